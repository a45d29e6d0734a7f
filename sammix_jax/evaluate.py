"""Scores a trained model on whole scans, on their own grids, under each prompt protocol."""

import csv
import dataclasses
import hashlib
import json
import logging
import pathlib

import numpy as np
from tqdm import tqdm

from sammix_jax import metrics
from sammix_jax.data import datasets, volumes
from sammix_jax.data.files import read_json, whole_file, write_json
from sammix_jax.data.slices import SliceStore
from sammix_jax.data.splits import digest, kept_split, training_digests
from sammix_jax.errors import UserError
from sammix_jax.inference import load_model, make_predict, predict_volume
from sammix_jax.prepare import central_slices

_LOG = logging.getLogger(__name__)

# "scored": scans where truth or prediction holds the organ; "failures": those of them where only
# one does; "not scored": scans where neither does.
COUNTS = ("scored", "failures", "not scored")


@dataclasses.dataclass(frozen=True)
class Case:
    """One scan under one protocol.

    Attributes:
      scan, protocol: which.
      volume: Dice and HD95 in mm, 3D, of all slices on the scan's own grid. The distance is None
        where the file has lost its spacing.
      slice_dice, slice_hausdorff: means over the slices that show the organ, at the model's slice
        size, in pixels, within the central part that `data.central_fraction` keeps: the columns to
        compare with the paper's. None without such slices.
      truth_ml, predicted_ml: volumes in mL, None where the file has lost its spacing.
    """

    scan: str
    protocol: str
    volume: metrics.VolumeScore
    slice_dice: float | None
    slice_hausdorff: float | None
    truth_ml: float | None
    predicted_ml: float | None


@dataclasses.dataclass(frozen=True)
class Example:
    """A slice for the report: the one that shows most of the organ, on the model's grid (H, W)."""

    scan: str
    dice: float | None  # of the whole volume, under the first protocol
    hu: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    cam: np.ndarray
    box: np.ndarray


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All cases, their summary by protocol, and one example a scan under the first protocol."""

    cases: list[Case]
    summary: dict[str, dict]
    examples: list[Example]


def evaluate(config, workdir) -> Evaluation:
    """Evaluates the best checkpoint; writes cases.csv and results.json into `results_folder`.

    Args:
      config: the run's config; `config.evaluate` says which scans and protocols.
      workdir: a trained workdir.

    Raises:
      UserError: no labelled scans, bad ones, or no checkpoint.
    """
    protocols = tuple(config.evaluate.protocols)
    scans = _scans(config, workdir)
    model, variables = load_model(config, workdir)
    predict = make_predict(model, config, protocols)
    cases, examples, seen = [], [], []
    trained = training_digests(workdir)
    for scan in tqdm(scans, desc="evaluate", unit="scan", disable=None):
        volume = volumes.read_volume(scan.image)
        truth = volumes.read_mask(scan.label, volume, scan.label_values, scan.known_values)
        central = central_slices(len(truth), config.data.central_fraction)
        organ_pixels = truth[central.start : central.stop].sum(axis=(1, 2))
        if digest(truth.shape, volume.affine.tolist(), organ_pixels) in trained:
            seen.append(scan.name)
        prediction = predict_volume(predict, variables, volume, truth, config)
        scored, example = _score(scan.name, volume, truth, prediction, protocols, central)
        cases += scored
        examples.append(example)
    if seen:
        _LOG.warning("%d of these %d scans trained the model: %s", len(seen), len(scans), seen[:8])
    summary = {p: _summarise([c for c in cases if c.protocol == p]) for p in protocols}
    evaluation = Evaluation(cases, summary, examples)
    _write(evaluation, results_folder(config, workdir), config)
    return evaluation


def results_folder(config, workdir) -> pathlib.Path:
    """WORKDIR/evaluation/PART; for another folder of scans its name and a digest of its path."""
    name = config.evaluate.part
    if config.evaluate.root:
        root = pathlib.Path(config.evaluate.root).resolve()
        name = f"{root.name}-{hashlib.sha256(str(root).encode()).hexdigest()[:6]}"
    return pathlib.Path(workdir) / "evaluation" / name


def saved_summary(config, workdir) -> dict[str, dict] | None:
    """The summary of an earlier evaluation with the same settings, if there is one."""
    path = results_folder(config, workdir) / "results.json"
    if not path.exists():
        return None
    results = read_json(path)
    same = results["evaluate"] == json.loads(config.evaluate.to_json())
    return results["summary"] if same else None


def result_table(summary: dict[str, dict]) -> str:
    """The summary as lines of text, a row a protocol."""
    rows = [("protocol", "Dice", "HD95 [mm]", "slice Dice", "slice HD [px]", *COUNTS)]
    for protocol, s in summary.items():
        scores = (
            _mean_std(s["dice"], 3),
            _mean_std(s["hd95_mm"], 1),
            _mean_std(s["slice_dice"], 3),
            _mean_std(s["slice_hausdorff_px"], 1),
        )
        counts = (str(s[name.replace(" ", "_")]) for name in COUNTS)
        rows.append((protocol, *scores, *counts))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _scans(config, workdir) -> list[datasets.Scan]:
    """Labelled scans of the configured part, or of another folder."""
    data = config.data
    if config.evaluate.root:
        found = datasets.find_scans(
            config.evaluate.root,
            data.organ,
            tuple(config.evaluate.label_values),
            field="evaluate.root",
        )
        scans = [scan for scan in found if scan.label]
        if not scans:
            raise UserError(f"evaluate.root={config.evaluate.root}: no scan there has a mask.")
        return scans
    split = kept_split(workdir)
    store = pathlib.Path(data.store or pathlib.Path(workdir) / "store")
    records = SliceStore.open(store).records
    names = split.part(config.evaluate.part)
    if not names:
        raise UserError(
            f"evaluate.part={config.evaluate.part}: that part of the split is empty; choose "
            "another with --config.evaluate.part=train."
        )
    missing = sorted(set(names) - set(records))
    if missing:
        raise UserError(
            f"{store}: lacks the scans {missing[:5]} of the workdir's split; prepare the workdir's "
            "data again with --mode=prepare."
        )
    return [
        datasets.Scan(
            name,
            pathlib.Path(records[name].image),
            pathlib.Path(records[name].label),
            records[name].label_values,
        )
        for name in names
    ]


def _score(
    name: str, volume, truth: np.ndarray, predicted, protocols, central
) -> tuple[list[Case], Example]:
    """A case for each protocol, and the example."""
    squares, logits = predicted.truth, predicted.slices.logits
    shown = [z for z in central if squares[z].any()]
    cases = []
    for protocol in protocols:
        per_slice = [metrics.slice_metrics(squares[z], logits[protocol][z] > 0) for z in shown]
        slice_dice, slice_hausdorff = np.mean(per_slice, axis=0) if per_slice else (None, None)
        mask = predicted.masks[protocol]
        score = metrics.volume_metrics(truth, mask, volume.spacing)
        voxel_ml = volume.voxel_ml
        if not volume.has_spacing:
            score, voxel_ml = dataclasses.replace(score, hd95=None), None
        cases.append(
            Case(
                scan=name,
                protocol=protocol,
                volume=score,
                slice_dice=slice_dice,
                slice_hausdorff=slice_hausdorff,
                truth_ml=voxel_ml and float(truth.sum() * voxel_ml),
                predicted_ml=voxel_ml and float(mask.sum() * voxel_ml),
            )
        )
    z = int(squares.sum(axis=(1, 2)).argmax())
    example = Example(
        scan=name,
        dice=cases[0].volume.dice,
        hu=predicted.hu[z],
        truth=squares[z],
        predicted=logits[protocols[0]][z] > 0,
        cam=predicted.slices.cam[z],
        box=predicted.slices.box[z],
    )
    return cases, example


def _summarise(cases: list[Case]) -> dict:
    """Mean and standard deviation over scans; failures and unscored scans counted."""
    scored = [case for case in cases if case.volume.status != "both_empty"]
    return {
        "scored": len(scored),
        "not_scored": len(cases) - len(scored),
        "failures": sum(case.volume.failed for case in scored),
        "dice": _moments([case.volume.dice for case in scored]),
        "hd95_mm": _moments([case.volume.hd95 for case in scored]),
        "slice_dice": _moments([case.slice_dice for case in scored]),
        "slice_hausdorff_px": _moments([case.slice_hausdorff for case in scored]),
    }


def _moments(values: list) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": float(np.mean(known)), "std": float(np.std(known)), "count": len(known)}


def _mean_std(moments: dict | None, digits: int) -> str:
    if not moments:
        return "–"
    spread = f" ± {moments['std']:.{digits}f}" if moments["count"] > 1 else ""
    return f"{moments['mean']:.{digits}f}{spread}"


def _write(evaluation: Evaluation, folder: pathlib.Path, config) -> None:
    columns = (
        "scan",
        "protocol",
        "status",
        "dice",
        "hd95_mm",
        "slice_dice",
        "slice_hausdorff_px",
        "truth_ml",
        "predicted_ml",
    )
    with whole_file(folder / "cases.csv") as partial, open(partial, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for case in evaluation.cases:
            writer.writerow(
                (
                    case.scan,
                    case.protocol,
                    case.volume.status,
                    case.volume.dice,
                    case.volume.hd95,
                    case.slice_dice,
                    case.slice_hausdorff,
                    case.truth_ml,
                    case.predicted_ml,
                )
            )
    write_json(
        folder / "results.json",
        {"evaluate": json.loads(config.evaluate.to_json()), "summary": evaluation.summary},
    )
    _LOG.info("evaluation → %s", folder)
