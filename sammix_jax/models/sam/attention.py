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
# Features of a query, with what it brings for position, that cuDNN's fused attention takes forward
# and backward, by the major number of the compute capability: 9 is Hopper. For 10 its tables name
# 256 too, but nothing between 128 and that.
FUSED_WIDTHS = {8: 128, 9: 256, 10: 128, 12: 128}


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
      q, k, v: (B, H, W, M, D), M heads, any float type.
      table_h, table_w: (2 * side - 1, D), see `relative_embeddings`.
      query_chunk: with more than twice as many tokens, queries go in chunks of this size, and
        the backward pass computes each chunk's logits again instead of keeping them.
      fold: whether position is folded into the product; None chooses by size.

    Returns:
      (B, H, W, M, D) in the type of `q`. Logits and softmax are float32.
    """
    b, h, w, m, d = q.shape
    n, dtype = h * w, q.dtype
    if fold is None:
        fold = h + w < d
    queries = _with_position(q, table_h, table_w)
    keys = jnp.concatenate([k, _places(k)], axis=-1) if fold else k
    # (B, H, W, M, ..) -> (B, M, N, ..)
    queries, keys, v = (
        x.transpose(0, 3, 1, 2, 4).reshape(b, m, n, x.shape[-1]) for x in (queries, keys, v)
    )

    def logits_of(queries: jax.Array) -> jax.Array:
        """(B, M, Q, D+H+W) to (B, M, Q, N) float32."""
        product = functools.partial(
            jnp.einsum, "bmqd,bmkd->bmqk", preferred_element_type=jnp.float32
        )
        if fold:
            return product(queries, keys)
        q, rel_h, rel_w = jnp.split(queries, (d, d + h), axis=-1)
        logits = product(q, keys).reshape(b, m, -1, h, w)  # (B, M, Q, N) -> (B, M, Q, H, W)
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
    # (B, M, N, D) -> (B, M, H, W, D) -> (B, H, W, M, D)
    return out.reshape(b, m, h, w, d).transpose(0, 2, 3, 1, 4)


def attend_fused(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table_h: jax.Array,
    table_w: jax.Array,
    *,
    implementation: str = "cudnn",
) -> jax.Array:
    """What `attend` computes, in a kernel of cuDNN that keeps no logits in memory.

    Position is always folded into the product: as a bias it would be as large as the logits. The
    kernel wants as many features of values as of keys, a multiple of eight: zeros fill them up.

    Args:
      q, k, v, table_h, table_w: as in `attend`, of float16 or bfloat16.
      implementation: of `jax.nn.dot_product_attention`.
    """
    b, h, w, m, d = q.shape
    width = _fused_width(d, h, w)

    def padded(x: jax.Array) -> jax.Array:
        x = x.reshape(b, h * w, m, -1)  # (B, H, W, M, ..) -> (B, N, M, ..)
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))

    out = jax.nn.dot_product_attention(
        padded(_with_position(q, table_h, table_w)),
        padded(jnp.concatenate([k, _places(k)], axis=-1)),
        padded(v),
        scale=1.0,
        implementation=implementation,
    )
    return out[..., :d].reshape(b, h, w, m, d)  # (B, N, M, D) -> (B, H, W, M, D)


def can_fuse(d: int, h: int, w: int, dtype) -> bool:
    """Whether JAX's default device has a kernel for `attend_fused`.

    Args:
      d: features of a head.
      h, w: sides of the grid.
      dtype: of the queries.
    """
    device = jax.config.jax_default_device or jax.local_devices()[0]
    if isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    # AMD's are called "gpu" too.
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return False
    if jnp.dtype(dtype) not in (jnp.float16, jnp.bfloat16):
        return False
    generation = int(device.compute_capability.split(".")[0])
    return _fused_width(d, h, w) <= FUSED_WIDTHS.get(generation, 0)


def _with_position(q: jax.Array, table_h: jax.Array, table_w: jax.Array) -> jax.Array:
    """What each query brings: its features, scaled, and its logits for every row and column of
    keys; (B, H, W, M, D) to (B, H, W, M, D+H+W)."""
    h, w, d = q.shape[1], q.shape[2], q.shape[-1]
    rel_h = jnp.einsum("bhwmd,hkd->bhwmk", q, relative_embeddings(table_h, h).astype(q.dtype))
    rel_w = jnp.einsum("bhwmd,wkd->bhwmk", q, relative_embeddings(table_w, w).astype(q.dtype))
    return jnp.concatenate([q * d**-0.5, rel_h, rel_w], axis=-1)


def _places(k: jax.Array) -> jax.Array:
    """One-hot row and column of each key; (B, H, W, M, H+W) for keys of (B, H, W, M, D)."""
    b, h, w, m, _ = k.shape
    rows = jnp.broadcast_to(jnp.eye(h, dtype=k.dtype)[:, None, None], (b, h, w, m, h))
    columns = jnp.broadcast_to(jnp.eye(w, dtype=k.dtype)[:, None], (b, h, w, m, w))
    return jnp.concatenate([rows, columns], axis=-1)


def _fused_width(d: int, h: int, w: int) -> int:
    return -(-(d + h + w) // 8) * 8
