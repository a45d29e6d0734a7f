"""SAM's prompt encoder: points, boxes and masks to embeddings.

Source: Kirillov et al., "Segment Anything", ICCV 2023, appendix A; reference file
`prompt_encoder.py` of facebookresearch/segment-anything. Unlike there, every prompt has a batch
axis B over images and an axis P over the prompts of one image.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sammix_jax.models.sam.layers import LayerNorm, gelu

_TOKEN_INIT = nn.initializers.normal(1.0)
# Rows of `point_embeddings`.
_NEGATIVE, _POSITIVE, _TOP_LEFT, _BOTTOM_RIGHT = range(4)


class PositionEncoding(nn.Module):
    """Random Fourier features of places in the unit square.

    `gaussian_matrix`, (2, features / 2), is a constant drawn at initialisation and carried by the
    checkpoint. It lives among the parameters so that one tree is the whole model; its gradient is
    stopped, it belongs on no optimiser's list, and `sam.count_parameters` leaves it out.
    """

    features: int

    @nn.compact
    def __call__(self, places: jax.Array) -> jax.Array:
        """Maps (..., 2) float32, x then y in [0, 1], to (..., features) float32."""
        matrix = self.param("gaussian_matrix", _TOKEN_INIT, (2, self.features // 2))
        # These are angles: a rounded product would move the place, whatever the compute type.
        angles = (
            2
            * math.pi
            * jnp.matmul(
                2 * places.astype(jnp.float32) - 1,
                jax.lax.stop_gradient(matrix).astype(jnp.float32),
                precision=jax.lax.Precision.HIGHEST,
            )
        )
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class MaskDownscaling(nn.Module):
    """Brings a mask prompt to the embedding's grid: a quarter of its side."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, masks: jax.Array) -> jax.Array:
        """Maps (..., 4h, 4w, 1) to (..., h, w, features)."""
        x = masks
        for i, features in ((1, 4), (2, 16)):
            conv = nn.Conv(
                features, (2, 2), strides=(2, 2), padding="VALID", dtype=self.dtype, name=f"conv{i}"
            )
            x = gelu(LayerNorm(dtype=self.dtype, name=f"norm{i}")(conv(x)))
        return nn.Conv(self.features, (1, 1), dtype=self.dtype, name="conv3")(x)


class PromptEncoder(nn.Module):
    """Prompts to sparse tokens and a dense embedding.

    Attributes:
      features: channels C of the embeddings.
      dtype: type of the embeddings; places are encoded in float32 whatever it is.
    """

    features: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.position_encoding = PositionEncoding(self.features)
        self.point_embeddings = self.param("point_embeddings", _TOKEN_INIT, (4, self.features))
        self.not_a_point_embed = self.param("not_a_point_embed", _TOKEN_INIT, (1, self.features))
        self.no_mask_embed = self.param("no_mask_embed", _TOKEN_INIT, (1, self.features))
        self.mask_downscaling = MaskDownscaling(self.features, self.dtype)

    def dense_position(self, grid_size: tuple[int, int]) -> jax.Array:
        """Position encoding of the embedding's cells, (h, w, C) in `dtype`."""
        h, w = grid_size
        y, x = jnp.meshgrid((jnp.arange(h) + 0.5) / h, (jnp.arange(w) + 0.5) / w, indexing="ij")
        return self.position_encoding(jnp.stack([x, y], axis=-1)).astype(self.dtype)

    def __call__(
        self,
        *,
        batch_size: int,
        input_size: tuple[int, int],
        grid_size: tuple[int, int],
        points: jax.Array | None = None,
        labels: jax.Array | None = None,
        boxes: jax.Array | None = None,
        masks: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes P prompts for each of B images; each prompt may combine all three kinds.

        Coordinates are pixels of the encoder's (padded) input, where pixel i has its centre at
        i + 0.5: half a pixel is added here.

        Args:
          batch_size: B.
          input_size: (H, W) of the encoder's input, in pixels.
          grid_size: (h, w) of the image embedding.
          points: (B, P, N, 2), x then y.
          labels: (B, P, N) integers: 1 inside the object, 0 outside, -1 padding.
          boxes: (B, P, 4), x and y of the top left, then of the bottom right corner.
          masks: (B, P, 4h, 4w) logits.

        Returns:
          sparse: (B, P, T, C). T = N + 1 for points alone (SAM adds one padding point), 2 for a
            box alone, N + 2 for both, 0 for neither.
          dense: (B, P, h, w, C), from the masks, or the learned no-mask embedding. Without any
            prompt P = 1.

        Raises:
          ValueError: points without labels or the reverse, no image or no prompt, or shapes that do
            not agree.
        """
        p = _check_prompts(batch_size, grid_size, points, labels, boxes, masks)
        h, w = grid_size
        tokens = [jnp.zeros((batch_size, p, 0, self.features))]
        if points is not None:
            tokens.append(self._embed_points(points, labels, input_size, pad=boxes is None))
        if boxes is not None:
            corners = boxes.reshape(batch_size, p, 2, 2)  # (B, P, 4) -> (B, P, corner, xy)
            rows = self.point_embeddings[_TOP_LEFT : _BOTTOM_RIGHT + 1]
            tokens.append(self._encode(corners, input_size) + rows)
        sparse = jnp.concatenate(tokens, axis=2).astype(self.dtype)

        if masks is not None:
            dense = self.mask_downscaling(masks[..., None])
        else:
            if self.is_initializing():
                self.mask_downscaling(jnp.zeros((1, 4 * h, 4 * w, 1)))
            shape = (batch_size, p, h, w, self.features)
            dense = jnp.broadcast_to(self.no_mask_embed.astype(self.dtype), shape)
        return sparse, dense

    def _encode(self, pixels: jax.Array, input_size: tuple[int, int]) -> jax.Array:
        h, w = input_size
        return self.position_encoding((pixels + 0.5) / jnp.array([w, h], jnp.float32))

    def _embed_points(
        self, points: jax.Array, labels: jax.Array, input_size: tuple[int, int], pad: bool
    ) -> jax.Array:
        labels = jnp.asarray(labels, jnp.int32)  # of booleans, -1 would be True
        if pad:
            points = jnp.pad(points, ((0, 0), (0, 0), (0, 1), (0, 0)))
            labels = jnp.pad(labels, ((0, 0), (0, 0), (0, 1)), constant_values=-1)
        labels = labels[..., None]
        position = self._encode(points, input_size)
        position = jnp.where(labels == -1, self.not_a_point_embed, position)
        position += jnp.where(labels == 0, self.point_embeddings[_NEGATIVE], 0.0)
        return position + jnp.where(labels == 1, self.point_embeddings[_POSITIVE], 0.0)


def _check_prompts(
    batch_size: int,
    grid_size: tuple[int, int],
    points: jax.Array | None,
    labels: jax.Array | None,
    boxes: jax.Array | None,
    masks: jax.Array | None,
) -> int:
    """Returns P, the number of prompts an image, after checking every shape against it."""
    if (points is None) != (labels is None):
        given, missing = ("labels", "points") if points is None else ("points", "labels")
        raise ValueError(f"Got {given} without {missing}: pass both or neither.")
    prompts = {"points": points, "labels": labels, "boxes": boxes, "masks": masks}
    given = {name: prompt.shape for name, prompt in prompts.items() if prompt is not None}
    p = next((shape[1] for shape in given.values() if len(shape) > 1), 1)
    n = points.shape[2] if points is not None and points.ndim == 4 else "N"
    expected = {
        "points": (batch_size, p, n, 2),
        "labels": (batch_size, p, n),
        "boxes": (batch_size, p, 4),
        "masks": (batch_size, p, 4 * grid_size[0], 4 * grid_size[1]),
    }
    if 0 in (batch_size, p):
        raise ValueError(
            f"{batch_size} images with {p} prompts each: there is nothing to answer; leave out "
            "images without a prompt."
        )
    for name, shape in given.items():
        if shape != expected[name]:
            raise ValueError(
                f"{name} have shape {shape}; expected {expected[name]} for {batch_size} images "
                f"with {p} prompts each and an embedding of {grid_size[0]} x {grid_size[1]}. Add "
                "the missing axes, or give every kind of prompt the same leading (B, P)."
            )
    return p
