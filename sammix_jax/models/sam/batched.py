"""Masks for a batch of images of mixed sizes, prompted in pixels of the originals, under one jit.

Source: Kirillov et al., "Segment Anything", ICCV 2023; it does for a batch what `predictor.py`
of facebookresearch/segment-anything does for one image.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sammix_jax.models.sam.inputs import normalise
from sammix_jax.models.sam.mask_decoder import MULTIMASK, SINGLE_MASK
from sammix_jax.models.sam.sam import Sam


def predict_masks(
    sam: Sam,
    params: Mapping[str, Any],
    squares: jax.Array,
    input_sizes: jax.Array,
    original_sizes: jax.Array,
    canvas: tuple[int, int],
    *,
    points: jax.Array | None = None,
    labels: jax.Array | None = None,
    boxes: jax.Array | None = None,
    masks: jax.Array | None = None,
    embeddings: jax.Array | None = None,
    multimask_output: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Answers P prompts for each of B images, which may differ in size.

    A pure function of static shapes: one compiled program serves every mix of image sizes.

        predict = jax.jit(predict_masks, static_argnames=("sam", "canvas", "multimask_output"))
        logits, iou, low_res = predict(sam, params, *stack_images(images, side), canvas, boxes=...)

    Args:
      sam: the model.
      params: its parameter tree, with 'image_encoder', 'prompt_encoder' and 'mask_decoder'.
      squares, input_sizes, original_sizes: from `stack_images`.
      canvas: (H, W) of the returned masks, at least the largest original.
      points: (B, P, N, 2) pixels of the original images, x then y; needs `labels`.
      labels: (B, P, N) integers: 1 inside the object, 0 outside, -1 padding.
      boxes: (B, P, 4) pixels of the originals: x and y of the top left, then the bottom right.
      masks: (B, P, 4h, 4w) logits, as returned in `low_res_logits`.
      embeddings: (B, h, w, C) of these images, such as `SamPredictor.features`; None encodes them
        here, which takes most of the time.
      multimask_output: M = 3 masks for each prompt, otherwise M = 1.

    Returns:
      logits: (B, P, M, *canvas) float32; image b fills the rows and columns of its original size,
        and beyond them stands -inf. The mask is where they exceed 0.
      iou: (B, P, M) float32, the estimated IoU of each mask.
      low_res_logits: (B, P, M, 4h, 4w) float32.

    Raises:
      ValueError: shapes that do not agree, see `Sam.decode`; outside of jit also a canvas that is
        too small.
    """
    if not isinstance(original_sizes, jax.core.Tracer) and (original_sizes > canvas).any():
        largest = tuple(int(length) for length in original_sizes.max(axis=0))
        raise ValueError(f"canvas={canvas}: cuts masks off; expected at least {largest}.")
    scale = jnp.asarray(input_sizes, jnp.float32) / original_sizes  # (B, 2), y then x
    scale = scale[:, None, None, ::-1]  # (B, 1, 1, 2), x then y
    if points is not None:
        _check_axes("points", points, ("B", "P", "N", 2))
        points = points * scale
    if boxes is not None:
        _check_axes("boxes", boxes, ("B", "P", 4))
        boxes = (boxes.reshape(*boxes.shape[:2], 2, 2) * scale).reshape(boxes.shape)
    sam = sam.bind({"params": params})
    if embeddings is not None and len(embeddings) != len(squares):
        raise ValueError(
            f"{len(embeddings)} embeddings of {len(squares)} images; expected one each."
        )
    if embeddings is None:
        embeddings = sam.encode_image(normalise(squares, input_sizes))
    low_res_logits, iou = sam.decode(
        embeddings,
        input_size=squares.shape[1:3],
        points=points,
        labels=labels,
        boxes=boxes,
        masks=masks,
    )
    kept = MULTIMASK if multimask_output else SINGLE_MASK
    low_res_logits, iou = low_res_logits[:, :, kept], iou[:, :, kept]
    shape = (*low_res_logits.shape[:3], *squares.shape[1:3])
    logits = jax.image.resize(low_res_logits, shape, "linear", antialias=False)
    restore = jax.vmap(functools.partial(_restore, canvas=canvas))
    return restore(logits, input_sizes, original_sizes), iou, low_res_logits


def _check_axes(name: str, value: jax.Array, expected: tuple[str | int, ...]) -> None:
    """Refuses what could not be scaled; `Sam.decode` compares the lengths."""
    shape = jnp.shape(value)
    if len(shape) != len(expected) or shape[-1] != expected[-1]:
        axes = ", ".join(map(str, expected))
        raise ValueError(f"{name} have shape {shape}; expected ({axes}).")


def _restore(
    logits: jax.Array, input_size: jax.Array, original_size: jax.Array, canvas: tuple[int, int]
) -> jax.Array:
    """Crops (..., S, S) to `input_size` and resizes to `original_size`, within a larger canvas.

    The second resize of `postprocess_masks`, for sizes known only at run time.
    """
    inside = True
    for axis, length in zip((-2, -1), canvas, strict=True):
        size, target = input_size[axis], original_size[axis]
        place = jnp.arange(length)
        source = jnp.clip((place + 0.5) * size / target - 0.5, 0, size - 1)
        low = source.astype(jnp.int32)
        column = (length, 1) if axis == -2 else (length,)
        weight = (source - low).reshape(column)
        inside &= (place < target).reshape(column)
        before = jnp.take(logits, low, axis)
        after = jnp.take(logits, jnp.minimum(low + 1, size - 1), axis)
        logits = (1 - weight) * before + weight * after
    return jnp.where(inside, logits, -jnp.inf)
