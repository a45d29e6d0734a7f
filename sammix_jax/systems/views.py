"""What a network sees of a microbatch in training, and which slices train masks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sammix_jax.method.augment import AUGMENTATIONS, move, move_masks
from sammix_jax.method.objective import mask_loss
from sammix_jax.method.preprocess import scale_slices
from sammix_jax.systems.system import Microbatch

# Draws that are not augmentation's, which takes 0 and 1 of a slice's key.
DROPOUT, POINTS, STRONG = 2, 3, 4


class View(NamedTuple):
    """A microbatch's slices as a network sees them in training.

    Attributes:
      images: (B, H, W) float32 in [0, 1].
      masks: (B, H, W) float32 in {0, 1}; empty where a slice lends none.
      counted: (B,) float32 in {0, 1}, whether its mask is known.
      share: () float32, by what the mean over the known masks counts, see `Microbatch.share`.
      key: (B,) random keys.
    """

    images: jax.Array
    masks: jax.Array
    counted: jax.Array
    share: jax.Array
    key: jax.Array


def moved_slices(part: Microbatch, config) -> tuple[jax.Array, jax.Array]:
    """(B, H, W) float32 in [0, 1], and the masks of the first L of them, (L, H, W) float32 in
    {0, 1}: moved together where `train.augment` says so."""
    images, masks = scale_slices(part.hu, config.input), part.mask.astype(jnp.float32)
    if config.train.augment:
        random_moves, _ = AUGMENTATIONS[config.train.augmentation]
        moves = random_moves(part.key, images.shape[1:])
        images, masks = move(images, moves), move_masks(masks, part.layout.first(moves))
    return images, masks


def view_all(part: Microbatch, config) -> View:
    """Every slice of a microbatch, augmented. With `loss.negatives` the slices known not to show
    the organ have masks too, which are empty."""
    layout, labels = part.layout, part.labels
    images, masks = moved_slices(part, config)
    if config.train.augment:
        _, distort = AUGMENTATIONS[config.train.augmentation]
        images = distort(images, part.key)
    rest = layout.rest(part.image_label)  # (U,)
    absent = jnp.zeros(rest.shape, jnp.float32)
    known = jnp.asarray(labels.shape[0] * layout.labelled)
    if config.loss.negatives:
        absent = (rest == 0).astype(jnp.float32)
        known += (jax.vmap(layout.rest)(labels) == 0).sum()
    counted = layout.join(jnp.ones(layout.labelled), absent)
    empty = jnp.zeros((layout.unlabelled, *images.shape[1:]))
    return View(
        images, layout.join(masks, empty), counted, part.share(counted.sum(), known), part.key
    )


def view_masked(part: Microbatch, config) -> View:
    """`view_all`, without the slices that can have no mask."""
    view = view_all(part, config)
    if config.loss.negatives:
        return view
    first = jax.tree.map(part.layout.first, view._replace(share=None))
    return first._replace(share=view.share)


def keys_for(view_key: jax.Array, draw: int) -> jax.Array:
    """(B,) keys for one of the draws named above."""
    return jax.vmap(jax.random.fold_in, (0, None))(view_key, draw)


def segmentation(logits: jax.Array, view: View, weights) -> tuple[jax.Array, dict]:
    """Dice, and cross-entropy beside it, over the known masks.

    Args:
      logits: (B, H, W).
      view: what they are about.
      weights: `config.loss`.

    Returns:
      The loss without `loss.segmentation`; and its parts, as of `mask_loss`.
    """
    loss, parts = mask_loss(logits, view.masks, weights, counted=view.counted)
    return view.share * loss, {name: view.share * part for name, part in parts.items()}
