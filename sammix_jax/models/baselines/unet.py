"""Two U-Nets: that of SAM-Mix's authors, and one in nnU-Net's manner.

Both descend from Ronneberger, Fischer and Brox 2015 (arXiv 1505.04597). The first is the one in the
code of MultiMix (ayaanzhaque/MultiMix) and PolyCL (tbwa233/PolyCL), of the same group. The second
follows nnU-Net (Isensee et al. 2021, Nature Methods 18) in its 2D form, `PlainConvUNet`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sammix_jax.models.baselines.layers import (
    TORCH_INIT,
    InstanceNorm,
    dropout,
    dropout_keys,
    expect_images,
    upsample,
)
from sammix_jax.models.baselines.output import SegmenterOutput

SLOPE = 0.2  # of the authors' leaky ReLU
# nnU-Net's `InitWeights_He(1e-2)`: normal, for leaky ReLU of slope 0.01. PyTorch keeps the kernel
# of a transposed convolution the other way round: its fan in is the fan out here.
_HE_INIT, _HE_INIT_TRANSPOSED = (
    nn.initializers.variance_scaling(2 / (1 + 0.01**2), fan, "normal")
    for fan in ("fan_in", "fan_out")
)


class DoubleConv(nn.Module):
    """Twice 3×3 convolution → instance norm without affine → leaky ReLU; then dropout.

    The norm takes out what the biases add, so these get no gradient; the published networks have
    them all the same.
    """

    features: int
    layer: int  # number of its dropout
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """(B, H, W, C) → (B, H, W, features)."""
        for i in (1, 2):
            x = nn.Conv(
                self.features,
                (3, 3),
                dtype=self.dtype,
                kernel_init=TORCH_INIT,
                name=f"conv{i}",
            )(x)
            x = InstanceNorm(use_bias=False, use_scale=False, dtype=self.dtype, name=f"norm{i}")(x)
            x = nn.leaky_relu(x, SLOPE)
        return dropout(x, self.dropout, keys, self.layer)


class UNetEncoder(nn.Module):
    """A double convolution per level, 2×2 max-pooling between levels."""

    widths: tuple[int, ...]
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: jax.Array, keys: jax.Array | None) -> tuple[jax.Array, ...]:
        """(B, H, W, C) → (B, H / 2^i, W / 2^i, widths[i]) for each level i."""
        maps, x = [], images
        for i, width in enumerate(self.widths):
            if i:
                x = nn.max_pool(x, (2, 2), (2, 2))
            x = DoubleConv(
                width,
                i,
                self.dropout,
                self.dtype,
                name=f"down{i + 1}",
            )(x, keys)
            maps.append(x)
        return tuple(maps)


class UNetDecoder(nn.Module):
    """Bilinear upsampling, the encoder's map alongside, a double convolution; level by level."""

    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        maps: tuple[jax.Array, ...],
        keys: jax.Array | None,
        bridge: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        """Decodes the encoder's maps.

        Args:
          maps: (B, H / 2^i, W / 2^i, widths[i]), those of `UNetEncoder`.
          keys: (B,) random keys of dropout, or None for none.
          bridge: (B, H / 2^(L-2), W / 2^(L-2), C), joined at the coarsest of L - 1 levels.

        Returns:
          (B, H / 2^i, W / 2^i, widths[i]) for each level i but the last, from fine to coarse.
        """
        x, decoded = maps[-1], []
        for i in reversed(range(len(maps) - 1)):
            parts = [upsample(x), maps[i]]
            if bridge is not None and i == len(maps) - 2:
                parts.append(bridge.astype(x.dtype))
            x = DoubleConv(
                maps[i].shape[-1],
                2 * len(maps) - 2 - i,  # the encoder's come first
                self.dropout,
                self.dtype,
                name=f"up{i + 1}",
            )(jnp.concatenate(parts, axis=-1), keys)
            decoded.append(x)
        return tuple(reversed(decoded))


class MaskHead(nn.Module):
    """1×1 convolution to one logit, in float32."""

    kernel_init: nn.initializers.Initializer = TORCH_INIT

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) → (B, H, W) float32."""
        logits = nn.Conv(1, (1, 1), kernel_init=self.kernel_init, name="conv")(
            x.astype(jnp.float32)
        )
        return logits[..., 0]


class UNet(nn.Module):
    """The U-Net of SAM-Mix's authors: 1,962,337 parameters for one channel, 1,962,625 for three.

    Attributes:
      widths: channels of each level; H and W must be multiples of 2^(levels - 1).
      dropout: share of elements zeroed at the end of each double convolution.
      dtype: compute dtype; norms and logits are float32, and parameters.
    """

    widths: tuple[int, ...] = (16, 32, 64, 128, 256)
    dropout: float = 0.25
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> SegmenterOutput:
        """Segments images.

        Args:
          images: (B, H, W, C) float, normalised.
          train: whether dropout is at work.
          keys: (B,) random keys of the slices; needed in training unless `dropout` is 0.

        Raises:
          ValueError: images of another shape, or keys missing.
        """
        expect_images(images, 2 ** (len(self.widths) - 1))
        keys = dropout_keys(keys, train, self.dropout)
        maps = UNetEncoder(self.widths, self.dropout, self.dtype, name="encoder")(images, keys)
        decoded = UNetDecoder(self.dropout, self.dtype, name="decoder")(maps, keys)
        return SegmenterOutput(MaskHead(name="head1")(decoded[0]))


class ConvStage(nn.Module):
    """nnU-Net's stage: twice 3×3 convolution → instance norm → leaky ReLU 0.01."""

    features: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) → (B, H / stride, W / stride, features)."""
        for i, stride in ((1, self.stride), (2, 1)):
            x = nn.Conv(
                self.features,
                (3, 3),
                strides=(stride, stride),
                padding=((1, 1), (1, 1)),  # both sides, as PyTorch pads
                dtype=self.dtype,
                kernel_init=_HE_INIT,
                name=f"conv{i}",
            )(x)
            x = InstanceNorm(dtype=self.dtype, name=f"norm{i}")(x)
            x = nn.leaky_relu(x, 0.01)
        return x


class NnUnet2d(nn.Module):
    """A U-Net in nnU-Net's 2D manner: strided and transposed convolutions, deep supervision.

    In training it returns coarser logits too, of every decoder resolution but the coarsest:
    nnU-Net computes that one as well and gives it weight 0. There is no dropout, as there. Its
    networks are planned per data set; `nnunet_widths` does that part.

    Attributes:
      widths: channels of each stage; H and W must be multiples of 2^(stages - 1).
      dtype: compute dtype; norms and logits are float32, and parameters.
    """

    widths: tuple[int, ...] = (32, 64, 128, 256, 512, 512)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> SegmenterOutput:
        """Segments images.

        Args:
          images: (B, H, W, C) float, normalised.
          train: whether deep supervision is at work.
          keys: not read: nothing here is random.

        Raises:
          ValueError: images of another shape.
        """
        expect_images(images, 2 ** (len(self.widths) - 1))
        maps, x = [], images
        for i, width in enumerate(self.widths):
            stride = 2 if i else 1
            x = ConvStage(width, stride, self.dtype, name=f"encoder{i + 1}")(x)
            maps.append(x)
        decoded = []
        for i in reversed(range(len(self.widths) - 1)):
            x = nn.ConvTranspose(
                self.widths[i],
                (2, 2),
                strides=(2, 2),
                padding="VALID",
                dtype=self.dtype,
                kernel_init=_HE_INIT_TRANSPOSED,
                name=f"upsample{i + 1}",
            )(x)
            x = jnp.concatenate((x, maps[i]), axis=-1)
            x = ConvStage(self.widths[i], 1, self.dtype, name=f"decoder{i + 1}")(x)
            decoded.insert(0, x)
        # Heads outside training too, so that there are parameters.
        logits = [
            MaskHead(_HE_INIT, name=f"head{i + 1}")(x)
            for i, x in enumerate(decoded[: max(1, len(decoded) - 1)])
        ]
        return SegmenterOutput(logits[0], tuple(logits[1:]) if train else ())


def nnunet_widths(height: int, width: int) -> tuple[int, ...]:
    """Widths of `NnUnet2d` for images of H × W pixels, by the rule of nnU-Net's planner.

    Maps are halved while the smaller side stays at 4 or more; widths double from 32 to 512 at most.
    nnU-Net goes on along the longer side and pads images of odd sizes; here halving stops there.
    """
    widths, sides = [32], (height, width)
    while all(side % 2 == 0 and side // 2 >= 4 for side in sides):
        widths.append(min(2 * widths[-1], 512))
        sides = sides[0] // 2, sides[1] // 2
    return tuple(widths)


def deep_supervision_weights(n: int) -> tuple[float, ...]:
    """Weights of n losses, the finest's first: 1, 1/2, 1/4, ... divided by their sum (nnU-Net)."""
    weights = [0.5**i for i in range(n)]
    return tuple(weight / sum(weights) for weight in weights)
