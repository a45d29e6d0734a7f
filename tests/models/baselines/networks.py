"""What the tests of the baselines share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

# What runs once compiles in half the time without optimisation.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def init(model, images):
    """Variables of random values, without the time it takes to compile the model's own."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name = path[-1].key
        base = 1.0 if name in ("scale", "var") else 0.0
        spread = 0.0 if name in ("mean", "var") else 0.2
        return jnp.asarray(rng.normal(base, spread, leaf.shape), jnp.float32)

    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
    return jax.tree_util.tree_map_with_path(fill, shapes)


def abstract(model, shape, train=False):
    """(variables, output) of a network as shapes; nothing is computed."""
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
    keys = jax.random.split(jax.random.key(0), shape[0])
    output = jax.eval_shape(
        lambda v, x: model.apply(v, x, train, keys, mutable=["batch_stats"])[0], variables, images
    )
    return variables, output


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def without_gradient(model, variables, images):
    """Names of the parameters that no output in training depends on; for models without dropout."""
    params, state = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def loss(params, state, images):
        variables = state | {"params": params}
        output, _ = model.apply(variables, images, True, mutable=["batch_stats"])
        leaves = jax.tree.leaves(output)
        # Uneven weights: a plain sum would not see what shifts between pixels.
        return sum((jnp.cos(jnp.arange(x.size)) * x.ravel()).mean() for x in leaves)

    gradient = jit(jax.grad(loss))(params, state, images)
    gradients = traverse_util.flatten_dict(gradient, sep="/")
    return {name for name, leaf in gradients.items() if not jnp.abs(leaf).max() > 1e-7}


def expect_slices_to_keep_to_themselves(model, variables, images, rtol=1e-4):
    """Dropout follows a slice's key: a batch in another order gives its output in that order."""
    keys = jax.random.split(jax.random.key(3), len(images))
    apply = jit(model.apply, static_argnums=2, static_argnames="mutable")

    def logits(images, keys):
        return apply(variables, images, True, keys, mutable=("batch_stats",))[0].logits

    order = jnp.array([2, 0, 1])
    straight, permuted = logits(images, keys), logits(images[order], keys[order])
    scale = jnp.abs(straight).max()
    assert jnp.abs(permuted - straight[order]).max() < rtol * scale
    other = logits(images, keys[order])
    assert (jnp.abs(other - straight).max(axis=(1, 2)) > 0.01 * scale).all()
