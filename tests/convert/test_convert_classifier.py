"""Converted classifiers compute what the PyTorch models of the same names compute."""

import functools

import jax
import numpy as np
import pytest
from flax import traverse_util

torch = pytest.importorskip("torch", reason="pip install -r requirements/parity.txt")

from torch import nn

from convert.classifier import convert
from convert.classifier_rules import RESNET38D, classifier_shapes
from sammix_jax.models.resnet import PreActivationBlock, ResNet
from sammix_jax.weights import read_weights

pytestmark = pytest.mark.torch


def conv(c, d, kernel, stride=1):
    return nn.Conv2d(c, d, kernel, stride, kernel // 2, bias=False)


class Residual(nn.Module):
    """Basic or bottleneck block with torchvision's names."""

    def __init__(self, c, widths, kernels, stride):
        super().__init__()
        self.count = len(widths)
        sizes = (c, *widths)
        for i in range(self.count):
            step = stride if i == kernels.index(3) else 1
            setattr(self, f"conv{i + 1}", conv(sizes[i], sizes[i + 1], kernels[i], step))
            setattr(self, f"bn{i + 1}", nn.BatchNorm2d(sizes[i + 1]))
        self.downsample = None
        if stride > 1 or c != widths[-1]:
            self.downsample = nn.Sequential(
                conv(c, widths[-1], 1, stride), nn.BatchNorm2d(widths[-1])
            )

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        for i in range(1, self.count + 1):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))
            x = x.relu() if i < self.count else x
        return (x + shortcut).relu()


class TorchResNet(nn.Module):
    """Trunk of ResNet-18, -34 or -50 with torchvision's names, and the ImageNet head."""

    def __init__(self, depths, bottleneck):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, 1)
        c = 64
        for i, depth in enumerate(depths):
            w = 64 * 2**i
            widths, kernels = ((w, w, 4 * w), (1, 3, 1)) if bottleneck else ((w, w), (3, 3))
            blocks = []
            for j in range(depth):
                blocks.append(Residual(c, widths, kernels, 2 if i and not j else 1))
                c = widths[-1]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(c, 1000)

    def forward(self, x):
        x = self.pool(self.bn1(self.conv1(x)).relu())
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class PreActivated(nn.Module):
    """Block of ResNet-38 with resnet38d's names."""

    def __init__(self, c, widths, kernels, stride, project):
        super().__init__()
        self.branches = ("2a", "2b1", "2b2")[: len(widths)]
        sizes = (c, *widths)
        for i, branch in enumerate(self.branches):
            setattr(self, f"bn_branch{branch}", nn.BatchNorm2d(sizes[i]))
            step = 1 if i else stride
            setattr(self, f"conv_branch{branch}", conv(sizes[i], sizes[i + 1], kernels[i], step))
        self.project = project
        if project:
            self.conv_branch1 = conv(c, widths[-1], 1, stride)

    def forward(self, x):
        shortcut = x
        for branch in self.branches:
            x = getattr(self, f"bn_branch{branch}")(x).relu()
            if self.project and branch == "2a":
                shortcut = self.conv_branch1(x)
            x = getattr(self, f"conv_branch{branch}")(x)
        return x + shortcut


def randomise(model):
    """Every value random, so that swapped arrays show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def variables_of(arrays, below):
    """Flax variables of the module at `below`, from flat paths."""
    mine = {p.removeprefix(below): a for p, a in arrays.items() if p.startswith(below)}
    stats = {p: a for p, a in mine.items() if p.endswith(("/mean", "/var"))}
    params = {p: a for p, a in mine.items() if p not in stats}
    nested = functools.partial(traverse_util.unflatten_dict, sep="/")
    return {"params": nested(params), "batch_stats": nested(stats)}


def compare(model, module, variables, x):
    with torch.no_grad():
        expected = model(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).numpy()
    found = jax.jit(functools.partial(module.apply, train=False))(variables, x)
    expected = np.moveaxis(expected, 1, -1)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("arch", "depths"), [("resnet18", (2, 2, 2, 2)), ("resnet50", (3, 4, 6, 3))]
)
def test_resnets_give_the_same_features(arch, depths, tmp_path):
    model = randomise(TorchResNet(depths, bottleneck=arch == "resnet50"))
    torch.save(model.state_dict(), tmp_path / "r.pth")
    assert convert(tmp_path / "r.pth", tmp_path / "r.safetensors") == arch
    arrays, _ = read_weights(tmp_path / "r.safetensors")
    x = np.random.default_rng(0).normal(size=(1, 64, 96, 3)).astype(np.float32)
    compare(model, ResNet(arch, 32), variables_of(arrays, "trunk/"), x)


@pytest.mark.parametrize(
    ("name", "ours", "c", "widths", "kernels", "stride", "project"),
    [
        ("b2", "b2_1", 64, (128, 128), (3, 3), 2, True),
        ("b2_2", "b2_3", 128, (128, 128), (3, 3), 1, False),
        ("b6", "b6_1", 1024, (512, 1024, 2048), (1, 3, 1), 2, True),
    ],
)
def test_resnet38_blocks_give_the_same_maps(name, ours, c, widths, kernels, stride, project):
    model = randomise(PreActivated(c, widths, kernels, stride, project))
    below = f"trunk/{ours}/"
    entries = RESNET38D.expand(
        {p: s for p, s in classifier_shapes("resnet38").items() if p.startswith(below)}
    )
    state = model.state_dict()
    arrays = {}
    for path, entry in entries.items():
        value = state.pop(entry.keys[0].removeprefix(f"{name}.")).numpy()
        arrays[path] = value if entry.axes.ours is None else value.transpose(entry.axes.ours)
    assert all(key.endswith("num_batches_tracked") for key in state)
    module = PreActivationBlock(widths, kernels, stride, 1, 1, project, np.float32)
    x = np.random.default_rng(0).normal(size=(1, 8, 12, c)).astype(np.float32)
    compare(model, module, variables_of(arrays, below), x)


def test_a_whole_resnet38_is_recognised(tmp_path):
    """105 million values as float16; the head of the weakly supervised literature is left out."""
    keys = RESNET38D.key_shapes(classifier_shapes("resnet38"))
    state = {key: torch.full(shape, 0.5, dtype=torch.float16) for key, shape in keys.items()}
    state["fc8.weight"] = torch.zeros(20, 4096, 1, 1)
    state["bn7.num_batches_tracked"] = torch.tensor(0)
    torch.save(state, tmp_path / "res38.pth")
    assert convert(tmp_path / "res38.pth", tmp_path / "c.safetensors") == "resnet38"
    arrays, metadata = read_weights(tmp_path / "c.safetensors")
    assert metadata["model"] == "resnet38" and "trunk/b7_1/conv3/kernel" in arrays
    assert {p: a.shape for p, a in arrays.items()} == classifier_shapes("resnet38")
