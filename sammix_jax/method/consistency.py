"""A teacher for slices without masks: an extension of the paper's method, off by default.

The teacher is the moving average of the trained parameters (Tarvainen and Valpola 2017, arXiv
1703.01780). It segments a weak view of a slice; where it is confident, the model learns its answer
on a strong view of the same slice (as FixMatch does for classes, Sohn et al. 2020, arXiv
2001.07685). Both views share one geometry, so their pixels correspond.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class PseudoMasks(NamedTuple):
    """What the teacher says of B slices.

    Attributes:
      target: (B, H, W) float32 in {0, 1}.
      valid: (B, H, W) bool, the pixels where it is confident.
    """

    target: jax.Array
    valid: jax.Array


def pseudo_masks(logits: jax.Array, image_label: jax.Array, confidence: float) -> PseudoMasks:
    """Cuts the teacher's logits, with no gradient; an image-level label that says 0 overrules it.

    Args:
      logits: (B, H, W) float, the teacher's.
      image_label: (B,) int: 1 the slice shows the organ, 0 it does not, -1 unknown. A slice known
        not to show the organ has an empty mask, and all of it is certain.
      confidence: probability from which a pixel counts, of either class; 0.5 to below 1.
    """
    probability = jax.nn.sigmoid(jax.lax.stop_gradient(logits.astype(jnp.float32)))
    absent = (image_label == 0)[:, None, None]
    target = (probability >= 0.5) & ~absent
    valid = (jnp.maximum(probability, 1 - probability) >= confidence) | absent
    return PseudoMasks(target.astype(jnp.float32), valid)


def follow(teacher: dict, trainable: dict, step: jax.Array, ema: float) -> dict:
    """The teacher after a step: a share `ema` of it stays, less in the first steps.

    Early parameters are far from any use; (1 + step) / (10 + step) forgets them.
    """
    share = jnp.minimum(ema, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: share * old + (1 - share) * new, teacher, trainable)


def ramp(step: jax.Array, start: int, length: int) -> jax.Array:
    """0 before `start`, 1 from `start + length` on, linear between; float32."""
    return jnp.clip((step - start + 1) / max(length, 1), 0.0, 1.0)
