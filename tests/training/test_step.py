"""A step moves what it should, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from toy import Toy, toy_state

from sammix_jax.config import default_config
from sammix_jax.sharding import BatchLayout
from sammix_jax.systems.sam_mix import SamMixSystem
from sammix_jax.training.optim import make_optimiser
from sammix_jax.training.step import make_init, make_train_step

NOISE = BatchLayout(3, 1)


def noise_batch():
    """Four slices of noise, three with the same mask: the left half."""
    masks = np.zeros((3, 64, 64), np.uint8)
    masks[:, :, :32] = 1
    return {
        "hu": np.random.default_rng(0).normal(0, 100, (4, 64, 64)).astype(np.int16),
        "mask": masks,
        "image_label": np.array([1, 1, 1, 0], np.int32),
    }


@pytest.fixture(scope="module")
def step_and_state():
    """The jitted step of a config that freezes all but LoRA and the decoder, and a first state."""
    config = small_config()
    config.train.trainable = (r"sam/image_encoder/.*/lora_.*", r"sam/mask_decoder/.*")
    config.train.augment = False
    config.train.weight_decay = 0.0  # what moves has a gradient
    config.train.schedule, config.train.learning_rate = "constant", 0.01
    config.loss.bce = 1.0
    system, optimiser = SamMixSystem.of(config), make_optimiser(config.train, 40)
    state = jax.jit(make_init(system, optimiser, config))()
    return jax.jit(make_train_step(system, optimiser, config, NOISE)), state


def test_only_the_trainable_tree_moves(step_and_state):
    step, state = step_and_state
    assert all("lora" in path or "mask_decoder" in path for path in state.trainable)
    assert any("qkv/kernel" in path for path in state.frozen)
    after = state
    for _ in range(3):  # the first at rate 0; B of LoRA is 0, so A moves one step later
        after, _ = step(after, noise_batch())
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


def test_one_batch_can_be_learnt_by_heart(step_and_state):
    step, state = step_and_state
    state, first = step(state, noise_batch())
    for _ in range(40):
        state, metrics = step(state, noise_batch())
    assert float(metrics["dice_loss"]) < 0.5 * float(first["dice_loss"])


def test_a_frozen_batch_norm_stays(config):
    config.model.freeze_batch_norm = True
    system, optimiser = SamMixSystem.of(config), make_optimiser(config.train, 30)
    like = jax.eval_shape(make_init(system, optimiser, config))
    state = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), like)
    step = make_train_step(system, optimiser, config, NOISE)
    # Of the step nothing else is compiled.
    after = jax.jit(lambda state: step(state, noise_batch())[0].batch_stats)(state)
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, after)


@pytest.mark.parametrize("teacher", [0.0, 1.0])
def test_the_classifier_warms_up_alone(config, teacher):
    """Neither masks nor a teacher move SAM before `classifier_warmup_steps`: not by a bit."""
    config.train.classifier_warmup_steps = 2
    config.train.schedule, config.train.warmup_steps = "constant", 0
    config.train.weight_decay, config.train.augment = 0.0, False
    config.consistency.weight, config.consistency.ramp_steps = teacher, 0
    config.consistency.confidence = 0.5
    optimiser = make_optimiser(config.train, 10)
    state = toy_state(optimiser, teacher=bool(teacher))
    step = jax.jit(make_train_step(SamMixSystem(Toy(), config), optimiser, config, NOISE))

    def moved(before, after):
        return {path for path in state.trainable if before.trainable[path] != after.trainable[path]}

    first, metrics = step(state, noise_batch())
    second, _ = step(first, noise_batch())
    third, _ = step(second, noise_batch())
    assert moved(state, first) == moved(first, second) == {"classifier/kernel"}
    assert moved(second, third) == set(state.trainable)
    assert float(metrics["loss"]) == float(metrics["classification_loss"])


def test_the_papers_mode_trains_lora_decoder_prompts_and_classifier(config):
    """SAM's encoder and its constant position table stay, as `train.trainable` has it."""
    config.train.trainable = default_config().train.trainable
    config.cam.fusion = "concat"
    init = make_init(SamMixSystem.of(config), make_optimiser(config.train, 10), config)
    state = jax.eval_shape(init)
    parts = {"/".join(path.split("/")[:2]) for path in state.trainable}
    assert {p for p in parts if p.startswith("sam/")} == {
        "sam/image_encoder", "sam/mask_decoder", "sam/prompt_encoder"
    }  # fmt: skip
    assert "fusion/kernel" in state.trainable and "classifier/head/kernel" in state.trainable
    encoder = [path for path in state.trainable if "image_encoder" in path]
    assert all("/lora_" in path for path in encoder)
    frozen = [path for path in state.frozen if "image_encoder" not in path]
    assert frozen == ["sam/prompt_encoder/position_encoding/gaussian_matrix"]
