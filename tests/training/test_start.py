"""A run that starts from a trained workdir."""

import shutil

import jax
import numpy as np
import pytest

from sammix_jax.config_files import load_config
from sammix_jax.config_rules import check_files
from sammix_jax.data.files import read_json, write_json
from sammix_jax.data.slices import SliceStore
from sammix_jax.data.split_files import BEGUN_FROM, training_scans
from sammix_jax.errors import UserError
from sammix_jax.train import train
from sammix_jax.training import start as start_module
from sammix_jax.training.checkpoint import best_step
from sammix_jax.training.trained import load_model


@pytest.fixture
def start(workdir, config, tmp_path):
    """A config that takes the workdir's model as it is, on another split of its scans."""
    config.model.start_from = str(workdir)
    config.train.steps, config.train.epochs = 0, 0.0
    split = read_json(workdir / "split.json")
    first, second = split["train"]
    others = [*split["val"], *split["test"]]
    write_json(tmp_path / "split.json", {"train": others, "val": [first], "test": [second]})
    config.data.split_file = str(tmp_path / "split.json")
    return config


def test_it_has_the_trained_model_and_knows_its_scans(workdir, start, tmp_path, caplog):
    start.input.window, start.model.sam_weights = (-100.0, 200.0), "not read"
    check_files(start)
    run = tmp_path / "run"
    train(start, run, SliceStore.open(workdir / "store"))
    assert "trained with input.window=[-160.0, 240.0] (now [-100.0, 200.0]), so that" in caplog.text
    before, after = (load_model(load_config(place), place).variables for place in (workdir, run))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    begun = read_json(run / BEGUN_FROM)
    assert begun["model.start_from"] == f"step {best_step(workdir)} of {workdir}"
    assert begun["model.sam_weights"] == begun["model.classifier_weights"] == ""
    known, own = training_scans(start, run), training_scans(load_config(workdir), workdir)
    assert known.digests > own.digests and known.chose > own.chose


def test_the_step_told_is_that_of_the_model_which_was_read(workdir, start, tmp_path, monkeypatch):
    """Not that of the best state, which may be damaged, or another by then."""
    monkeypatch.setattr(
        start_module, "load_model", lambda *given: load_model(*given)._replace(step=7)
    )
    train(start, tmp_path / "run", SliceStore.open(workdir / "store"))
    assert read_json(tmp_path / "run" / BEGUN_FROM)["model.start_from"] == f"step 7 of {workdir}"


def test_a_workdir_copied_in_part_is_refused_before_the_run_has_its_own(workdir, start, tmp_path):
    shutil.copytree(workdir, tmp_path / "part")
    (tmp_path / "part" / "scans.json").unlink()
    start.model.start_from = str(tmp_path / "part")
    with pytest.raises(UserError, match=r"^model\.start_from=.*part: .*scans\.json: no such file"):
        train(start, tmp_path / "run", SliceStore.open(workdir / "store"))
    assert not (tmp_path / "run" / "config.json").exists()


def test_another_model_is_refused(workdir, start, tmp_path):
    start.cam.fusion = "concat"
    with pytest.raises(UserError, match=r"not fit the model below 'fusion': .*without a value"):
        train(start, tmp_path / "run", SliceStore.open(workdir / "store"))
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_folder_without_checkpoints_is_refused_first(start, tmp_path):
    start.model.start_from = str(tmp_path)
    with pytest.raises(UserError, match=r"model\.start_from=.*: no checkpoints there; give a"):
        check_files(start)
