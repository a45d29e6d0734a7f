"""SAM's image encoder: a plain vision transformer with windowed attention and a neck.

Source: Kirillov et al., "Segment Anything", ICCV 2023, appendix A; Li et al., "ViTDet", ECCV
2022; reference file `image_encoder.py` of facebookresearch/segment-anything.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sammix_jax.models.blocks import block_class
from sammix_jax.models.lora import add_low_rank
from sammix_jax.models.sam.attention import QUERY_CHUNK, attend, attend_fused, can_fuse
from sammix_jax.models.sam.layers import LayerNorm, Mlp, gelu
from sammix_jax.models.sam.variants import SamVariant

_INIT = nn.initializers.truncated_normal(0.02)


class Attention(nn.Module):
    """Multi-head attention inside windows; global attention is one window as large as the grid.

    Attributes:
      num_heads: heads.
      window_size: side of a window in tokens; 0 for global attention.
      table_side: side of the grid for which the relative position tables are stored.
      lora_rank, lora_targets: see `lora.add_low_rank`; rank 0 means no LoRA.
      query_chunk: see `attention.attend`.
      dtype: compute type.
    """

    num_heads: int
    window_size: int
    table_side: int
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ("q", "v")
    query_chunk: int = QUERY_CHUNK
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to (B, H, W, C)."""
        b, h, w, c = x.shape
        m, d = self.num_heads, c // self.num_heads
        project = nn.Dense(3 * c, kernel_init=_INIT, dtype=self.dtype, name="qkv")
        qkv = add_low_rank(
            project(x), x, rank=self.lora_rank, targets=self.lora_targets, dtype=self.dtype
        )

        # SAM pads the normalised tokens with zeros, which take part in attention as the
        # projection's bias. Padding after the projection gives the same and projects less.
        side_h, side_w = (self.window_size or h), (self.window_size or w)
        pad_h, pad_w = -h % side_h, -w % side_w
        if pad_h or pad_w:
            bias = project(jnp.zeros((c,), self.dtype))
            padded = jnp.broadcast_to(bias, (b, h + pad_h, w + pad_w, 3 * c))
            qkv = padded.at[:, :h, :w].set(qkv)
        rows, columns = (h + pad_h) // side_h, (w + pad_w) // side_w

        # (B, H, W, 3C) -> (B, rows, side_h, columns, side_w, 3, M, D)
        qkv = qkv.reshape(b, rows, side_h, columns, side_w, 3, m, d)
        # -> (3, B, rows, columns, side_h, side_w, M, D) -> (3, B * windows, side_h, side_w, M, D)
        qkv = qkv.transpose(5, 0, 1, 3, 2, 4, 6, 7).reshape(3, -1, side_h, side_w, m, d)
        table = (2 * self.table_side - 1, d)
        tables = [
            self.param(name, nn.initializers.zeros, table) for name in ("rel_pos_h", "rel_pos_w")
        ]
        if can_fuse(d, side_h, side_w, self.dtype):
            x = attend_fused(*qkv, *tables)
        else:
            x = attend(*qkv, *tables, query_chunk=self.query_chunk)

        # (B * windows, side_h, side_w, M, D) -> (B, rows, columns, side_h, side_w, M, D)
        x = x.reshape(b, rows, columns, side_h, side_w, m, d)
        # -> (B, rows, side_h, columns, side_w, M, D) -> (B, H + pad, W + pad, C)
        x = x.transpose(0, 1, 3, 2, 4, 5, 6).reshape(b, h + pad_h, w + pad_w, c)
        return nn.Dense(c, kernel_init=_INIT, dtype=self.dtype, name="proj")(x[:, :h, :w])


class Block(nn.Module):
    """Pre-normalised transformer block; attributes as in `Attention`."""

    num_heads: int
    window_size: int
    table_side: int
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ("q", "v")
    query_chunk: int = QUERY_CHUNK
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to (B, H, W, C)."""
        attention = Attention(
            num_heads=self.num_heads,
            window_size=self.window_size,
            table_side=self.table_side,
            lora_rank=self.lora_rank,
            lora_targets=self.lora_targets,
            query_chunk=self.query_chunk,
            dtype=self.dtype,
            name="attn",
        )
        c = x.shape[-1]
        mlp = Mlp((4 * c, c), gelu, kernel_init=_INIT, dtype=self.dtype, name="mlp")
        x = x + attention(LayerNorm(dtype=self.dtype, name="norm1")(x))
        return x + mlp(LayerNorm(dtype=self.dtype, name="norm2")(x))


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its side, as the matrix product that it is.

    Attributes:
      patch: side, pixels.
      features: output channels.
      dtype: compute type.
    """

    patch: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to (B, H / patch, W / patch, features)."""
        b, h, w, c = images.shape
        patch = self.patch
        shape = (patch, patch, c, self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        images, kernel, bias = (x.astype(self.dtype) for x in (images, kernel, bias))
        # (B, H, W, C) -> (B, h, patch, w, patch, C) -> (B, h, w, patch * patch * C)
        x = images.reshape(b, h // patch, patch, w // patch, patch, c)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // patch, w // patch, -1)
        return x @ kernel.reshape(-1, self.features) + bias


class Neck(nn.Module):
    """1x1 and 3x3 convolutions, each followed by LayerNorm over the channels."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to (B, H, W, features)."""
        for i, side in ((1, 1), (2, 3)):
            conv = nn.Conv(
                self.features, (side, side), use_bias=False, dtype=self.dtype, name=f"conv{i}"
            )
            x = LayerNorm(dtype=self.dtype, name=f"norm{i}")(conv(x))
        return x


class ImageEncoder(nn.Module):
    """Image to embedding.

    Attributes:
      variant: sizes.
      lora_rank, lora_targets: LoRA on each block's fused projection; rank 0 means none.
      query_chunk: see `attention.attend`.
      remat: a name in `blocks.POLICIES`: what of each block the backward pass computes again.
      dtype: compute type; parameters are float32.
    """

    variant: SamVariant
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ("q", "v")
    query_chunk: int = QUERY_CHUNK
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Encodes images.

        Args:
          images: (B, H, W, 3) float, already normalised; H and W multiples of the patch size,
            not necessarily equal. Away from the native size the absolute position embedding is
            resized bilinearly and the relative tables of global blocks linearly, both with
            half-pixel centres and without antialiasing.

        Returns:
          (B, H / patch, W / patch, prompt_dim) in `dtype`.

        Raises:
          ValueError: wrong rank or channels, or a side that is no multiple of the patch size.
        """
        sizes = self.variant
        patch, native = sizes.patch_size, sizes.grid_size
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(
                f"Images have shape {images.shape}; expected (B, H, W, 3). Repeat a grey slice "
                "three times along the last axis and keep the batch axis."
            )
        if images.shape[1] % patch or images.shape[2] % patch:
            raise ValueError(
                f"Image size {images.shape[1]} x {images.shape[2]} is not a multiple of the "
                f"patch size {patch}: pad the bottom and right edges, or resize."
            )

        x = PatchEmbedding(patch, sizes.embed_dim, dtype=self.dtype, name="patch_embed")(images)
        position = self.param("pos_embed", _INIT, (1, native, native, sizes.embed_dim))
        if x.shape[1:3] != (native, native):
            position = jax.image.resize(position, (1, *x.shape[1:]), "linear", antialias=False)
        x = x + position.astype(self.dtype)

        block = block_class(Block, self.remat)
        for i in range(sizes.depth):
            is_global = i in sizes.global_blocks
            x = block(
                num_heads=sizes.num_heads,
                window_size=0 if is_global else sizes.window_size,
                table_side=native if is_global else sizes.window_size,
                lora_rank=self.lora_rank,
                lora_targets=self.lora_targets,
                query_chunk=self.query_chunk,
                dtype=self.dtype,
                name=f"block_{i}",
            )(x)
        return Neck(sizes.prompt_dim, dtype=self.dtype, name="neck")(x)
