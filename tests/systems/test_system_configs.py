"""Every system has its config, says what it cannot do, and is reported as what it is."""

import importlib

import numpy as np
import pytest
from tiny_systems import SETTINGS, tiny_config, tiny_system

from sammix_jax.config_rules import check_config
from sammix_jax.errors import UserError
from sammix_jax.evaluation import report
from sammix_jax.evaluation.results import Evaluation, Example, collect
from sammix_jax.evaluation.scores import Case, Guidance
from sammix_jax.evaluation.seeds import over_seeds, write_over_seeds
from sammix_jax.evaluation.tables import result_table
from sammix_jax.systems.named import SYSTEMS, make_system
from sammix_jax.systems.system import ORACLES, PROTOCOLS, scored_protocols

CONFIGS = ("unet", "nnunet", "multimix", "transunet", "sam_pp", "samed", "sam_mix_labelled_only")


def test_headlines_and_what_may_be_scored():
    headlines = {name: tiny_system(tiny_config(name)).headline for name in SETTINGS}
    assert headlines == dict.fromkeys(SETTINGS, "none") | {"prompted_sam_points": "gt_points"}
    pointed = tiny_system(tiny_config("prompted_sam_points"))
    assert scored_protocols(pointed, PROTOCOLS) == ("gt_points", "gt_box", "none")
    with pytest.raises(UserError, match=r"expected some of none for model\.system=unet"):
        scored_protocols(tiny_system(tiny_config("unet")), ("cam", "gt_box"))


@pytest.mark.parametrize(
    ("name", "field", "value", "expected"),
    [
        ("unet", "evaluate.protocols", ("cam", "gt_box"), "some of none for model.system=unet"),
        ("unet", "consistency.weight", 1.0, "0 for"),
        ("unet", "data.size", 34, "a multiple of 4 for"),
        ("multimix", "data.size", 36, "a multiple of 8 for"),
        ("nnunet", "data.size", 43, "an even number, from 8 on"),
        ("nnunet", "data.size", 6, "an even number, from 8 on"),
        ("transunet", "data.size", 40, "a multiple of 16 for"),
        ("nnunet", "model.sam_weights", "sam.safetensors", "none for"),
        ("multimix", "train.batch_unlabelled", 4, "train.batch_labelled=2"),
        ("prompted_sam_points", "loss.negatives", True, "there is no point"),
        ("prompted_sam", "train.box", "gt", "cam"),
        ("unet", "model.prompt", "points", "none"),
        ("unet", "input.normalise", "sam", "minmax or unit"),
        ("transunet", "model.freeze_batch_norm", True, "False"),
        ("multimix", "model.remat", "blocks", "none for"),
        ("multimix", "input.scaling", "paper", "window for"),
        ("unet", "loss.iou", 1.0, "0 for"),
        ("transunet", "model.widths", (8, 8, 8), "its own sizes"),
    ],
)
def test_what_does_not_go_with_a_system(name, field, value, expected):
    config = tiny_config(name)
    if expected.endswith("from 8 on"):
        config.model.widths = ()  # as nnU-Net's planner has it
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=rf"{field}=.*: expected .*{expected}"):
        check_config(config)


@pytest.mark.parametrize("data", ["phantom", "lits"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_baseline_has_its_config(name, data):
    module = importlib.import_module(f"configs.baselines.{name}")
    config = module.get_config(data)
    check_config(config)
    system = make_system(config)
    assert system.headline in scored_protocols(system, config.evaluate.protocols)
    assert "Command" in module.__doc__ and "not measured yet" in module.__doc__
    with pytest.raises(UserError, match="no variant 'lit': expected one of phantom, lits"):
        module.get_config("lit")


def test_every_system_has_a_config_and_a_name():
    configs = [importlib.import_module(f"configs.baselines.{n}").get_config() for n in CONFIGS]
    assert {config.model.system for config in configs} == set(SYSTEMS) == set(report.SYSTEM_NAMES)
    assert set(report.PROTOCOL_NOTES) == set(PROTOCOLS)
    assert {p for p, note in report.PROTOCOL_NOTES.items() if note.startswith("oracle")} == set(
        ORACLES
    )


def evaluation(config, folder, protocol, probability=None) -> Evaluation:
    """One scan, scored under one protocol, of a system that has no CAM."""
    for name, content in (("split", '{"train": [], "val": [], "test": ["a"]}'), ("labels", "[]")):
        (folder / f"{name}.json").write_text(content)
    case = Case("a", protocol, "scored", 0.8, 0.7, 8.0, 1.0, -0.1, 0.8, 7.0, 0.5, 1500, 1400)
    guidance = Guidance(np.array([True, False]), probability, None, None)
    results = collect(config, folder, [case], [guidance], [], [], {"a": "digest"}, [], 40)
    mask = np.zeros((16, 16), bool)
    mask[4:8, 4:12] = True
    hu = np.where(mask, 60, -900).astype(np.int16)
    return Evaluation([case], results, [Example(case, 3, hu, mask, mask, None, None, None)])


def test_a_report_without_classifier_and_cam(tmp_path):
    config = tiny_config("unet")
    found = evaluation(config, tmp_path, "none")
    assert found.results["classifier"] is None and found.results["prompt"] is None
    page = report.write_report(tmp_path / "out", found, config, tmp_path).read_text()
    assert "U-Net: liver" in page and "there is no classifier" in page
    for absent in ("classifier accuracy", "empty CAMs", "activation map", 'class="warning"'):
        assert absent not in page, absent
    table = result_table(found.results)
    assert "AUROC" not in table and "box IoU" not in table and "false positives" in table
    means = over_seeds([found.results])
    assert means["classifier"] is None and result_table(means)
    write_over_seeds(tmp_path / "means", means)


def test_a_report_with_a_classifier_and_no_cam(tmp_path):
    config = tiny_config("multimix")
    found = evaluation(config, tmp_path, "none", np.array([0.9, 0.2]))
    assert found.results["classifier"]["accuracy"] == 1 and found.results["prompt"] is None
    page = report.write_report(tmp_path / "out", found, config, tmp_path).read_text()
    assert "classifier accuracy" in page and "empty CAMs" not in page


def test_an_oracle_is_called_one(tmp_path):
    config = tiny_config("prompted_sam_points")
    found = evaluation(config, tmp_path, "gt_points")
    page = report.write_report(tmp_path / "out", found, config, tmp_path).read_text()
    assert "no measure of automatic segmentation" in page
    assert "oracle: prompted with points inside the true mask" in page
