"""nnU-Net as a peer: what is handed to it, its commands, and its masks scored."""

import csv
import json
import shlex
import shutil
import sys

import nibabel as nib
import numpy as np
import pytest
from conftest import small_config

from benchmarks.nnunet import __main__ as command_line
from benchmarks.nnunet.commands import VARIABLES, commands, execute, script
from benchmarks.nnunet.export import draw_negatives, export, patient_folds
from benchmarks.nnunet.layout import (
    Layout,
    canonical_affine,
    read_cases,
    slice_affine,
    write_nifti,
)
from benchmarks.nnunet.score import read_prediction, score
from sammix_jax import prepare
from sammix_jax.data import phantom, volumes
from sammix_jax.data.files import read_json
from sammix_jax.data.slices import SliceId, SliceStore
from sammix_jax.data.splits import draw_labelled_slices
from sammix_jax.errors import UserError

K, NEGATIVES = 7, 3
FILE_ORDER = "IPR"  # of the second domain's scans here: no axis where nnU-Net would look for it


def config_of_k():
    config = small_config()
    config.data.labelled_slices = K
    config.data.split = (3, 1, 1)
    config.data.phantom.unlabelled = 0
    config.evaluate.scans = 0
    return config


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A workdir that holds a prepared store and has not been trained."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare.prepare(config_of_k(), folder)
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A scan of the second domain, stored in another axis order."""
    folder = tmp_path_factory.mktemp("others")
    phantom.write_lits(folder, 1, seed=5, domain=phantom.DOMAINS["unenhanced"])
    for path in folder.glob("*.nii*"):
        image = nib.load(path)
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(FILE_ORDER)
        )
        turned = nib.Nifti1Image(np.asarray(image.dataobj), image.affine).as_reoriented(turn)
        path.unlink()
        nib.save(turned, path)
    return folder


@pytest.fixture(scope="module")
def exported(prepared, others, tmp_path_factory):
    output = tmp_path_factory.mktemp("nnunet") / "export"
    config = config_of_k()
    return export(config, prepared, output, negatives=NEGATIVES, roots=[str(others)])


@pytest.fixture
def layout(exported):
    """The export without predictions and scores."""
    for path in (*exported.output.glob("predictions/*"), *exported.output.glob("evaluation/*/*")):
        path.unlink()
    return exported


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def lps(path):
    """Voxels (D, H, W) and spacing (D, H, W) of a file, which must lie in canonical order."""
    image = nib.load(path)
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    return np.asarray(image.dataobj).transpose(2, 1, 0), image.header.get_zooms()[::-1]


def predict(layout, change=lambda mask: mask, move=lambda affine: affine):
    """Writes the truth as nnU-Net's prediction, changed as told."""
    layout.predictions.mkdir(exist_ok=True)
    for evaluation in read_cases(layout.output)[1]["evaluations"]:
        for case, scan in evaluation["cases"].items():
            given = nib.load(layout.image("imagesTs", case))
            label = nib.load(scan["label"])
            turn = nib.orientations.ornt_transform(
                nib.io_orientation(label.affine), nib.io_orientation(given.affine)
            )
            truth = np.asarray(label.as_reoriented(turn).dataobj) > 0
            mask = change(truth).astype(np.uint8)
            nib.save(nib.Nifti1Image(mask, move(given.affine)), layout.prediction(case))


def test_names_and_dataset_json(layout):
    assert layout.raw.parts[-2:] == ("nnUNet_raw", "Dataset501_liver")
    cases = [f"case_{i:04d}" for i in range(K + NEGATIVES)]
    assert names(layout.raw) == ["dataset.json", "imagesTr", "imagesTs", "labelsTr"]
    assert names(layout.raw / "imagesTr") == [f"{case}_0000.nii.gz" for case in cases]
    assert names(layout.raw / "labelsTr") == [f"{case}.nii.gz" for case in cases]
    tests = ["test_0000_0000.nii.gz", "test_0001_0000.nii.gz"]
    assert names(layout.raw / "imagesTs") == tests
    assert read_json(layout.raw / "dataset.json") == {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1},
        "numTraining": K + NEGATIVES,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIO",
    }


def test_the_labelled_slices_and_no_others(layout, prepared):
    """HU, masks and spacing of every case, against the scans' own files."""
    store = SliceStore.open(prepared / "store")
    split = read_json(layout.output / "split.json")
    drawn = draw_labelled_slices(store, tuple(split["train"]), K, config_of_k().data.labels_seed)
    training = read_cases(layout.output)[1]["training"]
    where = [(fields["scan"], fields["slice"]) for fields in training.values()]
    assert where[:K] == [(s.scan, store.records[s.scan].slices[s.position]) for s in drawn]
    assert len(set(where)) == K + NEGATIVES
    for case, fields in training.items():
        record = store.records[fields["scan"]]
        assert record.name in split["train"]
        source = nib.load(record.image)
        assert nib.aff2axcodes(source.affine)[2] == "S"
        flip = slice(None, None, -1 if nib.aff2axcodes(source.affine)[1] == "A" else 1)
        hu = np.asarray(source.dataobj)[:, flip, fields["slice"]].T
        truth = np.asarray(nib.load(record.label).dataobj)[:, flip, fields["slice"]].T > 0
        image, spacing = lps(layout.image("imagesTr", case))
        mask, mask_spacing = lps(layout.label(case))
        assert image.shape == mask.shape == (1, *hu.shape)
        assert image.dtype == np.int16 and mask.dtype == np.uint8
        np.testing.assert_array_equal(image[0], hu)
        np.testing.assert_array_equal(mask[0], truth)
        assert truth.any() == fields["shows_organ"] == (case < f"case_{K:04d}")
        np.testing.assert_allclose(spacing[1:], record.spacing[1:], rtol=1e-6)
        assert spacing[0] == 999 and mask_spacing == spacing


def test_slices_keep_their_place(layout, prepared):
    """The corner voxel lies where the scan's affine has it, and what crosses it is flat."""
    store = SliceStore.open(prepared / "store")
    for case, fields in read_cases(layout.output)[1]["training"].items():
        source = nib.load(store.records[fields["scan"]].image)
        voxel = np.array([0, 0, fields["slice"], 1.0])
        if nib.aff2axcodes(source.affine)[1] == "A":
            voxel[1] = source.shape[1] - 1
        affine = nib.load(layout.image("imagesTr", case)).affine
        np.testing.assert_allclose(affine[:, 3], source.affine @ voxel, atol=1e-4)


@pytest.mark.parametrize("order", ["RAS", "IPR", "SLA"])
def test_affines_of_sheared_scans(write_scan, ct, order):
    """A gantry tilt stays; voxels are followed to where the file's own affine puts them."""
    affine = np.array([[-2.0, 0, 0, 9], [0, -3, 1.5, 8], [0, 0, 5, -7], [0, 0, 0, 1]])
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(affine), nib.orientations.axcodes2ornt(order)
    )
    image = nib.Nifti1Image(ct, affine).as_reoriented(turn)
    volume = volumes.read_volume(write_scan("scan.nii", np.asarray(image.dataobj), image.affine))
    np.testing.assert_allclose(canonical_affine(volume), affine, atol=1e-5)
    flat = slice_affine(volume, 4)
    np.testing.assert_allclose(flat[:3, 3], (affine @ [0, 0, 4, 1])[:3], atol=1e-5)
    np.testing.assert_allclose(nib.affines.voxel_sizes(flat), (2, 3, 999), rtol=1e-6)
    np.testing.assert_allclose(np.cross(flat[:3, 2], affine[:3, 2]), 0, atol=1e-3)


@pytest.mark.parametrize("orientation", ["", "RAS", "LAS", "PIR"])
def test_a_prediction_for_a_scan_without_affine_lies_as_it_was_exported(
    write_scan, ct, tmp_path, orientation
):
    scan = volumes.read_volume(write_scan("scan.nii", ct, np.eye(4)), orientation)
    layout = Layout(tmp_path / "export", "Dataset501_liver")
    affine = canonical_affine(scan)
    write_nifti(layout.image("imagesTs", "test_0000"), scan.hu, affine)
    truth = scan.hu > 60
    write_nifti(layout.prediction("test_0000"), truth.astype(np.uint8), affine)
    np.testing.assert_array_equal(read_prediction(layout, "test_0000", scan), truth)


def test_test_scans_are_whole_and_in_canonical_order(layout, others):
    first, second = read_cases(layout.output)[1]["evaluations"]
    assert [scan["name"] for scan in first["cases"].values()] == (
        read_json(layout.output / "split.json")["test"]
    )
    assert second["root"] == str(others.resolve()) and list(second["cases"]) == ["test_0001"]
    (path,) = others.glob("volume-*")
    source = nib.load(path)
    assert "".join(nib.aff2axcodes(source.affine)) == FILE_ORDER
    image, spacing = lps(layout.image("imagesTs", "test_0001"))
    # I, P, R → L, P, S: the first and the last axis turned round.
    hu = np.asarray(source.dataobj)[::-1, :, ::-1]  # (D, H, W)
    np.testing.assert_array_equal(image, hu)
    np.testing.assert_allclose(spacing, source.header.get_zooms(), rtol=1e-6)


def test_folds_hold_patients_apart(layout):
    training = read_cases(layout.output)[1]["training"]
    folds = read_json(layout.splits)
    assert layout.splits.parts[-3:-1] == ("nnUNet_preprocessed", "Dataset501_liver")
    patients = {fields["scan"] for fields in training.values() if fields["shows_organ"]}
    assert len(folds) == len(patients) > 1
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == sorted(training)
        sides = [{training[case]["scan"] for case in fold[side]} for side in ("train", "val")]
        assert not sides[0] & sides[1]
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(training)


def test_every_fold_has_a_labelled_slice():
    counts = {"a": 9, "b": 1, "c": 4, "d": 2, "e": 1, "f": 1, "g": 0}
    labels = [SliceId(scan, i) for scan, count in counts.items() for i in range(count)]
    counts |= dict.fromkeys("hi", 0)
    empty = [SliceId(scan, 50) for scan in "aghi"]
    training = {f"case_{i:04d}": s for i, s in enumerate([*labels, *empty])}
    folds = patient_folds(training, labels)
    held = [sum(training[case] in labels for case in fold["val"]) for fold in folds]
    assert held == [9, 4, 2, 2, 1]
    # Patients of whom nothing is labelled do not pile up in one of them.
    assert [len(fold["val"]) for fold in folds] == [10, 4, 3, 3, 2]
    assert patient_folds(dict(zip("xy", labels[:2], strict=True)), labels[:2]) == []


def test_scans_of_one_patient_are_in_one_fold():
    labels = [SliceId(f"p{p}_{phase}", 0) for p in (1, 2) for phase in ("art", "portal")]
    training = {s.scan: s for s in labels}
    folds = patient_folds(training, labels, r"(p\d+)_")
    assert [fold["val"] for fold in folds] == [["p1_art", "p1_portal"], ["p2_art", "p2_portal"]]


def test_what_cannot_be_scored_is_not_exported(prepared, others, tmp_path):
    """A mask that is annotated in part."""
    shutil.copytree(others, tmp_path / "scans")
    (path,) = (tmp_path / "scans").glob("segmentation-*")
    label = nib.load(path)
    voxels = np.asarray(label.dataobj).copy()
    voxels[0] = 9
    nib.save(nib.Nifti1Image(voxels, label.affine, label.header), path)
    config = config_of_k()
    config.evaluate.ignore_value = 9
    with pytest.raises(UserError, match=r"segmentation-0\.nii.*: annotated in part"):
        export(config, prepared, tmp_path / "out", roots=[str(tmp_path / "scans")])


def test_a_config_file_may_have_variants():
    config = command_line._config("configs/baselines/nnunet.py:lits")
    assert (config.model.system, config.data.phantom.scans) == ("nnunet", 0)
    assert command_line._config("configs/lits.py").data.resize == "paper"
    for named in ("configs/nowhere.py:lits", "sammix_jax/errors.py"):
        with pytest.raises(UserError, match=rf"--config={named}: cannot be read as a config"):
            command_line._config(named)


def test_negatives_are_slices_without_the_organ(prepared):
    store = SliceStore.open(prepared / "store")
    known = [s for s in store.slices("volume-1") if store.image_label(s) == 0]
    draw = lambda count, seed=3: draw_negatives(store, ["volume-1"], count, seed, most=5)  # noqa: E731
    drawn = draw(4)
    assert len(set(drawn)) == 4 and set(drawn) <= set(known)
    assert drawn == draw(4)
    assert drawn != draw(4, seed=4)
    assert draw(0) == []
    assert len(draw(None)) == min(5, len(known))
    with pytest.raises(UserError, match=rf"negatives=999: .* have {len(known)} slices without"):
        draw(999)


def test_a_trained_workdir_lends_its_own_slices(workdir, tmp_path):
    layout = export(command_line.load_config(workdir), workdir, tmp_path / "out", negatives=0)
    for name in ("split.json", "labels.json"):
        assert (layout.output / name).read_text() == (workdir / name).read_text()
    training = read_cases(layout.output)[1]["training"].values()
    kept = [{"scan": fields["scan"], "slice": fields["slice"]} for fields in training]
    assert kept == read_json(workdir / "labels.json")


def test_an_export_needs_a_folder_of_its_own(prepared, layout):
    with pytest.raises(UserError, match="is not empty; delete it or give another --output"):
        export(config_of_k(), prepared, layout.output)
    with pytest.raises(UserError, match="dataset_id=1000: expected 1 to 999"):
        export(config_of_k(), prepared, layout.output, dataset_id=1000)


def test_the_truth_scores_one(layout, others):
    predict(layout)
    first, second = score(layout.output)
    for evaluation in (first, second):
        (case,) = evaluation.cases
        assert (case.protocol, case.status) == ("none", "scored")
        assert case.dice == case.nsd == case.slice_dice == 1
        assert case.hd95_mm == case.slice_hausdorff_px == case.volume_error == 0
        assert case.false_positive_ml == 0
        assert evaluation.results["classifier"] is None and evaluation.results["prompt"] is None
        assert evaluation.results["method"] == "nnU-Net"
        assert evaluation.results["checkpoint_step"] is None
        assert list(evaluation.summary) == ["none"]
        assert set(evaluation.results["digests"]) == {case.scan}
        assert evaluation.results["trained_on"] == []
    folder = layout.output / "evaluation" / "test"
    assert read_json(folder / "results.json") == json.loads(json.dumps(first.results))
    with open(folder / "cases.csv", encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["protocol"], float(row["dice"])) == ("none", 1)
    (elsewhere,) = (layout.output / "evaluation").glob(f"{others.name}-*")
    assert read_json(elsewhere / "results.json")["evaluate"]["root"] == str(others.resolve())


def test_an_empty_prediction_is_a_failure(layout):
    predict(layout, np.zeros_like)
    for evaluation in score(layout.output):
        (case,) = evaluation.cases
        assert (case.status, case.dice, case.slice_dice) == ("prediction_empty", 0, 0)
        assert evaluation.summary["none"]["failures"] == 1


def test_half_a_prediction(layout):
    """Dice on the scan's own grid: of the truth and what is left of it on the patient's right."""

    def right(mask):
        mask[mask.shape[0] // 2 :] = False  # the first axis runs to the left
        return mask

    predict(layout, right)
    for evaluation, exported in zip(
        score(layout.output), read_cases(layout.output)[1]["evaluations"], strict=True
    ):
        ((case, scan),) = exported["cases"].items()
        kept = np.count_nonzero(np.asarray(nib.load(layout.prediction(case)).dataobj))
        whole = np.count_nonzero(np.asarray(nib.load(scan["label"]).dataobj))
        assert 0 < kept < whole
        assert evaluation.cases[0].dice == pytest.approx(2 * kept / (kept + whole), abs=1e-12)


def test_the_largest_component_alone_as_the_run_has_it(prepared, others, tmp_path):
    config = config_of_k()
    config.evaluate.component = "largest"
    made = export(config, prepared, tmp_path / "export", negatives=0, roots=[str(others)])

    def with_a_corner(mask):
        mask[0, 0, 0] = True
        return mask

    predict(made, with_a_corner)
    for evaluation in score(made.output):
        assert evaluation.results["evaluate"]["component"] == "largest"
        assert evaluation.cases[0].dice == 1


def test_predictions_on_another_grid(layout):
    predict(layout, lambda mask: mask[:-1])
    with pytest.raises(UserError, match=r"test_0000\.nii\.gz: the mask's grid is \(\d+(.|\n)*has"):
        score(layout.output)

    def shifted(affine):
        return affine + np.array([[0, 0, 0, 0], [0, 0, 0, 3.0], [0, 0, 0, 0], [0, 0, 0, 0]])

    predict(layout, move=shifted)
    with pytest.raises(UserError, match=r"up to 3 mm from .*test_0000_0000(.|\n)*predict .* again"):
        score(layout.output)
    predict(layout, move=lambda affine: affine @ np.diag([1, 1, -1, 1]))
    with pytest.raises(UserError, match=r"test_0000\.nii\.gz: the mask's affine places"):
        score(layout.output)
    assert not list(layout.output.glob("evaluation/*/results.json"))


def test_labels_that_nnunet_was_not_given(layout):
    predict(layout, lambda mask: mask * np.uint8(2))
    with pytest.raises(UserError, match=r"test_0000\.nii\.gz: the mask holds the values \[2\]"):
        score(layout.output)


def test_missing_and_unknown_predictions(layout):
    (scan,) = read_json(layout.output / "split.json")["test"]
    with pytest.raises(UserError, match=rf"2 of 2 .*test_0000\.nii\.gz \(scan {scan}\), test_0001"):
        score(layout.output)
    predict(layout)
    layout.prediction("test_0001").rename(layout.prediction("test_0007"))
    with pytest.raises(UserError, match=r"1 of 2 predictions are missing: test_0001\.nii\.gz \("):
        score(layout.output)
    predict(layout)
    with pytest.raises(UserError, match=r"\['test_0007'\] belong to no scan of .*cases\.json"):
        score(layout.output)
    with pytest.raises(UserError, match=r"cases\.json: no such file; run `export`"):
        score(layout.output / "elsewhere")


def test_commands(layout):
    plan, train, predict_ = commands(layout.output, device="cpu", processes=2)
    assert shlex.join(plan) == (
        "nnUNetv2_plan_and_preprocess -d 501 -c 2d --verify_dataset_integrity -npfp 2 -np 2"
    )
    assert shlex.join(train) == "nnUNetv2_train 501 2d all -tr nnUNetTrainer -device cpu"
    assert shlex.join(predict_) == (
        f"nnUNetv2_predict -i {layout.raw / 'imagesTs'} -o {layout.predictions} -d 501 -c 2d "
        "-f all -tr nnUNetTrainer -device cpu -npp 2 -nps 2"
    )
    lines = commands(layout.output, ("0", "1"), "nnUNetTrainer_1epoch")
    assert [line[1:4] for line in lines[1:3]] == [["501", "2d", "0"], ["501", "2d", "1"]]
    assert "-f 0 1 -tr nnUNetTrainer_1epoch -device cuda" in shlex.join(lines[-1])
    with pytest.raises(UserError, match=r"folds=\['5'\]: .* by patient; expected some of all, 0"):
        commands(layout.output, ("0", "5"))


def test_commands_find_their_folders(layout, tmp_path, monkeypatch):
    """A stand-in for nnU-Net's command writes down its environment and arguments."""
    package = tmp_path / "nnunetv2"
    package.mkdir()
    (package / "__init__.py").touch()
    tool = tmp_path / "nnUNetv2_train"
    tool.write_text(f'#!/bin/sh\nenv > {tmp_path}/env\necho "$@" > {tmp_path}/args\nexit $4\n')
    tool.chmod(0o755)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("nnUNet_raw", "/elsewhere")
    execute(layout.output, [["nnUNetv2_train", "501", "2d", "all", "0"]])
    assert (tmp_path / "args").read_text() == "501 2d all 0\n"
    set_ = dict(
        line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line
    )
    assert {name: set_[name] for name in VARIABLES} == {
        name: str(layout.output / name) for name in VARIABLES
    }
    with pytest.raises(UserError, match="nnUNetv2_train 501 2d all 3: ended with code 3"):
        execute(layout.output, [["nnUNetv2_train", "501", "2d", "all", "3"]])
    with pytest.raises(UserError, match="nnUNetv2_unheard_of: no such command"):
        execute(layout.output, [["nnUNetv2_unheard_of"]])


def test_without_nnunet(layout, monkeypatch, capsys):
    monkeypatch.setattr(
        command_line.execute.__globals__["importlib"].util, "find_spec", lambda _: None
    )
    assert command_line.main(["run", f"--output={layout.output}", "--execute"]) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith(f"export nnUNet_raw={layout.output / 'nnUNet_raw'}\n")
    assert "nnUNetv2_predict -i" in printed.out
    assert "nnunetv2 is not installed" in printed.err and "pip install nnunetv2" in printed.err
    assert script(layout.output, commands(layout.output)) in printed.out


def test_command_line(prepared, tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text("from test_nnunet import config_of_k as get_config\n")
    output = tmp_path / "out"
    arguments = [f"--workdir={prepared}", f"--config={config}", f"--output={output}"]
    assert command_line.main(["export", *arguments, "--dataset-id=7", "--negatives=1"]) == 0
    layout, cases = read_cases(output)
    assert layout.dataset == "Dataset007_liver" and len(cases["training"]) == K + 1
    predict(layout)
    assert command_line.main(["score", f"--output={output}"]) == 0
    assert "test, none: Dice 1.000" in capsys.readouterr().out
    assert command_line.main(["export", f"--workdir={prepared}", f"--output={output}"]) == 1
    assert "config.json: no such file" in capsys.readouterr().err
