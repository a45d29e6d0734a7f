"""What is kept of each row of the paper's comparison, in two files that outlive its workdir."""

from __future__ import annotations

import csv
import dataclasses
import pathlib
from collections.abc import Callable, Iterable

from benchmarks.accuracy.cells import Row, Score, read_scores
from sammix_jax.data.files import read_json, write_csv
from sammix_jax.data.split_files import BEGUN_FROM
from sammix_jax.training.log import read_log

# Per volume and in mm, then per slice of those that show the organ and in pixels, as in the paper.
METRICS = ("dice", "hd95_mm", "slice_dice", "slice_hausdorff_px")
DIGITS = 8
SCORES, CURVES = "scores.csv", "curves.csv"
ROW_COLUMNS = ("system", "labelled_slices", "seed")
SCORE_COLUMNS = (*ROW_COLUMNS, "steps", "sam_weights", "domain", "protocol", "scan", *METRICS)
CURVE_COLUMNS = (*ROW_COLUMNS, "step", "dice")

Key = tuple[str, int, int]  # system, labelled slices, seed


@dataclasses.dataclass
class Record:
    """A trained row.

    Attributes:
      steps: of its training.
      sam_weights: whence SAM began, the first DIGITS of the file's SHA-256; "" of random weights.
      scores: of each scan of both domains under each protocol.
      curve: step and mean Dice of the validation patients.
    """

    steps: int
    sam_weights: str
    scores: list[Score] = dataclasses.field(default_factory=list)
    curve: list[tuple[int, float]] = dataclasses.field(default_factory=list)


def records_of(rows: Iterable[Row], config_of: Callable) -> dict[Key, Record]:
    """Records of finished rows; `config_of(system, count, seed)` is the config of one."""
    found: dict[Key, Record] = {}
    for row in rows:
        key = (row.variant, row.count, row.seed)
        if key not in found:
            config = config_of(*key)
            workdir = row.folder.parent.parent
            log = read_log(workdir)
            begun_from = read_json(workdir / BEGUN_FROM)["model.sam_weights"]
            found[key] = Record(
                steps=config.train.steps,
                sam_weights=begun_from[:DIGITS],
                curve=[(step, value) for step, name, value in log if name == "val/dice"],
            )
        found[key].scores += read_scores([row], METRICS)
    return found


def read_records(folder: pathlib.Path) -> dict[Key, Record]:
    """The records of a folder, none where it has no files of them."""
    found: dict[Key, Record] = {}
    for line in _read(folder / SCORES):
        key = _key(line)
        record = found.setdefault(key, Record(int(line["steps"]), line["sam_weights"]))
        values = {m: float(line[m]) if line[m] else None for m in METRICS}
        which = (line["domain"], line["protocol"], line["scan"])
        record.scores.append(Score(*key, *which, values))
    for line in _read(folder / CURVES):
        found[_key(line)].curve.append((int(line["step"]), float(line["dice"])))
    return found


def write_records(folder: pathlib.Path, records: dict[Key, Record]) -> None:
    """Writes both files, rows in the order of their keys."""
    items = sorted(records.items())
    scores = [
        (*key, r.steps, r.sam_weights, s.domain, s.protocol, s.scan, *map(_text, s.values.values()))
        for key, r in items
        for s in r.scores
    ]
    write_csv(folder / SCORES, SCORE_COLUMNS, scores)
    curves = [(*key, step, _text(dice)) for key, record in items for step, dice in record.curve]
    write_csv(folder / CURVES, CURVE_COLUMNS, curves)


def _key(line: dict[str, str]) -> Key:
    return line["system"], int(line["labelled_slices"]), int(line["seed"])


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _read(path: pathlib.Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
