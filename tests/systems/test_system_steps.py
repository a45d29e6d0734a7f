"""Every system trains and predicts in one harness."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_systems import SETTINGS, SIDE, batch_of, tiny_config, tiny_system

from sammix_jax.inference import make_predict
from sammix_jax.sharding import BatchLayout
from sammix_jax.systems.named import make_system
from sammix_jax.systems.system import ORACLES, OUTSIDE
from sammix_jax.training.step import make_init, make_train_step


@functools.cache
def trained(name: str):
    """A system, its first state and those after each of three steps, the steps' metrics, and the
    step."""
    config = tiny_config(name)
    system, optimiser = tiny_system(config), optax.adam(1e-3)
    state = jax.jit(make_init(system, optimiser, config))()
    step = jax.jit(make_train_step(system, optimiser, config, BatchLayout(2, 2)))
    states, found = [state], []
    for _ in range(3):
        state, metrics = step(state, batch_of())
        states.append(state)
        found.append(metrics)
    return system, states, found, step


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_trains_every_leaf(name):
    """Its gradient is finite, and none is zero but where a network cannot have one."""
    _, states, found, _ = trained(name)
    assert all(np.isfinite(value).all() for metrics in found for value in metrics.values())
    assert float(found[2]["loss"]) < float(found[0]["loss"])
    gradients = dict(zip(states[0].trainable, found[1]["leaf_norms"][0], strict=True))
    still = {path for path, norm in gradients.items() if norm == 0}
    # Neither prompts that nobody gives, nor the heads of masks that were not chosen.
    assert all(path.startswith("sam/") for path in still), still
    assert not [path for path in still if "image_encoder" in path]


@pytest.mark.parametrize("name", ["unet", "nnunet", "transunet", "multimix"])
def test_a_slice_of_air_does_not_make_the_gradient_explode(name):
    """At its ends a scan may show nothing but air, below the window. Norms divide it by nothing."""
    _, states, (usual, *_), step = trained(name)
    air = batch_of()
    air["hu"][2] = -1000  # known not to show the organ
    _, found = step(states[0], air)
    assert np.isfinite(found["loss"]) and found["loss"] != usual["loss"]
    assert 0 < found["gradient_norm"] < 10 * usual["gradient_norm"]


@pytest.mark.parametrize("name", SETTINGS)
def test_predictions_under_each_protocol(name):
    system, states, *_ = trained(name)
    batch = batch_of()
    truth = np.zeros(batch["hu"].shape, bool)
    truth[:2] = batch["mask"] > 0
    gated, open_ = (
        make_predict(system, system.config, system.protocols, gate=gate) for gate in (True, False)
    )
    given = states[-1].variables, batch["hu"], truth
    found = gated(*given)
    assert set(found.logits) == set(system.protocols)
    for protocol, logits in found.logits.items():
        assert logits.shape == (4, SIDE, SIDE) and logits.dtype == jnp.float32
        if protocol in ORACLES:  # where there is no truth nothing prompts
            assert (logits[2:] == OUTSIDE).all() and not (logits[:2] == OUTSIDE).any()
    assert found.cam is None and found.box is None and found.empty is None
    if name == "multimix":
        assert found.organ_probability.shape == (4,)
    else:  # and nothing to gate by
        assert found.organ_probability is None
        assert str(jax.make_jaxpr(gated)(*given)) == str(jax.make_jaxpr(open_)(*given))
    with pytest.raises(ValueError, match=r"protocols \['cam'\]: expected some of"):
        make_predict(system, system.config, ("cam",))


@pytest.mark.parametrize(("name", "averages"), [("nnunet", True), ("unet", False)])
def test_nnunet_predicts_a_mirrored_slice_mirrored(name, averages):
    system, states, *_ = trained(name)
    images = jax.random.uniform(jax.random.key(3), (2, SIDE, SIDE))
    predict = jax.jit(
        lambda x: system.predict(states[-1].variables, x, None, ("none",), False).logits["none"]
    )
    plain = predict(images)
    for axes in ((1,), (2,), (1, 2)):
        moved = jnp.abs(jnp.flip(predict(jnp.flip(images, axes)), axes) - plain).max()
        assert (float(moved) < 1e-5) == averages
    # One network stands behind them: the mean of its four answers is the first of them here.
    if averages:
        one = system.model.apply(states[-1].variables, system._inputs(images)).logits
        assert 1e-5 < float(jnp.abs(one - plain).max()) < float(jnp.abs(one).max())


def test_multimix_is_gated_by_its_classifier():
    system, states, *_ = trained("multimix")
    variables = jax.tree.map(lambda leaf: leaf, states[-1].variables)
    head = variables["params"]["class_head"]
    head["kernel"] = jnp.zeros_like(head["kernel"])
    head["bias"] = jnp.array([1.0, 0.0])  # never the organ
    for gate in (True, False):
        gated = make_predict(system, system.config, ("none",), gate=gate)
        logits = gated(variables, batch_of()["hu"], None).logits["none"]
        assert bool((logits == OUTSIDE).all()) == gate


@pytest.mark.parametrize("name", ["unet", "nnunet", "multimix", "transunet"])
def test_widths_and_variant_shape_the_networks(name):
    def parameters(**settings) -> int:
        config = tiny_config(name, **settings)
        images = jnp.zeros((1, SIDE, SIDE))
        shapes = jax.eval_shape(make_system(config).init, jax.random.key(0), images)
        return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))

    if name == "transunet":
        mini, published = (parameters(**{"model.transunet": v}) for v in ("mini", "r50_vit_b16"))
        assert mini < 4e6 and published > 1e8
    else:
        small, published = (parameters(**{"model.widths": w}) for w in ((4, 6, 8), ()))
        assert small < 1e4 < 1e6 < published
