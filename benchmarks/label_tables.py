"""Tables and figure of the label-efficiency benchmark, from each row's cases.csv."""

from __future__ import annotations

import csv
import dataclasses
import pathlib
from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure

from sammix_jax import figures
from sammix_jax.data.files import whole_file
from sammix_jax.intervals import summarise

METRICS = {"dice": 3, "nsd": 3, "hd95_mm": 1, "assd_mm": 1}  # digits shown
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
      cases: the file of its scores, a line a scan and protocol.
    """

    variant: str
    count: int
    seed: int
    domain: str
    cases: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Cell:
    """A metric over S seeds and P patients.

    Attributes:
      mean: over all.
      std: between the seeds' means, of the sample; 0 for one seed.
      low, high: 95% bootstrap interval over patients, each taken as the mean of its seeds; None
        with too few.
      seeds: S.
    """

    mean: float
    std: float
    low: float | None
    high: float | None
    seeds: int


def cells(rows: Iterable[Row]) -> dict[tuple[str, int, str, str, str], Cell]:
    """Cells by variant, number of labels, domain, protocol and metric."""
    values: dict[tuple, dict[int, dict[str, float]]] = {}
    for row in rows:
        with open(row.cases, newline="") as file:
            for case in csv.DictReader(file):
                for metric in METRICS:
                    key = (row.variant, row.count, row.domain, case["protocol"], metric)
                    if case[metric] != "":
                        by_scan = values.setdefault(key, {}).setdefault(row.seed, {})
                        by_scan[case["scan"]] = float(case[metric])
    return {key: _cell(by_seed) for key, by_seed in values.items()}


def _cell(by_seed: dict[int, dict[str, float]]) -> Cell:
    means = [float(np.mean(list(scans.values()))) for scans in by_seed.values()]
    names = sorted({name for scans in by_seed.values() for name in scans})
    patients = [np.mean([s[name] for s in by_seed.values() if name in s]) for name in names]
    moments = summarise([float(p) for p in patients])
    std = float(np.std(means, ddof=1)) if len(means) > 1 else 0.0
    return Cell(float(np.mean(means)), std, moments.low, moments.high, len(means))


def markdown(found: dict, domains: tuple[str, ...], protocols: tuple[str, ...]) -> str:
    """Three tables: the method under each protocol, its parts, and what the second domain costs."""
    variants = list(dict.fromkeys(key[0] for key in found))
    counts = sorted({key[1] for key in found})
    lines = [
        "| k | domain | protocol | Dice | NSD 2 mm | HD95 [mm] | ASSD [mm] |",
        "|" + "---|" * 7,
    ]
    for k in counts:
        for domain in domains:
            for protocol in protocols:
                scores = (_text(found.get(("sam_mix", k, domain, protocol, m)), m) for m in METRICS)
                lines.append(f"| {k} | {domain} | `{protocol}` | " + " | ".join(scores) + " |")
    for protocol in protocols:
        head = [f"{domain}, k = {k}" for domain in domains for k in counts]
        lines += ["", f"Dice under `{protocol}`:", "", "| | " + " | ".join(head) + " |"]
        lines.append("|---" * (len(head) + 1) + "|")
        for variant in variants:
            scores = (
                _text(found.get((variant, k, domain, protocol, "dice")), "dice", interval=False)
                for domain in domains
                for k in counts
            )
            lines.append(f"| {NAMES[variant]} | " + " | ".join(scores) + " |")
    return "\n".join(lines) + "\n"


def write_csv(found: dict, path: pathlib.Path) -> None:
    """Every cell, a line each."""
    columns = ("variant", "labelled_slices", "domain", "protocol", "metric")
    with whole_file(path) as partial, open(partial, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*columns, *(field.name for field in dataclasses.fields(Cell))))
        for key, cell in found.items():
            writer.writerow((*key, *dataclasses.astuple(cell)))


def plot(found: dict, domains: tuple[str, ...], path: pathlib.Path) -> None:
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


def _text(cell: Cell | None, metric: str, interval: bool = True) -> str:
    if cell is None:
        return "–"
    digits = METRICS[metric]
    text = f"{cell.mean:.{digits}f}" + (f" ± {cell.std:.{digits}f}" if cell.seeds > 1 else "")
    if interval and cell.low is not None:
        text += f" [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"
    return text
