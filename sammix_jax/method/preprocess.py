"""From int16 HU slices to network inputs, on the device: scale, normalise, augment."""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from sammix_jax.data import paper
from sammix_jax.models.sam.sam import PIXEL_MEAN, PIXEL_STD

SCALINGS = ("window", "paper")
NORMALISATIONS = ("unit", "minmax", "sam")

# Ranges of the augmentation. No flips: they would put the liver on the wrong side of the body.
ROTATION = 0.26  # radians, ± 15°
LOG_SCALE = 0.2
SHIFT = 0.08  # of the image's side
CONTRAST = 0.2
BRIGHTNESS = 0.1
NOISE = 0.05


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


def random_moves(keys: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Draws a rotation, a scale and a shift for each slice.

    Args:
      keys: (B,) random keys.
      shape: (H, W) of the slices.

    Returns:
      (B, 2, H, W) float32: from which row and column each pixel of the moved slice is read.
    """
    return jax.vmap(_random_affine, in_axes=(0, None))(keys, shape)


def move(images: jax.Array, moves: jax.Array) -> jax.Array:
    """(B, H, W) in [0, 1] → the same, moved by `random_moves`; beyond the edge lies 0."""
    sample = jax.vmap(lambda image, at: map_coordinates(image, at, order=1, mode="constant"))
    return sample(images.astype(jnp.float32), moves)


def move_masks(masks: jax.Array, moves: jax.Array) -> jax.Array:
    """(B, H, W) in [0, 1] → the same in {0, 1} float32, moved as their images are."""
    return (move(masks, moves) >= 0.5).astype(jnp.float32)


def distort(images: jax.Array, keys: jax.Array, strength: float = 1.0) -> jax.Array:
    """Random contrast, brightness and noise, one draw per slice; nothing moves.

    Args:
      images: (B, H, W) in [0, 1].
      keys: (B,) random keys.
      strength: by which the ranges are multiplied.

    Returns:
      (B, H, W) float32 in [0, 1].
    """
    return jax.vmap(_random_intensity, in_axes=(0, 0, None))(keys, images, strength)


def _random_affine(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """(2, H, W): where each pixel of the moved slice is read from, in pixels."""
    rotation, scale, shift = jax.random.split(jax.random.fold_in(key, 0), 3)
    angle = jax.random.uniform(rotation, minval=-ROTATION, maxval=ROTATION)
    zoom = jnp.exp(jax.random.uniform(scale, minval=-LOG_SCALE, maxval=LOG_SCALE))
    size = jnp.asarray(shape, jnp.float32)
    move = jax.random.uniform(shift, (2,), minval=-SHIFT, maxval=SHIFT) * size
    matrix = zoom * jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    grid = jnp.stack(jnp.meshgrid(*map(jnp.arange, shape), indexing="ij"))  # (2, H, W)
    centre = ((size - 1) / 2)[:, None, None]
    # At the default precision TPUs and GPUs would round coordinates to eight or eleven bits.
    turned = jnp.einsum("ij,jhw->ihw", matrix, grid - centre, precision="highest")
    return turned + centre + move[:, None, None]


def _random_intensity(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    contrast, brightness, noise, level = jax.random.split(jax.random.fold_in(key, 1), 4)
    factor = 1 + strength * jax.random.uniform(contrast, minval=-CONTRAST, maxval=CONTRAST)
    offset = strength * jax.random.uniform(brightness, minval=-BRIGHTNESS, maxval=BRIGHTNESS)
    sigma = strength * jax.random.uniform(level, maxval=NOISE)
    noisy = image + sigma * jax.random.normal(noise, image.shape)
    return jnp.clip((noisy - 0.5) * factor + 0.5 + offset, 0.0, 1.0)
