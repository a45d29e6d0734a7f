"""Augmentation by name: how slices are moved, and how their grey values change.

standard  small moves, contrast, brightness, noise; no flips
nnunet    after nnU-Net's 2D training (Isensee et al. 2021, Nature Methods 18, supplement, and its
          code): any rotation, scale, mirrors, noise, blur, brightness, contrast, low resolution
          and gamma, each with its own chance. Its grey values have mean 0 and standard deviation 1
          over the organ; here the middle of the window and each slice's own deviation take these
          places, the result is cut to [0, 1], and what lies beyond a moved slice is 0, the window's
          lower end, where nnU-Net has its 0. Elastic deformation is off there too.
"""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

# Ranges of the augmentation. No flips: they would put the liver on the wrong side of the body.
ROTATION = 0.26  # radians, ± 15°
LOG_SCALE = 0.2
SHIFT = 0.08  # of the image's side
CONTRAST = 0.2
BRIGHTNESS = 0.1
NOISE = 0.05

# Ranges of nnU-Net's.
ZOOM = (0.7, 1.4)
BLUR = (0.5, 1.0)  # standard deviation, pixels
TAPS = 3  # pixels to each side that a blur reaches
NOISE_LEVEL = 0.1  # most, of the slice's standard deviation
FACTOR = (0.75, 1.25)  # of brightness and of contrast
MIDDLE = 0.5  # grey that brightness leaves as it is, nnU-Net's 0
LOW_RESOLUTION = 0.5  # least share of the side
GAMMA = (0.7, 1.5)


def random_moves(keys: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Draws a rotation, a scale and a shift for each slice.

    Args:
      keys: (B,) random keys.
      shape: (H, W) of the slices.

    Returns:
      (B, 2, H, W) float32: from which row and column each pixel of the moved slice is read.
    """

    def draw(key: jax.Array) -> jax.Array:
        rotation, scale, shift = jax.random.split(jax.random.fold_in(key, 0), 3)
        angle = jax.random.uniform(rotation, minval=-ROTATION, maxval=ROTATION)
        zoom = jnp.exp(jax.random.uniform(scale, minval=-LOG_SCALE, maxval=LOG_SCALE))
        size = jnp.asarray(shape, jnp.float32)
        offset = jax.random.uniform(shift, (2,), minval=-SHIFT, maxval=SHIFT) * size
        cosine, sine = jnp.cos(angle), jnp.sin(angle)
        matrix = zoom * jnp.array([[cosine, -sine], [sine, cosine]])
        grid = jnp.stack(jnp.meshgrid(*map(jnp.arange, shape), indexing="ij"))  # (2, H, W)
        centre = ((size - 1) / 2)[:, None, None]
        # At the default precision TPUs and GPUs would round coordinates to eight or eleven bits.
        turned = jnp.einsum("ij,jhw->ihw", matrix, grid - centre, precision="highest")
        return turned + centre + offset[:, None, None]

    return jax.vmap(draw)(keys)


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

    def draw(key: jax.Array, image: jax.Array) -> jax.Array:
        contrast, brightness, noise, level = jax.random.split(jax.random.fold_in(key, 1), 4)
        factor = 1 + strength * jax.random.uniform(contrast, minval=-CONTRAST, maxval=CONTRAST)
        offset = strength * jax.random.uniform(brightness, minval=-BRIGHTNESS, maxval=BRIGHTNESS)
        sigma = strength * jax.random.uniform(level, maxval=NOISE)
        noisy = image + sigma * jax.random.normal(noise, image.shape)
        return jnp.clip((noisy - 0.5) * factor + 0.5 + offset, 0.0, 1.0)

    return jax.vmap(draw)(keys, images)


def nnunet_moves(keys: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """As `random_moves`: rotation and scale each for one slice in five, mirrors on each axis for
    every other one.

    Args:
      keys: (B,) random keys.
      shape: (H, W) of the slices.

    Returns:
      (B, 2, H, W) float32.
    """

    def draw(key: jax.Array) -> jax.Array:
        turn, angle, scale, zoom, flip = jax.random.split(jax.random.fold_in(key, 0), 5)
        radians = jnp.where(
            _chance(turn, 0.2), jax.random.uniform(angle, minval=-jnp.pi, maxval=jnp.pi), 0.0
        )
        low, high = ZOOM
        factor = jax.random.uniform(zoom, minval=low, maxval=high)
        # An object shown larger is read in smaller steps.
        step = jnp.where(_chance(scale, 0.2), 1 / factor, 1.0)
        sides = jnp.where(jax.random.bernoulli(flip, 0.5, (2,)), -1.0, 1.0)
        cosine, sine = jnp.cos(radians), jnp.sin(radians)
        matrix = step * jnp.array([[cosine, -sine], [sine, cosine]]) * sides
        grid = jnp.stack(jnp.meshgrid(*map(jnp.arange, shape), indexing="ij"))  # (2, H, W)
        centre = ((jnp.asarray(shape, jnp.float32) - 1) / 2)[:, None, None]
        # Multiplied out, not as a product of matrices: mirrored places must be whole numbers.
        rows, columns = grid - centre
        moved = jnp.stack([m[0] * rows + m[1] * columns for m in matrix])
        return moved + centre

    return jax.vmap(draw)(keys)


def nnunet_distort(images: jax.Array, keys: jax.Array, strength: float = 1.0) -> jax.Array:
    """As `distort`, in nnU-Net's order.

    Args:
      images: (B, H, W) in [0, 1].
      keys: (B,) random keys.
      strength: by which noise and the ranges of brightness and contrast are multiplied.

    Returns:
      (B, H, W) float32 in [0, 1].
    """

    def draw(key: jax.Array, image: jax.Array) -> jax.Array:
        noise, softened, brightness, contrast, resolution, inverted, gamma = jax.random.split(
            jax.random.fold_in(key, 1), 7
        )
        low, high = (1 + strength * (factor - 1) for factor in FACTOR)
        image = _sometimes(0.1, noise, image, lambda k, x: _noisy(k, x, strength))
        # nnU-Net draws for the slice and then, by a half, for each channel, of which CT has one.
        image = _sometimes(0.2 * 0.5, softened, image, lambda k, x: blur(x, _uniform(k, *BLUR)))
        image = _sometimes(
            0.15, brightness, image, lambda k, x: MIDDLE + (x - MIDDLE) * _uniform(k, low, high)
        )
        image = _sometimes(
            0.15, contrast, image, lambda k, x: _contrasted(x, _uniform(k, low, high))
        )
        image = _sometimes(0.25 * 0.5, resolution, image, _low_resolution)
        image = _sometimes(0.1, inverted, image, lambda k, x: 1 - _curved(k, 1 - x))
        image = _sometimes(0.3, gamma, image, _curved)
        return jnp.clip(image, 0.0, 1.0)

    return jax.vmap(draw)(keys, images.astype(jnp.float32))


def blur(image: jax.Array, sigma: jax.Array) -> jax.Array:
    """(H, W) → the same, under a Gaussian cut at `TAPS` pixels; the edge goes on beyond itself.

    Args:
      image: float.
      sigma: (), standard deviation, pixels.
    """
    kernel = jnp.exp(-0.5 * jnp.square(jnp.arange(-TAPS, TAPS + 1) / sigma))
    kernel /= kernel.sum()
    for axis in (0, 1):
        around = jnp.pad(image, [(TAPS, TAPS) if a == axis else (0, 0) for a in (0, 1)], "edge")
        length = image.shape[axis]
        image = sum(
            kernel[i] * jax.lax.slice_in_dim(around, i, i + length, axis=axis)
            for i in range(2 * TAPS + 1)
        )
    return image


AUGMENTATIONS = {"standard": (random_moves, distort), "nnunet": (nnunet_moves, nnunet_distort)}


def _chance(key: jax.Array, share: float) -> jax.Array:
    return jax.random.bernoulli(key, share)


def _uniform(key: jax.Array, low: float, high: float) -> jax.Array:
    return jax.random.uniform(key, minval=low, maxval=high)


def _sometimes(share: float, key: jax.Array, image: jax.Array, change) -> jax.Array:
    drawn, own = jax.random.split(key)
    return jnp.where(_chance(drawn, share), change(own, image), image)


def _noisy(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    level, draw = jax.random.split(key)
    sigma = strength * _uniform(level, 0.0, NOISE_LEVEL) * image.std()
    return image + sigma * jax.random.normal(draw, image.shape)


def _contrasted(image: jax.Array, factor: jax.Array) -> jax.Array:
    """About the mean, within the range that the slice had."""
    mean = image.mean()
    return jnp.clip((image - mean) * factor + mean, image.min(), image.max())


def _low_resolution(key: jax.Array, image: jax.Array) -> jax.Array:
    """Every pixel of a smaller grid is read from the nearest one, and they are interpolated back.

    The smaller image lies in the first rows and columns of one of full size, for its own size is
    a draw.
    """
    share = _uniform(key, LOW_RESOLUTION, 1.0)
    grid = jnp.stack(jnp.meshgrid(*map(jnp.arange, image.shape), indexing="ij"))
    coarse = map_coordinates(image, (grid + 0.5) / share - 0.5, order=0, mode="nearest")
    last = jnp.floor(share * jnp.array(image.shape)) - 1
    places = jnp.clip((grid + 0.5) * share - 0.5, 0, last[:, None, None])
    return map_coordinates(coarse, places, order=1, mode="nearest")


def _curved(key: jax.Array, image: jax.Array) -> jax.Array:
    """A gamma curve over the slice's range; mean and standard deviation stay."""
    side, value = jax.random.split(key)
    low, high = GAMMA
    # Below and above 1 are as likely.
    gamma = jnp.where(_chance(side, 0.5), _uniform(value, low, 1.0), _uniform(value, 1.0, high))
    least = image.min()
    extent = jnp.maximum(image.max() - least, 1e-7)
    # The minimum less itself may be below 0 where XLA computes and rounds it twice; then NaN.
    above = jnp.maximum(image - least, 0)
    curved = jnp.power(above / extent, gamma) * extent + least
    spread = jnp.maximum(curved.std(), 1e-7)
    return (curved - curved.mean()) / spread * image.std() + image.mean()
