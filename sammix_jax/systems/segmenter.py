"""U-Net, nnU-Net's form and TransU-Net as systems: every pixel from the image alone.

They learn from the slices with masks, by the loss SAM-Mix has for its own; with `loss.negatives`
also that slices whose image-level label says 0 are empty, which is what that label tells a system
without a classifier.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from sammix_jax.method.preprocess import to_rgb
from sammix_jax.models.baselines.layers import learn_from_shown
from sammix_jax.models.baselines.transunet import TransUNet
from sammix_jax.models.baselines.unet import (
    NnUnet2d,
    UNet,
    deep_supervision_weights,
    nnunet_widths,
)
from sammix_jax.systems.system import Microbatch, SlicePredictions, System
from sammix_jax.systems.views import DROPOUT, keys_for, segmentation, view_masked

MIRRORS = ((), (1,), (2,), (1, 2))  # axes of (B, H, W)


class Segmenter(System):
    """A network that returns a `SegmenterOutput`."""

    channels: ClassVar[int] = 1  # of its input

    def init(self, key: jax.Array, images: jax.Array) -> dict:
        return self.model.init(key, self._inputs(images))

    def loss(self, variables: dict, part: Microbatch, teacher: dict | None = None):
        view, weights = view_masked(part, self.config), self.config.loss
        output, updates = self.model.apply(
            variables,
            self._inputs(view.images),
            train=True,
            keys=keys_for(view.key, DROPOUT),
            mutable=["batch_stats"],
        )
        output = learn_from_shown(output, view.images)
        finest, metrics = segmentation(output.logits, view, weights)
        losses = [finest]
        for logits in output.deep:
            # Nearest, as nnU-Net brings masks to a coarser grid.
            masks = jax.image.resize(view.masks, logits.shape, "nearest")
            losses.append(segmentation(logits, view._replace(masks=masks), weights)[0])
        shares = deep_supervision_weights(len(losses))
        loss = sum(share * loss for share, loss in zip(shares, losses, strict=True))
        loss *= weights.segmentation
        return loss, (metrics | {"loss": loss}, updates.get("batch_stats", {}))

    def predict(self, variables, images, truth, protocols, gate) -> SlicePredictions:
        logits = self._predicted_logits(variables, images)
        return SlicePredictions(dict.fromkeys(protocols, logits))

    def _predicted_logits(self, variables: dict, images: jax.Array) -> jax.Array:
        """(B, H, W) → (B, H, W)."""
        return self.model.apply(variables, self._inputs(images)).logits

    def _inputs(self, images: jax.Array) -> jax.Array:
        """(B, H, W) → (B, H, W, channels)."""
        return to_rgb(images, self.config.input.normalise)[..., : self.channels]


class UNetSystem(Segmenter):
    """The U-Net of SAM-Mix's authors, or one of `model.widths`."""

    @classmethod
    def of(cls, config) -> "UNetSystem":
        widths = tuple(config.model.widths) or UNet.widths
        return cls(UNet(widths, dtype=jnp.dtype(config.model.dtype)), config)


class NnUnetSystem(Segmenter):
    """nnU-Net's form for slices of `data.size`, or one of `model.widths`."""

    @classmethod
    def of(cls, config) -> "NnUnetSystem":
        widths = tuple(config.model.widths) or nnunet_widths(config.data.size, config.data.size)
        return cls(NnUnet2d(widths, dtype=jnp.dtype(config.model.dtype)), config)

    def _predicted_logits(self, variables: dict, images: jax.Array) -> jax.Array:
        """Means over four mirrorings, as nnU-Net predicts: it has learned from mirrored slices."""
        mirrored = jnp.concatenate([jnp.flip(images, axes) for axes in MIRRORS])  # (4 B, H, W)
        logits = jnp.split(super()._predicted_logits(variables, mirrored), len(MIRRORS))
        back = [jnp.flip(part, axes) for part, axes in zip(logits, MIRRORS, strict=True)]
        return jnp.mean(jnp.stack(back), axis=0)


class TransUNetSystem(Segmenter):
    """TransU-Net of `model.transunet`."""

    channels = 3

    @classmethod
    def of(cls, config) -> "TransUNetSystem":
        dtype = jnp.dtype(config.model.dtype)
        return cls(TransUNet(config.model.transunet, config.data.size, dtype=dtype), config)
