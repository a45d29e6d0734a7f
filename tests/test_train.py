"""Training learns, resumes exactly, and touches nothing but what it should."""

import csv
import math

import jax
import numpy as np
import pytest
from conftest import small_config

from sammix_jax import train as train_module
from sammix_jax.checkpoint import Checkpoints, abstract
from sammix_jax.errors import UserError
from sammix_jax.optim import make_optimiser
from sammix_jax.prepare import prepare
from sammix_jax.sam_mix import sam_mix
from sammix_jax.sharding import make_mesh, replicated
from sammix_jax.train import train
from sammix_jax.train_log import read_log
from sammix_jax.train_step import make_init, make_train_step


def final_state(config, workdir):
    init = make_init(sam_mix(config), make_optimiser(config.train, config.train.steps), config)
    like = abstract(jax.eval_shape(init), replicated(make_mesh()))
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(like)


def test_training_learns_and_logs(workdir):
    losses = [value for step, name, value in read_log(workdir) if name == "train/loss"]
    assert len(losses) == 6 and losses[-1] < losses[0]
    with open(workdir / "metrics.csv", newline="") as file:
        names = {row["metric"] for row in csv.DictReader(file)}
    assert {"train/dice_loss", "train/slices_per_second", "val/dice", "val/accuracy"} <= names
    assert list((workdir / "tensorboard").glob("events.*"))
    assert (workdir / "split.json").exists() and (workdir / "labels.json").exists()


def test_a_finished_run_is_left_alone(workdir, config):
    assert train(config, workdir, prepare(config, workdir)) is False


class Killed(Exception):
    pass


def test_resumed_equals_uninterrupted(workdir, config, tmp_path, monkeypatch):
    """Stopped after step 17 and run again: the same bits as in one go."""
    config.data.store = str(workdir / "store")
    config.data.split_file = str(workdir / "split.json")
    config.data.labels_file = str(workdir / "labels.json")
    store = prepare(config, workdir)
    step_of = train_module.prefetch

    def until_17(batches, start, stop, place):
        for step, batch in step_of(batches, start, stop, place):
            if step == 17:
                raise Killed
            yield step, batch

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "prefetch", until_17)
        with pytest.raises(Killed):
            train(config, tmp_path, store)
    assert train(config, tmp_path, store) is True

    whole, resumed = final_state(config, workdir), final_state(config, tmp_path)
    assert int(resumed.step) == config.train.steps
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    log = [row for row in read_log(tmp_path) if "per_second" not in row[1]]
    assert log == [row for row in read_log(workdir) if "per_second" not in row[1]]


@pytest.fixture
def step_and_state(workdir):
    """The jitted step of a config that freezes all but LoRA and the decoder, and a batch."""
    config = small_config()
    config.train.trainable = (r"sam/image_encoder/.*/lora_.*", r"sam/mask_decoder/.*")
    model = sam_mix(config)
    optimiser = make_optimiser(config.train, 30)
    state = jax.jit(make_init(model, optimiser, config))()
    rng = np.random.default_rng(0)
    batch = {
        "hu": rng.normal(0, 100, (4, 64, 64)).astype(np.int16),
        "mask": np.repeat((np.arange(64) < 32)[None, None], 3, 0).repeat(64, 1).astype(np.uint8),
        "organ_present": np.array([1, 1, 1, 0], np.int32),
    }
    return jax.jit(make_train_step(model, optimiser, config)), state, batch


def test_only_the_trainable_tree_moves(step_and_state):
    step, state, batch = step_and_state
    assert all("lora" in path or "mask_decoder" in path for path in state.trainable)
    assert any("qkv/kernel" in path for path in state.frozen)
    after, _ = step(*[step(state, batch)[0], batch])  # B of LoRA is 0, so A moves one step later
    jax.tree.map(np.testing.assert_array_equal, state.frozen, after.frozen)
    still = [
        path for path, value in state.trainable.items()
        if np.array_equal(value, after.trainable[path])
    ]  # fmt: skip
    # With three masks to choose from, the single-mask token's own network gets no gradient.
    assert not [path for path in still if "lora" in path], still
    moments = jax.tree.leaves(state.opt_state)
    assert sum(m.size for m in moments) < 3 * sum(p.size for p in state.trainable.values())


def test_one_batch_can_be_learnt_by_heart(step_and_state):
    step, state, batch = step_and_state
    first = None
    for _ in range(25):
        state, metrics = step(state, batch)
        first = first if first is not None else float(metrics["dice_loss"])
    assert float(metrics["dice_loss"]) < 0.6 * first


def test_nan_stops_the_run(workdir, config, tmp_path):
    config.train.learning_rate = 1e30
    config.train.clip_norm = 0.0
    config.train.schedule, config.train.warmup_steps = "constant", 0
    config.data.store = str(workdir / "store")
    with pytest.raises(UserError, match=r"step \d+: .*loss.* is not finite"):
        train(config, tmp_path, prepare(config, workdir))


def test_validation_counts_the_classifier(workdir):
    values = [value for _, name, value in read_log(workdir) if name == "val/accuracy"]
    assert values and all(0 <= v <= 1 and math.isfinite(v) for v in values)
