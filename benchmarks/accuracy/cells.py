"""Numbers over seeds and patients, from the evaluation folders of many runs."""

from __future__ import annotations

import csv
import dataclasses
import pathlib
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from sammix_jax.data.files import read_json, write_csv
from sammix_jax.evaluation.intervals import summarise
from sammix_jax.evaluation.results import CASES, RESULTS


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
class Score:
    """What one trained model has on one scan.

    Attributes:
      variant, count, seed, domain, protocol, scan: which.
      values: by metric; None where the scan has none.
    """

    variant: str
    count: int
    seed: int
    domain: str
    protocol: str
    scan: str
    values: Mapping[str, float | None]


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


def read_scores(rows: Iterable[Row], metrics: Collection[str]) -> list[Score]:
    """What the rows' cases.csv say; `metrics` are columns of it."""
    scores = []
    for row in rows:
        with open(row.folder / CASES, encoding="utf-8", newline="") as file:
            for case in csv.DictReader(file):
                values = {m: float(case[m]) if case[m] else None for m in metrics}
                which = (row.variant, row.count, row.seed, row.domain)
                scores.append(Score(*which, case["protocol"], case["scan"], values))
    return scores


def cells(scores: Iterable[Score]) -> dict[Key, Cell]:
    """Cells by variant, number of labels, domain, protocol and metric.

    A metric that no patient has gets no cell.

    Raises:
      ValueError: the seeds of a cell have values of different scans, so that the mean over seeds
        and the interval over patients would have different centres.
    """
    values: dict[Key, dict[int, dict[str, float]]] = {}
    for s in scores:
        for metric, value in s.values.items():
            key = (s.variant, s.count, s.domain, s.protocol, metric)
            by_scan = values.setdefault(key, {}).setdefault(s.seed, {})
            if value is not None:
                by_scan[s.scan] = value
    return {key: _score_cell(key, seeds) for key, seeds in values.items() if any(seeds.values())}


def in_order(found: dict[Key, Cell], order: Iterable[str]) -> dict[Key, Cell]:
    """The cells with variants in this order and, in each, growing numbers of labels.

    Raises:
      ValueError: a cell of another variant.
    """
    order = list(order)
    return {key: found[key] for key in sorted(found, key=lambda k: (order.index(k[0]), k[1]))}


def diagnostic_cells(rows: Iterable[Row], diagnostics: Mapping[str, str]) -> dict[Key, Cell]:
    """As `cells`, under the protocol "", what results.json says of a whole run.

    Args:
      rows: what was run.
      diagnostics: names of values, and in which part of results.json they stand.
    """
    # A value and its number of patients for each seed that has one.
    values: dict[Key, list[tuple[float, int]]] = {}
    for row in rows:
        results = read_json(row.folder / RESULTS)
        for name, part in diagnostics.items():
            if (value := results[part][name]) is not None:
                key = (row.variant, row.count, row.domain, "", name)
                values.setdefault(key, []).append((value, len(results["scans"])))
    return {
        key: Cell(*_mean_std([value for value, _ in pairs]), None, None, len(pairs), pairs[0][1])
        for key, pairs in values.items()
    }


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


def write_cells(found: dict[Key, Cell], path: pathlib.Path) -> None:
    """Every cell, a line each; no protocol for diagnostics."""
    columns = ("variant", "labelled_slices", "domain", "protocol", "metric")
    fields = (field.name for field in dataclasses.fields(Cell))
    rows = ((*key, *dataclasses.astuple(cell)) for key, cell in found.items())
    write_csv(path, (*columns, *fields), rows)


def cell_text(cell: Cell | None, digits: int, interval: bool = True) -> str:
    if cell is None:
        return "–"
    text = f"{cell.mean:.{digits}f}" + (f" ± {cell.std:.{digits}f}" if cell.seeds > 1 else "")
    if interval and cell.low is not None:
        text += f" [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"
    return text
