"""The report: one page that stands alone, and pictures of this evaluation only."""

import re

import numpy as np
import pytest
from scored import DICES, evaluation, example

from sammix_jax.config import default_config
from sammix_jax.data.files import write_json
from sammix_jax.evaluation import figures
from sammix_jax.evaluation.report import write_report
from sammix_jax.evaluation.results import Evaluation, collect
from sammix_jax.evaluation.scores import Case, Guidance


@pytest.fixture
def run(tmp_path):
    split = {"train": ["a", "b"], "val": ["c"], "test": []}
    write_json(tmp_path / "run" / "split.json", split)
    write_json(tmp_path / "run" / "labels.json", [{"scan": "a", "slice": n} for n in range(17)])
    (tmp_path / "run" / "metrics.csv").write_text("step,metric,value\n1,train/loss,0.9\n")
    return tmp_path / "run"


def test_a_page_that_stands_alone(run, tmp_path):
    config = default_config()
    page = write_report(tmp_path / "out", evaluation(run, DICES, config), config, run).read_text()
    assert "http" not in page and "<script" not in page
    assert page.count("<img") == page.count('src="data:image/png;base64,') == 1 + 1 + 3
    chosen = re.findall(r"<b>(best|median|worst)</b> (v-\d)", page)
    assert chosen == [("best", "v-3"), ("median", "v-2"), ("worst", "v-1")]
    for told in (
        "oracle",
        "0.828 ± 0.087 [",
        "17",
        "0.710",
        "labels.json",
        "&quot;lora_rank&quot;",
    ):
        assert told in page, told
    assert 'class="warning"' not in page
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "report.html", "v-1.png", "v-2.png", "v-3.png", "v-4.png"]  # fmt: skip


def test_pictures_of_an_earlier_evaluation_are_removed(run, tmp_path):
    config = default_config()
    write_report(tmp_path / "out", evaluation(run, DICES, config), config, run)
    write_report(tmp_path / "out", evaluation(run, {"v-2": 0.8}, config), config, run)
    assert [p.name for p in (tmp_path / "out").glob("*.png")] == ["v-2.png"]


def test_what_spoils_the_numbers_is_told_first(run, tmp_path):
    config = default_config()
    found = evaluation(run, DICES, config, faults=["<x>.nii: cut short"], trained_on=["v-2"])
    page = write_report(tmp_path / "out", found, config, run).read_text()
    warnings = re.findall(r'<p class="warning">(.*?)</p>', page, re.S)
    assert len(warnings) == 2 and page.index(warnings[1]) < page.index("<table")
    assert "1 of these scans trained the model" in warnings[0] and "v-2" in warnings[0]
    assert "&lt;x&gt;.nii: cut short" in warnings[1]


def test_every_part_of_the_loss_has_its_curve():
    names = ("val/accuracy", "train/bce_loss", "train/accuracy", "train/loss", "val/dice")
    drawn = figures.curves([(step, name, 0.5) for step in (1, 2) for name in names])
    shown = [[line.get_label() for line in figure.axes[0].lines] for figure in drawn.values()]
    assert shown == [["loss", "bce_loss"], ["dice", "accuracy"]]
    assert not figures.curves([(1, "train/host_mib", 2.0)])


def test_nothing_scored_and_no_curves(run, tmp_path):
    (run / "metrics.csv").unlink()
    config = default_config()
    nothing = Case("v-1", "cam", "both_empty", *[None] * 7, 0.0, 0.0, 0.0)
    guidance = Guidance(np.zeros(2, bool), np.zeros(2), np.zeros(0), np.zeros(0, bool))
    results = collect(config, run, [nothing], [guidance], [], [], {"v-1": "digest"}, [], 40)
    shown = Evaluation([nothing], results, [example(nothing)])
    page = write_report(tmp_path / "out", shown, config, run).read_text()
    assert "<img" not in page and "no learning curves" in page and "–" in page
