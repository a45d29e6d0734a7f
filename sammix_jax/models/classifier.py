"""The image-level classifier of SAM-Mix: a trunk of `models.resnet`, pooling, a linear head."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sammix_jax.models.resnet import OUTPUT_STRIDES, STAGES, ResNet, ResNet38


class Classifier(nn.Module):
    """Trunk, global average pooling and a linear head.

    With this head the Grad-CAM of a class is linear in the head's weights (`method.cam`).
    Parameters are float32 under `trunk` and `head`; running statistics are in `batch_stats`.

    Attributes:
      arch: 'resnet38', 'resnet18', 'resnet34', 'resnet50' or 'mini'.
      num_classes: K.
      output_stride: pixels per cell of the feature map; None takes 32, and 8 for `mini`.
      dtype: compute dtype of the trunk; pooling and head are float32.
      freeze_batch_norm: normalise by the running statistics in training too, as batches of one
        slice may need.
      remat: a name in `blocks.POLICIES`.
    """

    arch: str
    num_classes: int = 2
    output_stride: int | None = None
    dtype: jnp.dtype = jnp.float32
    freeze_batch_norm: bool = False
    remat: str = "none"

    def setup(self):
        """Raises ValueError for an unknown `arch`, or an `output_stride` that it does not have."""
        if self.arch not in OUTPUT_STRIDES:
            raise ValueError(f"arch={self.arch!r}: expected one of {tuple(OUTPUT_STRIDES)}.")
        options = OUTPUT_STRIDES[self.arch]
        output_stride = options[0] if self.output_stride is None else self.output_stride
        if output_stride not in options:
            raise ValueError(
                f"output_stride={output_stride} for arch={self.arch!r}: expected one of {options}, "
                f"or None for {options[0]}."
            )
        if self.arch == "resnet38":
            self.trunk = ResNet38(output_stride, self.dtype, self.remat)
        else:
            self.trunk = ResNet(self.arch, output_stride, self.dtype, self.remat)
        self.head = nn.Dense(self.num_classes)

    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Classifies images.

        Args:
          images: (B, H, W, 3) float, normalised.
          train: whether BatchNorm uses the batch's statistics and updates the running ones (then
            apply with `mutable=["batch_stats"]`).

        Returns:
          Logits (B, K) float32, and the last feature map (B, h, w, D) in `dtype`, where
          h = ceil(H / output_stride).

        Raises:
          ValueError: images of another shape.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(
                f"images has shape {images.shape}: expected (B, H, W, 3); repeat a grey channel "
                "three times."
            )
        features = self.trunk(images, train and not self.freeze_batch_norm)
        return self._pool_and_classify(features), features

    def features_at(self, images: jax.Array, stage: str) -> jax.Array:
        """(B, H, W, 3) → the map at the end of a stage in `STAGES[arch]`, running statistics."""
        self._expect_stage(stage)
        return self.trunk(images, False, end=stage)

    def logits_from(self, features: jax.Array, stage: str) -> jax.Array:
        """The map at the end of a stage, (B, h, w, D) → logits (B, K), running statistics."""
        self._expect_stage(stage)
        return self._pool_and_classify(self.trunk(features, False, begin=stage))

    def _pool_and_classify(self, features: jax.Array) -> jax.Array:
        return self.head(jnp.mean(features.astype(jnp.float32), axis=(1, 2)))  # (B, D) → (B, K)

    def _expect_stage(self, stage: str) -> None:
        if stage not in STAGES[self.arch]:
            raise ValueError(f"stage={stage!r} of {self.arch}: expected one of {STAGES[self.arch]}")
