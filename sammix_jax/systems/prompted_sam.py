"""SAM without a classifier as a system: prompted with points of the truth, or not at all.

With `model.prompt="points"` it is trained and scored with points drawn from the true mask, so its
headline is an oracle's; with "none" nothing but the image goes in.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sammix_jax.method.cam import mask_to_box
from sammix_jax.method.losses import iou_loss
from sammix_jax.method.prompted_sam import PromptedSam, points_inside, sam_fields
from sammix_jax.systems.system import Microbatch, SlicePredictions, System, ruled_out
from sammix_jax.systems.views import POINTS, keys_for, segmentation, view_masked


@dataclasses.dataclass(frozen=True)
class PromptedSamSystem(System):
    """The network and who prompts it."""

    model: PromptedSam
    protocols = ("gt_box", "none", "gt_points")

    @classmethod
    def of(cls, config) -> "PromptedSamSystem":
        return cls(PromptedSam(**sam_fields(config)), config)

    @property
    def headline(self) -> str:
        return "gt_points" if self.config.model.prompt == "points" else "none"

    def init(self, key: jax.Array, images: jax.Array) -> dict:
        return self.model.init(key, images)

    def loss(self, variables: dict, part: Microbatch, teacher: dict | None = None):
        view, weights = view_masked(part, self.config), self.config.loss
        prompts = {}
        if self.config.model.prompt == "points":
            keys = keys_for(view.key, POINTS)
            points, labels = points_inside(view.masks > 0.5, keys, self.config.train.points)
            prompts = {"points": points, "labels": labels}
        output = self.model.apply(variables, view.images, **prompts)
        loss, metrics = segmentation(output.logits, view, weights)
        if weights.iou:
            shape = output.candidates.shape  # (B, M, H, W)
            truth = jnp.broadcast_to(view.masks[:, None], shape)
            counted = jnp.broadcast_to(view.counted[:, None], shape[:2])
            metrics["iou_loss"] = view.share * iou_loss(
                output.iou, output.candidates, truth, counted
            )
            loss += weights.iou * metrics["iou_loss"]
        loss *= weights.segmentation
        return loss, (metrics | {"loss": loss}, {})

    def predict(self, variables, images, truth, protocols, gate) -> SlicePredictions:
        size, logits = images.shape[1:], {}
        model = self.model.bind(variables)
        embeddings = model.encode(images)
        for protocol in protocols:
            if protocol == "none":
                found = model.segment(embeddings, size)
                logits[protocol] = found.logits
                continue
            boxes, absent = mask_to_box(truth)
            prompts = {"boxes": boxes}
            if protocol == "gt_points":
                # One key for all slices: a slice's points follow from its mask.
                keys = jnp.broadcast_to(jax.random.key(0), len(truth))
                points, labels = points_inside(truth, keys, self.config.evaluate.points)
                prompts = {"points": points, "labels": labels}
            found = model.segment(embeddings, size, **prompts)
            # There is nothing to prompt with where the organ is not.
            logits[protocol] = ruled_out(absent, found.logits)
        return SlicePredictions(logits)
