"""Tables and figure of the label-efficiency benchmark, from each row's evaluation folder."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import pathlib
from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure

from configs.labels import VARIANTS
from sammix_jax import figures
from sammix_jax.data.files import read_json, whole_file
from sammix_jax.intervals import summarise
from sammix_jax.results import CASES, RESULTS

METRICS = {"dice": 3, "nsd": 3, "hd95_mm": 1, "assd_mm": 1}  # digits shown
# What guides the segmentation, the same under every protocol: parts of results.json.
DIAGNOSTICS = {"box_iou": "prompt", "empty_cams": "prompt", "auroc": "classifier"}
NAMES = {
    "sam_mix": "SAM-Mix",
    "no_fusion": "without CAM fusion",
    "no_box": "without CAM box",
    "teacher": "with teacher",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One trained model scored on one domain.

    Attributes:
      variant, count, seed, domain: which.
      folder: of its evaluation, which holds cases.csv and results.json.
    """

    variant: str
    count: int
    seed: int
    domain: str
    folder: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Cell:
    """A number over S seeds and P patients.

    Attributes:
      mean: over all.
      std: between the seeds' means, of the sample; 0 for one seed.
      low, high: 95% bootstrap interval over patients, each taken as the mean of its seeds; None
        with too few, and for diagnostics, which are pooled over the slices of all patients.
      seeds, patients: S, P.
    """

    mean: float
    std: float
    low: float | None
    high: float | None
    seeds: int
    patients: int


Key = tuple[str, int, str, str, str]


def cells(rows: Iterable[Row]) -> dict[Key, Cell]:
    """Cells by variant, number of labels, domain, protocol and metric.

    Variants stand in the order of `configs.labels.VARIANTS`, and numbers of labels grow. The
    protocol of diagnostics is "". A metric that no patient has gets no cell.

    Raises:
      ValueError: the seeds of a cell have values of different scans, so that the mean over seeds
        and the interval over patients would have different centres; or an unknown variant.
    """
    rows = list(rows)
    scores, diagnostics = _scores(rows), _diagnostics(rows)
    found = {key: _score_cell(key, by_seed) for key, by_seed in scores.items()}
    found |= {
        key: Cell(*_mean_std([value for value, _ in pairs]), None, None, len(pairs), pairs[0][1])
        for key, pairs in diagnostics.items()
    }
    order = list(VARIANTS)
    return {key: found[key] for key in sorted(found, key=lambda k: (order.index(k[0]), k[1]))}


def _scores(rows: list[Row]) -> dict[Key, dict[int, dict[str, float]]]:
    """Values of cases.csv by seed and scan, those that there are."""
    values: dict[Key, dict[int, dict[str, float]]] = {}
    for row in rows:
        with open(row.folder / CASES, newline="") as file:
            for case in csv.DictReader(file):
                for metric in METRICS:
                    key = (row.variant, row.count, row.domain, case["protocol"], metric)
                    by_scan = values.setdefault(key, {}).setdefault(row.seed, {})
                    if case[metric] != "":
                        by_scan[case["scan"]] = float(case[metric])
    return {key: by_seed for key, by_seed in values.items() if any(by_seed.values())}


def _diagnostics(rows: list[Row]) -> dict[Key, list[tuple[float, int]]]:
    """A value of results.json and its number of patients for each seed that has one."""
    values: dict[Key, list[tuple[float, int]]] = {}
    for row in rows:
        results = read_json(row.folder / RESULTS)
        for name, part in DIAGNOSTICS.items():
            if (value := results[part][name]) is not None:
                key = (row.variant, row.count, row.domain, "", name)
                values.setdefault(key, []).append((value, len(results["scans"])))
    return values


def _score_cell(key: Key, by_seed: dict[int, dict[str, float]]) -> Cell:
    (first, scans), *others = by_seed.items()
    for seed, other in others:
        if set(other) != set(scans):
            variant, count, domain, protocol, metric = key
            raise ValueError(
                f"{variant}, k={count}, {domain}: seeds {first} and {seed} have {metric} under "
                f"{protocol} of different scans: only one has {sorted(set(scans) ^ set(other))}; "
                "expected the same scans of every seed."
            )
    values = np.array([[by_scan[name] for name in scans] for by_scan in by_seed.values()])  # (S, P)
    moments = summarise(values.mean(axis=0).tolist())
    mean_std = _mean_std(values.mean(axis=1).tolist())
    return Cell(*mean_std, moments.low, moments.high, *values.shape)


def _mean_std(seeds: list[float]) -> tuple[float, float]:
    return float(np.mean(seeds)), float(np.std(seeds, ddof=1)) if len(seeds) > 1 else 0.0


def markdown(found: dict[Key, Cell], domains: tuple[str, ...], protocols: tuple[str, ...]) -> str:
    """What the numbers are, then the method under each protocol, its parts, and its guidance."""
    variants = list(dict.fromkeys(key[0] for key in found))
    counts = sorted({key[1] for key in found})
    lines = [
        _legend(found),
        "",
        "| k | domain | protocol | Dice | NSD 2 mm | HD95 [mm] | ASSD [mm] |",
        "|" + "---|" * 7,
    ]
    for k in counts:
        for domain in domains:
            for protocol in protocols:
                scores = (
                    _text(found.get(("sam_mix", k, domain, protocol, metric)), digits)
                    for metric, digits in METRICS.items()
                )
                lines.append(f"| {k} | {domain} | `{protocol}` | " + " | ".join(scores) + " |")
    for protocol in protocols:
        head = [f"{domain}, k = {k}" for domain in domains for k in counts]
        lines += ["", f"Dice under `{protocol}`:", "", "| | " + " | ".join(head) + " |"]
        lines.append("|---" * (len(head) + 1) + "|")
        for variant in variants:
            scores = (
                _text(found.get((variant, k, domain, protocol, "dice")), 3, interval=False)
                for domain in domains
                for k in counts
            )
            lines.append(f"| {NAMES[variant]} | " + " | ".join(scores) + " |")
    lines += [
        "",
        "Guidance, over the slices of all patients: IoU of the CAM's box with the true one and the "
        "share of empty CAMs, on slices that show the organ (the central box stands in for that of "
        "an empty CAM); the classifier's AUROC on all slices:",
        "",
        "| | domain | k | box IoU | empty CAMs | AUROC |",
        "|" + "---|" * 6,
    ]
    for variant, domain, k in itertools.product(variants, domains, counts):
        values = (_text(found.get((variant, k, domain, "", name)), 3) for name in DIAGNOSTICS)
        lines.append(f"| {NAMES[variant]} | {domain} | {k} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def _legend(found: dict[Key, Cell]) -> str:
    scores = [cell for key, cell in found.items() if key[4] in METRICS]
    seeds, patients = (
        _span(getattr(cell, name) for cell in scores) for name in ("seeds", "patients")
    )
    return (
        f"Means; seeds: {seeds}, patients of a domain: {patients}. ± is the standard deviation "
        "between seeds; brackets hold the 95% bootstrap interval over the patients, each taken as "
        "the mean of its seeds. Of so few patients such an interval holds the true mean less often "
        "than it says: of normal values 85% of the time with 5, 90% with 10. Every score names its "
        "protocol: `cam` takes nothing but the image, `gt_box` is prompted by the box of the true "
        "mask, `none` has no prompt."
    )


def _span(numbers: Iterable[int]) -> str:
    known = sorted(set(numbers))
    return str(known[0]) if len(known) == 1 else f"{known[0]} to {known[-1]}"


def write_csv(found: dict[Key, Cell], path: pathlib.Path) -> None:
    """Every cell, a line each; no protocol for diagnostics."""
    columns = ("variant", "labelled_slices", "domain", "protocol", "metric")
    with whole_file(path) as partial, open(partial, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*columns, *(field.name for field in dataclasses.fields(Cell))))
        for key, cell in found.items():
            writer.writerow((*key, *dataclasses.astuple(cell)))


def plot(found: dict[Key, Cell], domains: tuple[str, ...], path: pathlib.Path) -> None:
    """Dice under `cam` over the number of labels; bars are the standard deviation over seeds."""
    variants = list(dict.fromkeys(key[0] for key in found))
    counts = sorted({key[1] for key in found})
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, domain in zip(figure.subplots(1, len(domains), sharey=True), domains, strict=True):
        for i, variant in enumerate(variants):
            known = [
                (k + 0.01 * k * (i - len(variants) / 2), found[variant, k, domain, "cam", "dice"])
                for k in counts
                if (variant, k, domain, "cam", "dice") in found
            ]
            axis.errorbar(
                [place for place, _ in known],
                [cell.mean for _, cell in known],
                yerr=[cell.std for _, cell in known],
                marker="o",
                capsize=3,
                label=NAMES[variant],
            )
        axis.set(title=f"phantom, {domain}", xlabel="labelled slices", xscale="log")
        axis.set_xticks(counts, [str(k) for k in counts], minor=False)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("Dice per volume, protocol cam")
    figure.axes[0].legend()
    figures.save(figure, path)


def _text(cell: Cell | None, digits: int, interval: bool = True) -> str:
    if cell is None:
        return "–"
    text = f"{cell.mean:.{digits}f}" + (f" ± {cell.std:.{digits}f}" if cell.seeds > 1 else "")
    if interval and cell.low is not None:
        text += f" [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"
    return text
