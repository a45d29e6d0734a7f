"""Low-rank adaptation of SAM's fused query-key-value projection.

Source: Hu et al., "LoRA", ICLR 2022; on the q and v projections of every encoder block as in
SAM-Mix (Ward and Imran, arXiv 2412.08575), rank 8 by default there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

THIRDS = ("q", "k", "v")  # order in the fused projection's output


class LowRank(nn.Module):
    """x -> x a b, with a: (C, rank) and b: (rank, features).

    `a` starts as N(0, 0.01), 0.01 being the standard deviation, and `b` as zeros, so that the
    adapted model starts as the frozen one. There is no alpha / rank factor.
    """

    rank: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., C) to (..., features)."""
        a = self.param("a", nn.initializers.normal(0.01), (x.shape[-1], self.rank))
        b = self.param("b", nn.initializers.zeros, (self.rank, self.features))
        return x.astype(self.dtype) @ a.astype(self.dtype) @ b.astype(self.dtype)


def add_low_rank(
    qkv: jax.Array, x: jax.Array, *, rank: int, targets: tuple[str, ...], dtype: Any
) -> jax.Array:
    """Adds `lora_q`, `lora_k`, `lora_v` to the thirds of a fused projection that they name.

    Call it inside a compact method: the low-rank modules become children of that module.

    Args:
      qkv: (..., 3C), the frozen projection of `x`; queries, keys, values in this order.
      x: (..., D), the projection's input.
      rank: 0 leaves `qkv` as it is.
      targets: which of 'q', 'k', 'v' are adapted.
      dtype: compute type.

    Returns:
      (..., 3C).

    Raises:
      ValueError: negative rank, or a target other than 'q', 'k', 'v'.
    """
    unknown = [target for target in targets if target not in THIRDS]
    if rank < 0 or unknown:
        raise ValueError(
            f"LoRA got rank {rank} and targets {tuple(targets)}: the rank must be 0 (off) or "
            f"more, and each target one of {THIRDS}."
        )
    if rank == 0:
        return qkv
    thirds = jnp.split(qkv, 3, axis=-1)
    for i, third in enumerate(THIRDS):
        if third in targets:
            low_rank = LowRank(rank, thirds[i].shape[-1], dtype, name=f"lora_{third}")
            thirds[i] = thirds[i] + low_rank(x)
    return jnp.concatenate(thirds, axis=-1)


def merge_lora(params: Mapping[str, Any]) -> dict[str, Any]:
    """Adds every low-rank product to the kernel it adapts and drops the LoRA leaves.

    Args:
      params: nested mapping of arrays, the whole model's or any part's. Beside each group of
        `lora_*` stands its `qkv/kernel`, (C, 3C).

    Returns:
      New nested dicts: the parameters of the same model with `lora_rank=0`. Kernels keep their
      type; the product is taken in float32. The input is left unchanged.

    Raises:
      ValueError: LoRA leaves without a fused projection beside them.
    """
    merged = {
        name: merge_lora(leaf) if isinstance(leaf, Mapping) else leaf
        for name, leaf in params.items()
    }
    found = [name for name in merged if name in {f"lora_{third}" for third in THIRDS}]
    if not found:
        return merged
    if "qkv" not in merged:
        raise ValueError(
            f"Found {found} beside {sorted(merged)}, but no 'qkv' to merge them into: pass the "
            "frozen and the LoRA parameters joined in one tree."
        )
    kernel = merged["qkv"]["kernel"]
    thirds = jnp.split(jnp.asarray(kernel, jnp.float32), 3, axis=-1)
    for name in found:
        pair = merged.pop(name)
        product = jnp.matmul(
            jnp.asarray(pair["a"], jnp.float32),
            jnp.asarray(pair["b"], jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        i = THIRDS.index(name.removeprefix("lora_"))
        thirds[i] = thirds[i] + product
    merged["qkv"]["kernel"] = jnp.concatenate(thirds, axis=-1).astype(kernel.dtype)
    return merged
