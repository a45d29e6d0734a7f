"""Stand-ins that compile in a moment: a SAM of two small blocks, and scenes of one rectangle."""

import dataclasses

import jax
import jax.numpy as jnp

from sammix_jax.models.sam.variants import VARIANTS
from sammix_jax.pretrain.scenes import Scenes

TWO_BLOCKS = dataclasses.replace(
    VARIANTS["mini"],
    image_size=32,
    embed_dim=16,
    depth=2,
    num_heads=2,
    global_blocks=(1,),
    window_size=2,
    prompt_dim=16,
    decoder_mlp_dim=32,
    decoder_heads=2,
)


def draw_rectangles(keys: jax.Array, size: int) -> Scenes:
    """Two rectangles a scene, of chance size and place, brighter than what is around."""

    def draw(key):
        low, side = jax.random.uniform(key, (2, 2, 2))  # of (xy, rectangle)
        low, side = low * size / 2, size / 6 + side * size / 4
        place = jnp.arange(size)[:, None]
        along = (place >= low[:, None]) & (place < (low + side)[:, None])  # (xy, S, rectangle)
        masks = along[1].T[:, :, None] & along[0].T[:, None, :]  # (rectangle, S, S)
        owners = jnp.where(masks, jnp.arange(2)[:, None, None], -1).max(axis=0)
        return 0.3 * masks.sum(0), masks, owners

    return Scenes(*jax.vmap(draw)(keys))
