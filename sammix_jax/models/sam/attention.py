"""Attention over a grid of tokens with decomposed relative position.

Source: Li et al., "MViTv2", CVPR 2022, section 4.1, in the form SAM's image encoder uses
(`image_encoder.py` of facebookresearch/segment-anything).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

# Grids of more than two chunks attend in chunks of this many queries; windows of 14 x 14 stay
# whole. One chunk of vit_b at 1024 x 1024 holds 12 x 128 x 4096 logits: 25 MB an image in float32
# where the whole is 805 MB. Of 128, 256, 512 and 1024 the smallest was the fastest on a CPU.
QUERY_CHUNK = 128


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
    fold: bool | None = None,
) -> jax.Array:
    """softmax(q k / sqrt(D) + q R_h + q R_w) v over an H x W grid.

    The position terms come in one of two ways. Folded into the product: with e the one-hot row
    and column of a key, [q / sqrt(D), q R_h, q R_w] . [k, e_h, e_w] is the whole logit. Or added
    to the logits, row by row and column by column. Folding is a pass over the logits less, and
    H + W more products for each: it is the faster while H + W < D, which holds for windows.
    Position takes the query *before* scaling.

    Args:
      q, k, v: (B, M, H, W, D), M heads, any float type.
      table_h, table_w: (2 * side - 1, D), see `relative_embeddings`.
      query_chunk: with more than twice as many tokens, queries go in chunks of this size, and
        the backward pass computes each chunk's logits again instead of keeping them.
      fold: whether position is folded into the product; None chooses by size.

    Returns:
      (B, M, H, W, D) in the type of `q`. Logits and softmax are float32.
    """
    b, m, h, w, d = q.shape
    n = h * w
    dtype = q.dtype
    if fold is None:
        fold = h + w < d
    rel_h = jnp.einsum("bmhwd,hkd->bmhwk", q, relative_embeddings(table_h, h).astype(dtype))
    rel_w = jnp.einsum("bmhwd,wkd->bmhwk", q, relative_embeddings(table_w, w).astype(dtype))
    # What each query brings: its features and its logits for every row and column of keys.
    queries = jnp.concatenate([q * d**-0.5, rel_h, rel_w], axis=-1)
    queries = queries.reshape(b, m, n, d + h + w)  # (B, M, H, W, D+H+W) -> (B, M, N, D+H+W)
    k, v = k.reshape(b, m, n, d), v.reshape(b, m, n, d)  # (B, M, H, W, D) -> (B, M, N, D)
    if fold:
        one_hot_h = jnp.repeat(jnp.eye(h, dtype=dtype), w, axis=0)
        one_hot_w = jnp.tile(jnp.eye(w, dtype=dtype), (h, 1))
        place = jnp.concatenate([one_hot_h, one_hot_w], axis=-1)  # (N, H+W)
        k = jnp.concatenate([k, jnp.broadcast_to(place, (b, m, n, h + w))], axis=-1)

    def logits_of(queries: jax.Array) -> jax.Array:
        """(B, M, Q, D+H+W) to (B, M, Q, N) float32."""
        product = functools.partial(
            jnp.einsum, "bmqd,bmkd->bmqk", preferred_element_type=jnp.float32
        )
        if fold:
            return product(queries, k)
        q, rel_h, rel_w = jnp.split(queries, (d, d + h), axis=-1)
        logits = product(q, k).reshape(b, m, -1, h, w)  # (B, M, Q, N) -> (B, M, Q, H, W)
        logits = logits + rel_h[..., :, None] + rel_w[..., None, :]
        return logits.reshape(b, m, -1, n)  # (B, M, Q, H, W) -> (B, M, Q, N)

    def attend_rows(queries: jax.Array) -> jax.Array:
        logits = logits_of(queries)
        # A shift by the peak cancels in the ratio, so no gradient goes through it. Dividing the
        # D sums instead of the N weights saves a pass over the logits.
        peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        weights = jnp.exp(logits - peak)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        sums = jnp.einsum(
            "bmqk,bmkd->bmqd", weights.astype(dtype), v, preferred_element_type=jnp.float32
        )
        return (sums / total).astype(dtype)

    if n <= 2 * query_chunk:
        out = attend_rows(queries)
    else:
        chunks = -(-n // query_chunk)
        queries = jnp.pad(queries, ((0, 0), (0, 0), (0, chunks * query_chunk - n), (0, 0)))
        # (B, M, N, ..) -> (B, M, chunks, chunk, ..)
        queries = queries.reshape(b, m, chunks, query_chunk, -1)
        # The scan already keeps XLA from merging the two computations of a chunk.
        attend_rows = jax.checkpoint(attend_rows, prevent_cse=False)
        out = jax.lax.map(attend_rows, jnp.moveaxis(queries, 2, 0))
        out = jnp.moveaxis(out, 0, 2).reshape(b, m, -1, d)[:, :, :n]  # (B, M, N, D)
    return out.reshape(b, m, h, w, d)  # (B, M, N, D) -> (B, M, H, W, D)
