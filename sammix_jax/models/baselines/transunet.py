"""TransU-Net: convolutions, then a Transformer on their map, then a U-Net's decoder.

Source: Chen et al., "TransUNet: Transformers Make Strong Encoders for Medical Image Segmentation",
2021 (arXiv 2102.04306) and its code (Beckschen/TransUNet), configuration R50-ViT-B_16. The
convolutions are BiT's ResNet-50 (Kolesnikov et al. 2020, arXiv 1912.11370) without its last stage,
the Transformer is ViT-B (Dosovitskiy et al. 2021, arXiv 2010.11929). The authors start from
ImageNet-21k weights of both; the parameters here are drawn at random.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sammix_jax.models.baselines.layers import (
    TORCH_INIT,
    dropout,
    dropout_keys,
    expect_images,
    learn_from_shown,
    upsample,
)
from sammix_jax.models.baselines.output import SegmenterOutput
from sammix_jax.models.sam.layers import LayerNorm, gelu

_GROUP_EPSILON = 1e-6
_XAVIER = nn.initializers.xavier_uniform()


class TransUNetVariant(NamedTuple):
    """Sizes of one TransU-Net."""

    width: int  # of the stem; the stages have 4, 8 and 16 times as many channels
    depths: tuple[int, int, int]  # units of each stage
    groups: int  # of the group norms
    hidden: int  # channels of a token
    mlp: int
    layers: int
    heads: int
    head_width: int  # channels with which the decoder begins
    decoder: tuple[int, int, int, int]


VARIANTS = {
    "r50_vit_b16": TransUNetVariant(64, (3, 4, 9), 32, 768, 3072, 12, 12, 512, (256, 128, 64, 16)),
    # Small enough to train on a CPU.
    "mini": TransUNetVariant(32, (1, 1, 1), 8, 192, 768, 4, 3, 128, (64, 32, 16, 16)),
}


class StandardisedConv(nn.Module):
    """Convolution without bias whose kernel is standardised per output channel.

    Source: Qiao et al. 2019, arXiv 1903.10520; ε 1e-5 inside the root, as in BiT.
    """

    features: int
    kernel: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) → (B, H / stride, W / stride, features)."""
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", TORCH_INIT, shape)
        mean = kernel.mean(axis=(0, 1, 2))
        kernel = (kernel - mean) * jax.lax.rsqrt(kernel.var(axis=(0, 1, 2)) + 1e-5)
        pad = self.kernel // 2
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class Bottleneck(nn.Module):
    """Residual unit 1×1, 3×3, 1×1 of standardised convolutions and group norms.

    As in the authors' code each norm follows its convolution, and a projection's norm has a group
    per channel.
    """

    width: int
    stride: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) → (B, H / stride, W / stride, 4 · width)."""
        conv = functools.partial(StandardisedConv, dtype=self.dtype)
        norm = functools.partial(_group_norm, dtype=self.dtype)
        out, shortcut = 4 * self.width, x
        if self.stride > 1 or x.shape[-1] != out:
            shortcut = conv(out, 1, self.stride, name="projection")(x)
            shortcut = norm(out, epsilon=1e-5, name="projection_norm")(shortcut)
        x = nn.relu(norm(self.groups, name="norm1")(conv(self.width, 1, 1, name="conv1")(x)))
        x = conv(self.width, 3, self.stride, name="conv2")(x)
        x = nn.relu(norm(self.groups, name="norm2")(x))
        x = norm(self.groups, name="norm3")(conv(out, 1, 1, name="conv3")(x))
        return nn.relu(shortcut + x)


class ResNetV2(nn.Module):
    """The convolutional part: stem at 1/2, three stages at 1/4, 1/8 and 1/16."""

    sizes: TransUNetVariant
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """(B, H, W, 3) → the map at 1/16, and those at 1/8, 1/4 and 1/2."""
        sizes = self.sizes
        x = StandardisedConv(sizes.width, 7, 2, self.dtype, name="root")(x)
        x = nn.relu(_group_norm(sizes.groups, dtype=self.dtype, name="root_norm")(x))
        skips = [x]
        grid = x.shape[1], x.shape[2]
        x = nn.max_pool(x, (3, 3), (2, 2))  # unpadded: a row and a column less than half
        for i, depth in enumerate(sizes.depths):
            for j in range(depth):
                stride = 2 if i and j == 0 else 1
                unit = Bottleneck(
                    sizes.width * 2**i,
                    stride,
                    sizes.groups,
                    self.dtype,
                    name=f"stage{i + 1}_{j + 1}",
                )
                x = unit(x)
            grid = grid[0] // 2, grid[1] // 2
            if i < 2:
                lack = [(0, side - have) for side, have in zip(grid, x.shape[1:3], strict=True)]
                skips.append(jnp.pad(x, ((0, 0), *lack, (0, 0))))
        return x, tuple(reversed(skips))


class TransformerLayer(nn.Module):
    """Pre-norm self-attention and MLP; dropout in the MLP alone, as in the authors' code."""

    heads: int
    mlp: int
    layer: int  # number of its first dropout
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """(B, N, D) → (B, N, D)."""
        hidden = x.shape[-1]
        dense = functools.partial(
            nn.Dense, dtype=self.dtype, kernel_init=_XAVIER, bias_init=nn.initializers.normal(1e-6)
        )
        y = LayerNorm(dtype=self.dtype, name="attention_norm")(x)
        x = x + nn.MultiHeadDotProductAttention(
            self.heads, dtype=self.dtype, force_fp32_for_softmax=True, name="attention"
        )(y, y)
        y = LayerNorm(dtype=self.dtype, name="mlp_norm")(x)
        y = dropout(gelu(dense(self.mlp, name="lin1")(y)), self.dropout, keys, self.layer)
        y = dropout(dense(hidden, name="lin2")(y), self.dropout, keys, self.layer + 1)
        return x + y


class DecoderBlock(nn.Module):
    """Convolutions 3×3 → batch norm → ReLU, at twice the size if `double`, with a skip if any."""

    features: int
    convs: int
    double: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, skip: jax.Array | None, train: bool) -> jax.Array:
        """(B, h, w, C), (B, 2h, 2w, S) → (B, 2h, 2w, features)."""
        if self.double:
            x = upsample(x)
        if skip is not None:
            x = jnp.concatenate((x, skip), axis=-1)
        for i in range(self.convs):
            x = nn.Conv(
                self.features,
                (3, 3),
                use_bias=False,
                dtype=self.dtype,
                kernel_init=TORCH_INIT,
                name=f"conv{i + 1}",
            )(x)
            # Momentum 0.9 is PyTorch's 0.1: the share that the old statistics keep.
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                epsilon=1e-5,
                dtype=self.dtype,
                name=f"bn{i + 1}",
            )(x)
            x = nn.relu(x)
        return x


class TransUNet(nn.Module):
    """TransU-Net with one logit; batch norm in the decoder, as published.

    Parameters of `r50_vit_b16` at 224 pixels: 105,275,921. The authors' network with nine classes
    has 1,160 more, 8 · (9 · 16 + 1) in its last layer. `mini` at 128 pixels: 2,950,129.

    Attributes:
      variant: 'r50_vit_b16', 'mini', or a `TransUNetVariant` of one's own.
      image_size: (H, W), or the side of square images, in pixels, multiples of 16. Each place of
        the map at 1/16 has a learned position embedding, so the size is part of the network.
      dropout: share of elements zeroed after the position embeddings and in the MLPs.
      dtype: compute dtype; norms, softmax and logits are float32, and parameters.
    """

    variant: str | TransUNetVariant
    image_size: int | tuple[int, int]
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> SegmenterOutput:
        """Segments images.

        Args:
          images: (B, H, W, 3) float, normalised, or (B, H, W, 1), which is repeated.
          train: whether dropout is at work and batch norm uses the batch's statistics and updates
            the running ones (then apply with `mutable=["batch_stats"]`).
          keys: (B,) random keys of the slices; needed in training unless `dropout` is 0.

        Raises:
          ValueError: an unknown variant, images of another shape, or keys missing.
        """
        sizes = self.variant
        if isinstance(sizes, str):
            if sizes not in VARIANTS:
                raise ValueError(f"variant={sizes!r}: expected one of {tuple(VARIANTS)}.")
            sizes = VARIANTS[sizes]
        expect_images(images, 16)
        size = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        if images.shape[1:3] != tuple(size) or images.shape[-1] not in (1, 3):
            raise ValueError(
                f"images has shape {images.shape}: expected (B, {size[0]}, {size[1]}, 1 or 3), "
                "image_size and grey or RGB."
            )
        keys = dropout_keys(keys, train, self.dropout)
        if images.shape[-1] == 1:
            images = jnp.repeat(images, 3, axis=-1)

        x, skips = ResNetV2(sizes, self.dtype, name="resnet")(images)
        x = nn.Conv(
            sizes.hidden, (1, 1), dtype=self.dtype, kernel_init=TORCH_INIT, name="patch_embed"
        )(x)
        b, h, w, d = x.shape
        x = x.reshape(b, h * w, d)  # (B, H, W, D) → (B, N, D)
        position = self.param("pos_embed", nn.initializers.zeros, (1, h * w, d))
        x = dropout(x + position.astype(self.dtype), self.dropout, keys, 0)
        for i in range(sizes.layers):
            layer = TransformerLayer(
                sizes.heads, sizes.mlp, 1 + 2 * i, self.dropout, self.dtype, name=f"layer{i + 1}"
            )
            x = layer(x, keys)
        x = LayerNorm(dtype=self.dtype, name="norm")(x)
        x = x.reshape(b, h, w, d)  # (B, N, D) → (B, H, W, D)
        # Before the decoder, whose batch norm gives a slice a part in the gradients of the others.
        x, skips = learn_from_shown((x, skips), images)

        x = DecoderBlock(sizes.head_width, 1, False, self.dtype, name="decoder0")(x, None, train)
        for i, (width, skip) in enumerate(zip(sizes.decoder, (*skips, None), strict=True), 1):
            x = DecoderBlock(width, 2, True, self.dtype, name=f"decoder{i}")(x, skip, train)
        logits = nn.Conv(1, (3, 3), kernel_init=TORCH_INIT, name="head")(x.astype(jnp.float32))
        return SegmenterOutput(logits[..., 0])


def _group_norm(groups: int, *, dtype: jnp.dtype, name: str, epsilon: float = _GROUP_EPSILON):
    return nn.GroupNorm(groups, epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)
