"""What a prepared store holds, and what of its masks seems wrong, for the log."""

import logging

import numpy as np

from sammix_jax.data.paths import Path
from sammix_jax.data.sides import other_side, seem_mirrored
from sammix_jax.data.slices import ScanRecord

_LOG = logging.getLogger(__name__)


def log_store(records: list[ScanRecord], new: int, seconds: float, organ: str, store: Path) -> None:
    """Logs how many scans there are, and warns of masks that seem wrong.

    Args:
      records: of all scans.
      new: how many of them were prepared now.
      seconds: that took.
      organ: of the masks.
      store: where they are.
    """
    unlabelled = [record.name for record in records if not record.has_label]
    rate = f", {new / seconds:.2f} scans/s" if new else ""
    _LOG.info(
        "prepared %d scans (%d new%s): %d labelled, %d unlabelled%s → %s",
        len(records),
        new,
        rate,
        len(records) - len(unlabelled),
        len(unlabelled),
        _listed(unlabelled),
        store,
    )
    if partly := [r.name for r in records if r.unannotated]:
        count = sum(len(r.unannotated) for r in records)
        _LOG.info(
            "annotated in part: %d scans%s, whose %d slices with voxels to ignore lend no mask",
            len(partly),
            _listed(partly),
            count,
        )
    without = [r.name for r in records if r.has_label and not any(r.organ_pixels)]
    if without:
        _LOG.warning("masks without any %s: %d scans%s", organ, len(without), _listed(without))
    if gaps := [record.name for record in records if _has_gaps(record)]:
        _LOG.warning(
            "masks that lack %s on many slices between its first and its last: %d scans%s. What "
            "nobody annotated there is taken for slices without it: give such slices a value to "
            "ignore.",
            organ,
            len(gaps),
            _listed(gaps),
        )
    mirrored = seem_mirrored(records)
    if oriented := [record.name for record in mirrored if record.oriented]:
        _LOG.warning(
            "%s lies on the other side in %d scans%s than in the rest: look at them, whether their "
            "headers or masks are mirrored.",
            organ,
            len(oriented),
            _listed(oriented),
        )
    if mirrored := [record for record in mirrored if not record.oriented]:
        _LOG.warning(
            "%s lies on the other side in %d scans that know no orientation%s than in those that "
            "know theirs, so they seem to be mirrored: look at them, and say by "
            "--config.data.default_orientation=%s, with another store, how their axes run.",
            organ,
            len(mirrored),
            _listed([record.name for record in mirrored]),
            other_side(mirrored[0].axcodes),
        )


def _has_gaps(record: ScanRecord) -> bool:
    """Whether over a quarter of the slices from the organ's first to its last do not show it."""
    shown = np.flatnonzero(record.organ_pixels)
    return len(shown) > 0 and len(shown) < 0.75 * (np.ptp(shown) + 1) and not record.unannotated


def _listed(names: list[str]) -> str:
    return f" ({', '.join(names[:8])}{' …' if len(names) > 8 else ''})" if names else ""
