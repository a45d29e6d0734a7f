"""SAM on slices, prompted from outside or not at all.

With points drawn from the truth it is the paper's SAM-PP (Segment Anything, fine-tuned or as it
is); with LoRA and without prompts it is in the manner of SAMed (Zhang and Liu 2023, arXiv
2304.13785), whose decoder also learns and whose prompt is the default embedding. With a classifier
that prompts it, it is SAM-Mix.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sammix_jax.method.preprocess import to_rgb
from sammix_jax.models.sam.attention import QUERY_CHUNK
from sammix_jax.models.sam.choice import Masks, choose_masks
from sammix_jax.models.sam.sam import Sam

PROMPTS = ("none", "points")


class PromptedSam(nn.Module):
    """Segment Anything on slices; fields as in `config.model` and `.input`."""

    sam_variant: str
    image_size: int
    lora_rank: int
    lora_targets: tuple[str, ...]
    mask_choice: str
    mask_index: int
    normalisation: str
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    query_chunk: int = QUERY_CHUNK

    def setup(self):
        self.sam = Sam(
            variant=self.sam_variant,
            lora_rank=self.lora_rank,
            lora_targets=self.lora_targets,
            dtype=self.dtype,
            remat=self.remat,
            query_chunk=self.query_chunk,
        )

    def __call__(self, images: jax.Array, **prompts) -> Masks:
        """`encode`, then `segment` on the slices' grid."""
        return self.segment(self.encode(images), images.shape[1:], **prompts)

    def encode(self, images: jax.Array) -> jax.Array:
        """(B, H, W) float32 in [0, 1], windowed → image embeddings (B, h, w, C)."""
        return self.sam.encode_image(self.inputs(images))

    def inputs(self, images: jax.Array) -> jax.Array:
        """(B, H, W) → (B, S, S, 3) as SAM takes them, S = `image_size`."""
        shape = (len(images), self.image_size, self.image_size)
        resized = jax.image.resize(images, shape, "linear")  # antialiased where it shrinks
        return to_rgb(resized, self.normalisation)

    def segment(
        self,
        embeddings: jax.Array,
        size: tuple[int, int],
        points: jax.Array | None = None,
        labels: jax.Array | None = None,
        boxes: jax.Array | None = None,
    ) -> Masks:
        """Prompts the mask decoder.

        Args:
          embeddings: (B, h, w, C) image embeddings.
          size: (H, W) of the slices.
          points: (B, N, 2) x and y in pixels of the slice, whose pixel i has its centre at i.
          labels: (B, N) int32: 1 inside, 0 outside, -1 no point.
          boxes: (B, 4) XYXY in pixels of the slice, whose maximum edge is one past the last pixel.
        """
        side = self.image_size
        scale = side / jnp.array(size[::-1], jnp.float32)  # x, y
        if points is not None:
            points = ((points + 0.5) * scale - 0.5)[:, None]  # (B, P=1, N, 2)
            labels = labels[:, None]  # (B, P=1, N)
        if boxes is not None:
            boxes = (boxes * jnp.tile(scale, 2))[:, None]  # (B, P=1, 4)
        low_res_logits, iou = self.sam.decode(
            embeddings, input_size=(side, side), points=points, labels=labels, boxes=boxes
        )  # (B, 1, 4, 4h, 4w), (B, 1, 4)
        return choose_masks(
            low_res_logits[:, 0], iou[:, 0], size, self.mask_choice, self.mask_index
        )


def sam_fields(config) -> dict:
    """The fields of a `PromptedSam` that a config describes."""
    return {
        "sam_variant": config.model.sam,
        "image_size": config.model.image_size,
        "lora_rank": config.model.lora_rank,
        "lora_targets": tuple(config.model.lora_targets),
        "mask_choice": config.model.mask_choice,
        "mask_index": config.model.mask_index,
        "normalisation": config.input.normalise,
        "dtype": jnp.dtype(config.model.dtype),
        "remat": config.model.remat,
        "query_chunk": config.model.query_chunk,
    }


def points_inside(masks: jax.Array, keys: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Points drawn evenly from the pixels of each mask.

    Args:
      masks: (B, H, W) bool.
      keys: (B,) random keys; with one key the points follow from the mask alone.
      count: N, points of each mask; in a mask of fewer pixels some coincide.

    Returns:
      Points (B, N, 2) float32, x and y of pixel centres; and labels (B, N) int32, 1, and -1 (no
      point) where a mask is empty.
    """
    b, _, w = masks.shape

    def draw(key: jax.Array, mask: jax.Array) -> jax.Array:
        height = jax.random.uniform(key, (count, *mask.shape))
        return jnp.argmax(jnp.where(mask, height, -1.0).reshape(count, -1), axis=1)

    pixel = jax.vmap(draw)(keys, masks)  # (B, N)
    points = jnp.stack([pixel % w, pixel // w], axis=-1).astype(jnp.float32)
    inside = masks.any(axis=(1, 2))[:, None]
    return points, jnp.broadcast_to(jnp.where(inside, 1, -1), (b, count)).astype(jnp.int32)
