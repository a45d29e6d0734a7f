"""From int16 HU slices to network inputs, on the device: scale and normalise."""

import jax
import jax.numpy as jnp

from sammix_jax.data import paper
from sammix_jax.models.sam.sam import PIXEL_MEAN, PIXEL_STD

SCALINGS = ("window", "paper")
NORMALISATIONS = ("unit", "minmax", "sam")


def scale_slices(hu: jax.Array, inputs) -> jax.Array:
    """HU → grey values in [0, 1].

    Args:
      hu: (B, H, W) int16.
      inputs: `config.input`. With `scaling="window"` its window becomes [0, 1]; with `"paper"` the
        values are the authors' float16 ones, bit by bit, which lie in [0.327, 0.372].

    Returns:
      (B, H, W) float32.
    """
    if inputs.scaling == "window":
        return window(hu, inputs.window)
    if inputs.scaling != "paper":
        raise ValueError(f"input.scaling={inputs.scaling!r}: expected one of {SCALINGS}.")
    # Looked up: a compiler may fuse or widen float16 arithmetic, and round differently.
    levels = jnp.asarray(paper.LEVELS, jnp.float32)
    low, high = paper.WINDOW
    return levels[jnp.clip(hu, low, high).astype(jnp.int32) - low]


def window(hu: jax.Array, limits: tuple[float, float]) -> jax.Array:
    """Clips HU to the window and scales it to [0, 1]; any shape, float32."""
    low, high = limits
    return (jnp.clip(hu.astype(jnp.float32), low, high) - low) / (high - low)


def to_rgb(images: jax.Array, normalisation: str) -> jax.Array:
    """Grey slices → three-channel network input.

    Args:
      images: (B, H, W) in [0, 1].
      normalisation: `"unit"` leaves the values, `"minmax"` stretches each slice to [0, 1] (the
        group's later code), `"sam"` applies SAM's own mean and standard deviation.

    Returns:
      (B, H, W, 3) float32.
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"input.normalise={normalisation!r}: expected one of {NORMALISATIONS}.")
    if normalisation == "minmax":
        low = images.min(axis=(1, 2), keepdims=True)
        high = images.max(axis=(1, 2), keepdims=True)
        # A slice of air alone has no range; it stays zero.
        images = (images - low) / jnp.where(high > low, high - low, 1.0)
    rgb = jnp.repeat(images[..., None], 3, axis=-1)  # (B, H, W, 3)
    if normalisation == "sam":
        rgb = (rgb * 255.0 - jnp.asarray(PIXEL_MEAN)) / jnp.asarray(PIXEL_STD)
    return rgb
