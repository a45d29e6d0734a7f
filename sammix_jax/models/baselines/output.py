"""What a baseline that only segments returns."""

from typing import NamedTuple

import jax


class SegmenterOutput(NamedTuple):
    """Masks of B slices as logits.

    Attributes:
      logits: (B, H, W) float32, at the size of the images.
      deep: (B, h, w) float32 each, coarser logits for deep supervision from fine to coarse; empty
        where a network has none, and outside training.
    """

    logits: jax.Array
    deep: tuple[jax.Array, ...] = ()
