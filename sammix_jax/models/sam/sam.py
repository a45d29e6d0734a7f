"""Segment Anything: image encoder, prompt encoder and mask decoder as one module.

Source: Kirillov et al., "Segment Anything", ICCV 2023; reference files `sam.py` and
`predictor.py` of facebookresearch/segment-anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sammix_jax.models.sam.attention import QUERY_CHUNK
from sammix_jax.models.sam.image_encoder import ImageEncoder
from sammix_jax.models.sam.mask_decoder import MaskDecoder
from sammix_jax.models.sam.prompt_encoder import PromptEncoder
from sammix_jax.models.sam.variants import SamVariant, get_variant

# RGB on the scale 0 to 255; normalise by (image - PIXEL_MEAN) / PIXEL_STD before any padding.
PIXEL_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
PIXEL_STD = np.array([58.395, 57.12, 57.375], np.float32)

# Leaves of the parameter tree that are constants: never trained and never counted.
CONSTANTS = ("prompt_encoder/position_encoding/gaussian_matrix",)


class Sam(nn.Module):
    """Segment Anything with optional LoRA in the image encoder.

    Attributes:
      variant: a name in `variants.VARIANTS`, or a `SamVariant` of one's own.
      lora_rank: rank of the low-rank terms; 0 leaves them out of the parameter tree.
      lora_targets: which of 'q', 'k', 'v' they adapt in every encoder block.
      dtype: compute type of all three parts; parameters are float32, as are softmax,
        LayerNorm, the encoding of coordinates and the outputs of `decode`.
      remat: see `ImageEncoder`.
      query_chunk: see `attention.attend`.
    """

    variant: str | SamVariant
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ("q", "v")
    dtype: Any = jnp.float32
    remat: str = "none"
    query_chunk: int = QUERY_CHUNK

    def setup(self) -> None:
        sizes = get_variant(self.variant)
        self.image_encoder = ImageEncoder(
            sizes,
            lora_rank=self.lora_rank,
            lora_targets=self.lora_targets,
            remat=self.remat,
            query_chunk=self.query_chunk,
            dtype=self.dtype,
        )
        self.prompt_encoder = PromptEncoder(sizes.prompt_dim, dtype=self.dtype)
        self.mask_decoder = MaskDecoder(
            sizes.decoder_heads, sizes.decoder_mlp_dim, dtype=self.dtype
        )

    def encode_image(self, images: jax.Array) -> jax.Array:
        """Encodes images.

        Args:
          images: (B, H, W, 3) float, already normalised; sides are multiples of the patch size.

        Returns:
          (B, h, w, C) in `dtype`, with h = H / patch and w = W / patch.

        Raises:
          ValueError: wrong shape, see `ImageEncoder`.
        """
        return self.image_encoder(images)

    def decode(
        self,
        image_embeddings: jax.Array,
        *,
        input_size: tuple[int, int],
        points: jax.Array | None = None,
        labels: jax.Array | None = None,
        boxes: jax.Array | None = None,
        masks: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Answers P prompts for each of B images.

        Args:
          image_embeddings: (B, h, w, C) from `encode_image`.
          input_size: (H, W) in pixels of the array given to `encode_image`, padding included.
          points: (B, P, N, 2) pixels of that array, x then y; needs `labels`.
          labels: (B, P, N) integers: 1 inside the object, 0 outside, -1 padding.
          boxes: (B, P, 4) pixels: x and y of the top left, then of the bottom right corner.
          masks: (B, P, 4h, 4w) logits.

        Returns:
          low_res_logits: (B, P, 4, 4h, 4w) float32; above 0 is inside. Index 0 is the single-mask
            answer, 1 to 3 the multi-mask answers. Without a prompt P = 1.
          iou: (B, P, 4) float32, the estimated IoU of each mask.

        Raises:
          ValueError: shapes that do not agree, or `input_size` not that of the embeddings.
        """
        sizes = get_variant(self.variant)
        if image_embeddings.ndim != 4 or image_embeddings.shape[-1] != sizes.prompt_dim:
            raise ValueError(
                f"Image embeddings have shape {image_embeddings.shape}; expected (B, h, w, "
                f"{sizes.prompt_dim}), as encode_image returns them."
            )
        b, h, w, _ = image_embeddings.shape
        patch = sizes.patch_size
        if tuple(input_size) != (h * patch, w * patch):
            raise ValueError(
                f"input_size is {tuple(input_size)}, but embeddings of {h} x {w} cells come from "
                f"an input of {(h * patch, w * patch)}: pass (H, W) of the array given to "
                "encode_image, padding included."
            )
        sparse, dense = self.prompt_encoder(
            batch_size=b,
            input_size=input_size,
            grid_size=(h, w),
            points=points,
            labels=labels,
            boxes=boxes,
            masks=masks,
        )
        image_pe = self.prompt_encoder.dense_position((h, w))
        return self.mask_decoder(image_embeddings, image_pe, sparse, dense)

    def __call__(
        self,
        images: jax.Array,
        *,
        points: jax.Array | None = None,
        labels: jax.Array | None = None,
        boxes: jax.Array | None = None,
        masks: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """`encode_image`, then `decode`; initialising by it creates every parameter."""
        return self.decode(
            self.encode_image(images),
            input_size=images.shape[1:3],
            points=points,
            labels=labels,
            boxes=boxes,
            masks=masks,
        )


def postprocess_masks(
    low_res_logits: jax.Array,
    input_size: tuple[int, int],
    original_size: tuple[int, int],
    encoder_size: tuple[int, int],
) -> jax.Array:
    """Brings mask logits to the original image: upsample, crop the padding, resize.

    The two resizes do not commute with the crop: one resize from the low-resolution logits gives
    other masks. Both are bilinear with half-pixel centres and no antialiasing.

    Args:
      low_res_logits: (..., 4h, 4w) float32 from `Sam.decode`.
      input_size: (H, W) in pixels of the resized image before padding.
      original_size: (H, W) in pixels of the image before any resize.
      encoder_size: (H, W) in pixels of the array given to `Sam.encode_image`.

    Returns:
      (..., *original_size) logits; the mask is where they exceed 0.

    Raises:
      ValueError: `input_size` exceeds `encoder_size`.
    """
    if input_size[0] > encoder_size[0] or input_size[1] > encoder_size[1]:
        raise ValueError(
            f"input_size {tuple(input_size)} exceeds encoder_size {tuple(encoder_size)}: pass the "
            "(H, W) of the image after resizing and before padding."
        )
    lead = low_res_logits.shape[:-2]
    logits = jax.image.resize(low_res_logits, (*lead, *encoder_size), "linear", antialias=False)
    logits = logits[..., : input_size[0], : input_size[1]]
    return jax.image.resize(logits, (*lead, *original_size), "linear", antialias=False)


def count_parameters(params: Mapping[str, Any]) -> int:
    """Number of learned values in a parameter tree of arrays or shapes, `CONSTANTS` left out."""
    leaves = traverse_util.flatten_dict(dict(params), sep="/")
    return sum(
        int(np.prod(leaf.shape)) for path, leaf in leaves.items() if not path.endswith(CONSTANTS)
    )
