"""Scores a trained model on whole scans, on their own grids, under each prompt protocol."""

import csv
import dataclasses
import json
import logging
import pathlib

import numpy as np
from tqdm import tqdm

from sammix_jax import metrics
from sammix_jax.data import datasets, volumes
from sammix_jax.data.files import read_json, whole_file, write_json
from sammix_jax.data.geometry import slice_geometry
from sammix_jax.data.slices import SliceStore
from sammix_jax.data.splits import Split
from sammix_jax.errors import UserError
from sammix_jax.inference import PROTOCOLS, load_model, make_predict, predict_volume
from sammix_jax.prepare import central_slices

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Case:
    """One scan under one protocol.

    Attributes:
      scan, protocol: which.
      volume: Dice and HD95 in mm, 3D on the scan's own grid.
      slice_dice, slice_hausdorff: means over the slices that show the organ, at the model's slice
        size, in pixels: the columns to compare with the paper's. None without such slices.
      truth_ml, predicted_ml: volumes in mL.
    """

    scan: str
    protocol: str
    volume: metrics.VolumeScore
    slice_dice: float | None
    slice_hausdorff: float | None
    truth_ml: float
    predicted_ml: float


@dataclasses.dataclass(frozen=True)
class Example:
    """A slice for the report: the one that shows most of the organ, on the model's grid (H, W)."""

    scan: str
    dice: float | None  # of the whole volume
    hu: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    cam: np.ndarray
    box: np.ndarray


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All cases, their summary by protocol, and one example a scan under the headline protocol."""

    cases: list[Case]
    summary: dict[str, dict]
    examples: list[Example]


def evaluate(config, workdir) -> Evaluation:
    """Evaluates the best checkpoint and writes WORKDIR/evaluation/{cases.csv,results.json}.

    Args:
      config: the run's config; `config.evaluate` says which scans and protocols.
      workdir: a trained workdir.

    Raises:
      UserError: unknown protocols, no labelled scans, no checkpoint.
    """
    protocols = tuple(config.evaluate.protocols)
    unknown = sorted(set(protocols) - set(PROTOCOLS))
    if unknown or not protocols:
        raise UserError(f"evaluate.protocols={protocols}: expected some of {PROTOCOLS}.")
    scans = _scans(config, workdir)
    model, variables = load_model(config, workdir)
    predict = make_predict(model, config, protocols)
    cases, examples = [], []
    for scan in tqdm(scans, desc="evaluate", unit="scan", disable=None):
        scored, example = _evaluate_scan(scan, predict, variables, protocols, config)
        cases += scored
        examples.append(example)
    summary = {p: _summarise([c for c in cases if c.protocol == p]) for p in protocols}
    evaluation = Evaluation(cases, summary, examples)
    _write(evaluation, pathlib.Path(workdir) / "evaluation", config)
    return evaluation


def saved_summary(config, workdir) -> dict[str, dict] | None:
    """The summary of an earlier evaluation with the same settings, if there is one."""
    path = pathlib.Path(workdir) / "evaluation" / "results.json"
    if not path.exists():
        return None
    results = read_json(path)
    same = results["evaluate"] == json.loads(config.evaluate.to_json())
    return results["summary"] if same else None


def result_table(summary: dict[str, dict]) -> str:
    """The summary as lines of text, a row a protocol."""
    header = ("protocol", "Dice", "HD95 [mm]", "slice Dice", "slice HD [px]", "cases", "failures")
    rows = [header]
    for protocol, s in summary.items():
        rows.append(
            (
                protocol,
                _mean_std(s["dice"], 3),
                _mean_std(s["hd95_mm"], 1),
                _mean_std(s["slice_dice"], 3),
                _mean_std(s["slice_hausdorff_px"], 1),
                str(s["cases"]),
                str(s["failures"]),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _scans(config, workdir) -> list[datasets.Scan]:
    """Labelled scans of the configured part, or of another folder."""
    data = config.data
    if config.evaluate.root:
        found = datasets.find_scans(config.evaluate.root, data.organ, tuple(data.label_values))
        scans = [scan for scan in found if scan.label]
        if not scans:
            raise UserError(f"evaluate.root={config.evaluate.root}: no scan there has a mask.")
        return scans
    split = Split(**read_json(pathlib.Path(workdir) / "split.json"))
    records = SliceStore.open(data.store or pathlib.Path(workdir) / "store").records
    names = split.part(config.evaluate.part)
    if not names:
        raise UserError(
            f"evaluate.part={config.evaluate.part}: that part of the split is empty; choose "
            "another with --config.evaluate.part=train."
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


def _evaluate_scan(scan, predict, variables, protocols, config) -> tuple[list[Case], Example]:
    volume = volumes.read_volume(scan.image)
    truth = volumes.read_mask(scan.label, volume, scan.label_values)
    kept = np.array(central_slices(len(truth), config.data.central_fraction))
    volume, truth = dataclasses.replace(volume, hu=volume.hu[kept]), truth[kept]
    slices, masks = predict_volume(predict, variables, volume, truth, config)
    geometry = slice_geometry(
        volume.hu.shape[1:], volume.spacing[1:], config.data.size, config.data.resize
    )
    squares = np.stack([geometry.mask_to_square(m) for m in truth])
    cases = []
    for protocol in protocols:
        per_slice = [
            metrics.slice_metrics(square, logits > 0)
            for square, logits in zip(squares, slices.logits[protocol], strict=True)
            if square.any()
        ]
        slice_dice, slice_hausdorff = np.mean(per_slice, axis=0) if per_slice else (None, None)
        cases.append(
            Case(
                scan=scan.name,
                protocol=protocol,
                volume=metrics.volume_metrics(truth, masks[protocol], volume.spacing),
                slice_dice=slice_dice,
                slice_hausdorff=slice_hausdorff,
                truth_ml=float(truth.sum() * volume.voxel_ml),
                predicted_ml=float(masks[protocol].sum() * volume.voxel_ml),
            )
        )
    z = int(squares.sum(axis=(1, 2)).argmax())
    example = Example(
        scan=scan.name,
        dice=cases[0].volume.dice,
        hu=geometry.image_to_square(volume.hu[z]),
        truth=squares[z],
        predicted=slices.logits[protocols[0]][z] > 0,
        cam=slices.cam[z],
        box=slices.box[z],
    )
    return cases, example


def _summarise(cases: list[Case]) -> dict:
    """Mean and standard deviation over scans; failures and unscored scans counted."""
    scored = [case for case in cases if case.volume.status != "both_empty"]
    return {
        "cases": len(scored),
        "not_scored": len(cases) - len(scored),
        "failures": sum(case.volume.failed for case in scored),
        "dice": _moments([case.volume.dice for case in scored]),
        "hd95_mm": _moments([case.volume.hd95 for case in scored]),
        "slice_dice": _moments([case.slice_dice for case in scored]),
        "slice_hausdorff_px": _moments([case.slice_hausdorff for case in scored]),
    }


def _moments(values: list) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    return {"mean": float(np.mean(known)), "std": float(np.std(known))} if known else None


def _mean_std(moments: dict | None, digits: int) -> str:
    return f"{moments['mean']:.{digits}f} ± {moments['std']:.{digits}f}" if moments else "–"


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
