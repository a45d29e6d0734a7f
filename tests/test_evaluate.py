"""Evaluation on whole scans: three protocols, no truth in `cam`, bad scans."""

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from sammix_jax import evaluate as evaluation_module
from sammix_jax.config_files import load_config
from sammix_jax.data import phantom
from sammix_jax.data.digests import label_digest
from sammix_jax.data.files import read_json
from sammix_jax.data.slices import SliceStore
from sammix_jax.data.split_files import TrainingScans, training_scans
from sammix_jax.errors import UserError
from sammix_jax.evaluate import IncompleteEvaluation, evaluate
from sammix_jax.evaluation import results as results_module
from sammix_jax.evaluation.results import results_folder, saved_results
from sammix_jax.predict import predict


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


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Three scans that no run has seen, in LiTS's layout."""
    folder = tmp_path_factory.mktemp("others")
    phantom.write_lits(folder, 3, seed=5)
    return folder


def test_unseen_patients_under_three_protocols(run, config):
    evaluation = evaluate(config, run)
    split = read_json(run / "split.json")
    assert {case.scan for case in evaluation.cases} == set(split["test"])
    assert evaluation.results["scans"] == split["test"]
    assert list(evaluation.summary) == ["cam", "gt_box", "none"]
    for summary in evaluation.summary.values():
        assert summary["scored"] == 1
        assert 0 <= summary["dice"]["mean"] <= 1 and 0 <= summary["nsd"]["mean"] <= 1
        assert summary["hd95_mm"]["mean"] >= summary["assd_mm"]["mean"] > 0
        assert summary["dice"]["low"] is None  # one patient tells nothing of others
    by = {case.protocol: case for case in evaluation.cases}
    assert len({case.predicted_ml for case in evaluation.cases}) == 3  # three ways to prompt
    assert evaluation.results["classifier"]["slices"] == sum(
        SliceStore.open(run / "store").records[name].shape[0] for name in split["test"]
    )
    assert 0 < evaluation.results["prompt"]["box_iou"] <= 1

    folder = results_folder(config, run)
    with open(folder / "cases.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and float(rows[0]["dice"]) == by["cam"].dice
    assert saved_results(config, run) == evaluation.results
    best = [int(p.name) for p in (run / "checkpoints" / "best").iterdir() if p.name.isdigit()]
    assert [evaluation.results["checkpoint_step"]] == best


def test_scores_are_those_of_the_masks_on_the_scans_grid(run, config):
    """Dice on the original grid, recomputed from the files."""
    config.evaluate.protocols = ("cam",)
    (case,) = evaluate(config, run).cases
    record = SliceStore.open(run / "store").records[case.scan]
    (made,) = predict(config, run, record.image, run / "mask.nii.gz")
    predicted = np.asarray(nib.load(made.mask).dataobj) > 0
    folder = results_folder(config, run)
    assert not (folder / "masks").exists()
    config.evaluate.save_masks = True
    assert results_folder(config, run) == folder
    evaluate(config, run)
    kept = nib.load(folder / "masks" / f"{case.scan}.nii.gz")
    np.testing.assert_array_equal(np.asarray(kept.dataobj) > 0, predicted)
    np.testing.assert_array_equal(kept.affine, nib.load(record.image).affine)
    truth = np.asarray(nib.load(record.label).dataobj) > 0
    dice = 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum())
    assert case.dice == pytest.approx(dice, abs=1e-6)
    assert case.predicted_ml == pytest.approx(made.organ_ml)
    error = (predicted.sum() - truth.sum()) / truth.sum()
    assert case.volume_error == pytest.approx(error)


def test_cam_reads_no_truth(run, config, others, tmp_path, monkeypatch):
    """Every mask replaced by another one: the same predictions to the bit, but for the oracle."""
    root = tmp_path / "scans"
    shutil.copytree(others, root)
    config.evaluate.root = str(root)
    made = []
    predict_volume = evaluation_module.predict_volume
    monkeypatch.setattr(
        evaluation_module,
        "predict_volume",
        lambda *args: made.append(predict_volume(*args)) or made[-1],
    )
    before = evaluate(config, run)
    labels = sorted(root.glob("segmentation-*"))
    for path in labels:
        label = nib.load(path)
        shifted = np.roll(np.asarray(label.dataobj), (9, -5), axis=(0, 1))
        nib.save(nib.Nifti1Image(shifted, label.affine, label.header), path)
    after = evaluate(config, run)

    count = len(labels)
    assert count == 3 and len(made) == 2 * count
    for one, other in zip(made[:count], made[count:], strict=True):
        assert not np.array_equal(one.truth, other.truth)
        for protocol in ("cam", "none"):
            np.testing.assert_array_equal(one.masks[protocol], other.masks[protocol])
            np.testing.assert_array_equal(
                one.slices.logits[protocol], other.slices.logits[protocol]
            )
        for name in ("organ_probability", "cam", "box", "empty"):
            np.testing.assert_array_equal(getattr(one.slices, name), getattr(other.slices, name))
        assert not np.array_equal(one.masks["gt_box"], other.masks["gt_box"])
    assert before.summary["cam"]["dice"] != after.summary["cam"]["dice"]


def test_one_bad_scan_does_not_waste_the_others(run, config, others, tmp_path, monkeypatch):
    root = tmp_path / "scans"
    shutil.copytree(others, root)
    bad = next(root.glob("segmentation-1.*"))
    bad.write_bytes(bad.read_bytes()[:200])
    config.evaluate.root = str(root)
    config.evaluate.protocols = ("none",)
    with pytest.raises(IncompleteEvaluation, match=r"1 of 3 scans(.|\n)*segmentation-1") as raised:
        evaluate(config, run)
    folder = results_folder(config, run)
    assert str(folder) in str(raised.value) and folder.parent == run / "evaluation"
    results = read_json(folder / "results.json")
    assert results["scans"] == ["volume-0", "volume-2"]
    assert [bad.name in fault for fault in results["faults"]] == [True]
    assert raised.value.evaluation.results == results
    assert saved_results(config, run) is None  # so that it is done again
    with pytest.raises(IncompleteEvaluation), monkeypatch.context() as patch:
        patch.setattr(evaluation_module, "predict_volume", None)  # not for the others, though
        evaluate(config, run)

    for path in root.glob("segmentation-*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no scan could be scored(.|\n)*segmentation-2"):
        evaluate(config, run)


def test_what_was_scored_before_a_crash_is_taken_over(run, config, monkeypatch, caplog):
    """And results name the checkpoint that was scored, though a run has a better one by then."""
    config.evaluate.part, config.evaluate.protocols = "train", ("cam", "none")
    whole = evaluate(config, run)
    folder, score, scored = results_folder(config, run), evaluation_module.score_scan, []
    assert not (folder / "so_far").exists()
    (folder / "results.json").unlink()

    def fails(known, *args):
        if scored:
            raise MemoryError
        scored.append(known.name)
        return score(known, *args)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation_module, "score_scan", fails)
        with pytest.raises(MemoryError):
            evaluate(config, run)
    kept = (folder / "cases_so_far.csv").read_text().splitlines()
    assert len(kept) == 1 + 2 and not (folder / "results.json").exists()

    monkeypatch.setattr(results_module, "best_step", lambda workdir: 10**6)
    predicted, predict_volume = [], evaluation_module.predict_volume

    def predicts(predict, variables, volume, *args):
        predicted.append(volume.path)
        return predict_volume(predict, variables, volume, *args)

    monkeypatch.setattr(evaluation_module, "predict_volume", predicts)
    caplog.set_level("INFO")
    found = evaluate(config, run)
    assert "1 of 2 scans were scored before, and are taken over" in caplog.text
    assert len(predicted) == 1 and scored[0] not in predicted[0].name
    assert found.results == whole.results and found.cases == whole.cases
    assert 0 < found.results["checkpoint_step"] < 10**6
    for one, other in zip(found.examples, whole.examples, strict=True):
        np.testing.assert_array_equal(one.predicted, other.predicted)
        np.testing.assert_array_equal(one.cam, other.cam)
    cases = (folder / "cases.csv").read_text().splitlines()
    assert cases[:3] == kept and len(cases) == 1 + 4
    assert not (folder / "cases_so_far.csv").exists() and not (folder / "so_far").exists()


def test_an_evaluation_that_ends_in_its_report_scores_nothing_again(run, config, monkeypatch):
    config.evaluate.protocols = ("none",)
    told = []

    def fails(evaluation):
        told.append(evaluation.results)
        raise UserError("no room for the report")

    with pytest.raises(UserError, match="no room"):
        evaluate(config, run, fails)
    monkeypatch.setattr(evaluation_module, "predict_volume", None)
    evaluate(config, run, lambda evaluation: told.append(evaluation.results))
    assert told[0] == told[1] and told[0]["scans"]
    assert not (results_folder(config, run) / "so_far").exists()


def test_scans_that_trained_the_model_are_named(run, config, caplog):
    config.evaluate.part = "train"
    config.evaluate.protocols = ("none",)
    results = evaluate(config, run).results
    assert "2 of these scans trained the model" in caplog.text
    assert results["trained_on"] == results["scans"]
    caplog.clear()
    config.evaluate.part = "test"
    assert evaluate(config, run).results["trained_on"] == []
    assert "trained the model" not in caplog.text and "nobody can tell" not in caplog.text
    assert "chose" not in caplog.text
    config.evaluate.part = "val"
    assert evaluate(config, run).results["trained_on"] == []
    assert "1 of these scans chose the model's checkpoint, so" in caplog.text


def test_copies_of_training_scans_are_known_by_their_images(run, config, tmp_path, monkeypatch):
    """Under other names and with other masks; those without masks where a teacher taught on them.

    A teacher's checkpoint holds more: here the run's own stands for one that it taught.
    """
    records = SliceStore.open(run / "store").records
    split = read_json(run / "split.json")
    (unlabelled,) = (record.name for record in records.values() if not record.has_label)
    root = tmp_path / "copies"
    root.mkdir()
    for n, name in enumerate((split["train"][0], split["test"][0], unlabelled), start=90):
        scan = nib.load(records[name].image)
        mask = np.zeros(scan.shape, np.uint8)
        mask[5:15, 5:15, 2:4] = 1
        nib.save(scan, root / f"volume-{n}.nii")
        nib.save(nib.Nifti1Image(mask, scan.affine), root / f"segmentation-{n}.nii")
    config.evaluate.root = str(root)
    config.evaluate.protocols = ("none",)
    results = evaluate(config, run).results
    assert results["trained_on"] == ["volume-90"]
    assert list(results["digests"]) == results["scans"] == ["volume-90", "volume-91", "volume-92"]

    def with_a_teacher(config, workdir):
        taught = config.copy_and_resolve_references()
        taught.consistency.weight = 0.1
        return training_scans(taught, workdir)

    monkeypatch.setattr(evaluation_module, "training_scans", with_a_teacher)
    assert evaluate(config, run).results["trained_on"] == ["volume-90", "volume-92"]


def test_scans_without_the_organ_are_not_taken_for_one_another(
    run, config, others, tmp_path, monkeypatch, caplog
):
    """Their masks are alike on one grid; and a scan without a mask is told."""
    shutil.copytree(others, tmp_path / "scans")
    config.evaluate.root = str(tmp_path / "scans")
    config.evaluate.protocols = ("none",)
    path = next((tmp_path / "scans").glob("segmentation-0.*"))
    label = nib.load(path)
    empty = np.zeros(label.shape, np.uint8)
    nib.save(nib.Nifti1Image(empty, label.affine, label.header), path)
    next((tmp_path / "scans").glob("segmentation-2.*")).unlink()
    depth = label.shape[2]
    none = np.zeros(label.shape[::-1], bool)
    alike = label_digest(label.affine, none, np.zeros(depth), np.ones(depth, bool))
    trained = TrainingScans(frozenset({alike}), frozenset({alike}), hdf5=False)
    monkeypatch.setattr(evaluation_module, "training_scans", lambda *_: trained)
    results = evaluate(config, run).results
    assert alike in results["digests"]["volume-0"]
    assert results["trained_on"] == results["chose"] == []
    assert "1 of 3 scans have no mask and are not scored, such as volume-2" in caplog.text
    assert "no mask of these" not in caplog.text
    for mask in (tmp_path / "scans").glob("segmentation-*"):
        whole = nib.load(mask)
        nib.save(nib.Nifti1Image(np.zeros(whole.shape, np.uint8), whole.affine), mask)
    evaluate(config, run)
    assert "no mask of these 2 scans shows liver" in caplog.text


def test_a_scan_that_was_replaced_since_training_is_not_scored(run, config, others, tmp_path):
    config.evaluate.part, config.evaluate.protocols = "train", ("none",)
    manifest = read_json(run / "store" / "manifest.json")
    name = read_json(run / "split.json")["train"][0]
    (record,) = (scan for scan in manifest["scans"] if scan["name"] == name)
    for kind, prefix in (("image", "volume"), ("label", "segmentation")):
        copy = tmp_path / f"{prefix}-9.nii.gz"
        shutil.copy(next(others.glob(f"{prefix}-0.*")), copy)
        record[kind] = str(copy)
    (run / "store" / "manifest.json").write_text(json.dumps(manifest))
    told = r"1 of 2 scans(.|\n)*volume-9\.nii\.gz: other voxels, or another mask, than when"
    with pytest.raises(IncompleteEvaluation, match=told):
        evaluate(config, run)


def test_that_hdf5_may_hold_training_scans_is_told(run, config, write_hdf5, caplog):
    write_hdf5("scans/a.h5")
    config.evaluate.root = str(write_hdf5("scans/b.h5").parent)
    config.evaluate.protocols = ("none",)
    assert evaluate(config, run).results["trained_on"] == []
    assert caplog.text.count("trained on NIfTI files and these are HDF5: nobody can tell") == 1


def test_refusals(run, config):
    config.evaluate.root = "/nowhere"
    with pytest.raises(UserError, match=r"evaluate\.root=/nowhere: no such folder"):
        evaluate(config, run)
    config.evaluate.root = ""
    config.evaluate.scans = 3
    with pytest.raises(UserError, match=r"evaluate\.scans=3: .*--config\.evaluate\.root=DIR"):
        evaluate(config, run)
    config.evaluate.scans = 0
    manifest = read_json(run / "store" / "manifest.json")
    for scan in manifest["scans"]:
        scan["image"] = f"/moved/{scan['name']}.nii.gz"
    (run / "store" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"/moved/.*no such file, as of all .*--mode=prepare"):
        evaluate(config, run)
    for scan in manifest["scans"]:
        scan["label_digest"] = "prepared for another organ"
    (run / "store" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"have other voxels or masks there than when .* trained"):
        evaluate(config, run)
    manifest["scans"] = []
    (run / "store" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="lacks the scans"):
        evaluate(config, run)
