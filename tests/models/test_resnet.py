"""Structure of the classifiers: pinned counts, names, map sizes, padding and BatchNorm."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from sammix_jax.models import resnet
from sammix_jax.models.classifier import Classifier
from sammix_jax.models.resnet import (
    _RESNET38,
    _RESNETS,
    OUTPUT_STRIDES,
    STAGES,
    PreActivationBlock,
    ResidualBlock,
    _conv,
    _dilate,
)

TRUNK_PARAMETERS = {
    "resnet38": 105_070_912,
    "resnet18": 11_176_512,  # torchvision's, less the ImageNet head
    "resnet34": 21_284_672,
    "resnet50": 23_508_032,
    "mini": 1_226_400,
}
WIDTHS = {"resnet38": 4096, "resnet18": 512, "resnet34": 512, "resnet50": 2048, "mini": 256}


def abstract(size=(64, 96), **fields):
    classifier = Classifier(**fields)
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: classifier.init(jax.random.key(0), x, False), images)
    outputs = jax.eval_shape(lambda v, x: classifier.apply(v, x, False), variables, images)
    return variables, outputs


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_every_architecture_is_pinned():
    assert set(TRUNK_PARAMETERS) == set(WIDTHS) == set(OUTPUT_STRIDES)


@pytest.mark.parametrize("arch", OUTPUT_STRIDES)
def test_parameters_and_maps(arch):
    for output_stride in (None, *OUTPUT_STRIDES[arch]):
        variables, (logits, features) = abstract(arch=arch, output_stride=output_stride)
        stride = output_stride or OUTPUT_STRIDES[arch][0]
        assert count(variables["params"]["trunk"]) == TRUNK_PARAMETERS[arch]
        assert variables["params"]["head"]["kernel"].shape == (WIDTHS[arch], 2)
        assert logits.shape == (2, 2) and logits.dtype == jnp.float32
        assert features.shape == (2, 64 // stride, 96 // stride, WIDTHS[arch])


def test_resnet38_stages():
    trunk = abstract(arch="resnet38")[0]["params"]["trunk"]
    stages = {}
    for name, tree in trunk.items():
        stage = name.split("_")[0]
        stages[stage] = stages.get(stage, 0) + count(tree)
    assert stages == {
        "conv1a": 1_728,
        "b2": 820_608,
        "b3": 3_279_616,
        "b4": 27_274_752,
        "b5": 26_484_736,
        "b6": 9_442_304,
        "b7": 37_758_976,
        "bn": 8_192,
    }


@pytest.mark.parametrize("arch", OUTPUT_STRIDES)
def test_names_are_explicit(arch):
    variables, _ = abstract(arch=arch)
    paths = traverse_util.flatten_dict(variables["params"], sep="/")
    assert not [path for path in paths if any(part[0].isupper() for part in path.split("/"))]
    # Every convolution is bias-free, so biases belong to BN and the head.
    assert not [path for path in paths if "conv" in path and path.endswith("bias")]


def test_known_paths():
    resnet38 = traverse_util.flatten_dict(abstract(arch="resnet38")[0]["params"], sep="/")
    assert resnet38["trunk/b2_1/conv1/kernel"].shape == (3, 3, 64, 128)
    assert resnet38["trunk/b6_1/projection/kernel"].shape == (1, 1, 1024, 2048)
    assert "trunk/b2_2/projection/kernel" not in resnet38
    resnet50 = traverse_util.flatten_dict(abstract(arch="resnet50")[0]["params"], sep="/")
    assert resnet50["trunk/layer1_1/projection/kernel"].shape == (1, 1, 64, 256)
    assert "trunk/layer1_2/projection/kernel" not in resnet50


def test_dilated_resnet38_is_that_of_the_literature():
    plan = {
        stage.name: (stride, before, dilation)
        for stage, stride, before, dilation in _dilate(_RESNET38, 1, 8)
    }
    assert plan["b4"] == (2, 1, 1)
    assert plan["b5"] == (1, 1, 2)
    assert plan["b6"] == (1, 2, 4)
    assert plan["b7"] == (1, 4, 4)


def test_strided_convolution_pads_both_sides():
    image = jnp.arange(36.0).reshape(1, 6, 6, 1)

    class Strided(nn.Module):
        @nn.compact
        def __call__(self, x):
            return _conv(x, 1, 3, 2, 1, jnp.float32, "conv")

    kernel = jnp.arange(9.0).reshape(3, 3, 1, 1)
    result = Strided().apply({"params": {"conv": {"kernel": kernel}}}, image)[0, :, :, 0]
    padded = np.pad(np.asarray(image[0, :, :, 0]), 1)
    expected = [
        [(padded[r : r + 3, c : c + 3] * np.arange(9.0).reshape(3, 3)).sum() for c in (0, 2, 4)]
        for r in (0, 2, 4)
    ]
    np.testing.assert_allclose(result, expected)


def arbitrary(variables):
    """Arbitrary values for abstract variables, variances positive."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if path[-1].key == "kernel":
            return jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32)
        return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, variables)


@functools.partial(jax.jit, static_argnames=("stride", "dilation"))
def convolve(x, kernel, stride=1, dilation=1):
    pad = dilation * (kernel.shape[0] - 1) // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((pad, pad), (pad, pad)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@functools.partial(jax.jit, static_argnames=("name",))
def normalise(x, variables, name):
    stats, affine = variables["batch_stats"][name], variables["params"][name]
    scaled = (x - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-5)
    return scaled * affine["scale"] + affine["bias"]


def block_and_variables(block, channels):
    x = jax.random.normal(jax.random.key(0), (2, 9, 12, channels))
    shapes = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, False), x)
    variables = arbitrary(shapes)
    kernels = {k: v["kernel"] for k, v in variables["params"].items() if "kernel" in v}
    found = jax.jit(lambda v, x: block.apply(v, x, False))(variables, x)
    return x, variables, kernels, found


def test_pre_activation_block():
    block = PreActivationBlock((6, 8), (3, 3), 2, 1, 2, project=True, dtype=jnp.float32)
    x, variables, kernels, found = block_and_variables(block, 5)
    active = nn.relu(normalise(x, variables, "bn1"))
    y = convolve(active, kernels["conv1"], 2)
    y = convolve(nn.relu(normalise(y, variables, "bn2")), kernels["conv2"], dilation=2)
    expected = y + convolve(active, kernels["projection"], 2)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_pre_activation_block_keeps_a_raw_shortcut():
    block = PreActivationBlock((6, 5, 7), (1, 3, 1), 1, 2, 2, project=False, dtype=jnp.float32)
    x, variables, kernels, found = block_and_variables(block, 7)
    y = x
    for i, dilation in ((1, 1), (2, 2), (3, 1)):
        y = nn.relu(normalise(y, variables, f"bn{i}"))
        y = convolve(y, kernels[f"conv{i}"], dilation=dilation)
    np.testing.assert_allclose(found, x + y, atol=1e-4)


def test_bottleneck_strides_on_its_3x3():
    block = ResidualBlock((4, 4, 16), (1, 3, 1), 2, 1, 1, dtype=jnp.float32)
    x, variables, kernels, found = block_and_variables(block, 8)
    y = nn.relu(normalise(convolve(x, kernels["conv1"]), variables, "bn1"))
    y = nn.relu(normalise(convolve(y, kernels["conv2"], 2), variables, "bn2"))
    y = normalise(convolve(y, kernels["conv3"]), variables, "bn3")
    shortcut = normalise(convolve(x, kernels["projection"], 2), variables, "projection_bn")
    np.testing.assert_allclose(found, nn.relu(y + shortcut), atol=1e-4)


@pytest.fixture(scope="module")
def mini():
    images = jax.random.normal(jax.random.key(1), (2, 32, 48, 3))
    return arbitrary(abstract((32, 48), arch="mini")[0]), images


def test_logits_are_head_of_pooled_features(mini):
    variables, images = mini
    logits, features = jax.jit(Classifier("mini").apply)(variables, images)
    head = variables["params"]["head"]
    expected = features.mean((1, 2)) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert features.min() >= 0


def test_batch_norm_follows_train_and_freeze(mini):
    variables, images = mini
    (trained, _), updates = Classifier("mini").apply(
        variables, images, True, mutable=["batch_stats"]
    )
    (frozen, _), kept = Classifier("mini", freeze_batch_norm=True).apply(
        variables, images, True, mutable=["batch_stats"]
    )
    evaluated, _ = Classifier("mini").apply(variables, images, False)
    mean = updates["batch_stats"]["trunk"]["bn1"]["mean"]
    stem = convolve(images, variables["params"]["trunk"]["conv1"]["kernel"], 2)
    before = variables["batch_stats"]["trunk"]["bn1"]["mean"]
    np.testing.assert_allclose(mean, 0.9 * before + 0.1 * stem.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_array_equal(frozen, evaluated)
    jax.tree.map(np.testing.assert_array_equal, kept["batch_stats"], variables["batch_stats"])
    assert not np.allclose(trained, evaluated)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    variables, (logits, features) = abstract(arch="mini", dtype=jnp.bfloat16)
    assert features.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("fields", "channels", "message"),
    [
        ({"arch": "resnet99"}, 3, "arch='resnet99'"),
        ({"arch": "mini", "output_stride": 32}, 3, "output_stride=32"),
        ({"arch": "mini"}, 1, "repeat a grey channel"),
    ],
)
def test_rejections_name_the_fix(fields, channels, message):
    with pytest.raises(ValueError, match=message):
        Classifier(**fields).init(jax.random.key(0), jnp.zeros((1, 32, 32, channels)))


def map_at(stage, size, **fields):
    classifier = Classifier(**fields)
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    variables = jax.eval_shape(classifier.init, jax.random.key(0), images)
    at = jax.eval_shape(
        lambda v, x: classifier.apply(v, x, stage, method="features_at"), variables, images
    )
    return at.shape


@pytest.mark.parametrize("stride", [32, 8])
def test_maps_of_resnet38s_stages(stride):
    """Sides of a 256-pixel slice's maps: the classification form, and the dilated one."""
    channels = {"b2": 128, "b3": 256, "b4": 512, "b5": 1024, "b6": 2048, "b7": 4096}
    sides = {"b2": 128, "b3": 64, "b4": 32, "b5": 16, "b6": 8, "b7": 8}
    assert STAGES["resnet38"] == tuple(sides)
    for stage, side in sides.items():
        side = max(side, 256 // stride)
        shape = map_at(stage, (256, 256), arch="resnet38", output_stride=stride)
        assert shape == (1, side, side, channels[stage])


def test_maps_of_the_resnets_stages():
    for arch, first, widths in (
        ("resnet18", 4, (64, 128, 256, 512)),
        ("resnet50", 4, (256, 512, 1024, 2048)),
        ("mini", 2, (32, 64, 128, 256)),
    ):
        for i, (stage, width) in enumerate(zip(STAGES[arch], widths, strict=True)):
            stride = min(first * 2**i, OUTPUT_STRIDES[arch][0])
            shape = map_at(stage, (64, 96), arch=arch)
            assert shape == (1, 64 // stride, 96 // stride, width)


def slender(stages):
    """The same stages with few channels and at most two blocks each."""
    return tuple(
        stage._replace(
            depth=min(stage.depth, 2), widths=tuple(4 + width // 256 for width in stage.widths)
        )
        for stage in stages
    )


@pytest.mark.parametrize("dilated", [False, True])
@pytest.mark.parametrize("arch", OUTPUT_STRIDES)
def test_a_stage_and_what_follows_compose_to_the_whole(arch, dilated, monkeypatch):
    monkeypatch.setattr(resnet, "_RESNET38", slender(_RESNET38))
    monkeypatch.setattr(resnet, "_RESNETS", {a: slender(s) for a, s in _RESNETS.items()})
    strides = OUTPUT_STRIDES[arch]
    classifier = Classifier(arch, output_stride=min(strides) if dilated else strides[0])
    images = jax.random.normal(jax.random.key(0), (2, 32, 64, 3))
    variables = arbitrary(jax.eval_shape(classifier.init, jax.random.key(0), images))
    # With so few channels, larger kernels, lest the signal fade on its way.
    variables["params"]["trunk"] = jax.tree.map(
        lambda leaf: 2.5 * leaf if leaf.ndim == 4 else leaf, variables["params"]["trunk"]
    )

    @jax.jit
    def in_two_parts(variables):
        def logits(stage):
            features = classifier.apply(variables, images, stage, method="features_at")
            return classifier.apply(variables, features, stage, method="logits_from")

        return {stage: logits(stage) for stage in STAGES[arch]}

    whole, _ = jax.jit(classifier.apply)(variables, images)
    assert float(jnp.abs(whole[0] - whole[1]).max()) > 1e-3  # tells images apart
    for stage, found in in_two_parts(variables).items():
        np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-5, err_msg=stage)


@pytest.mark.parametrize(("arch", "stage"), [("resnet38", "layer4"), ("mini", "b5"), ("mini", "")])
def test_unknown_stages_are_refused(arch, stage):
    variables, _ = abstract(arch=arch)
    for method in ("features_at", "logits_from"):
        with pytest.raises(ValueError, match=rf"stage='{stage}' of {arch}: expected one of"):
            Classifier(arch).apply(variables, jnp.zeros((1, 32, 32, 3)), stage, method=method)
