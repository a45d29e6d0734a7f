"""MultiMix's losses against NumPy, and where their gradient goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sammix_jax.systems.multimix_loss import kl_loss, pseudo_label_loss

WEAK = jnp.array([[2.0, 0.0], [0.0, 0.5], [-1.0, 1.0], [0.2, 0.0]])
STRONG = jnp.array([[0.3, 0.4], [1.0, -1.0], [2.0, 0.5], [0.0, 0.0]])


def softmax(x):
    exponent = np.exp(np.asarray(x, np.float64))
    return exponent / exponent.sum(-1, keepdims=True)


def test_only_confident_slices_count_in_a_mean_over_all():
    # The weak view gives 0.88 to class 0, 0.62 to 1, 0.88 to 1 and 0.55 to 0.
    p = softmax(STRONG)
    for confidence, chosen in ((0.7, [(0, 0), (2, 1)]), (0.6, [(0, 0), (1, 1), (2, 1)])):
        expected = -sum(np.log(p[i, label]) for i, label in chosen) / 4
        found = pseudo_label_loss(WEAK, STRONG, confidence)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert pseudo_label_loss(WEAK, STRONG, 0.95) == 0


def test_pseudo_labels_send_no_gradient():
    weak, strong = jax.grad(pseudo_label_loss, argnums=(0, 1))(WEAK, STRONG, 0.7)
    assert not weak.any()
    np.testing.assert_array_equal(jnp.abs(strong).max(axis=-1) > 0, [True, False, True, False])


@pytest.fixture
def masks():
    a, b = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    return 3 * a, 3 * b


def test_published_kl_is_always_zero(masks):
    assert kl_loss(*masks, "published") == 0
    gradients = jax.grad(kl_loss, argnums=(0, 1))(*masks, "published")
    assert not any(x.any() for x in gradients)


def test_bernoulli_kl(masks):
    p, q = (1 / (1 + np.exp(-np.asarray(x, np.float64))) for x in masks)
    expected = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    np.testing.assert_allclose(kl_loss(*masks, "bernoulli"), expected, rtol=1e-5)
    assert abs(kl_loss(masks[0], masks[0], "bernoulli")) < 1e-6
    gradients = jax.grad(kl_loss, argnums=(0, 1))(*masks, "bernoulli")
    assert all((x != 0).all() for x in gradients)


def test_bernoulli_kl_stays_finite():
    high, low = jnp.full((1, 2, 2), 200.0), jnp.full((1, 2, 2), -200.0)
    np.testing.assert_allclose(kl_loss(high, low, "bernoulli"), 200, rtol=1e-5)
    assert jnp.isfinite(jax.grad(kl_loss)(high, low, "bernoulli")).all()


def test_wrong_input_is_refused(masks):
    with pytest.raises(ValueError, match="expected one of"):
        kl_loss(*masks, "gaussian")
    with pytest.raises(ValueError, match=r"\(B, H, W\)"):
        kl_loss(masks[0], masks[1][:2])
    with pytest.raises(ValueError, match=r"\(B, K\)"):
        pseudo_label_loss(WEAK, STRONG[:3])
