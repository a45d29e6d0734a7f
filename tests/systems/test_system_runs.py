"""Baselines from scans to masks."""

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util
from tiny_systems import tiny_config

from sammix_jax.config_rules import check_config
from sammix_jax.data.slices import SliceStore
from sammix_jax.errors import UserError
from sammix_jax.evaluate import evaluate
from sammix_jax.evaluation import report
from sammix_jax.predict import predict
from sammix_jax.prepare import prepare
from sammix_jax.systems.named import make_system
from sammix_jax.train import train
from sammix_jax.training.log import read_log
from sammix_jax.training.step import make_init
from sammix_jax.training.trained import load_model
from sammix_jax.weights import write_weights


def run_config(name: str, **settings):
    """`tiny_config` on slices that can be prepared, with few of everything."""
    config = tiny_config(name, **{"evaluate.batch": 8, "train.steps": 2} | settings)
    config.log.validate_every_steps = 2
    return config


def test_a_segmenter_runs_from_scans_to_a_mask(tmp_path):
    """Nothing is frozen, and there are no batch statistics and no classifier."""
    config = run_config("unet")
    train(config, tmp_path, prepare(config, tmp_path))
    logged = {name for _, name, _ in read_log(tmp_path)}
    assert "train/dice_loss" in logged and "val/accuracy" not in logged
    found = evaluate(config, tmp_path)
    assert {case.protocol for case in found.cases} == {"none"}
    page = report.write_report(tmp_path / "out", found, config, tmp_path)
    assert page.exists() and len(list((tmp_path / "out").glob("*.png"))) == len(found.examples)
    store = SliceStore.open(tmp_path / "store")
    scan = next(iter(store.records.values())).image
    (made,) = predict(config, tmp_path, scan, tmp_path / "mask.nii.gz")
    assert made.mask.exists()


@pytest.mark.slow
def test_weights_are_scored_as_they_are_loaded(tmp_path):
    """No epochs and no steps: SAM-PP-0. What a model would be prompted with is not predicted."""
    name = "prompted_sam_points"
    config = run_config(name, **{"model.lora_rank": 0})
    optimiser = optax.identity()
    state = jax.jit(make_init(make_system(config), optimiser, config))()
    weights = {path.removeprefix("sam/"): np.asarray(x) for path, x in state.trainable.items()}
    about = {"kind": "sam", "model": "tiny", "source": "none", "sha256": ""}
    write_weights(tmp_path / "sam.safetensors", weights, about)
    config.train.steps, config.train.epochs = 0, 0.0
    with pytest.raises(UserError, match=r"train\.epochs=0.0: expected .*wants model.sam_weights"):
        check_config(config)
    config.model.sam_weights = str(tmp_path / "sam.safetensors")
    config.seed = 5  # other random values, which the file's replace
    check_config(config)
    run = tmp_path / "run"
    store = prepare(config, run)
    for _ in range(2):
        assert train(config, run, store) is False
    variables = load_model(config, run).variables
    kept = traverse_util.flatten_dict(variables["params"]["sam"], sep="/")
    for path, leaf in weights.items():
        np.testing.assert_array_equal(kept[path], leaf)
    config.evaluate.protocols = ("gt_points",)
    assert {case.protocol for case in evaluate(config, run).cases} == {"gt_points"}
    scan = next(iter(store.records.values())).image
    with pytest.raises(UserError, match=r"model\.prompt=points: .*cannot segment a scan"):
        predict(config, run, scan, run / "mask.nii.gz")
