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
        assert summary["scored"] == 1
        assert 0 <= summary["dice"]["mean"] <= 1
        assert summary["hd95_mm"]["mean"] > 0
    by = {case.protocol: case for case in evaluation.cases}
    assert len({case.predicted_ml for case in evaluation.cases}) == 3  # three ways to prompt

    table = result_table(evaluation.summary)
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["cam", "gt_box", "none"]
    with open(run / "evaluation" / "test" / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and float(rows[0]["dice"]) == by["cam"].volume.dice
    assert saved_summary(config, run) == evaluation.summary
    config.evaluate.gate = True
    assert saved_summary(config, run) is None

    page = write_report(run / "out", evaluation, config, run).read_text()
    assert page.count("data:image/png;base64,") == 2  # the curves and the one case
    assert "gt_box" in page and "http" not in page  # self-contained
    assert (run / "out" / f"{evaluation.cases[0].scan}.png").exists()


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
    (folder,) = (run / "evaluation").glob("other-*")  # beside the run's own
    assert (folder / "results.json").exists()


def test_scans_that_trained_the_model_are_named(run, config, caplog):
    config.evaluate.part = "train"
    config.evaluate.protocols = ("none",)
    evaluate(config, run)
    assert "2 of these 2 scans trained the model" in caplog.text
    caplog.clear()
    config.evaluate.part = "test"
    evaluate(config, run)
    assert "trained the model" not in caplog.text


def test_whole_volumes_are_scored_whatever_part_trained(run, config):
    """The central part that training keeps limits the slice columns, not the volume."""
    config.evaluate.protocols = ("cam",)
    (whole,) = evaluate(config, run).cases
    config.data.central_fraction = 0.3
    (central,) = evaluate(config, run).cases
    assert central.volume == whole.volume and central.truth_ml == whole.truth_ml
    assert central.slice_dice != whole.slice_dice


def test_no_millimetres_without_spacing(run, config, tmp_path):
    made = phantom.make_patient(3)
    root = tmp_path / "lost"
    root.mkdir()
    labels = made.labels["liver"]
    nib.save(nib.Nifti1Image(made.image, np.eye(4)), root / "volume-0.nii.gz")
    nib.save(nib.Nifti1Image(labels, np.eye(4)), root / "segmentation-0.nii.gz")
    config.evaluate.root = str(root)
    config.evaluate.protocols = ("gt_box",)
    (case,) = evaluate(config, run).cases
    assert case.volume.dice > 0 and case.volume.hd95 is None
    assert case.truth_ml is None and case.predicted_ml is None


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
    assert (summary["scored"], summary["failures"], summary["not_scored"]) == (2, 1, 1)
    assert summary["slice_hausdorff_px"] is None
    one = result_table({"cam": _summarise([case(0.9, 4.0, "scored")])})
    assert "0.900" in one and "±" not in one
    empty = _summarise([case(None, None, "both_empty")])
    assert empty["dice"] is None and "–" in result_table({"cam": empty})


def test_refusals(run, config):
    config.evaluate.root = "/nowhere"
    with pytest.raises(UserError, match=r"evaluate\.root=/nowhere: no such folder"):
        evaluate(config, run)
    config.evaluate.root = ""
    manifest = read_json(run / "store" / "manifest.json")
    manifest["scans"] = []
    (run / "store" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="lacks the scans"):
        evaluate(config, run)
