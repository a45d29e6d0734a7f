"""The small layers that SAM's encoder, prompt encoder and decoder share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# Flax normalises in float32 and casts the result. The fast variance E[x^2] - E[x]^2 cancels
# badly where the mean is large, as it is in SAM's residual stream, so it is switched off.
LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)


def gelu(x: jax.Array) -> jax.Array:
    """x Φ(x), in float32, returned in the type of `x`.

    SAM was trained with the erf form; the tanh approximation shifts activations by up to 5e-4.
    JAX's own exact form takes erfc, which costs a GPU three times the pass over memory.
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


class Mlp(nn.Module):
    """Dense layers `lin1`, `lin2`, ... with an activation between them and none at the end.

    Attributes:
      widths: output features of each layer.
      activation: applied between layers.
      kernel_init: initialiser of the kernels.
      dtype: compute type; parameters are float32.
    """

    widths: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array]
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., C) to (..., widths[-1])."""
        for i, width in enumerate(self.widths):
            if i:
                x = self.activation(x)
            dense = nn.Dense(
                width, kernel_init=self.kernel_init, dtype=self.dtype, name=f"lin{i + 1}"
            )
            x = dense(x)
        return x
