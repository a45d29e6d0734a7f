"""MultiMix: a U-Net whose encoder also classifies, and hands its saliency to the decoder.

Source: Haque, Imran, Wang and Terzopoulos, "MultiMix: Sparingly-Supervised, Extreme Multitask
Learning from Medical Images", ISBI 2021 (arXiv 2010.14731). What the paper leaves open is as in the
authors' code (ayaanzhaque/MultiMix). The losses are in `sammix_jax.systems.multimix_loss`.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sammix_jax.models.baselines.layers import (
    TORCH_INIT,
    dropout_keys,
    expect_images,
    shrink,
    where_shown,
)
from sammix_jax.models.baselines.unet import MaskHead, UNetDecoder, UNetEncoder


class MultiMixOutput(NamedTuple):
    """Classes and masks of B slices.

    Attributes:
      class_logits: (B, 2) float32; class 1 is "shows the organ".
      logits: (B, H, W) float32, of the mask.
      saliency: (B, H, W) float32, not negative, no gradient.
    """

    class_logits: jax.Array
    logits: jax.Array
    saliency: jax.Array


class MultiMix(nn.Module):
    """U-Net, classifier and saliency bridge: 1,965,155 parameters for one channel.

    The saliency of a slice is the absolute gradient of its higher class logit with respect to its
    pixels, the greatest of its channels. Slice and saliency, shrunk by 8, join the decoder's first
    level beside the encoder's map. As in the authors' code, the saliency is taken without
    dropout, is not normalised, and is a constant in training: no gradient passes through it. Not as
    there it is 0 of a slice of one grey, where it would be 1e20 and more. Instance norm keeps
    slices apart, so one gradient of the summed logits serves a whole batch.

    Attributes:
      widths: channels of each level; H and W must be multiples of 2^levels, since the classifier
        pools once more.
      dropout: share of elements zeroed at the end of each double convolution.
      dtype: compute dtype; norms, logits and saliency are float32, and parameters.
    """

    widths: tuple[int, ...] = (16, 32, 64, 128, 256)
    dropout: float = 0.25
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.encoder = UNetEncoder(self.widths, self.dropout, self.dtype)
        self.decoder = UNetDecoder(self.dropout, self.dtype)
        self.mask_head = MaskHead()
        self.class_head = nn.Dense(2, kernel_init=TORCH_INIT)

    def __call__(
        self, images: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> MultiMixOutput:
        """Classifies and segments images.

        Args:
          images: (B, H, W, C) float, normalised.
          train: whether dropout is at work.
          keys: (B,) random keys of the slices; needed in training unless `dropout` is 0.

        Raises:
          ValueError: images of another shape, or keys missing.
        """
        expect_images(images, 2 ** len(self.widths))
        keys = dropout_keys(keys, train, self.dropout)
        class_logits, maps = self._classify(images, keys)
        saliency = self._saliency(images)
        bridge = jnp.concatenate((images, saliency[..., None]), axis=-1)
        bridge = shrink(bridge, 2 ** (len(self.widths) - 2))
        decoded = self.decoder(maps, keys, bridge)
        return MultiMixOutput(class_logits, self.mask_head(decoded[0]), saliency)

    def _classify(
        self, images: jax.Array, keys: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """(B, H, W, C) → logits (B, 2) and the encoder's maps."""
        maps = self.encoder(images, keys)
        pooled = nn.max_pool(maps[-1], (2, 2), (2, 2)).astype(jnp.float32)
        return self.class_head(pooled.mean(axis=(1, 2))), maps  # (B, D) → (B, 2)

    def _saliency(self, images: jax.Array) -> jax.Array:
        """(B, H, W, C) → (B, H, W)."""

        def top_logits(model: "MultiMix", images: jax.Array) -> jax.Array:
            logits, _ = model._classify(images, None)
            # By its place, as a maximum's gradient is 0 / 0 where XLA rounds the logits two ways.
            top = jnp.argmax(logits, axis=-1, keepdims=True)
            return jnp.take_along_axis(logits, top, axis=-1).sum()

        # The lifted form: a plain jax.grad must not enclose a bound module.
        total, pull = nn.vjp(top_logits, self, images, vjp_variables=False)
        _, gradient = pull(jnp.ones_like(total))
        saliency = jnp.abs(gradient.astype(jnp.float32)).max(axis=-1)
        return jax.lax.stop_gradient(where_shown(images, saliency, 0.0))
