"""What is trained, and by which rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sammix_jax.config import default_config
from sammix_jax.errors import UserError
from sammix_jax.training.optim import make_optimiser, merge_params, split_params
from sammix_jax.training.step import new_state

PARAMS = {
    "sam": {
        "image_encoder": {"block_0": {"qkv": jnp.ones((2, 2)), "lora_q": {"a": jnp.ones((2, 1))}}},
        "mask_decoder": {"token": jnp.ones(3)},
    },
    "classifier": {"head": {"kernel": jnp.ones((2, 2))}},
}


def test_split_and_merge():
    trainable, frozen = split_params(PARAMS, (r".*/lora_.*", r"classifier/.*"))
    assert set(trainable) == {"sam/image_encoder/block_0/lora_q/a", "classifier/head/kernel"}
    assert set(frozen) == {"sam/image_encoder/block_0/qkv", "sam/mask_decoder/token"}
    merged = merge_params(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)


def test_a_pattern_without_a_parameter_is_refused():
    with pytest.raises(UserError, match=r"'sam/decoder/\.\*' matches no parameter.*sam/mask_deco"):
        split_params(PARAMS, (r"classifier/.*", r"sam/decoder/.*"))


def test_without_lora_its_pattern_may_match_nothing():
    """And a pattern that names it to leave it out still matches the rest."""
    config = default_config()
    config.model.lora_rank = 0
    params = {"sam": {"mask_decoder": {"token": jnp.ones(3)}, "image_encoder": {"k": jnp.ones(2)}}}
    config.train.trainable = (r"sam/image_encoder/.*/lora_.*", r"sam/mask_decoder/.*")
    make_state = lambda: new_state({"params": params}, optax.sgd(0.1), config)  # noqa: E731
    assert set(make_state().trainable) == {"sam/mask_decoder/token"}
    config.train.trainable = (r"sam/image_encoder/(?!.*lora_).*",)
    assert set(make_state().trainable) == {"sam/image_encoder/k"}
    config.model.lora_rank = 8
    config.train.trainable = (r"sam/image_encoder/.*/lora_.*",)
    with pytest.raises(UserError, match="matches no parameter"):
        make_state()


def rates(config, steps, at):
    """The step sizes that Adam takes on a constant gradient are its learning rates."""
    optimiser = make_optimiser(config, steps)
    params = {"w": jnp.zeros(())}
    state, taken = optimiser.init(params), []
    for _ in range(max(at) + 1):
        updates, state = optimiser.update({"w": jnp.ones(())}, state, params)
        taken.append(-float(updates["w"]))
    return [taken[i] for i in at]


def test_schedules():
    config = default_config().train
    config.learning_rate = 0.1
    np.testing.assert_allclose(rates(config, 10, (0, 5, 20)), 0.1, rtol=1e-3)
    config.warmup_steps = 4
    np.testing.assert_allclose(rates(config, 10, (0, 2, 8)), (0, 0.05, 0.1), rtol=1e-3, atol=1e-9)
    config.schedule = "cosine"
    np.testing.assert_allclose(rates(config, 10, (4, 7, 10)), (0.1, 0.05, 0), rtol=1e-3, atol=1e-6)
    config.schedule = "poly"
    expected = 0.1 * np.array([1.0, 0.5, 1 / 6]) ** 0.9
    np.testing.assert_allclose(rates(config, 10, (4, 7, 9)), expected, rtol=1e-3)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_who_waits_for_the_classifier_then_begins_as_a_new_run_does(kind):
    config = default_config().train
    config.learning_rate, config.optimiser, config.warmup_steps = 0.1, kind, 3
    config.clip_norm = 0.0
    params = {"classifier/w": jnp.zeros(()), "sam/w": jnp.zeros(())}

    def taken(wait):
        config.classifier_warmup_steps = wait
        optimiser = make_optimiser(config, 60 + wait)
        state, found = optimiser.init(params), []
        update = jax.jit(optimiser.update)
        for step in range(40 + wait):
            grads = {"classifier/w": jnp.ones(()), "sam/w": jnp.float32(step >= wait)}
            updates, state = update(grads, state, params)
            found.append((float(updates["classifier/w"]), float(updates["sam/w"])))
        return np.array(found).T

    at_once, later = taken(0), taken(200)
    np.testing.assert_array_equal(later[1, :200], 0)
    np.testing.assert_allclose(later[1, 200:], at_once[1], rtol=1e-6)
    np.testing.assert_allclose(later[0, :40], at_once[0], rtol=1e-6)


def test_b2_says_how_soon_adam_forgets_a_large_gradient():
    config = default_config().train
    config.learning_rate = 1.0

    def step_after(gradients, b2):
        config.adam_b2 = b2
        optimiser = make_optimiser(config, 10)
        params = {"w": jnp.zeros(())}
        state = optimiser.init(params)
        for gradient in gradients:
            updates, state = optimiser.update({"w": jnp.float32(gradient)}, state, params)
        return -float(updates["w"])

    b1, gradients = 0.9, (10.0, 1.0)
    for b2 in (0.5, 0.999):
        mean = (b1 * gradients[0] + gradients[1]) * (1 - b1) / (1 - b1**2)
        square = (b2 * gradients[0] ** 2 + gradients[1] ** 2) * (1 - b2) / (1 - b2**2)
        np.testing.assert_allclose(step_after(gradients, b2), mean / square**0.5, rtol=1e-5)


def test_sgd_is_nnunets():
    """The sum that Nesterov momentum 0.99 makes of two gradients, and decay as a part of them."""
    config = default_config().train
    config.optimiser, config.learning_rate, config.weight_decay = "sgd", 0.1, 0.5
    optimiser = make_optimiser(config, 10)
    params = {"a/kernel": jnp.array(2.0), "a/bias": jnp.array(2.0)}
    state = optimiser.init(params)
    velocity = dict.fromkeys(params, 0.0)
    for gradient in (1.0, -3.0):
        grads = dict.fromkeys(params, jnp.array(gradient))
        updates, state = optimiser.update(grads, state, params)
        for path, decay in (("a/kernel", 0.5 * 2.0), ("a/bias", 0.0)):
            whole = gradient + decay
            velocity[path] = 0.99 * velocity[path] + whole
            step = -0.1 * (whole + 0.99 * velocity[path])
            assert float(updates[path]) == pytest.approx(step, rel=1e-5)


def test_decay_spares_biases_and_tables():
    config = default_config().train
    config.weight_decay, config.learning_rate = 0.5, 0.1
    optimiser = make_optimiser(config, 10)
    kept = ("sam/x/bias", "sam/x/rel_pos_h", "sam/pos_embed", "sam/mask_decoder/mask_tokens")
    decayed = ("sam/x/kernel", "sam/x/lora_q/a")
    params = {path: jnp.ones((2, 2)) for path in kept + decayed}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimiser.update(zero, optimiser.init(params), params)
    for path in decayed:
        np.testing.assert_allclose(updates[path], -0.05)
    for path in kept:
        np.testing.assert_allclose(updates[path], 0)


def test_clipping_bounds_the_norm_of_all_gradients_together():
    """Adam's first step forgets the gradient's length, so the second one is looked at."""
    config = default_config().train

    def second_step(scale, clip_norm):
        config.clip_norm = clip_norm
        optimiser = make_optimiser(config, 10)
        params = {"a/kernel": jnp.zeros(2), "b/bias": jnp.zeros(1)}
        state = optimiser.init(params)
        for factor in (1.0, scale):
            grads = {
                "a/kernel": factor * jnp.array([0.0, 0.6]),
                "b/bias": factor * jnp.array([-0.8]),
            }
            updates, state = optimiser.update(grads, state, params)
        return jnp.concatenate([updates["a/kernel"], updates["b/bias"]])

    even = second_step(1.0, 0.0)
    np.testing.assert_allclose(second_step(50.0, 1.0), even, rtol=1e-5)  # norms of 1 and 50
    np.testing.assert_allclose(second_step(0.5, 1.0), second_step(0.5, 0.0), rtol=1e-5)
    assert not np.allclose(second_step(50.0, 0.0), even, rtol=0.1)


def test_the_learning_rate_is_the_length_of_a_step():
    config = default_config().train
    for rate in (config.learning_rate, 0.03):
        config.learning_rate = rate
        np.testing.assert_allclose(rates(config, 10, (0, 9)), rate, rtol=1e-3)
