"""Attention over a grid of tokens with decomposed relative position.

Source: Li et al., "MViTv2", CVPR 2022, section 4.1, in the form SAM's image encoder uses
(`image_encoder.py` of facebookresearch/segment-anything).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Grids with more tokens than this attend in chunks of this many queries. One chunk of vit_b at
# 1024 x 1024 holds 12 x 512 x 4096 logits: 100 MB an image in float32 where the whole is 805 MB.
QUERY_CHUNK = 512


def relative_embeddings(table: jax.Array, side: int) -> jax.Array:
    """Spreads a table of relative offsets over all pairs of places along one axis.

    Args:
      table: (L, D); row `side - 1 + i - j` belongs to query i and key j when L = 2 * side - 1.
        A table of another length, trained on another grid, is first resized linearly with
        half-pixel centres and no antialiasing.
      side: number of places along the axis.

    Returns:
      (side, side, D), indexed by query, then key.
    """
    rows = 2 * side - 1
    if table.shape[0] != rows:
        table = jax.image.resize(table, (rows, table.shape[1]), "linear", antialias=False)
    place = jnp.arange(side)
    return table[place[:, None] - place[None, :] + side - 1]


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table_h: jax.Array,
    table_w: jax.Array,
    *,
    query_chunk: int = QUERY_CHUNK,
) -> jax.Array:
    """softmax(q k / sqrt(D) + q R_h + q R_w) v over an H x W grid.

    The position terms are folded into the product: with e the one-hot row and column of a key,
    [q / sqrt(D), q R_h, q R_w] . [k, e_h, e_w] is the whole logit, so that no bias of H W x H W
    values is ever built. Position takes the query *before* scaling.

    Args:
      q, k, v: (B, M, H, W, D), M heads, any float type.
      table_h, table_w: (2 * side - 1, D), see `relative_embeddings`.
      query_chunk: with more than this many tokens, queries go in chunks of this size, and the
        backward pass computes each chunk's logits again instead of keeping them.

    Returns:
      (B, M, H, W, D) in the type of `q`. Logits and softmax are float32.
    """
    b, m, h, w, d = q.shape
    n = h * w
    dtype = q.dtype
    rel_h = jnp.einsum("bmhwd,hkd->bmhwk", q, relative_embeddings(table_h, h).astype(dtype))
    rel_w = jnp.einsum("bmhwd,wkd->bmhwk", q, relative_embeddings(table_w, w).astype(dtype))
    q = jnp.concatenate([q * d**-0.5, rel_h, rel_w], axis=-1)
    q = q.reshape(b, m, n, d + h + w)  # (B, M, H, W, D+H+W) -> (B, M, N, D+H+W)

    one_hot_h = jnp.repeat(jnp.eye(h, dtype=dtype), w, axis=0)
    one_hot_w = jnp.tile(jnp.eye(w, dtype=dtype), (h, 1))
    place = jnp.broadcast_to(jnp.concatenate([one_hot_h, one_hot_w], axis=-1), (b, m, n, h + w))
    k = jnp.concatenate([k.reshape(b, m, n, d), place], axis=-1)  # (B, M, N, D+H+W)
    v = v.reshape(b, m, n, d)  # (B, M, H, W, D) -> (B, M, N, D)

    def attend_rows(q: jax.Array) -> jax.Array:
        logits = jnp.einsum("bmqd,bmkd->bmqk", q, k, preferred_element_type=jnp.float32)
        return jnp.einsum("bmqk,bmkd->bmqd", jax.nn.softmax(logits).astype(dtype), v)

    if n <= query_chunk:
        out = attend_rows(q)
    else:
        chunks = -(-n // query_chunk)
        q = jnp.pad(q, ((0, 0), (0, 0), (0, chunks * query_chunk - n), (0, 0)))
        q = q.reshape(b, m, chunks, query_chunk, -1)  # (B, M, N, ..) -> (B, M, chunks, chunk, ..)
        # The scan already keeps XLA from merging the two computations of a chunk.
        attend_rows = jax.checkpoint(attend_rows, prevent_cse=False)
        out = jax.lax.map(attend_rows, jnp.moveaxis(q, 2, 0))
        out = jnp.moveaxis(out, 0, 2).reshape(b, m, -1, d)[:, :, :n]  # (B, M, N, D)
    return out.reshape(b, m, h, w, d)  # (B, M, N, D) -> (B, M, H, W, D)
