"""Which of the decoder's masks is the answer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sammix_jax.models.sam.mask_decoder import MULTIMASK, SINGLE_MASK

MASK_CHOICES = ("argmax_iou", "index", "single")


class Masks(NamedTuple):
    """Masks of SAM's decoder on the slice's grid.

    Attributes:
      logits: (B, H, W) float32, the final mask.
      candidates: (B, M, H, W) float32, the masks it was chosen from.
      iou: (B, M) float32, their predicted IoU.
    """

    logits: jax.Array
    candidates: jax.Array
    iou: jax.Array


def choose_masks(
    low_res_logits: jax.Array, iou: jax.Array, size: tuple[int, int], choice: str, index: int
) -> Masks:
    """Resizes the decoder's masks and chooses one of each image.

    Args:
      low_res_logits: (B, 4, 4h, 4w) of one prompt, from `Sam.decode`.
      iou: (B, 4), their predicted IoU.
      size: (H, W) of the slices.
      choice: of `MASK_CHOICES`: of the three masks of an ambiguous prompt that of the highest
        predicted IoU, or the one that `index` names; or the mask for one without ambiguity.
      index: 0 to 2.
    """
    kept = SINGLE_MASK if choice == "single" else MULTIMASK
    logits, iou = low_res_logits[:, kept], iou[:, kept]
    candidates = jax.image.resize(
        logits.astype(jnp.float32), (*logits.shape[:2], *size), "linear", antialias=False
    )  # (B, M, H, W)
    if choice == "index":
        final = candidates[:, index]  # (B, H, W)
    else:
        best = jnp.argmax(iou, axis=1)[:, None, None, None]
        final = jnp.take_along_axis(candidates, best, axis=1)[:, 0]  # (B, H, W)
    return Masks(final, candidates, iou.astype(jnp.float32))
