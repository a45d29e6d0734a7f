"""Which patients train, validate and test, and which slices lend their masks."""

import dataclasses
import re
from collections.abc import Container, Iterable

import numpy as np

from sammix_jax.data.slices import SliceId, SliceStore
from sammix_jax.errors import UserError

PARTS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Split:
    """Names of the scans of each part; by patient, so no patient's slices stand in two parts."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def part(self, name: str) -> tuple[str, ...]:
        """The scans of `train`, `val` or `test`."""
        return getattr(self, name)


def split_scans(
    names: list[str],
    ratio: tuple[int, int, int],
    seed: int,
    patient: str = "",
    partly: Container[str] = (),
) -> Split:
    """Draws a split of the labelled scans, patient by patient.

    Args:
      names: the labelled scans.
      ratio: parts for train, val and test. Where they add up to the number of patients they are
        counts (LiTS: 91, 13, 27); else each part gets its share, and at least one patient unless
        its ratio is 0.
      seed: of the draw.
      patient: `data.patient`.
      partly: scans that are annotated in part. They cannot be scored, so their patients always
        train, and the ratio divides the others.

    Raises:
      UserError: fewer patients than parts, a ratio without training scans, or a scan in whose name
        no patient is found.
    """
    patients: dict[str, list[str]] = {}
    for name in names:
        patients.setdefault(patient_of(name, patient), []).append(name)
    ratio = tuple(ratio)
    if len(ratio) != 3 or min(ratio) < 0 or ratio[0] <= 0:
        raise UserError(f"data.split={ratio}: expected three parts (train, val, test), train > 0.")
    training = [scans for scans in patients.values() if any(s in partly for s in scans)]
    of_each = [scans for scans in patients.values() if scans not in training]
    wanted = sum(r > 0 for r in (ratio[1:] if training else ratio))
    count = len(of_each)
    if count < wanted:
        throughout = " that are annotated throughout" if training else ""
        raise UserError(
            f"data.split={ratio}: {count} labelled scans of different patients{throughout} cannot "
            f"fill {wanted} parts; add scans or set parts to 0, as in "
            "--config.data.split='(1, 0, 0)'."
        )
    val, test = (max(1, round(count * r / sum(ratio))) if r else 0 for r in ratio[1:])
    train = count - val - test
    if train < (0 if training else 1):
        raise UserError(
            f"data.split={ratio}: leaves no training scan of {count}; raise the first part."
        )
    shuffled = [of_each[i] for i in np.random.default_rng(seed).permutation(count)]
    parts = (training + shuffled[:train], shuffled[train : train + val], shuffled[train + val :])
    return Split(*(tuple(name for scans in part for name in scans) for part in parts))


def patient_of(name: str, pattern: str) -> str:
    """Whose scan it is: what `pattern` finds in its name, or the first of its groups that finds
    something; without a pattern, `name`.

    Raises:
      UserError: it finds nothing.
    """
    if not pattern:
        return name
    found = _found(name, pattern)
    if not found:
        raise UserError(
            f"data.patient={pattern}: finds nothing in the scan's name {name}; give a pattern that "
            "finds the patient in every name."
        )
    return found


def whose(name: str, pattern: str) -> str:
    """`patient_of`; in another data set the pattern may find nothing, and a scan is a patient."""
    return _found(name, pattern) or name if pattern else name


def _found(name: str, pattern: str) -> str:
    """What a pattern finds, or the first of its groups that finds something; "" where nothing."""
    match = re.search(pattern, name)
    parts = (match.groups() if match.re.groups else (match[0],)) if match else ()
    return next((part for part in parts if part), "")


def taught_scans(names: Iterable[str], split: Split, pattern: str) -> tuple[str, ...]:
    """Of the scans without masks those that a teacher may teach on: of no patient who validates or
    tests.

    Args:
      names: the scans without masks.
      split: of the others.
      pattern: `data.patient`.

    Raises:
      UserError: a scan in whose name no patient is found.
    """
    held_out = {patient_of(name, pattern) for name in (*split.val, *split.test)}
    return tuple(name for name in names if patient_of(name, pattern) not in held_out)


def draw_labelled_slices(
    store: SliceStore, scans: tuple[str, ...], count: int, seed: int
) -> list[SliceId]:
    """Draws the slices whose masks train the segmentation, from the positive slices of `scans`.

    Args:
      count: k of the paper; 0 takes every positive slice.

    Raises:
      UserError: fewer positive slices than `count`.
    """
    # Of a small organ that shows on a slice, resizing may have left nothing to learn from.
    positive = [
        s
        for scan in scans
        for s in store.slices(scan)
        if store.image_label(s) == 1 and store.has_mask(s) and store.mask(s).any()
    ]
    if not positive:
        raise UserError(
            f"no mask of the {len(scans)} training scans shows data.organ={store.params['organ']}: "
            "is it the organ that was annotated, and does data.label_values say what counts?"
        )
    if count > len(positive):
        raise UserError(
            f"data.labelled_slices={count}: the {len(scans)} training scans show "
            f"data.organ={store.params['organ']} on {len(positive)} slices with masks; ask for "
            "fewer, take all of them by 0, or add scans."
        )
    if count == 0:
        return positive
    drawn = np.random.default_rng([seed, count]).choice(len(positive), count, replace=False)
    return [positive[i] for i in sorted(drawn)]
