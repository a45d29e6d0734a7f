"""The loss of SAM-Mix."""

import jax
import jax.numpy as jnp
import pytest

from sammix_jax.method import losses
from sammix_jax.method.cam import cam_prompt
from sammix_jax.method.objective import sam_mix_loss
from sammix_jax.method.sam_mix import SamMixOutput
from sammix_jax.models.sam.choice import Masks


@pytest.mark.parametrize(("bce", "iou"), [(0.2, 0.4), (0.2, 0.0), (0.0, 0.4)])
@pytest.mark.parametrize("classifier", ["cross_entropy", "focal"])
def test_the_loss_is_the_sum_of_its_weighted_parts(config, classifier, bce, iou):
    """Classification of all four slices; Dice, cross-entropy and IoU of the two with masks."""
    keys = jax.random.split(jax.random.key(0), 4)
    candidates = jax.random.normal(keys[0], (2, 3, 8, 8))
    output = SamMixOutput(
        jax.random.normal(keys[1], (4, 2)),
        cam_prompt(jax.random.uniform(keys[2], (2, 4, 4)), (8, 8)),
        Masks(candidates[:, 1], candidates, jax.random.uniform(keys[3], (2, 3))),
    )
    masks, labels = jnp.zeros((2, 8, 8)).at[:, 2:6, 1:5].set(1), jnp.array([1, 1, 0, 1])
    weights = config.loss
    weights.classifier, weights.classification, weights.segmentation = classifier, 0.7, 0.3
    weights.bce, weights.iou, weights.dice_smooth = bce, iou, 5.0
    classes = {"cross_entropy": losses.cross_entropy, "focal": losses.focal_loss}[classifier]
    truth = jnp.stack([masks] * 3, axis=1)
    expected = 0.7 * classes(output.class_logits, labels) + 0.3 * (
        losses.dice_loss(candidates[:, 1], masks, smooth=5.0)
        + bce * losses.bce_loss(candidates[:, 1], masks)
        + iou * losses.iou_loss(output.masks.iou, candidates, truth)
    )
    loss, parts = sam_mix_loss(output, masks, labels, weights)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    shares = {"classification_loss": 0.7, "dice_loss": 0.3}
    shares |= {"bce_loss": 0.3 * bce} if bce else {}
    shares |= {"iou_loss": 0.3 * iou} if iou else {}
    assert {name for name in parts if name.endswith("_loss")} == set(shares)
    told = sum(share * float(parts[name]) for name, share in shares.items())
    assert told == pytest.approx(float(loss), rel=1e-5)
