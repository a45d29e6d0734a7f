"""A whole pretraining in small: it resumes exactly and leaves weights that SAM-Mix takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import TWO_BLOCKS, draw_rectangles

from configs.pretrain_mini import get_config
from sammix_jax import hosts
from sammix_jax.errors import UserError
from sammix_jax.models.sam import variants
from sammix_jax.pretrain import run, score, step
from sammix_jax.training.log import read_log
from sammix_jax.weights import load_weights, read_weights


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setitem(variants.VARIANTS, "two_blocks", TWO_BLOCKS)
    monkeypatch.setattr(step, "draw_scenes", draw_rectangles)
    monkeypatch.setattr(score, "draw_scenes", draw_rectangles)
    config = get_config()
    config.model.sam, config.model.image_size = "two_blocks", 32
    config.pretrain.images = config.pretrain.prompts = config.pretrain.held_out = 2
    config.pretrain.rounds, config.pretrain.coarse_steps = 1, 1
    config.train.steps, config.train.warmup_steps = 4, 1
    config.log.every_steps, config.log.validate_every_steps = 1, 2
    config.checkpoint.every_steps = 2
    return config


def test_images_and_held_out_say_how_many_scenes_are_drawn(config, tmp_path, monkeypatch):
    config.pretrain.images, config.pretrain.held_out = 3, 5
    drawn = []

    def stop(state, train_step, batch_of, steps, **rest):
        raise InterruptedError(len(batch_of(0).numbers), rest["images"])

    monkeypatch.setattr(run, "held_out_scenes", lambda *which: drawn.append(which))
    monkeypatch.setattr(run, "run_steps", stop)
    with pytest.raises(InterruptedError) as seen:
        run.pretrain(config, tmp_path)
    assert seen.value.args == (3, 3)
    assert drawn == [(5, 32, score.VALIDATION)]


def test_the_first_steps_see_coarse_images(config, tmp_path, monkeypatch):
    config.pretrain.coarse_steps = 3

    def spy(state, train_step, batch_of, steps, **rest):
        for number in range(steps):
            jax.eval_shape(lambda state, number=number: train_step(state, batch_of(number)), state)
        return state.replace(step=jnp.int32(steps))

    sides = []
    monkeypatch.setattr(
        step, "draw_scenes", lambda keys, size: sides.append(size) or draw_rectangles(keys, size)
    )
    monkeypatch.setattr(run, "run_steps", spy)
    with pytest.raises(UserError, match="checkpoint"):  # nothing was saved
        run.pretrain(config, tmp_path)
    assert sides == [16, 32]  # traced once for each size


@pytest.mark.parametrize("prompts", [3, 14])
def test_prompts_that_a_scene_cannot_have(config, tmp_path, prompts):
    config.pretrain.prompts = prompts
    with pytest.raises(UserError, match=rf"pretrain\.prompts={prompts}: expected an even number"):
        run.pretrain(config, tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train.accumulate", 2),
        ("train.classifier_warmup_steps", 3),
        ("consistency.weight", 1.0),
        ("model.start_from", "runs/a"),
    ],
)
def test_what_pretraining_does_not_know_is_refused(config, tmp_path, field, value):
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=rf"^{field}={value}: expected"):
        run.pretrain(config, tmp_path)


def remembered(make):
    """`make`, of which the numbers and words among its arguments tell what it makes."""
    made = {}

    def once(*args):
        plain = tuple(arg for arg in args if isinstance(arg, int | str))
        if plain not in made:
            made[plain] = make(*args)
        return made[plain]

    return once


def test_a_run_that_is_cut_goes_on_as_if_it_had_not_been(config, tmp_path, monkeypatch):
    # One config, so that all runs may share what the first one compiles.
    for name in ("make_init", "jit_pretrain_step", "make_answer"):
        monkeypatch.setattr(run, name, remembered(getattr(run, name)))
    whole = run.pretrain(config, tmp_path / "whole")
    steps = run.run_steps

    def cut(state, train_step, batch_of, last, **rest):
        def until_three(number):
            if number == 3:
                raise KeyboardInterrupt
            return batch_of(number)

        return steps(state, train_step, until_three, last, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(run, "run_steps", cut)
        with pytest.raises(KeyboardInterrupt):
            run.pretrain(config, tmp_path / "cut")
    # And where it is asked to stop after the last step on coarse images.
    with monkeypatch.context() as patch:
        patch.setattr(hosts.Termination, "asked", lambda self, step: step == 1)
        with pytest.raises(hosts.Terminated, match="stopped after step 1 of 4"):
            run.pretrain(config, tmp_path / "asked")

    resumed = run.pretrain(config, tmp_path / "cut")
    (arrays, _), (others, _) = read_weights(whole), read_weights(resumed)
    assert arrays.keys() == others.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(array, others[path], err_msg=path)

    log = {(step, name): value for step, name, value in read_log(tmp_path / "cut")}
    assert {step for step, name in log if name == "val/iou_box"} == {2, 4}
    assert all(0 <= log[2, f"val/iou_{name}"] <= 1 for name in ("box", "point"))

    # What it leaves is a SAM's weights in half precision, and nothing else's.
    assert resumed.name == "sam_two_blocks.safetensors"
    arrays = load_weights(resumed, "sam", "two_blocks")
    assert {array.dtype for array in arrays.values()} == {np.dtype("float16")}
    assert "prompt_encoder/position_encoding/gaussian_matrix" in arrays
    with pytest.raises(UserError, match=r"model\.sam is mini"):
        load_weights(resumed, "sam", "mini")
    about = read_weights(resumed)[1]
    assert about["image_size"] == "32"
    assert about["source"] == "pretrain from random, seed 0, step 4"
    load_weights(resumed, "sam", "two_blocks", choices={"normalise": "sam"})
    with pytest.raises(UserError, match=r"set --config\.input\.normalise=sam"):
        load_weights(resumed, "sam", "two_blocks", choices={"normalise": "minmax"})

    # Another run may go on from there, with its own steps.
    config.model.sam_weights, config.train.steps = str(resumed), 1
    begun = {}

    def stop(state, *args, **rest):
        begun.update(state.trainable | state.frozen)
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(run, "run_steps", stop)
        with pytest.raises(InterruptedError):
            run.pretrain(config, tmp_path / "onward")
    for path, array in arrays.items():
        np.testing.assert_array_equal(array, begun[f"sam/{path}"], err_msg=path)

    config.model.sam_weights = ""
    for steps, coarse in ((0, 0), (4, 5)):
        config.train.steps, config.pretrain.coarse_steps = steps, coarse
        with pytest.raises(UserError, match=rf"train\.steps={steps}: expected above 0, and .*"):
            run.pretrain(config, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    config.train.steps, config.pretrain.coarse_steps = 4, 1
    config.pretrain.prompts = 4
    with pytest.raises(UserError, match=r"pretrain\.prompts=2"):
        run.pretrain(config, tmp_path / "cut")
