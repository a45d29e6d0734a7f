"""SAM's mask decoder: a two-way transformer, upscaling, and one small network for each mask.

Source: Kirillov et al., "Segment Anything", ICCV 2023, appendix A; reference files
`mask_decoder.py` and `transformer.py` of facebookresearch/segment-anything. Here B images with P
prompts each go through in one call.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sammix_jax.models.sam.layers import LayerNorm, Mlp, gelu

NUM_MASKS = 4
SINGLE_MASK, MULTIMASK = slice(0, 1), slice(1, 4)  # one answer; or whole, part and subpart

# The transformer kept PyTorch's default; the encoder, the neck and the upscaling use 1e-6.
_TransformerNorm = functools.partial(LayerNorm, epsilon=1e-5)
_TOKEN_INIT = nn.initializers.normal(1.0)
# PyTorch's default, with which SAM began: a third of the variance of Flax's. It matters only to
# one who trains from random weights, where it was 1.6 times as fast.
_KERNEL_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_UPSCALE_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=(0, 1))
_Mlp = functools.partial(Mlp, activation=nn.relu, kernel_init=_KERNEL_INIT)


class TokenAttention(nn.Module):
    """Attention between two sets of tokens, in `inner` channels."""

    num_heads: int
    inner: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Maps queries (B, P, N, C), keys and values (B, P, K, C) to (B, P, N, C)."""
        c, m = q.shape[-1], self.num_heads

        def project(x: jax.Array, name: str) -> jax.Array:
            x = nn.Dense(self.inner, kernel_init=_KERNEL_INIT, dtype=self.dtype, name=name)(x)
            return x.reshape(*x.shape[:-1], m, -1)  # (B, P, N, inner) -> (B, P, N, M, D)

        q, k, v = project(q, "q_proj"), project(k, "k_proj"), project(v, "v_proj")
        logits = jnp.einsum("bpqmd,bpkmd->bpmqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5).astype(self.dtype)
        x = jnp.einsum("bpmqk,bpkmd->bpqmd", weights, v)
        x = x.reshape(*x.shape[:-2], self.inner)  # (B, P, N, M, D) -> (B, P, N, inner)
        return nn.Dense(c, kernel_init=_KERNEL_INIT, dtype=self.dtype, name="out_proj")(x)


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves, then to the image, and the image to the tokens.

    Attributes:
      num_heads: heads of every attention.
      mlp_dim: hidden width of the tokens' MLP.
      first: the first block's self-attention replaces the tokens: it has neither residual nor
        position, since the tokens are still the position itself.
      dtype: compute type.
    """

    num_heads: int
    mlp_dim: int
    first: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: jax.Array, image: jax.Array, token_pe: jax.Array, image_pe: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Updates tokens (B, P, N, C) and image (B, P, hw, C); the encodings broadcast."""
        c = tokens.shape[-1]
        attention = functools.partial(TokenAttention, self.num_heads, dtype=self.dtype)
        norm = functools.partial(_TransformerNorm, dtype=self.dtype)

        self_attention = attention(inner=c, name="self_attn")
        if self.first:
            tokens = self_attention(tokens, tokens, tokens)
        else:
            q = tokens + token_pe
            tokens = tokens + self_attention(q, q, tokens)
        tokens = norm(name="norm1")(tokens)

        to_image = attention(inner=c // 2, name="cross_attn_token_to_image")
        tokens = tokens + to_image(tokens + token_pe, image + image_pe, image)
        tokens = norm(name="norm2")(tokens)

        mlp = _Mlp((self.mlp_dim, c), dtype=self.dtype, name="mlp")
        tokens = norm(name="norm3")(tokens + mlp(tokens))

        to_tokens = attention(inner=c // 2, name="cross_attn_image_to_token")
        image = image + to_tokens(image + image_pe, tokens + token_pe, tokens)
        return tokens, norm(name="norm4")(image)


class TwoWayTransformer(nn.Module):
    """Two blocks, then a last attention from the tokens to the image."""

    num_heads: int
    mlp_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: jax.Array, image: jax.Array, image_pe: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Maps tokens (B, P, N, C) and image (B, P, hw, C), encoded by (hw, C), to the same."""
        token_pe = tokens
        for i in range(2):
            block = TwoWayBlock(
                self.num_heads, self.mlp_dim, first=i == 0, dtype=self.dtype, name=f"layer_{i}"
            )
            tokens, image = block(tokens, image, token_pe, image_pe)
        last = TokenAttention(
            self.num_heads,
            inner=tokens.shape[-1] // 2,
            dtype=self.dtype,
            name="final_attn_token_to_image",
        )
        tokens = tokens + last(tokens + token_pe, image + image_pe, image)
        return _TransformerNorm(dtype=self.dtype, name="norm_final_attn")(tokens), image


class Upscale(nn.Module):
    """Transposed convolution with a 2 x 2 kernel and stride 2: each cell becomes 2 x 2 cells.

    As the copies of the kernel never overlap, it is a matrix product. `kernel` is (2, 2, C, D),
    indexed by the row and column inside the new cell: PyTorch's (C, D, 2, 2) transposed, without
    the flip that `nn.ConvTranspose` would ask for.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., h, w, C) to (..., 2h, 2w, features)."""
        *lead, h, w, c = x.shape
        kernel = self.param("kernel", _UPSCALE_INIT, (2, 2, c, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = jnp.einsum("...hwc,ijcd->...hiwjd", x.astype(self.dtype), kernel.astype(self.dtype))
        x = x.reshape(*lead, 2 * h, 2 * w, self.features)  # (.., h, 2, w, 2, D) -> (.., 2h, 2w, D)
        return x + bias.astype(self.dtype)


class MaskDecoder(nn.Module):
    """Image and prompt embeddings to mask logits and their estimated quality.

    Attributes:
      num_heads: heads of the two-way transformer.
      mlp_dim: hidden width of its MLPs.
      dtype: compute type; parameters are float32.
    """

    num_heads: int
    mlp_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, image_embeddings: jax.Array, image_pe: jax.Array, sparse: jax.Array, dense: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Decodes P prompts for each of B images.

        Args:
          image_embeddings: (B, h, w, C).
          image_pe: (h, w, C), the position encoding of the cells.
          sparse: (B, P, T, C), tokens of points and boxes; T may be 0.
          dense: (B, P, h, w, C), the embedding of the mask prompt.

        Returns:
          low_res_logits: (B, P, 4, 4h, 4w) float32, unbounded; above 0 is inside. Index 0 is the
            single-mask answer, 1 to 3 are the multi-mask answers.
          iou: (B, P, 4) float32, the estimated IoU of each mask, not clipped to [0, 1].
        """
        b, p, h, w, c = dense.shape
        iou_token = self.param("iou_token", _TOKEN_INIT, (1, c))
        mask_tokens = self.param("mask_tokens", _TOKEN_INIT, (NUM_MASKS, c))
        own = jnp.concatenate([iou_token, mask_tokens]).astype(self.dtype)
        own = jnp.broadcast_to(own, (b, p, 1 + NUM_MASKS, c))
        tokens = jnp.concatenate([own, sparse.astype(self.dtype)], axis=2)

        image = image_embeddings.astype(self.dtype)[:, None] + dense.astype(self.dtype)
        transformer = TwoWayTransformer(
            self.num_heads, self.mlp_dim, dtype=self.dtype, name="transformer"
        )
        tokens, image = transformer(
            tokens,
            image.reshape(b, p, h * w, c),  # (B, P, h, w, C) -> (B, P, hw, C)
            image_pe.astype(self.dtype).reshape(h * w, c),  # (h, w, C) -> (hw, C)
        )

        x = image.reshape(b, p, h, w, c)  # (B, P, hw, C) -> (B, P, h, w, C)
        x = Upscale(c // 4, dtype=self.dtype, name="upscale1")(x)
        x = gelu(LayerNorm(dtype=self.dtype, name="upscale_norm")(x))
        x = gelu(Upscale(c // 8, dtype=self.dtype, name="upscale2")(x))

        weights = [
            _Mlp((c, c, c // 8), dtype=self.dtype, name=f"hypernetwork_{i}")(tokens[:, :, 1 + i])
            for i in range(NUM_MASKS)
        ]
        low_res_logits = jnp.einsum(
            "bpmc,bphwc->bpmhw", jnp.stack(weights, axis=2), x, preferred_element_type=jnp.float32
        )
        # Not in bfloat16, where estimates that differ by less than 0.004 are one.
        head = _Mlp((c, c, NUM_MASKS), dtype=jnp.float32, name="iou_head")
        return low_res_logits, head(tokens[:, :, 0])
