"""Losses of both tasks. All compute in float32 and return a float32 scalar.

Each is a mean over images, weighted where `weights` are given: 0 leaves an image out, and a batch
whose weights sum to 0, or that is empty, costs 0 rather than NaN.
"""

import jax
import jax.numpy as jnp


def dice_loss(
    logits: jax.Array,
    target: jax.Array,
    smooth: float = 1.0,
    weights: jax.Array | None = None,
    valid: jax.Array | None = None,
) -> jax.Array:
    """1 - Dice of the sigmoid, per image (SAM-Mix's segmentation loss).

    Args:
      logits: (..., H, W) float.
      target: (..., H, W) bool, or float in [0, 1].
      smooth: added to numerator and denominator, in pixels.
      weights: (...) float, not negative.
      valid: (..., H, W) bool, pixels that count; None counts all.

    Raises:
      ValueError: shapes that do not fit.
    """
    return _mean(dice_costs(logits, target, smooth, valid), weights)


def dice_costs(
    logits: jax.Array, target: jax.Array, smooth: float = 1.0, valid: jax.Array | None = None
) -> jax.Array:
    """1 - Dice of each mask, (...); arguments as `dice_loss`."""
    logits, target = _masks(logits, target)
    probability = jax.nn.sigmoid(logits)
    if valid is not None:
        probability, target = probability * valid, target * valid
    overlap = (probability * target).sum(axis=(-2, -1))
    total = probability.sum(axis=(-2, -1)) + target.sum(axis=(-2, -1))
    return 1 - (2 * overlap + smooth) / (total + smooth)


def focal_costs(
    logits: jax.Array, target: jax.Array, alpha: float = 0.25, gamma: float = 2.0
) -> jax.Array:
    """Focal loss of each mask, the mean over its pixels (Lin et al. 2017, arXiv 1708.02002).

    Args:
      logits: (..., H, W) float.
      target: (..., H, W) bool, or float in {0, 1}.
      alpha: weight of a pixel inside; one outside has 1 - alpha.
      gamma: how strongly pixels already told well are discounted.

    Returns:
      (...) float32.

    Raises:
      ValueError: shapes that do not fit.
    """
    logits, target = _masks(logits, target)
    # Logits whose sign says whether the pixel is told right.
    signed = jnp.where(target > 0.5, logits, -logits)
    balance = jnp.where(target > 0.5, alpha, 1 - alpha)
    cost = balance * jax.nn.sigmoid(-signed) ** gamma * jax.nn.softplus(-signed)
    return cost.mean(axis=(-2, -1))


def bce_loss(
    logits: jax.Array,
    target: jax.Array,
    weights: jax.Array | None = None,
    valid: jax.Array | None = None,
) -> jax.Array:
    """Binary cross-entropy of the sigmoid, mean over each image's pixels; arguments as `dice_loss`.

    Pixels that do not count cost 0 and stay in the mean, so that few confident ones weigh little.
    """
    logits, target = _masks(logits, target)
    # log(1 + e^x) - x·t: stable where log(sigmoid) would underflow.
    pixels = jax.nn.softplus(logits) - logits * target
    if valid is not None:
        pixels = pixels * valid
    return _mean(pixels.mean(axis=(-2, -1)), weights)


def iou_loss(
    predicted_iou: jax.Array,
    logits: jax.Array,
    target: jax.Array,
    weights: jax.Array | None = None,
) -> jax.Array:
    """Squared error of the predicted IoU (Segment Anything, arXiv 2304.02643, section A).

    The true IoU is that of the mask `logits > 0`, with no gradient; it is 0 where mask and target
    are both empty.

    Args:
      predicted_iou: (...) float.
      logits: (..., H, W) float, the masks that the predictions are about.
      target: (..., H, W) bool, or float that counts as true above 0.5.
      weights: (...) float, not negative.

    Raises:
      ValueError: shapes that do not fit.
    """
    logits, target = _masks(logits, target)
    if predicted_iou.shape != logits.shape[:-2]:
        raise ValueError(
            f"predicted_iou {predicted_iou.shape} for masks {logits.shape}: expected "
            f"{logits.shape[:-2]}, one value per mask."
        )
    error = predicted_iou.astype(jnp.float32) - mask_iou(logits > 0, target > 0.5)
    return _mean(jnp.square(error), weights)


def mask_iou(masks: jax.Array, truth: jax.Array) -> jax.Array:
    """IoU of each mask, (...) float32 without gradient; 0 where mask and truth are both empty.

    Args:
      masks, truth: (..., H, W) bool.
    """
    overlap = (masks & truth).sum(axis=(-2, -1))
    union = (masks | truth).sum(axis=(-2, -1))
    return jax.lax.stop_gradient(overlap / jnp.maximum(union, 1))


def cross_entropy(
    logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    """Softmax cross-entropy (SAM-Mix's classification loss).

    Args:
      logits: (B, K) float.
      labels: (B,) integer or bool, 0 to K - 1.
      weights: (B,) float, not negative.

    Raises:
      ValueError: shapes that do not fit.
    """
    log_probability = _log_probability(logits, labels)
    labels = labels.astype(jnp.int32)[:, None]
    return _mean(-jnp.take_along_axis(log_probability, labels, axis=1)[:, 0], weights)


def focal_loss(
    logits: jax.Array,
    labels: jax.Array,
    weights: jax.Array | None = None,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> jax.Array:
    """Binary focal loss (Lin et al. 2017, arXiv 1708.02002, equation 5) on two logits.

    Args:
      logits: (B, 2) float.
      labels: (B,) integer or bool, 0 or 1.
      weights: (B,) float, not negative.
      alpha: weight of class 1; class 0 has 1 - alpha.
      gamma: how strongly images already classified well are discounted; 0 does not.

    Raises:
      ValueError: shapes that do not fit.
    """
    log_probability = _log_probability(logits, labels)
    if logits.shape[1] != 2:
        raise ValueError(
            f"logits {logits.shape}: expected (B, 2); use cross_entropy for more classes."
        )
    positive = labels.astype(bool)
    log_true = jnp.where(positive, log_probability[:, 1], log_probability[:, 0])
    # 1 - p of the true class is the other's p: taken as such, it does not cancel.
    log_other = jnp.where(positive, log_probability[:, 0], log_probability[:, 1])
    balance = jnp.where(positive, alpha, 1 - alpha)
    return _mean(-balance * jnp.exp(gamma * log_other) * log_true, weights)


def _masks(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    if logits.ndim < 2 or logits.shape != target.shape:
        raise ValueError(
            f"logits {logits.shape} and target {target.shape}: expected one shape (..., H, W); "
            "resize or broadcast the target first."
        )
    return logits.astype(jnp.float32), target.astype(jnp.float32)


def _log_probability(logits: jax.Array, labels: jax.Array) -> jax.Array:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits {logits.shape} and labels {labels.shape}: expected (B, K) and (B,), "
            "class numbers rather than one-hot vectors."
        )
    return jax.nn.log_softmax(logits.astype(jnp.float32))


def _mean(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    if weights is None:
        weights = jnp.ones_like(values)
    if weights.shape != values.shape:
        raise ValueError(
            f"weights {weights.shape}: expected {values.shape}, one per image; broadcast them."
        )
    weights = weights.astype(jnp.float32)
    total = weights.sum()
    return (values * weights).sum() / jnp.where(total > 0, total, 1)
