"""SAM-Mix as a system: its loss, with a teacher or without, and its three protocols."""

import dataclasses

import jax
import jax.numpy as jnp

from sammix_jax.method.augment import AUGMENTATIONS
from sammix_jax.method.cam import central_box, mask_to_box
from sammix_jax.method.consistency import pseudo_masks, ramp
from sammix_jax.method.objective import mask_loss, sam_mix_loss
from sammix_jax.method.sam_mix import SamMix, sam_mix
from sammix_jax.systems.system import (
    Microbatch,
    SlicePredictions,
    System,
    organ_probability,
    ruled_out,
)
from sammix_jax.systems.views import moved_slices


@dataclasses.dataclass(frozen=True)
class SamMixSystem(System):
    """The method (`sammix_jax.method.sam_mix`)."""

    model: SamMix
    protocols = ("cam", "gt_box", "none")

    @classmethod
    def of(cls, config) -> "SamMixSystem":
        return cls(sam_mix(config), config)

    @property
    def headline(self) -> str:
        return "cam"

    def init(self, key: jax.Array, images: jax.Array) -> dict:
        return self.model.init(key, images, segmented=1)

    def loss(self, variables: dict, part: Microbatch, teacher: dict | None = None):
        config, layout, taught = self.config, part.layout, teacher is not None
        weak, strong, masks = _views(part, config)
        if taught:
            answers = self.model.apply(
                teacher,
                layout.rest(weak),
                segmented=layout.unlabelled,
                shards=layout.shards,
            )
            pseudo = pseudo_masks(
                answers.masks.logits,
                layout.rest(part.image_label),
                config.consistency.confidence,
            )
        output, updates = self.model.apply(
            variables,
            strong,
            segmented=layout.size if taught else layout.labelled,
            train=True,
            boxes=_true_boxes(masks) if config.train.box == "gt" else None,
            shards=layout.shards,
            mutable=["batch_stats"],
        )
        all_masks = output.masks
        if taught:
            output = output._replace(masks=jax.tree.map(layout.first, all_masks))
        # 0 while the classifier warms up: neither masks nor a teacher train SAM then.
        segments = (part.step >= config.train.classifier_warmup_steps).astype(jnp.float32)
        known = part.share((part.image_label >= 0).sum(), (part.labels >= 0).sum())
        loss, metrics = sam_mix_loss(output, masks, part.image_label, config.loss, segments, known)
        if taught:
            consistency, _ = mask_loss(
                layout.rest(all_masks.logits), pseudo.target, config.loss, pseudo.valid
            )
            start, length = config.consistency.start_step, config.consistency.ramp_steps
            grown = segments * ramp(part.step, start, length) * config.consistency.weight
            loss += grown * consistency
            metrics |= {
                "loss": loss,
                "consistency_loss": consistency,
                "confident_pixels": jnp.mean(pseudo.valid.astype(jnp.float32)),
            }
        return loss, (metrics, updates.get("batch_stats", {}))

    def predict(self, variables, images, truth, protocols, gate) -> SlicePredictions:
        size = images.shape[1:]
        model = self.model.bind(variables)
        class_logits, features = model.classify(images)
        prompt = model.prompt(images, features)
        embeddings = model.encode(images)
        fused = model.fuse(embeddings, prompt)
        probability = organ_probability(class_logits)
        negative = (probability < 0.5) & gate
        logits = {}
        for protocol in protocols:
            if protocol == "cam":
                box = prompt.box if self.config.cam.box else None
                mask = model.segment(fused, size, boxes=box).logits
                outside = negative
            elif protocol == "gt_box":
                box, outside = mask_to_box(truth)
                mask = model.segment(fused, size, boxes=box).logits
            else:
                mask = model.segment(model.fuse(embeddings, None), size).logits
                outside = negative
            logits[protocol] = ruled_out(outside, mask)
        return SlicePredictions(logits, probability, prompt.cam, prompt.box, prompt.empty)


def _views(part: Microbatch, config):
    """Weak and strong views of a microbatch's slices in register, and the masks that go with them.

    Only a teacher looks at weak views. What it teaches is distorted twice as much, and all slices
    alike, or the classifier could tell from that which of them lend masks, all of which show the
    organ.

    Returns:
      Weak and strong (B, H, W) float32 in [0, 1], masks (L, H, W) float32 in {0, 1}.
    """
    images, masks = moved_slices(part, config)
    taught, strong = config.consistency.weight > 0, images
    if taught or config.train.augment:
        _, distort = AUGMENTATIONS[config.train.augmentation]
        strong = distort(images, part.key, 2.0 if taught else 1.0)
    return images, strong, masks


def _true_boxes(masks: jax.Array) -> jax.Array:
    """(L, H, W) → (L, 4) XYXY; the central box where augmentation left nothing of the organ."""
    boxes, empty = mask_to_box(masks > 0.5)
    return jnp.where(empty[:, None], central_box(*masks.shape[1:]), boxes)
