"""Training learns, resumes exactly, and touches nothing but what it should."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config

from sammix_jax import train as train_module
from sammix_jax.cam import CamPrompt
from sammix_jax.checkpoint import Checkpoints, abstract
from sammix_jax.data.files import read_json, write_json
from sammix_jax.errors import UserError
from sammix_jax.evaluate import evaluate
from sammix_jax.optim import make_optimiser
from sammix_jax.prepare import prepare
from sammix_jax.sam_mix import Masks, SamMixOutput, sam_mix
from sammix_jax.sharding import make_mesh, replicated
from sammix_jax.train import train
from sammix_jax.train_log import read_log
from sammix_jax.train_step import make_init, make_train_step, sam_mix_loss


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


def noise_batch():
    """Four slices of noise, three with the same mask: the left half."""
    masks = np.zeros((3, 64, 64), np.uint8)
    masks[:, :, :32] = 1
    return {
        "hu": np.random.default_rng(0).normal(0, 100, (4, 64, 64)).astype(np.int16),
        "mask": masks,
        "image_label": np.array([1, 1, 1, 0], np.int32),
    }


@pytest.fixture
def step_and_state():
    """The jitted step of a config that freezes all but LoRA and the decoder, and a batch."""
    config = small_config()
    config.train.trainable = (r"sam/image_encoder/.*/lora_.*", r"sam/mask_decoder/.*")
    model = sam_mix(config)
    optimiser = make_optimiser(config.train, 30)
    state = jax.jit(make_init(model, optimiser, config))()
    return jax.jit(make_train_step(model, optimiser, config)), state, noise_batch()


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
    assert not [path for path in still if "lora" in path], still
    # Dice reaches the decoder through the mask that was chosen alone, not through the IoU head.
    moved = set(state.trainable) - set(still)
    assert {"sam/mask_decoder/mask_tokens", "sam/mask_decoder/upscale1/kernel"} <= moved
    moments = jax.tree.leaves(state.opt_state)
    assert sum(m.size for m in moments) < 3 * sum(p.size for p in state.trainable.values())


def test_one_batch_can_be_learnt_by_heart():
    config = small_config()
    config.train.augment = False
    config.train.schedule = "constant"
    config.loss.bce = 1.0
    model, optimiser = sam_mix(config), make_optimiser(config.train, 40)
    state = jax.jit(make_init(model, optimiser, config))()
    step = jax.jit(make_train_step(model, optimiser, config))
    batch = noise_batch()
    state, first = step(state, batch)
    for _ in range(40):
        state, metrics = step(state, batch)
    assert float(metrics["dice_loss"]) < 0.5 * float(first["dice_loss"])


def test_nan_stops_the_run(workdir, config, tmp_path):
    config.train.learning_rate = 1e30
    config.train.clip_norm = 0.0
    config.train.schedule, config.train.warmup_steps = "constant", 0
    config.data.store = str(workdir / "store")
    with pytest.raises(UserError, match=r"step \d+: .*loss.* is not finite"):
        train(config, tmp_path, prepare(config, workdir))


def test_the_best_by_validation_is_kept(workdir, config):
    """`best` holds the step whose Dice the log shows to be the highest."""
    values = {step: value for step, name, value in read_log(workdir) if name == "val/dice"}
    best = [int(p.name) for p in (workdir / "checkpoints" / "best").iterdir() if p.name.isdigit()]
    assert best == [max(values, key=values.get)]


def test_given_files_are_followed_to_the_end(workdir, config, tmp_path):
    """A run on a given split and given labels evaluates on that split."""
    split = read_json(workdir / "split.json")
    swapped = {"train": split["train"], "val": split["test"], "test": split["val"]}
    write_json(tmp_path / "mine.json", swapped)
    config.data.split_file = str(tmp_path / "mine.json")
    config.data.labels_file = str(workdir / "labels.json")
    config.train.steps = 1
    config.evaluate.protocols = ("cam",)
    run = tmp_path / "run"
    train(config, run, prepare(config, run))
    assert {case.scan for case in evaluate(config, run).cases} == set(swapped["test"])
    assert read_json(run / "labels.json") == read_json(workdir / "labels.json")


def test_a_part_that_is_empty_is_told_before_training(config, tmp_path):
    config.data.split = (1, 0, 0)
    with pytest.raises(UserError, match=r"evaluate\.part=test: that part of the split is empty"):
        train(config, tmp_path, prepare(config, tmp_path))
    assert not (tmp_path / "config.json").exists()


def test_a_frozen_batch_norm_stays(config):
    config.model.freeze_batch_norm = True
    model, optimiser = sam_mix(config), make_optimiser(config.train, 30)
    state = jax.jit(make_init(model, optimiser, config))()
    batch = {
        "hu": np.random.default_rng(0).normal(0, 100, (2, 64, 64)).astype(np.int16),
        "mask": np.ones((1, 64, 64), np.uint8),
        "image_label": np.array([1, 0], np.int32),
    }
    after, _ = jax.jit(make_train_step(model, optimiser, config))(state, batch)
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, after.batch_stats)


def test_loss_options_change_the_loss(config):
    output = SamMixOutput(
        jnp.array([[2.0, -1.0], [0.5, 0.2]]),
        CamPrompt(*[jnp.zeros((1, 8, 8))] * 2, jnp.zeros((1, 4)), jnp.zeros(1, bool)),
        Masks(jnp.ones((1, 8, 8)), jnp.ones((1, 3, 8, 8)), jnp.zeros((1, 3))),
    )
    masks, present = jnp.ones((1, 8, 8)), jnp.array([0, 1])

    def loss(**options):
        weights = config.loss.copy_and_resolve_references()
        weights.update(options)
        return float(sam_mix_loss(output, masks, present, weights)[0])

    plain = loss(bce=0.0)
    assert loss(bce=1.0) > plain
    assert loss(bce=0.0, iou=1.0) == pytest.approx(plain + config.loss.segmentation)
    assert loss(bce=0.0, classifier="focal") < plain
    assert loss(bce=0.0, segmentation=0.0) < plain
    assert loss(bce=0.0, dice_smooth=100.0) < plain
