"""From images of any size to SAM's input: resize, pad, normalise.

Source: Kirillov et al., "Segment Anything", ICCV 2023; `utils/transforms.py` and `preprocess` in
`modeling/sam.py` of facebookresearch/segment-anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sammix_jax.models.sam.sam import PIXEL_MEAN, PIXEL_STD


def resize_longest_side(image: np.ndarray, side: int) -> np.ndarray:
    """Resizes an image so that its longest side is `side`: bilinear, antialiased.

    Pillow rounds to uint8 after each axis; a float resize gives slightly other pixels.

    Args:
      image: (H, W, 3) uint8.
      side: pixels of the longest side of the result.

    Returns:
      (h, w, 3) uint8; the other side is rounded, halves up.

    Raises:
      ValueError: another shape or type, or an image so narrow that a side rounds to 0.
    """
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"The image is {image.dtype} of shape {image.shape}; expected uint8, (H, W, 3). "
            "Scale a CT slice to 0..255 first; np.stack([slice] * 3, axis=-1) makes grey RGB."
        )
    scale = side / max(*image.shape[:2], 1)
    h, w = (int(length * scale + 0.5) for length in image.shape[:2])
    if not h or not w:
        raise ValueError(
            f"An image of {image.shape[0]} x {image.shape[1]} pixels would shrink to {h} x {w}: "
            "crop its longer side."
        )
    return np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR))


def stack_images(
    images: Sequence[np.ndarray], side: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Resizes images of any sizes by `resize_longest_side` and pads them into one array.

    Returns:
      squares: (B, side, side, 3) uint8, padded with 0 at the bottom and right.
      input_sizes: (B, 2) int32, (H, W) of each after resizing and before padding.
      original_sizes: (B, 2) int32, (H, W) of each before resizing.
    """
    resized = [resize_longest_side(image, side) for image in images]
    squares = np.zeros((len(resized), side, side, 3), np.uint8)
    for square, image in zip(squares, resized, strict=True):
        square[: image.shape[0], : image.shape[1]] = image
    sizes = [[np.shape(image)[:2] for image in stack] for stack in (resized, images)]
    input_sizes, original_sizes = np.array(sizes, np.int32).reshape(2, -1, 2)  # none is (0, 2)
    return squares, input_sizes, original_sizes


def normalise(squares: jax.Array, input_sizes: jax.Array) -> jax.Array:
    """Standardises padded RGB images, and sets the padding to 0 afterwards.

    Args:
      squares: (B, S, S, 3) on the scale 0 to 255.
      input_sizes: (B, 2) integers, (H, W) before padding.

    Returns:
      (B, S, S, 3) float32.
    """
    place = jnp.arange(squares.shape[1])
    rows, columns = place < input_sizes[:, :1], place < input_sizes[:, 1:]  # (B, S) each
    inside = rows[:, :, None, None] & columns[:, None, :, None]  # (B, S, S, 1)
    return jnp.where(inside, (squares.astype(jnp.float32) - PIXEL_MEAN) / PIXEL_STD, 0.0)
