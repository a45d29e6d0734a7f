"""Configs: every file builds, unknown fields are named, a workdir belongs to one config."""

import importlib
import pathlib

import pytest

from sammix_jax.config import claim_workdir, default_config, load_config
from sammix_jax.errors import UserError
from sammix_jax.sam_mix import sam_mix

CONFIGS = sorted(p.stem for p in (pathlib.Path(__file__).parents[1] / "configs").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_describes_a_model(name):
    module = importlib.import_module(f"configs.{name}")
    assert "Command" in module.__doc__
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
    ("section", "field"),
    [("cam", "fusion"), ("cam", "component"), ("model", "mask_choice"), ("model", "dtype")],
)
def test_unknown_choices_are_named(section, field):
    config = default_config()
    config[section][field] = "nonsense"
    with pytest.raises(UserError, match=rf"{section}\.{field}='nonsense': expected one of"):
        sam_mix(config)


def test_a_misspelt_field_is_no_new_field():
    config = default_config()
    with pytest.raises(AttributeError, match="learning_rate"):
        config.train.learning_rat = 1.0
