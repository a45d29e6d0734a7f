"""The small layers that the baselines share."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# PyTorch's default for convolutions: uniform between ±1 / sqrt(fan in).
TORCH_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# Normalises each channel of each slice over its pixels, in float32, with the biased variance.
InstanceNorm = functools.partial(nn.InstanceNorm, epsilon=1e-5, use_fast_variance=False)


def expect_images(images: jax.Array, multiple: int) -> None:
    """Raises ValueError unless images are (B, H, W, C) with H and W multiples of `multiple`."""
    if images.ndim != 4 or any(side % multiple or not side for side in images.shape[1:3]):
        raise ValueError(
            f"images has shape {images.shape}: expected (B, H, W, C) with H and W multiples of "
            f"{multiple}; pad or resize them."
        )


def dropout_keys(keys: jax.Array | None, train: bool, rate: float) -> jax.Array | None:
    """The keys where dropout is at work, else None.

    Raises:
      ValueError: dropout is at work and there are no keys.
    """
    if not train or rate == 0:
        return None
    if keys is None:
        raise ValueError(f"keys=None: dropout of {rate} in training needs a key for each slice.")
    return keys


def dropout(x: jax.Array, rate: float, keys: jax.Array | None, layer: int) -> jax.Array:
    """Zeroes a share of the elements and scales up the rest, as `nn.Dropout` does.

    What is zeroed in a slice follows from the slice's own key, so it does not depend on the
    batch the slice is in, nor on how that is divided over devices.

    Args:
      x: (B, ...) float.
      rate: share of elements that are zeroed, 0 to below 1.
      keys: (B,) random keys; None returns `x` as it is.
      layer: number of this dropout within its network; each has draws of its own.
    """
    if keys is None:
        return x

    def keep(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - rate, x.shape[1:])

    return jnp.where(jax.vmap(keep)(keys), x / (1 - rate), 0).astype(x.dtype)


def where_shown(images: jax.Array, found: jax.Array, otherwise: jax.Array) -> jax.Array:
    """`found` of images that show anything, `otherwise` of those of one grey.

    Such a slice, all air below the window, teaches nothing. Behind it every norm divides a gradient
    by the root of its epsilon, and a stack of them makes it huge, or infinite.

    Args:
      images: (B, H, W) or (B, H, W, C).
      found, otherwise: (B, ...), or what broadcasts to it.
    """
    greys = images.reshape(len(images), images.shape[1] * images.shape[2], -1)  # (B, HW, C)
    shown = (greys.max(axis=1) > greys.min(axis=1)).any(axis=1)  # (B,)
    every = shown.reshape(-1, *(1,) * (found.ndim - 1))  # (B,) -> (B, 1, ...)
    return jnp.where(every, found, otherwise)


def learn_from_shown(output, images: jax.Array):
    """What a network made of images, arrays (B, ...), without a gradient where one is of one grey;
    images as in `where_shown`."""
    return jax.tree.map(lambda x: where_shown(images, x, jax.lax.stop_gradient(x)), output)


def upsample(x: jax.Array) -> jax.Array:
    """(B, H, W, C) → (B, 2H, 2W, C), bilinear with aligned corners.

    The centres of the corner pixels stay where they are: `align_corners=True` in PyTorch, the form
    in the published code of all baselines that interpolate.
    """
    return _double(_double(x, 1), 2)


def shrink(x: jax.Array, factor: int) -> jax.Array:
    """(B, H, W, C) → (B, H // factor, W // factor, C), bilinear with aligned corners.

    Without antialiasing, as PyTorch's `interpolate`: most pixels are never read.
    """
    for axis in (1, 2):
        sides = x.shape[axis], x.shape[axis] // factor
        at = np.linspace(0, sides[0] - 1, sides[1])
        low = np.floor(at).astype(int)
        share = _along(at - low, axis).astype(x.dtype)
        below, above = (x.take(np.minimum(i, sides[0] - 1), axis) for i in (low, low + 1))
        x = below + share * (above - below)
    return x


def _double(x: jax.Array, axis: int) -> jax.Array:
    # With aligned corners new place 2k lies k / (2n - 1) before old place k, and 2k + 1 lies
    # (n - 1 - k) / (2n - 1) after it. What `roll` wraps around has weight 0.
    n = x.shape[axis]
    before, after = (
        _along(at / (2 * n - 1), axis).astype(x.dtype) for at in (np.r_[:n], np.r_[n - 1 : -1 : -1])
    )
    even = x + before * (jnp.roll(x, 1, axis) - x)
    odd = x + after * (jnp.roll(x, -1, axis) - x)
    shape = list(x.shape)
    shape[axis] = 2 * n
    return jnp.stack((even, odd), axis + 1).reshape(shape)  # (.., N, 2, ..) → (.., 2N, ..)


def _along(values: np.ndarray, axis: int) -> np.ndarray:
    """(N,) → (N, 1, ..) that broadcasts along an axis of (B, H, W, C)."""
    return values.reshape((-1,) + (1,) * (3 - axis))
