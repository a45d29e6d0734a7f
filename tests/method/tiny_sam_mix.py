"""SAM-Mix on the smallest SAM there is: 64 pixels, a grid of 8 × 8."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from conftest import small_config

from sammix_jax.method.sam_mix import sam_mix


def noise_images():
    return jax.random.uniform(jax.random.key(0), (3, 64, 64))


def tiny(fields=()):
    """The small config's model, with fields such as {"cam.fusion": "none"}."""
    config = small_config()
    config.update_from_flattened_dict(dict(fields))
    return sam_mix(config)


def initialise(fields=()):
    return tiny(fields).init(jax.random.key(1), jnp.zeros((1, 64, 64)), segmented=1)


def arbitrary_variables():
    """Every leaf arbitrary, running statistics too, so that no zero hides a mistake."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        value, name = rng.normal(size=leaf.shape), path[-1].key
        if name == "kernel":
            value *= np.sqrt(2 / np.prod(leaf.shape[:-1]))
        elif name in ("scale", "var"):
            value = np.exp(0.3 * value)
        elif name != "gaussian_matrix":
            value *= 0.3
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(initialise))


@functools.cache
def compiled(method, fields):
    return jax.jit(functools.partial(tiny(fields).apply, method=method))


def run(fields, variables, method, *args):
    """A method of a tiny model; compiled once for the same fields."""
    return compiled(method, tuple(dict(fields).items()))(variables, *args)


def on_the_slices_grid(model, embeddings, fused, boxes):
    return model.segment(model.fuse(embeddings, fused), (64, 64), boxes=boxes)


def segment(fields, variables, embeddings, fused=None, boxes=None):
    return run(fields, variables, on_the_slices_grid, embeddings, fused, boxes)


def all_segmented(model, images, boxes):
    return model(images, segmented=len(images), boxes=boxes)


def forward(fields, variables, images, boxes=None):
    return run(fields, variables, all_segmented, images, boxes)
