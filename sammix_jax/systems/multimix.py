"""MultiMix as a system (Haque et al. 2021, arXiv 2010.14731).

Its losses, with the weights of `config.multimix` and `config.loss`:

classification   cross-entropy of the image-level labels, of all slices that have one, in place of
                 the published labelled set of its own; with `image_labels="labelled"` only of
                 slices with masks. Those are positive here, every one: a classifier that sees no
                 others learns nothing else.
pseudo-labels    the class that it is sure of on a weak view of the other slices, on a strong one
segmentation     Dice of the slices with masks
KL               between masks of labelled and of other slices, pair by pair
"""

import dataclasses

import jax
import jax.numpy as jnp

from sammix_jax.method.augment import AUGMENTATIONS
from sammix_jax.method.objective import classification_loss
from sammix_jax.method.preprocess import to_rgb
from sammix_jax.models.baselines.layers import learn_from_shown
from sammix_jax.models.baselines.multimix import MultiMix
from sammix_jax.systems.multimix_loss import kl_loss, pseudo_label_loss
from sammix_jax.systems.system import (
    Microbatch,
    SlicePredictions,
    System,
    organ_probability,
    ruled_out,
)
from sammix_jax.systems.views import DROPOUT, STRONG, keys_for, segmentation, view_all

IMAGE_LABELS = ("all", "labelled")


@dataclasses.dataclass(frozen=True)
class MultiMixSystem(System):
    """The network with a classifier and no CAM prompt."""

    model: MultiMix

    @classmethod
    def of(cls, config) -> "MultiMixSystem":
        """The published network, or one of `model.widths`."""
        widths = tuple(config.model.widths) or MultiMix.widths
        return cls(MultiMix(widths, dtype=jnp.dtype(config.model.dtype)), config)

    def init(self, key: jax.Array, images: jax.Array) -> dict:
        return self.model.init(key, self._inputs(images))

    def loss(self, variables: dict, part: Microbatch, teacher: dict | None = None):
        layout, weights, ours = part.layout, self.config.loss, self.config.multimix
        view = view_all(part, self.config)
        output = self._apply(variables, view.images, view.key)
        # Of the weak views, so that both are in register; the published code draws each on its own.
        keys = keys_for(layout.rest(view.key), STRONG)
        _, distort = AUGMENTATIONS[self.config.train.augmentation]
        strong = distort(layout.rest(view.images), keys, strength=2.0)
        strong_logits = self._apply(variables, strong, keys).class_logits

        labels, label = part.labels, part.image_label
        if ours.image_labels == "labelled":
            unknown = jnp.full(layout.unlabelled, -1, label.dtype)

            def hide(x: jax.Array) -> jax.Array:
                return layout.join(layout.first(x), unknown)

            label, labels = hide(label), jax.vmap(hide)(labels)
        classification, accuracy = classification_loss(
            output.class_logits,
            label,
            weights.classifier,
            part.share((label >= 0).sum(), (labels >= 0).sum()),
        )
        pseudo = pseudo_label_loss(layout.rest(output.class_logits), strong_logits, ours.confidence)
        masks, metrics = segmentation(output.logits, view, weights)
        kl = kl_loss(layout.first(output.logits), layout.rest(output.logits), ours.kl_form)
        loss = (
            weights.classification * classification
            + ours.unsupervised * pseudo
            + weights.segmentation * masks
            + ours.kl * kl
        )
        metrics |= {
            "loss": loss,
            "classification_loss": classification,
            "pseudo_label_loss": pseudo,
            "kl_loss": kl,
            "accuracy": accuracy,
        }
        return loss, (metrics, {})

    def predict(self, variables, images, truth, protocols, gate) -> SlicePredictions:
        output = self.model.apply(variables, self._inputs(images))
        probability = organ_probability(output.class_logits)
        logits = ruled_out((probability < 0.5) & gate, output.logits)
        return SlicePredictions(dict.fromkeys(protocols, logits), probability)

    def _apply(self, variables: dict, images: jax.Array, keys: jax.Array):
        keys = keys_for(keys, DROPOUT)
        output = self.model.apply(variables, self._inputs(images), train=True, keys=keys)
        return learn_from_shown(output, images)

    def _inputs(self, images: jax.Array) -> jax.Array:
        """(B, H, W) → (B, H, W, 1)."""
        return to_rgb(images, self.config.input.normalise)[..., :1]
