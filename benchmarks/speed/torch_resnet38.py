"""ResNet-38 (model A1 of Wu, Shen, van den Hengel 2016, arXiv 1611.10080) in PyTorch.

The classification form, output stride 32. Modules have the names of the public ports' files, those
that `convert/classifier_rules.py` reads.
"""

import torch
import torch.nn.functional as F
from torch import nn

BRANCHES = ("2a", "2b1", "2b2")
WIDTH = 4096  # channels of the last map
# Stage: blocks, output channels of a block's convolutions, their kernels, stride of the first.
STAGES = {
    "b2": (3, (128, 128), (3, 3), 2),
    "b3": (3, (256, 256), (3, 3), 2),
    "b4": (6, (512, 512), (3, 3), 2),
    "b5": (3, (512, 1024), (3, 3), 2),
    "b6": (1, (512, 1024, 2048), (1, 3, 1), 2),
    "b7": (1, (1024, 2048, 4096), (1, 3, 1), 1),
}


def _conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class Block(nn.Module):
    """BN → ReLU → convolution, two or three times, beside a shortcut.

    The first block of a stage projects its shortcut from the activated input.
    """

    def __init__(self, c: int, widths, kernels, stride: int, project: bool):
        super().__init__()
        self.branches = BRANCHES[: len(widths)]
        inputs = (c, *widths[:-1])
        for i, name in enumerate(self.branches):
            step = 1 if i else stride
            self.add_module(f"bn_branch{name}", nn.BatchNorm2d(inputs[i]))
            self.add_module(f"conv_branch{name}", _conv(inputs[i], widths[i], kernels[i], step))
        self.conv_branch1 = _conv(c, widths[-1], 1, stride) if project else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) → (B, widths[-1], H/stride, W/stride)."""
        shortcut = x
        for i, name in enumerate(self.branches):
            x = F.relu(getattr(self, f"bn_branch{name}")(x), inplace=True)
            if i == 0 and self.conv_branch1 is not None:
                shortcut = self.conv_branch1(x)
            x = getattr(self, f"conv_branch{name}")(x)
        return x + shortcut


class ResNet38(nn.Module):
    """Trunk, global average pooling and a linear head of two classes."""

    def __init__(self):
        super().__init__()
        self.conv1a = _conv(3, 64, 3)
        c, self.order = 64, []
        for stage, (depth, widths, kernels, stride) in STAGES.items():
            for i in range(depth):
                name = f"{stage}_{i}" if i else stage
                self.add_module(name, Block(c, widths, kernels, 1 if i else stride, i == 0))
                self.order.append(name)
                c = widths[-1]
        self.bn7 = nn.BatchNorm2d(WIDTH)
        self.fc = nn.Linear(WIDTH, 2)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) → class logits (B, 2) and the last map (B, 4096, H/32, W/32)."""
        x = self.conv1a(images)
        for name in self.order:
            x = getattr(self, name)(x)
        features = F.relu(self.bn7(x), inplace=True)
        return self.fc(features.mean(dim=(2, 3))), features
