"""What is minimised: both tasks' losses, weighted by `config.loss`."""

import jax
import jax.numpy as jnp

from sammix_jax.method import losses
from sammix_jax.method.sam_mix import SamMixOutput

CLASSIFICATION_LOSSES = {"cross_entropy": losses.cross_entropy, "focal": losses.focal_loss}


def mask_loss(
    logits: jax.Array,
    target: jax.Array,
    weights,
    valid: jax.Array | None = None,
    counted: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Dice, and cross-entropy beside it where `weights` (`config.loss`) has it.

    Args:
      logits, target: (N, H, W).
      weights: `config.loss`.
      valid: (N, H, W) bool, pixels that count; None counts all.
      counted: (N,) float, by how much each slice counts; None counts all alike.

    Returns:
      The loss, and its parts without their weights: "dice_loss", and "bce_loss" if there is one.
    """
    dice = losses.dice_loss(logits, target, weights.dice_smooth, counted, valid)
    if not weights.bce:
        return dice, {"dice_loss": dice}
    bce = losses.bce_loss(logits, target, counted, valid)
    return dice + weights.bce * bce, {"dice_loss": dice, "bce_loss": bce}


def classification_loss(
    class_logits: jax.Array, image_label: jax.Array, name: str, share: jax.Array | float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """The classifier's loss and accuracy, means over the slices whose label is known.

    Args:
      class_logits: (B, 2).
      image_label: (B,) int32: 1 the slice shows the organ, 0 it does not, -1 unknown and left out.
      name: one of `CLASSIFICATION_LOSSES`.
      share: by which both are multiplied.

    Returns:
      Two scalars.
    """
    known = (image_label >= 0).astype(jnp.float32)
    loss = CLASSIFICATION_LOSSES[name](class_logits, jnp.maximum(image_label, 0), weights=known)
    correct = jnp.argmax(class_logits, axis=-1) == image_label
    return share * loss, share * (correct * known).sum() / jnp.maximum(known.sum(), 1)


def sam_mix_loss(
    output: SamMixOutput,
    masks: jax.Array,
    image_label: jax.Array,
    weights,
    segmentation_share: jax.Array | float = 1.0,
    classification_share: jax.Array | float = 1.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The multitask loss: classification of every slice, segmentation of the labelled ones.

    Args:
      output: of B slices, of which L are segmented.
      masks: (L, H, W) in {0, 1}.
      image_label: (B,) int32, as of `classification_loss`.
      weights: `config.loss`.
      segmentation_share, classification_share: by which the weights are multiplied.

    Returns:
      The loss; and by name its parts without their weights, and what else tells of it. Scalars.
    """
    classification, accuracy = classification_loss(
        output.class_logits, image_label, weights.classifier, classification_share
    )
    logits, candidates, iou = output.masks
    segmentation, parts = mask_loss(logits, masks, weights)
    if weights.iou:
        truth = jnp.broadcast_to(masks[:, None], candidates.shape)  # (L, M, H, W)
        parts["iou_loss"] = losses.iou_loss(iou, candidates, truth)
        segmentation += weights.iou * parts["iou_loss"]
    segmentation_weight = weights.segmentation * segmentation_share
    loss = weights.classification * classification + segmentation_weight * segmentation
    return loss, parts | {
        "loss": loss,
        "classification_loss": classification,
        "accuracy": accuracy,
        "empty_cams": jnp.mean(output.prompt.empty.astype(jnp.float32)),
    }
