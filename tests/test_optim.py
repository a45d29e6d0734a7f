"""What is trained, and by which rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sammix_jax.config import default_config
from sammix_jax.errors import UserError
from sammix_jax.optim import make_optimiser, merge_params, split_params

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
