"""nnU-Net as a peer: its commands, and its masks scored."""

import csv
import json
import shlex
import sys

import nibabel as nib
import numpy as np
import pytest
from nnunet_exports import K, config_of_k, exported, layout, others, predict, prepared

from benchmarks.nnunet import __main__ as command_line
from benchmarks.nnunet.commands import VARIABLES, commands, execute, script
from benchmarks.nnunet.export import export
from benchmarks.nnunet.layout import read_cases
from benchmarks.nnunet.score import score
from sammix_jax.data.files import read_json
from sammix_jax.errors import UserError


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
    for evaluation, given in zip(
        score(layout.output), read_cases(layout.output)[1]["evaluations"], strict=True
    ):
        ((case, scan),) = given["cases"].items()
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
    config.write_text("from nnunet_exports import config_of_k as get_config\n")
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
