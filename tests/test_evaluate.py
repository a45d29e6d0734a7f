"""Evaluation on whole scans: three protocols, one policy for empty masks, no truth in `cam`."""

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from sammix_jax.config import load_config
from sammix_jax.data import phantom
from sammix_jax.data.files import read_json
from sammix_jax.data.slices import SliceStore
from sammix_jax.errors import UserError
from sammix_jax.evaluate import Case, _summarise, evaluate, result_table, saved_summary
from sammix_jax.metrics import VolumeScore
from sammix_jax.report import write_report


@pytest.fixture
def config(workdir):
    config = load_config(workdir)
    config.evaluate.gate = False  # a small model's classifier may call every slice negative
    return config


@pytest.fixture
def run(workdir, tmp_path):
    """A copy of the trained workdir, to write into."""
    shutil.copytree(workdir, tmp_path / "run")
    return tmp_path / "run"


def test_unseen_patients_under_three_protocols(run, config):
    evaluation = evaluate(config, run)
    split = read_json(run / "split.json")
    assert {case.scan for case in evaluation.cases} == set(split["test"])
    assert list(evaluation.summary) == ["cam", "gt_box", "none"]
    for summary in evaluation.summary.values():
        assert summary["cases"] == 1
        assert 0 <= summary["dice"]["mean"] <= 1
        assert summary["hd95_mm"]["mean"] > 0
    # The box of the truth bounds the mask to slices that show the organ.
    by = {case.protocol: case for case in evaluation.cases}
    assert by["gt_box"].volume.dice > by["cam"].volume.dice

    table = result_table(evaluation.summary)
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["cam", "gt_box", "none"]
    with open(run / "evaluation" / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and float(rows[0]["dice"]) == by["cam"].volume.dice
    assert saved_summary(config, run) == evaluation.summary
    config.evaluate.gate = True
    assert saved_summary(config, run) is None

    write_report(run / "report.html", evaluation, table, config, run)
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4  # curves and three cases
    assert "gt_box" in page and "http" not in page.replace("http-equiv", "")


def test_scores_are_those_of_the_masks_on_the_scans_grid(run, config):
    """Dice in mm on the original grid, recomputed from the files."""
    from sammix_jax.predict import predict

    evaluation = evaluate(config, run)
    record = SliceStore.open(run / "store").records[evaluation.cases[0].scan]
    (made,) = predict(config, run, record.image, run / "mask.nii.gz")
    predicted = np.asarray(nib.load(made.mask).dataobj) > 0
    truth = np.asarray(nib.load(record.label).dataobj) > 0
    dice = 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum())
    assert evaluation.cases[0].volume.dice == pytest.approx(dice, abs=1e-6)
    assert evaluation.cases[0].predicted_ml == pytest.approx(made.organ_ml)


def test_cam_reads_no_truth(run, config):
    """Other masks, the same predictions."""
    before = evaluate(config, run).cases
    record = SliceStore.open(run / "store").records[before[0].scan]
    label = nib.load(record.label)
    shifted = np.roll(np.asarray(label.dataobj), 5, axis=0)
    copy = run / "other-mask.nii.gz"
    nib.save(nib.Nifti1Image(shifted, label.affine, label.header), copy)
    manifest = read_json(run / "store" / "manifest.json")
    for scan in manifest["scans"]:
        if scan["name"] == before[0].scan:
            scan["label"] = str(copy)
    (run / "store" / "manifest.json").write_text(json.dumps(manifest))
    after = {case.protocol: case for case in evaluate(config, run).cases}
    for case in before:
        same = after[case.protocol].predicted_ml == case.predicted_ml
        assert same == (case.protocol != "gt_box"), case.protocol
    assert after["cam"].volume.dice != before[0].volume.dice


def test_another_folder(run, config, tmp_path):
    phantom.write_totalsegmentator(tmp_path / "other", 1, seed=3)
    config.evaluate.root = str(tmp_path / "other")
    config.evaluate.protocols = ("cam",)
    evaluation = evaluate(config, run)
    assert [case.scan for case in evaluation.cases] == ["s0000"]


def case(dice, hd95, status):
    return Case("s", "cam", VolumeScore(dice, hd95, status), dice, None, 0.0, 0.0)


def test_failures_stay_in_the_mean():
    summary = _summarise([
        case(0.9, 4.0, "scored"),
        case(0.0, 100.0, "prediction_empty"),
        case(None, None, "both_empty"),
    ])  # fmt: skip
    assert summary["dice"]["mean"] == pytest.approx(0.45)
    assert summary["hd95_mm"]["mean"] == pytest.approx(52.0)
    assert (summary["cases"], summary["failures"], summary["not_scored"]) == (2, 1, 1)
    assert summary["slice_hausdorff_px"] is None
    empty = _summarise([case(None, None, "both_empty")])
    assert empty["dice"] is None and "–" in result_table({"cam": empty})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("protocols", ("oracle",), "expected some of"),
        ("part", "holdout", "expected one of train, val, test"),
        ("root", "/nowhere", "no such folder"),
    ],
)
def test_refusals(run, config, field, value, message):
    config.evaluate[field] = value
    with pytest.raises(UserError, match=message):
        evaluate(config, run)
