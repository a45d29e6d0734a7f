"""A workdir's labelled slices and test scans → nnU-Net's raw layout."""

from __future__ import annotations

import collections
import dataclasses
import logging
import pathlib
from collections.abc import Sequence

import numpy as np

from benchmarks.nnunet.layout import (
    CASES,
    ENDING,
    Layout,
    canonical_affine,
    slice_affine,
    write_nifti,
)
from sammix_jax.config_files import claim_workdir
from sammix_jax.data import volumes
from sammix_jax.data.files import write_json
from sammix_jax.data.masks import read_mask
from sammix_jax.data.paths import absolute, as_path, resolved
from sammix_jax.data.slices import SliceId, SliceStore
from sammix_jax.data.split_files import keep, load_or_draw
from sammix_jax.data.splits import patient_of
from sammix_jax.errors import UserError
from sammix_jax.evaluation.scans import read_labelled, scans_to_score
from sammix_jax.prepare import store_folder

_LOG = logging.getLogger(__name__)

FOLDS = 5  # nnU-Net's own number


def export(
    config,
    workdir,
    output: pathlib.Path,
    *,
    dataset_id: int = 501,
    negatives: int | None = None,
    roots: Sequence[str] = (),
) -> Layout:
    """Writes what nnU-Net trains on and is scored on.

    Each labelled slice is a case of its own: a volume of one slice, HU and mask as the scan's files
    have them, not resized and not windowed. Test scans are whole. All are in canonical orientation,
    in which nnU-Net's first axis is the one the scan is sliced along.

    Args:
      config: the run's; `data` says which masks train, `evaluate` which scans are scored.
      workdir: a trained workdir, or one whose store is prepared, of which split and labelled slices
        are drawn as training would.
      output: a new folder.
      dataset_id: nnU-Net's number of the data set, 1 to 999.
      negatives: how many training slices that do not show the organ are added as empty masks; None
        adds one to each labelled slice, as far as there are. The other systems draw theirs from all
        such slices.
      roots: other folders of labelled scans to predict and score too.

    Raises:
      UserError: the folder is in use, too few negatives, or scans that cannot be read.
    """
    if not 1 <= dataset_id <= 999:
        raise UserError(f"dataset_id={dataset_id}: expected 1 to 999; nnU-Net writes three digits.")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output}: is not empty; delete it or give another --output.")
    store = SliceStore.open(store_folder(config, workdir))
    split, labels = load_or_draw(config, store, workdir)
    empty = draw_negatives(store, split.train, negatives, config.data.labels_seed, len(labels))

    # The export knows what it was made of as a workdir does, and lends itself to the same readers.
    config = config.copy_and_resolve_references()
    config.data.store = str(resolved(as_path(store.root)))
    config.evaluate.protocols = ("none",)
    config.evaluate.root = ""
    claim_workdir(config, output)
    keep(split, labels, store, output)

    layout = Layout(output, f"Dataset{dataset_id:03d}_{config.data.organ}")
    training = {f"case_{i:04d}": s for i, s in enumerate([*labels, *empty])}
    _write_training(layout, store, training)
    write_json(
        layout.raw / "dataset.json",
        {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, config.data.organ: 1},
            "numTraining": len(training),
            "file_ending": ENDING,
            # Keeps affines as they are, where SimpleITK refuses sheared ones (gantry tilt).
            "overwrite_image_reader_writer": "NibabelIO",
        },
    )
    if folds := patient_folds(training, labels, config.data.patient):
        write_json(layout.splits, folds)
    evaluations = _write_tests(layout, config, output, roots)
    cases = {
        case: {
            "scan": s.scan,
            "slice": store.records[s.scan].slices[s.position],
            "shows_organ": store.image_label(s) == 1,
        }
        for case, s in training.items()
    }
    write_json(
        output / CASES,
        {
            "dataset": layout.dataset,
            "training": cases,
            "folds": len(folds),
            "evaluations": evaluations,
        },
    )
    count = sum(len(evaluation["cases"]) for evaluation in evaluations)
    _LOG.info(
        "exported %d labelled and %d empty slices, %d scans to predict → %s",
        len(labels),
        len(empty),
        count,
        layout.raw,
    )
    return layout


def draw_negatives(
    store: SliceStore, scans: Sequence[str], count: int | None, seed: int, most: int
) -> list[SliceId]:
    """Draws slices of `scans` that are known not to show the organ: `count`, or up to `most`.

    Raises:
      UserError: fewer such slices than `count`.
    """
    known = [s for scan in scans for s in store.slices(scan) if store.image_label(s) == 0]
    if count is None:
        count = min(most, len(known))
    if not 0 <= count <= len(known):
        raise UserError(
            f"negatives={count}: the {len(scans)} training scans have {len(known)} slices without "
            f"data.organ={store.params['organ']}; ask for 0 to {len(known)}."
        )
    drawn = np.random.default_rng([seed, count]).choice(len(known), count, replace=False)
    return [known[i] for i in sorted(drawn)]


def patient_folds(
    training: dict[str, SliceId], labels: Sequence[SliceId], pattern: str = ""
) -> list[dict]:
    """Folds that hold patients apart, in the form of nnU-Net's splits_final.json.

    nnU-Net's own draw would put slices of one patient on both sides. Patients go, those with most
    labelled slices first, to the fold that holds the fewest; so each fold has a labelled slice.
    Those without any go to the fold that holds the fewest slices.

    Args:
      training: the slice of each case.
      labels: those that show the organ.
      pattern: `data.patient`, which says whose a scan is.

    Returns:
      {"train", "val"} with names of cases for each of up to `FOLDS` folds; none where the labelled
      slices are all of one patient.
    """
    patients = {case: patient_of(s.scan, pattern) for case, s in training.items()}
    labelled = collections.Counter(patient_of(s.scan, pattern) for s in labels)
    slices = collections.Counter(patients.values())
    count = min(FOLDS, len(labelled))
    if count < 2:
        return []
    shown, held, fold_of = [0] * count, [0] * count, {}
    for patient in sorted(slices, key=lambda patient: (-labelled[patient], -slices[patient])):
        fullness = [(shown[f] if labelled[patient] else 0, held[f]) for f in range(count)]
        fold = fold_of[patient] = fullness.index(min(fullness))
        shown[fold] += labelled[patient]
        held[fold] += slices[patient]
    return [
        {
            "train": [case for case, patient in patients.items() if fold_of[patient] != fold],
            "val": [case for case, patient in patients.items() if fold_of[patient] == fold],
        }
        for fold in range(count)
    ]


def _write_training(layout: Layout, store: SliceStore, training: dict[str, SliceId]) -> None:
    by_scan = collections.defaultdict(list)
    for case, s in training.items():
        by_scan[s.scan].append((case, s))
    for name, cases in by_scan.items():
        record = store.records[name]
        volume = volumes.read_volume(record.image, store.params["default_orientation"])
        mask = read_mask(record.label, volume, record.label_values)
        for case, s in cases:
            z = record.slices[s.position]
            affine = slice_affine(volume, z)
            write_nifti(layout.image("imagesTr", case), volume.hu[z : z + 1], affine)
            write_nifti(layout.label(case), mask[z : z + 1].astype(np.uint8), affine)


def _write_tests(layout: Layout, config, output, roots: Sequence[str]) -> list[dict]:
    """Writes imagesTs. Returns what is to be scored: the split's part, then each other folder."""
    evaluations, written = [], 0
    for root in ("", *roots):
        config = config.copy_and_resolve_references()
        config.evaluate.root = str(resolved(as_path(root))) if root else ""
        if not root:
            config.evaluate.scans = 0  # draws from other folders alone
        scans, faults = scans_to_score(config, output)
        if faults:
            raise UserError("; ".join(faults))
        cases = {}
        for scan in scans:
            case = f"test_{written:04d}"
            volume = read_labelled(scan, config).volume  # what cannot be scored is refused now
            write_nifti(layout.image("imagesTs", case), volume.hu, canonical_affine(volume))
            files = {"image": str(absolute(scan.image)), "label": str(absolute(scan.label))}
            cases[case] = dataclasses.asdict(scan) | files
            written += 1
        settings = {"root": config.evaluate.root, "scans": config.evaluate.scans}
        evaluations.append({**settings, "cases": cases})
    return evaluations
