"""Whether scans lie as the others do, by the side of the organ."""

from collections.abc import Iterable

import numpy as np

from sammix_jax.data.slices import ScanRecord
from sammix_jax.data.volumes import MOST_AIR_HU

# Part of the scans with an orientation by which the organ has a side at all.
AGREEING = 0.9


def seem_mirrored(records: Iterable[ScanRecord]) -> list[ScanRecord]:
    """Those of the scans whose organ lies on the other side than in most of those with an
    orientation. An organ of the middle, or of both sides, tells nothing."""
    labelled = [record for record in records if record.organ_side]
    known = [np.sign(record.organ_side) for record in labelled if record.oriented]
    side = np.sign(sum(known))
    if not known or known.count(side) < AGREEING * len(known):
        return []
    return [record for record in labelled if np.sign(record.organ_side) == -side]


def other_side(axcodes: str) -> str:
    """Orientation codes with left and right exchanged."""
    return axcodes.translate(str.maketrans("LR", "RL"))


def organ_side(hu: np.ndarray, mask: np.ndarray) -> float:
    """`ScanRecord.organ_side` of slices (N, S, S) in HU and their masks."""
    columns = np.arange(hu.shape[2])
    organ, body = mask.sum(axis=(0, 1)), (hu > MOST_AIR_HU).sum(axis=(0, 1))  # (S,) each
    if not organ.any() or not body.any():
        return 0.0
    between = np.average(columns, weights=organ) - np.average(columns, weights=body)
    return float(between / hu.shape[2])
