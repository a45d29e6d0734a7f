"""A small SAM with random weights and a few prompts, shared by the tests of its parts."""

import functools

import jax
import numpy as np
from flax import traverse_util

from sammix_jax.models.sam import Sam, SamVariant

# Small, and its windows need padding, on the native grid and on that of H x W.
TINY = SamVariant(
    image_size=64,
    patch_size=8,
    embed_dim=32,
    depth=2,
    num_heads=2,
    global_blocks=(1,),
    window_size=3,
    parameters=84_236,
    prompt_dim=32,
    decoder_mlp_dim=48,
    decoder_heads=4,
)
H, W = 48, 80  # a grid of 6 x 10


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def random_params(module, *args, **kwargs):
    """Parameters of a module with every leaf random, so that no zero hides a mistake."""
    init = functools.partial(module.init, **kwargs)  # sizes among them must stay static
    shapes = flat(jax.eval_shape(init, jax.random.key(0), *args)["params"])
    rng = np.random.default_rng(0)
    params = {}
    for path, leaf in shapes.items():
        value = rng.normal(size=leaf.shape)
        if path.endswith("kernel"):
            value /= np.sqrt(np.prod(leaf.shape[:-1]))
        elif path.endswith("scale"):
            value = 1 + 0.1 * value
        elif not path.endswith("gaussian_matrix"):
            value *= 0.3
        params[path] = value.astype(np.float32)
    return traverse_util.unflatten_dict(params, sep="/")


@functools.cache
def tiny():
    """A model with LoRA, random parameters, two images, and three prompts for each."""
    model = Sam(TINY, lora_rank=2)
    params = random_params(model, np.zeros((1, H, W, 3), np.float32))
    rng = np.random.default_rng(2)
    corner = rng.uniform(0, 30, size=(2, 3, 2))
    prompts = {
        "points": np.float32(rng.uniform(size=(2, 3, 2, 2)) * (W, H)),
        "labels": np.array([[[1, 0], [1, -1], [0, 0]], [[1, 1], [0, 1], [-1, -1]]]),
        "boxes": np.float32(np.concatenate([corner, corner + 15], axis=-1)),
        "masks": normal(4, 2, 3, 24, 40),
    }
    return model, params, normal(1, 2, H, W, 3), prompts


@functools.partial(jax.jit, static_argnums=0)
def answer(model, params, images, prompts):
    return model.apply({"params": params}, images, **prompts)


@functools.partial(jax.jit, static_argnums=0)
def encode(model, params, images):
    return model.apply({"params": params}, images, method=Sam.encode_image)


def equations(jaxpr):
    """Every equation of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
