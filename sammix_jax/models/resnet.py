"""Trunks of image-level classifiers: ResNet-38, the standard ResNets, and a small one for CPUs.

ResNet-38 is model A1 of "Wider or Deeper: Revisiting the ResNet Model for Visual Recognition"
(Wu, Shen, van den Hengel 2016, arXiv 1611.10080); ResNet-18, -34 and -50 are those of He et al.
2015 (arXiv 1512.03385) with the stride of a bottleneck on its 3×3 convolution, as in torchvision.

All pad symmetrically, as PyTorch does. XLA's 'SAME' puts the odd row and column of a strided
convolution on the other side, and converted weights would then see shifted images.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sammix_jax.models.blocks import block_class

_KAIMING = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class _Stage(NamedTuple):
    """A row of blocks; only the first one strides."""

    name: str
    depth: int
    widths: tuple[int, ...]  # output channels of each convolution of a block
    kernels: tuple[int, ...]
    stride: int


def _stages(depths: tuple[int, ...], base: int, bottleneck: bool = False) -> tuple[_Stage, ...]:
    """The four stages of a standard ResNet: width doubles as resolution halves."""
    stages = []
    for i, depth in enumerate(depths):
        width = base * 2**i
        widths = (width, width, 4 * width) if bottleneck else (width, width)
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        stages.append(_Stage(f"layer{i + 1}", depth, widths, kernels, 1 if i == 0 else 2))
    return tuple(stages)


_RESNET38 = (
    _Stage("b2", 3, (128, 128), (3, 3), 2),
    _Stage("b3", 3, (256, 256), (3, 3), 2),
    _Stage("b4", 6, (512, 512), (3, 3), 2),
    _Stage("b5", 3, (512, 1024), (3, 3), 2),
    _Stage("b6", 1, (512, 1024, 2048), (1, 3, 1), 2),
    _Stage("b7", 1, (1024, 2048, 4096), (1, 3, 1), 1),
)
_RESNETS = {
    "resnet18": _stages((2, 2, 2, 2), 64),
    "resnet34": _stages((3, 4, 6, 3), 64),
    "resnet50": _stages((3, 4, 6, 3), 64, bottleneck=True),
    "mini": _stages((1, 1, 1, 1), 32),
}
# Names of the stages, at the end of each of which a class activation map can be taken.
STAGES = {"resnet38": tuple(stage.name for stage in _RESNET38)} | {
    arch: tuple(stage.name for stage in stages) for arch, stages in _RESNETS.items()
}
# The first output stride is the default.
OUTPUT_STRIDES = {
    "resnet38": (32, 16, 8),
    "resnet18": (32, 16, 8),
    "resnet34": (32, 16, 8),
    "resnet50": (32, 16, 8),
    "mini": (8, 16),
}


def _dilate(stages, stem_stride: int, output_stride: int):
    """Yields (stage, stride, dilation before, dilation within) for each stage.

    Beyond `output_stride`, dilation stands in for stride: every kernel still reads the taps it
    would have read on the coarser grid. The convolution that used to stride reads the finer grid,
    so it keeps the dilation of the stage before.
    """
    reached, dilation = stem_stride, 1
    for stage in stages:
        before = dilation
        if reached * stage.stride <= output_stride:
            stride = stage.stride
            reached *= stride
        else:
            stride = 1
            dilation *= stage.stride
        yield stage, stride, before, dilation


def _between(stages, begin: str, end: str):
    """Yields the stages after `begin` up to and with `end`; "" stands for the trunk's two ends."""
    inside = not begin
    for stage in stages:
        if inside:
            yield stage
        if stage[0].name == end:
            return
        inside = inside or stage[0].name == begin


def _conv(x, features: int, kernel: int, stride: int, dilation: int, dtype, name: str):
    pad = dilation * (kernel - 1) // 2
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        kernel_dilation=(dilation, dilation),
        use_bias=False,
        dtype=dtype,
        kernel_init=_KAIMING,
        name=name,
    )(x)


def _norm(x, train: bool, dtype, name: str):
    # Momentum 0.9 is PyTorch's 0.1: the share that the old statistics keep.
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name
    )(x)


class PreActivationBlock(nn.Module):
    """Residual block of ResNet-38: BN → ReLU → convolution, two or three times.

    The first block of a stage projects its shortcut from the activated input, not the raw one.
    """

    widths: tuple[int, ...]
    kernels: tuple[int, ...]
    stride: int
    dilation_before: int
    dilation: int
    project: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(B, H, W, C) → (B, H/stride, W/stride, widths[-1])."""
        shortcut = x
        for i, (width, kernel) in enumerate(zip(self.widths, self.kernels, strict=True), 1):
            x = nn.relu(_norm(x, train, self.dtype, f"bn{i}"))
            if i == 1 and self.project:
                shortcut = _conv(x, self.widths[-1], 1, self.stride, 1, self.dtype, "projection")
            stride, dilation = (self.stride, self.dilation_before) if i == 1 else (1, self.dilation)
            x = _conv(x, width, kernel, stride, dilation, self.dtype, f"conv{i}")
        return x + shortcut


class ResidualBlock(nn.Module):
    """Basic (3×3, 3×3) or bottleneck (1×1, 3×3, 1×1) block: convolution → BN → ReLU.

    The first 3×3 convolution strides.
    """

    widths: tuple[int, ...]
    kernels: tuple[int, ...]
    stride: int
    dilation_before: int
    dilation: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(B, H, W, C) → (B, H/stride, W/stride, widths[-1])."""
        shortcut = x
        if self.stride > 1 or x.shape[-1] != self.widths[-1]:
            shortcut = _conv(x, self.widths[-1], 1, self.stride, 1, self.dtype, "projection")
            shortcut = _norm(shortcut, train, self.dtype, "projection_bn")
        first_3x3 = self.kernels.index(3)
        for i, (width, kernel) in enumerate(zip(self.widths, self.kernels, strict=True)):
            strided = i == first_3x3
            stride, dilation = (
                (self.stride, self.dilation_before) if strided else (1, self.dilation)
            )
            x = _conv(x, width, kernel, stride, dilation, self.dtype, f"conv{i + 1}")
            x = _norm(x, train, self.dtype, f"bn{i + 1}")
            if i < len(self.widths) - 1:
                x = nn.relu(x)
        return nn.relu(x + shortcut)


class ResNet38(nn.Module):
    """Trunk of model A1: no BN on the stem, no max-pool, 105,070,912 parameters for RGB.

    Attributes:
      output_stride: 32 (the classification form), or 16 or 8 (dilated, the form of the weakly
        supervised literature: B5 at dilation 2, B6 and B7 at 4).
      dtype: compute dtype.
      remat: a name in `blocks.POLICIES`.
    """

    output_stride: int = 32
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, begin: str = "", end: str = "") -> jax.Array:
        """(B, H, W, C) → (B, h, w, 4096), not negative; `begin` and `end` as in `_between`, where
        what comes before the last norm has its stage's channels, and either sign."""
        if not begin:
            x = _conv(x, 64, 3, 1, 1, self.dtype, "conv1a")
        block = block_class(PreActivationBlock, self.remat, static_argnums=(2,))
        stages = _dilate(_RESNET38, 1, self.output_stride)
        for stage, stride, before, dilation in _between(stages, begin, end):
            for i in range(stage.depth):
                x = block(
                    widths=stage.widths,
                    kernels=stage.kernels,
                    stride=stride if i == 0 else 1,
                    dilation_before=before if i == 0 else dilation,
                    dilation=dilation,
                    project=i == 0,
                    dtype=self.dtype,
                    name=f"{stage.name}_{i + 1}",
                )(x, train)
        return x if end else nn.relu(_norm(x, train, self.dtype, "bn"))


class ResNet(nn.Module):
    """Trunk of ResNet-18, -34 or -50, or of `mini`: 3×3 stem, widths 32 to 256, 1.2 M parameters.

    Attributes:
      arch: 'resnet18', 'resnet34', 'resnet50' or 'mini'.
      output_stride: 32, 16 or 8; `mini` 16 or 8.
      dtype: compute dtype.
      remat: a name in `blocks.POLICIES`.
    """

    arch: str
    output_stride: int
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, begin: str = "", end: str = "") -> jax.Array:
        """(B, H, W, C) → (B, h, w, D), not negative; D is 512, 2048 (resnet50) or 256 (mini).

        `begin` and `end` as in `_between`.
        """
        mini = self.arch == "mini"
        if not begin:
            width, kernel = (32, 3) if mini else (64, 7)
            x = _conv(x, width, kernel, 2, 1, self.dtype, "conv1")
            x = nn.relu(_norm(x, train, self.dtype, "bn1"))
            if not mini:
                x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        block = block_class(ResidualBlock, self.remat, static_argnums=(2,))
        stages = _dilate(_RESNETS[self.arch], 2 if mini else 4, self.output_stride)
        for stage, stride, before, dilation in _between(stages, begin, end):
            for i in range(stage.depth):
                x = block(
                    widths=stage.widths,
                    kernels=stage.kernels,
                    stride=stride if i == 0 else 1,
                    dilation_before=before if i == 0 else dilation,
                    dilation=dilation,
                    dtype=self.dtype,
                    name=f"{stage.name}_{i + 1}",
                )(x, train)
        return x
