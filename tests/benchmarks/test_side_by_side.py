"""The table of a comparison: columns, medians and ratios."""

import json
import os
import sys

import pytest

from benchmarks.speed import side_by_side
from benchmarks.speed.input_pipeline import bytes_per_slice, make_batches, make_store
from benchmarks.speed.train_step import STEPS

RESULTS = {
    "pytorch": [
        {"times": [4.0, 2.0, 3.0], "rise": 100.0, "peak": 1000.0},
        {"times": [9.0, 1.0, 3.0], "rise": 300.0, "peak": 3000.0},
    ],
    "jax": [{"times": [1.5, 1.5, 1.0], "rise": 50.0, "peak": 500.0}],
}


def cells(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize("slices", [0, 2])
def test_columns_and_values(slices):
    names, rule = side_by_side.header(slices).splitlines()
    values = cells(side_by_side.row(256, RESULTS, slices))
    assert len(cells(names)) == len(cells(rule)) == len(values)
    speeds = ["0.667", "1.333"] if slices else []
    times = ["3.000 (1.000–9.000)", "1.500 (1.000–1.500)", "0.50"]
    assert values == ["256", *speeds, *times, "200", "50", "0.25", "2000", "500", "0.25"]


def test_the_first_call_is_not_timed():
    calls = []
    made = side_by_side.SideBySide(
        module="none",
        title="none",
        makers={"jax": lambda side, threads: calls.append},
        make_input=lambda side: side,
        sides=(8,),
    )
    found = side_by_side.measure(made, "jax", 8, 1, repeats=3)
    assert calls == [8] * 4 and len(found["times"]) == 3
    assert json.loads(json.dumps(found)) == found


def test_resident_is_at_most_the_peak():
    assert 0 < side_by_side.resident_megabytes() <= side_by_side.peak_megabytes() + 1


def test_bytes_that_travel(tmp_path):
    """int16 HU and a label for each slice, and a uint8 mask for every second one."""
    batches = make_batches(make_store(tmp_path, scans=1, size=32), (4, 4), labelled=8)
    assert bytes_per_slice(batches) == 32 * 32 * (2 + 0.5) + 4
    assert not set(batches.labelled) & set(batches.unlabelled) and len(batches.labelled) == 8


def test_another_form_of_ours_stands_beside_pytorch(monkeypatch, capsys):
    ran = []

    def measure_apart(module, framework, side, threads, repeats):
        ran.append((framework, side))
        return RESULTS["pytorch" if framework == "pytorch" else "jax"][0]

    monkeypatch.setattr(side_by_side, "measure_apart", measure_apart)
    monkeypatch.setattr(side_by_side.metadata, "version", lambda package: "1.0")  # torch may lack
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: None)
    monkeypatch.setattr(sys, "argv", ["", "--sides", "256", "--rounds", "2", "--ours", "jax_dots"])
    side_by_side.run(STEPS)
    assert ran == [("pytorch", 256), ("jax_dots", 256)] * 2
    assert "jax_dots" in capsys.readouterr().out
