"""What a workdir keeps of its data: the split, the labelled slices, and how to know its scans."""

import dataclasses
import logging
from collections.abc import Collection

from sammix_jax.data.files import read_json, write_json
from sammix_jax.data.hdf5 import is_hdf5
from sammix_jax.data.paths import Path, as_path
from sammix_jax.data.scan_files import natural
from sammix_jax.data.slices import SliceId, SliceStore
from sammix_jax.data.splits import (
    PARTS,
    Split,
    draw_labelled_slices,
    patient_of,
    split_scans,
    taught_scans,
)
from sammix_jax.errors import UserError

_LOG = logging.getLogger(__name__)

SPLIT, LABELS, SCANS, IMAGES = "split.json", "labels.json", "scans.json", "images.json"
BEGUN_FROM = "weights.json"  # what the run started from, as `training.start.begun_from` has it


@dataclasses.dataclass(frozen=True)
class TrainingScans:
    """What the scans that trained a workdir are known by.

    Attributes:
      digests: of each one's image, and of the masks of the labelled ones.
      chose: the same of those that chose its checkpoint.
      hdf5: whether they are HDF5 files, whose copies in NIfTI have other digests.
    """

    digests: frozenset[str]
    chose: frozenset[str]
    hdf5: bool


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
        if left_out := sorted(set(labelled) - {*split.train, *split.val, *split.test}, key=natural):
            _LOG.warning(
                "%d scans with masks are in no part of %s, and so left out: %s. A new workdir "
                "draws a split of all.",
                len(left_out),
                split_path,
                ", ".join(left_out[:8]),
            )
    else:
        data = config.data
        split = split_scans(labelled, data.split, data.seed, data.patient, partly)
    _refuse_copies(split, store)
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
    if (workdir / IMAGES).exists():  # what the run was begun on, whatever was added since
        return
    write_json(workdir / SCANS, _label_digests(store))
    images = {
        name: {"file": record.image, "digest": record.image_digest}
        for name, record in store.records.items()
    }
    write_json(workdir / IMAGES, images)


def kept_split(workdir) -> Split:
    """The split that a workdir was trained on."""
    fields = read_json(as_path(workdir) / SPLIT)
    return Split(**{part: tuple(fields[part]) for part in PARTS})


def training_scans(config, workdir) -> TrainingScans:
    """The scans that trained a workdir: the split's, with a teacher the unlabelled ones too, and
    those of the workdir that it started from.

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
    begun = read_json(workdir / BEGUN_FROM) if (workdir / BEGUN_FROM).exists() else {}
    digests = known_by(trained).union(begun.get("trained_on", ()))
    chose = known_by(split.val).union(begun.get("chose", ()))
    return TrainingScans(digests, chose, hdf5)


def kept_digests(workdir) -> dict[str, tuple[str, str]]:
    """Digests of mask and image of the labelled scans that a workdir was begun on, by name."""
    workdir = as_path(workdir)
    labelled, images = read_json(workdir / SCANS), read_json(workdir / IMAGES)
    return {name: (labelled[name], images[name]["digest"]) for name in labelled}


def changed_scans(store: SliceStore, workdir, names: Collection[str] | None = None) -> list[str]:
    """The labelled scans of a workdir that the store lacks, or holds with other images or masks.

    Args:
      store: the workdir's, or what has taken its place.
      workdir: one that was begun; of one that was not, no scan has changed.
      names: of the scans to compare; None compares all.
    """
    workdir = as_path(workdir)
    if not (workdir / SCANS).exists():
        return []
    begun, now = read_json(workdir / SCANS), _label_digests(store)
    images = read_json(workdir / IMAGES) if (workdir / IMAGES).exists() else {}

    def changed(name: str) -> bool:
        if begun[name] != now.get(name):
            return True
        return name in images and images[name]["digest"] != store.records[name].image_digest

    return sorted(filter(changed, begun if names is None else begun.keys() & set(names)))


def _first_file(kept: Path, given: str) -> Path | None:
    """A workdir once begun keeps its own file."""
    return kept if kept.exists() else as_path(given) if given else None


def _label_digests(store: SliceStore) -> dict[str, str]:
    return {name: r.label_digest for name, r in store.records.items() if r.has_label}


def _refuse_other_scans(store: SliceStore, workdir: Path, taught: bool) -> None:
    """Labelled scans may join, which a split once kept leaves out; what a teacher teaches on is all
    that has no mask, and must stay the same."""
    other = changed_scans(store, workdir)
    if taught and (workdir / IMAGES).exists():
        without = set(read_json(workdir / IMAGES)) - set(read_json(workdir / SCANS))
        other += sorted(without ^ {n for n, r in store.records.items() if not r.has_label})
    if other:
        raise UserError(
            f"{workdir}: begun on other scans: {', '.join(other[:5])} changed, vanished or joined "
            "since; give another --workdir, or bring back the scans as they were."
        )


def _refuse_copies(split: Split, store: SliceStore) -> None:
    """One image under two names would train the model that it scores."""
    first: dict[str, tuple[str, str]] = {}
    for part in PARTS:
        for name in split.part(part):
            other, where = first.setdefault(store.records[name].image_digest, (name, part))
            if where != part:
                raise UserError(
                    f"{store.records[name].image}: the same image as {store.records[other].image}, "
                    f"which is in {where} where this one is in {part}; remove one of them, or put "
                    "both in one part (data.split_file)."
                )


def _read_split(path: Path, labelled: set[str]) -> Split:
    fields = read_json(path)
    if not isinstance(fields, dict) or set(fields) != set(PARTS):
        raise UserError(f"{path}: expected an object with the lists {', '.join(PARTS)}.")
    for part in PARTS:
        listed = fields[part]
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise UserError(f"{path}: {part} is {listed!r}, expected a list of scans' names.")
    names = [name for part in PARTS for name in fields[part]]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise UserError(f"{path}: {repeated} stand in two parts; a patient belongs to one.")
    unknown = sorted(set(names) - labelled)
    if unknown:
        names = ", ".join(sorted(labelled, key=natural)[:3])
        raise UserError(
            f"{path}: {unknown[:5]} are no labelled scans of this data set, whose names are such "
            f"as {names}; correct them, or remove what is not there."
        )
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
    labels, entries = [], read_json(path)
    if not isinstance(entries, list):
        raise UserError(f'{path}: expected a list of {{"scan": …, "slice": …}}.')
    for entry in entries:
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
        if labels[-1] in labels[:-1]:
            raise UserError(f"{path}: slice {index} of {scan} stands there twice; remove one.")
        if not store.has_mask(labels[-1]):
            raise UserError(
                f"{path}: slice {index} of {scan} is not annotated throughout; annotate it or "
                "leave it out."
            )
        if not store.image_label(labels[-1]):
            raise UserError(
                f"{path}: slice {index} of {scan} does not show {store.params['organ']}, and "
                "teaches that without lending its mask; leave it out."
            )
    if not labels:
        raise UserError(f"{path}: names no slice; expected at least one labelled slice.")
    return labels
