"""Training batches as a function of (seed, step): resuming needs no iterator state.

Every batch has two parts of fixed size: slices that lend their masks, and slices that give their
image-level label alone. So every step trains both tasks, and shapes never change.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from sammix_jax.data.slices import SliceId, SliceStore
from sammix_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Batches:
    """`batches(step)` gives the batch of that step, whatever steps came before.

    Attributes:
      labelled: slices with masks (the k labelled slices).
      unlabelled: slices without masks, of which the image-level label is used if there is one.
      sizes: how many of each are in a batch.
      seed: of the order in which they come.
    """

    store: SliceStore
    labelled: tuple[SliceId, ...]
    unlabelled: tuple[SliceId, ...]
    sizes: tuple[int, int]
    seed: int

    def __post_init__(self):
        if self.sizes[0] < 1:
            raise UserError(f"train.batch_labelled={self.sizes[0]}: expected at least 1.")
        if self.sizes[1] and not self.unlabelled:
            raise UserError(
                f"train.batch_unlabelled={self.sizes[1]}, but no training slice is left that gives "
                "an image-level label and lends no mask; annotate slices without the organ too, or "
                "set it to 0."
            )

    def __call__(self, step: int, rows: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """The batch of `step`, or of several processes' batch the rows that one of them needs.

        Args:
          step: from 0.
          rows: N numbers of slices, 0 to L - 1 labelled, L to L + U - 1 not; None takes all in
            this order. No other slice is read.

        Returns:
          hu: (N, size, size) int16.
          mask: (n, size, size) uint8, of the n labelled slices among the rows.
          image_label: (N,) int32: 1 shows the organ, 0 does not, -1 unknown.
        """
        labelled = self._draw(self.labelled, self.sizes[0], step, stream=0)
        unlabelled = self._draw(self.unlabelled, self.sizes[1], step, stream=1)
        rows = range(sum(self.sizes)) if rows is None else rows
        chosen = [(labelled + unlabelled)[row] for row in rows]
        masked = [labelled[row] for row in rows if row < len(labelled)]
        return {
            "hu": np.stack([self.store.hu(s) for s in chosen]),
            "mask": np.stack([self.store.mask(s) for s in masked]),
            "image_label": np.array([self.store.image_label(s) for s in chosen], np.int32),
        }

    @property
    def steps_per_epoch(self) -> float:
        """Steps in one pass over the slices without masks; over those with, where these are all."""
        labelled, unlabelled = self.sizes
        return len(self.unlabelled) / unlabelled if unlabelled else len(self.labelled) / labelled

    def _draw(self, pool, size: int, step: int, stream: int) -> list[SliceId]:
        """`size` slices: the pool is shuffled anew for each pass over it."""
        positions = range(step * size, (step + 1) * size)
        return [
            pool[_order(len(pool), self.seed, stream, p // len(pool))[p % len(pool)]]
            for p in positions
        ]


def prefetch(make, start: int, stop: int):
    """Yields (step, `make(step)`) for each step, the next one made while this one is in use."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pending = pool.submit(make, start) if start < stop else None
        for step in range(start, stop):
            batch = pending.result()
            if step + 1 < stop:
                pending = pool.submit(make, step + 1)
            yield step, batch


@functools.lru_cache(maxsize=8)
def _order(count: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, stream, epoch]).permutation(count)
