"""Configs: every file builds, unknown fields are named, a workdir belongs to one config."""

import importlib
import pathlib

import pytest

from sammix_jax.config import claim_workdir, default_config, load_config
from sammix_jax.config_rules import check_config, check_weight_files
from sammix_jax.errors import UserError
from sammix_jax.sam_mix import sam_mix

CONFIGS = sorted(p.stem for p in (pathlib.Path(__file__).parents[1] / "configs").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_describes_a_model(name):
    module = importlib.import_module(f"configs.{name}")
    assert "Command" in module.__doc__
    check_config(module.get_config())
    sam_mix(module.get_config())


def test_a_workdir_belongs_to_one_config(config, tmp_path):
    claim_workdir(config, tmp_path)
    claim_workdir(config, tmp_path)
    config.train.learning_rate = 0.5
    config.input.window = (-100.0, 200.0)
    with pytest.raises(UserError) as error:
        claim_workdir(config, tmp_path)
    assert "train.learning_rate=0.001 (now 0.5)" in str(error.value)
    assert "input.window=[-160.0, 240.0] (now [-100.0, 200.0])" in str(error.value)


def test_places_and_reporting_may_change(config, tmp_path):
    claim_workdir(config, tmp_path)
    config.data.root = "/moved"
    config.evaluate.part = "val"
    config.log.every_steps = 1
    claim_workdir(config, tmp_path)


def test_saved_config_comes_back(config, tmp_path):
    claim_workdir(config, tmp_path)
    assert load_config(tmp_path).to_dict() == config.to_dict()


def test_no_run_there(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load_config(tmp_path)


def test_saved_by_another_version(tmp_path):
    (tmp_path / "config.json").write_text('{"data": {"colour": 1}}')
    with pytest.raises(UserError, match="unknown field colour"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("cam.fusion", "times", "one of add, none"),
        ("cam.component", "first", "one of largest, peak, all"),
        ("cam.threshold", 0.0, "above 0 to 1"),
        ("data.resize", "crop", "one of fit, stretch"),
        ("data.phantom.domain", "arterial", "one of portal, unenhanced"),
        ("data.labelled_slices", -1, "at least 0"),
        ("input.window", (240.0, -160.0), "low < high"),
        ("input.window", (40.0, 40.0), "low < high"),
        ("model.sam", "vit_x", "vit_b"),
        ("model.image_size", 1000, "a multiple of 16"),
        ("model.classifier_stride", 4, "one of 32, 16, 8 for model.classifier=resnet38"),
        ("model.lora_targets", ("x",), "some of q, k, v"),
        ("train.batch_labelled", 0, "at least 1"),
        ("evaluate.protocols", ("oracle",), "some of cam, gt_box, none"),
        ("evaluate.part", "holdout", "one of train, val, test"),
        ("checkpoint.every_steps", 0, "at least 1"),
    ],
)
def test_values_that_no_run_could_use(field, value, expected):
    config = default_config()
    check_config(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=rf"config: {field}=.*: expected .*{expected}"):
        check_config(config)


def test_missing_weights_are_named():
    config = default_config()
    check_weight_files(config)
    config.model.sam_weights = "/nowhere.safetensors"
    check_config(config)  # a trained workdir needs the file no more
    with pytest.raises(UserError, match=r"model\.sam_weights=/nowhere\.safetensors: no such file"):
        check_weight_files(config)


def test_all_faults_are_told_at_once():
    config = default_config()
    config.data.size, config.train.schedule = 0, "step"
    with pytest.raises(UserError, match=r"data\.size=0.*") as error:
        check_config(config)
    assert "train.schedule='step'" in str(error.value)


def test_a_misspelt_field_is_no_new_field():
    config = default_config()
    with pytest.raises(AttributeError, match="learning_rate"):
        config.train.learning_rat = 1.0
