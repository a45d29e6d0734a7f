"""Which patients train, validate and test, and which slices lend their masks; kept as files."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Container, Iterable

import numpy as np

from sammix_jax import hosts
from sammix_jax.data.datasets import natural
from sammix_jax.data.files import read_json, write_json
from sammix_jax.data.hdf5 import is_hdf5
from sammix_jax.data.paths import Path, as_path
from sammix_jax.data.slices import SliceId, SliceStore
from sammix_jax.errors import UserError

PARTS = ("train", "val", "test")
SPLIT, LABELS, SCANS, IMAGES = "split.json", "labels.json", "scans.json", "images.json"


@dataclasses.dataclass(frozen=True)
class Split:
    """Names of the scans of each part; by patient, so no patient's slices stand in two parts."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def part(self, name: str) -> tuple[str, ...]:
        """The scans of `train`, `val` or `test`."""
        return getattr(self, name)


@dataclasses.dataclass(frozen=True)
class TrainingScans:
    """What the scans that trained a workdir are known by.

    Attributes:
      digests: `image_digest` of each, and `digest` of the labelled ones.
      chose: the same of those that chose its checkpoint.
      hdf5: whether they are HDF5 files, whose copies in NIfTI have other digests.
    """

    digests: frozenset[str]
    chose: frozenset[str]
    hdf5: bool


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
    if len(ratio) != 3 or min(ratio) < 0 or ratio[0] < 1:
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
    """Whose scan it is: what `pattern` finds in its name, or its first group; without one, `name`.

    Raises:
      UserError: it finds nothing.
    """
    if not pattern:
        return name
    found = re.search(pattern, name)
    if not found:
        raise UserError(
            f"data.patient={pattern}: finds nothing in the scan's name {name}; give a pattern that "
            "finds the patient in every name."
        )
    return found[1] if found.re.groups else found[0]


def whose(name: str, pattern: str) -> str:
    """`patient_of`; in another data set the pattern may find nothing, and a scan is a patient."""
    return patient_of(name, pattern) if re.search(pattern, name) else name


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
    if not positive or count > len(positive):
        raise UserError(
            f"data.labelled_slices={count}: the {len(scans)} training scans show "
            f"data.organ={store.params['organ']} on {len(positive)} slices with masks; ask for "
            "fewer or add scans."
        )
    if count == 0:
        return positive
    drawn = np.random.default_rng([seed, count]).choice(len(positive), count, replace=False)
    return [positive[i] for i in sorted(drawn)]


def load_or_draw(config, store: SliceStore, workdir) -> tuple[Split, list[SliceId]]:
    """The run's split and labelled slices: the workdir's, else the config's files, else drawn.

    Writes nothing; `keep` does, once the run is known to be sound.

    Raises:
      UserError: no masks, bad files, or a workdir that was begun on other scans.
    """
    workdir = as_path(workdir)
    labelled = [r.name for r in store.records.values() if r.has_label]
    if not labelled:
        raise UserError(
            f"{store.root}: none of the {len(store.records)} scans has a mask; training needs some."
        )
    partly = {r.name for r in store.records.values() if r.unannotated}
    _refuse_other_scans(store, workdir, taught=config.consistency.weight > 0)
    split_path = _first_file(workdir / SPLIT, config.data.split_file)
    if split_path:
        split = _read_split(split_path, set(labelled))
        _refuse_partly_annotated(split, split_path, partly)
        _refuse_torn_patients(split, split_path, config.data.patient)
    else:
        data = config.data
        split = split_scans(labelled, data.split, data.seed, data.patient, partly)
    labels_path = _first_file(workdir / LABELS, config.data.labels_file)
    if labels_path:
        labels = _read_labels(labels_path, store, split)
    else:
        labels = draw_labelled_slices(
            store, split.train, config.data.labelled_slices, config.data.labels_seed
        )
    return split, labels


def keep(split: Split, labels: list[SliceId], store: SliceStore, workdir) -> None:
    """Writes split.json and labels.json, in the form that `data.split_file` and `data.labels_file`
    take; scans.json, by which the workdir knows its labelled scans again; and images.json, by which
    it knows any of its scans without their masks."""
    workdir = as_path(workdir)
    write_json(workdir / SPLIT, dataclasses.asdict(split))
    # The canonical slice index, which still holds for a store of other slices.
    slices = [{"scan": s.scan, "slice": store.records[s.scan].slices[s.position]} for s in labels]
    write_json(workdir / LABELS, slices)
    # What the run was begun on stays, whatever was added since. To know the images each is read,
    # which the process alone does that writes.
    if not hosts.is_first() or (workdir / IMAGES).exists():
        return
    write_json(workdir / SCANS, _digests(store))
    images = {
        name: {"file": record.image, "digest": _image_digest(store, name)}
        for name, record in store.records.items()
    }
    write_json(workdir / IMAGES, images)


def kept_split(workdir) -> Split:
    """The split that a workdir was trained on."""
    fields = read_json(as_path(workdir) / SPLIT)
    return Split(**{part: tuple(fields[part]) for part in PARTS})


def _first_file(kept: Path, given: str) -> Path | None:
    """A workdir once begun keeps its own file."""
    return kept if kept.exists() else as_path(given) if given else None


def digest(shape, affine, organ_pixels) -> str:
    """What tells labelled scans apart, whatever their files' names and dates.

    Args:
      shape: (D, H, W) of the canonical volume.
      affine: (4, 4) of the file, nested sequences.
      organ_pixels: of each stored slice.
    """
    about = [list(shape), [list(row) for row in affine], [int(n) for n in organ_pixels]]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def image_digest(shape, middle: np.ndarray) -> str:
    """What tells scans apart by their images alone, whatever their masks, affines and files.

    Args:
      shape: (D, H, W) of the canonical volume.
      middle: (S, S) int16 HU on the store's grid, the slice at position N // 2 of the N kept ones.
    """
    about = json.dumps([int(n) for n in shape]).encode() + np.asarray(middle, "<i2").tobytes()
    return hashlib.sha256(about).hexdigest()[:16]


def training_scans(config, workdir) -> TrainingScans:
    """The scans that trained a workdir: the split's, and with a teacher the unlabelled ones too.

    Args:
      config: the run's config; `config.consistency.weight` says whether there was a teacher.
      workdir: a trained workdir.

    Raises:
      UserError: the workdir lacks one of its files.
    """
    workdir = as_path(workdir)
    if not (workdir / IMAGES).exists():
        raise UserError(
            f"{workdir / IMAGES}: no such file, so nobody can tell which scans trained the model; "
            "run the command that trained the workdir again, which writes the file."
        )
    labelled, images = read_json(workdir / SCANS), read_json(workdir / IMAGES)
    split = kept_split(workdir)
    unlabelled = ()
    if config.consistency.weight > 0:
        without = (name for name in images if name not in labelled)
        unlabelled = taught_scans(without, split, config.data.patient)

    def known_by(names) -> frozenset[str]:
        found = {images[name]["digest"] for name in names}
        return frozenset(found | {labelled[name] for name in names if name in labelled})

    trained = (*split.train, *unlabelled)
    hdf5 = any(is_hdf5(images[name]["file"]) for name in trained)
    return TrainingScans(known_by(trained), known_by(split.val), hdf5)


def _digests(store: SliceStore) -> dict[str, str]:
    return {
        name: digest(record.shape, record.affine, record.organ_pixels)
        for name, record in store.records.items()
        if record.has_label
    }


def _image_digest(store: SliceStore, name: str) -> str:
    slices = store.slices(name)
    return image_digest(store.records[name].shape, store.hu(slices[len(slices) // 2]))


def _refuse_other_scans(store: SliceStore, workdir: Path, taught: bool) -> None:
    """Labelled scans may join, which a split once kept leaves out; what a teacher teaches on is all
    that has no mask, and must stay the same."""
    path = workdir / SCANS
    if not path.exists():
        return
    begun, now = read_json(path), _digests(store)
    other = sorted(name for name in begun if begun[name] != now.get(name))
    if taught and (workdir / IMAGES).exists():
        without = set(read_json(workdir / IMAGES)) - set(begun)
        other += sorted(without ^ (set(store.records) - set(now)))
    if other:
        raise UserError(
            f"{workdir}: begun on other scans: {', '.join(other[:5])} changed, vanished or joined "
            "since; give another --workdir, or bring back the scans as they were."
        )


def _read_split(path: Path, labelled: set[str]) -> Split:
    fields = read_json(path)
    if not isinstance(fields, dict) or set(fields) != set(PARTS):
        raise UserError(f"{path}: expected an object with the lists {', '.join(PARTS)}.")
    names = [name for part in PARTS for name in fields[part]]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise UserError(f"{path}: {repeated} stand in two parts; a patient belongs to one.")
    unknown = sorted(set(names) - labelled)
    if unknown:
        raise UserError(f"{path}: {unknown} are no labelled scans of this data set; remove them.")
    return Split(**{part: tuple(fields[part]) for part in PARTS})


def _refuse_partly_annotated(split: Split, path: Path, partly: set[str]) -> None:
    if held_out := sorted(partly & {*split.val, *split.test}, key=natural):
        raise UserError(
            f"{path}: {held_out[:5]} validate or test and are annotated in part, so nobody can "
            "score them; annotate them throughout or let them train."
        )


def _refuse_torn_patients(split: Split, path: Path, pattern: str) -> None:
    parts: dict[str, str] = {}
    for part in PARTS:
        for name in split.part(part):
            patient = patient_of(name, pattern)
            if parts.setdefault(patient, part) != part:
                raise UserError(
                    f"{path}: scans of {patient} stand in {parts[patient]} and in {part}; a "
                    "patient belongs to one part (data.patient says whose a scan is)."
                )


def _read_labels(path: Path, store: SliceStore, split: Split) -> list[SliceId]:
    labels = []
    for entry in read_json(path):
        try:
            scan, index = entry["scan"], entry["slice"]
        except (TypeError, KeyError) as error:
            raise UserError(f'{path}: {entry!r}: expected {{"scan": …, "slice": …}}.') from error
        if scan not in split.train:
            raise UserError(
                f"{path}: {scan} is no training scan; a label file must not reach past "
                "the training patients."
            )
        if index not in store.records[scan].slices:
            raise UserError(f"{path}: {scan} has no slice {index} in {store.root}.")
        labels.append(SliceId(scan, store.records[scan].slices.index(index)))
        if not store.has_mask(labels[-1]):
            raise UserError(
                f"{path}: slice {index} of {scan} is not annotated throughout; annotate it or "
                "leave it out."
            )
    if not labels:
        raise UserError(f"{path}: names no slice; expected at least one labelled slice.")
    return labels
