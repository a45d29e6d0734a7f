"""Simulated users of a promptable model: a box or a point to begin with, then corrections.

As in Segment Anything (Kirillov et al. 2023, arXiv 2304.02643, appendix A, "Training algorithm").
Points and boxes are x, y in pixels of the encoder's input, where pixel i has its centre at i.
"""

import jax
import jax.numpy as jnp

from sammix_jax.method.cam import mask_to_box

JITTER = 0.1  # standard deviation of a box's corners, of its sides
MOST_JITTER = 20 / 1024  # of the input's side


def jittered_boxes(keys: jax.Array, masks: jax.Array) -> jax.Array:
    """The tight box of each mask with its corners moved by chance.

    Args:
      keys: (B,) random keys.
      masks: (B, P, S, S) bool.

    Returns:
      (B, P, 4) float32 XYXY within the image; the whole of it for an empty mask.
    """
    b, p, size, _ = masks.shape
    flat = masks.reshape(b * p, size, size)  # (B, P, S, S) → (BP, S, S)
    boxes, empty = mask_to_box(flat)
    boxes = jnp.where(empty[:, None], jnp.array([0.0, 0.0, size, size]), boxes).reshape(b, p, 4)
    sides = jnp.tile(boxes[..., 2:] - boxes[..., :2], 2)  # (B, P, 4)
    noise = jax.vmap(lambda key: jax.random.normal(key, (p, 4)))(keys)
    limit = MOST_JITTER * size
    return jnp.clip(boxes + jnp.clip(JITTER * sides * noise, -limit, limit), 0, size)


def random_points(keys: jax.Array, regions: jax.Array, size: int) -> jax.Array:
    """A point drawn evenly from each region.

    Args:
      keys: (B,) random keys.
      regions: (B, P, s, s) bool, on a grid that covers the input; not empty.
      size: S, the input's side in pixels.

    Returns:
      (B, P, 2) float32, x and y of the centre of a cell.
    """
    b, p, side, _ = regions.shape
    shape = (p, side * side)
    draws = jax.vmap(lambda key: jax.random.uniform(key, shape, minval=0.1, maxval=1.0))(keys)
    draws = draws * regions.reshape(b, *shape)  # (B, P, s, s) → (B, P, ss)
    cell = jnp.argmax(draws, axis=-1)
    places = jnp.stack([cell % side, cell // side], axis=-1).astype(jnp.float32)  # (B, P, xy)
    return (places + 0.5) * (size / side) - 0.5


def corrections(
    keys: jax.Array, predicted: jax.Array, truth: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
    """Where a user would click next: anywhere in the region that is wrong.

    Args:
      keys: (B,) random keys.
      predicted, truth: (B, P, s, s) bool; a truth is not empty.
      size: S, the input's side in pixels.

    Returns:
      Points (B, P, 2), and labels (B, P) int32: 1 where the mask lacks the point, 0 where it should
      not hold it. Where nothing is wrong the point lies in the object.
    """
    wrong = predicted != truth
    right = ~wrong.any(axis=(-2, -1), keepdims=True)
    points = random_points(keys, jnp.where(right, truth, wrong), size)
    cells = ((points + 0.5) * (truth.shape[-1] / size) - 0.5).astype(jnp.int32)  # (B, P, xy)
    inside = jax.vmap(jax.vmap(lambda mask, at: mask[at[1], at[0]]))(truth, cells)
    return points, inside.astype(jnp.int32)
