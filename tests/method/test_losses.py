"""Losses against NumPy, at their limits, and under weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sammix_jax.method import losses

LOGITS = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
TARGET = np.random.default_rng(1).random((3, 5, 7)) < 0.4
CLASS_LOGITS = np.random.default_rng(2).normal(size=(3, 2)).astype(np.float32)
LABELS = np.array([0, 1, 1])
WEIGHTS = np.array([1.0, 0.0, 2.0], np.float32)


def mask_losses(logits=LOGITS, target=TARGET, weights=None):
    iou = jnp.full(logits.shape[:-2], 0.5)
    return {
        "dice": losses.dice_loss(logits, target, weights=weights),
        "bce": losses.bce_loss(logits, target, weights),
        "iou": losses.iou_loss(iou, logits, target, weights),
    }


def class_losses(logits=CLASS_LOGITS, labels=LABELS, weights=None):
    return {
        "cross_entropy": losses.cross_entropy(logits, labels, weights),
        "focal": losses.focal_loss(logits, labels, weights),
    }


def per_image():
    """The same losses in NumPy, one value per image."""
    p = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
    overlap = (p * TARGET).sum((1, 2))
    mask = LOGITS > 0
    iou = (mask & TARGET).sum((1, 2)) / (mask | TARGET).sum((1, 2))
    c = np.exp(CLASS_LOGITS.astype(np.float64))
    true = (c / c.sum(1, keepdims=True))[np.arange(3), LABELS]
    balance = np.where(LABELS == 1, 0.25, 0.75)
    return {
        "dice": 1 - (2 * overlap + 1) / (p.sum((1, 2)) + TARGET.sum((1, 2)) + 1),
        "bce": -np.where(TARGET, np.log(p), np.log(1 - p)).mean((1, 2)),
        "iou": (0.5 - iou) ** 2,
        "cross_entropy": -np.log(true),
        "focal": -balance * (1 - true) ** 2 * np.log(true),
    }


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_values(weights):
    found = mask_losses(weights=weights) | class_losses(weights=weights)
    for name, values in per_image().items():
        expected = np.average(values, weights=weights)
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, err_msg=name)


def test_no_weight_and_no_image_cost_nothing():
    nothing = np.zeros(3)
    for name, value in (mask_losses(weights=nothing) | class_losses(weights=nothing)).items():
        assert value == 0, name
    empty = mask_losses(LOGITS[:0], TARGET[:0]) | class_losses(CLASS_LOGITS[:0], LABELS[:0])
    for name, value in empty.items():
        assert value == 0, name


def test_extreme_logits_stay_finite():
    for scale in (-1e4, 1e4):
        masks, classes = scale * np.sign(LOGITS), scale * np.sign(CLASS_LOGITS)
        found = mask_losses(masks) | class_losses(classes)
        assert all(np.isfinite(value) for value in found.values())
        for loss in (losses.dice_loss, losses.bce_loss):
            assert np.isfinite(jax.grad(loss)(jnp.asarray(masks), TARGET)).all()
        for loss in (losses.cross_entropy, losses.focal_loss):
            assert np.isfinite(jax.grad(loss)(jnp.asarray(classes), LABELS)).all()


def test_perfect_masks_cost_nothing():
    perfect = np.where(TARGET, 50.0, -50.0)
    assert losses.dice_loss(perfect, TARGET) < 1e-6
    assert losses.bce_loss(perfect, TARGET) < 1e-6
    assert losses.iou_loss(jnp.ones(3), perfect, TARGET) == 0


def test_iou_loss_trains_the_prediction_alone():
    iou = jnp.full(3, 0.5)
    to_iou, to_logits = jax.grad(losses.iou_loss, argnums=(0, 1))(iou, jnp.asarray(LOGITS), TARGET)
    assert np.abs(to_iou).min() > 0
    assert np.abs(to_logits).max() == 0


def test_float32_inside():
    half = mask_losses(LOGITS.astype(jnp.bfloat16)) | class_losses(
        CLASS_LOGITS.astype(jnp.bfloat16)
    )
    assert {value.dtype for value in half.values()} == {jnp.dtype("float32")}


def test_leading_axes_are_free():
    stacked = losses.dice_loss(LOGITS[None], TARGET[None], weights=WEIGHTS[None])
    assert stacked == losses.dice_loss(LOGITS, TARGET, weights=WEIGHTS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.dice_loss(LOGITS, TARGET[0]), "target"),
        (lambda: losses.dice_loss(LOGITS, TARGET, weights=np.ones(2)), "one per image"),
        (lambda: losses.iou_loss(np.ones(2), LOGITS, TARGET), "one value per mask"),
        (lambda: losses.cross_entropy(CLASS_LOGITS, np.eye(2)[LABELS]), "one-hot"),
        (lambda: losses.focal_loss(np.zeros((3, 4)), LABELS), "cross_entropy"),
    ],
)
def test_rejections_name_the_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()
