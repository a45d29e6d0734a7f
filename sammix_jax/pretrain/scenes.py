"""Procedural grey images with the masks of the shapes in them: what a small SAM is pretrained on.

A scene is painted back to front: shapes lie over and inside one another, with fills, edges, blur
and noise drawn anew each time. There is no anatomy in it, and nothing of the phantom, so a model
that learned here has seen no organ.

A scene is a function of its key alone, drawn on the device that trains: no file, no transfer, and
no image twice.

Coordinates are x, y in [-1, 1] over the square; a field is positive inside a shape and close to the
distance from its edge.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sammix_jax.method.augment import blur

SHAPES = 12  # in a scene
# Between the mean grey of a shape and of what it lies on, before blur, grain and gamma.
LEAST_CONTRAST = 0.08
TEXTURES = (3, 6, 12, 24, 48)  # cells along a side, of the noise that textures are made of

_ORDERS = np.arange(2, 7)  # of the waves on a blob's edge
_SIDES = 7  # of a convex polygon at most
_LOBES = 4
_JOINTS = 9  # of a tube's axis


class Scenes(NamedTuple):
    """B scenes.

    Attributes:
      images: (B, S, S) float32 in [0, 1].
      masks: (B, SHAPES, S, S) bool, what is seen of each shape; parts that lie within a shape and
        belong to it count.
      owners: (B, S, S) int32, the number of the shape that lies on top, -1 for the background.
    """

    images: jax.Array
    masks: jax.Array
    owners: jax.Array


class _Place(NamedTuple):
    """Where a shape lies: its centre (2,), its radius, and the shape it is part of, or -1."""

    centre: jax.Array
    radius: jax.Array
    parent: jax.Array


def draw_scenes(keys: jax.Array, size: int) -> Scenes:
    """Draws a scene from each of (B,) random keys, `size` pixels square."""
    # Where factors of products are rounded, as on TPUs, shapes would lie elsewhere.
    with jax.default_matmul_precision("highest"):
        return Scenes(*jax.vmap(lambda key: _draw_scene(key, size))(keys))


def _draw_scene(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    places_key, warp_key, shapes_key, paint_key, finish_key, few_key = jax.random.split(key, 6)
    places = _place_shapes(places_key)
    keys = jax.random.split(shapes_key, SHAPES)
    # Fields are near to linear, so every other pixel tells those between.
    coarse = _grid(size // 2)
    coarse = coarse + _waves(warp_key, coarse)
    fields = jax.vmap(_field, in_axes=(0, 0, 0, None))(
        keys, places.centre, places.radius, coarse
    )  # (K, s, s)
    fields = jax.image.resize(fields, (SHAPES, size, size), "linear")
    # From a few shapes to all: in a crowd alone, nothing would be learned but where boxes are.
    share, draws = jnp.split(jax.random.uniform(few_key, (SHAPES + 1,)), [1])
    fields = jnp.where((draws < 0.15 + share)[:, None, None], fields, -1.0)
    image = _paint(paint_key, fields, places, _grid(size))
    inside = fields > 0
    numbers = jnp.arange(SHAPES)[:, None, None]
    owners = jnp.where(inside, numbers, -1).max(axis=0)
    return _finish(finish_key, image), _visible(inside, places.parent), owners


def _grid(size: int) -> jax.Array:
    """(S, S, xy): the centres of the pixels."""
    pixels = (jnp.arange(size) + 0.5) * 2 / size - 1
    return jnp.stack(jnp.meshgrid(pixels, pixels, indexing="xy"), axis=-1)


def _waves(key: jax.Array, grid: jax.Array) -> jax.Array:
    """(S, S, 2): a smooth displacement, so that no contour is a textbook curve."""
    amplitude_key, direction_key, phase_key, much_key = jax.random.split(key, 4)
    count = 4
    much = 0.06 * jax.random.uniform(much_key)
    amplitude = much * jax.random.normal(amplitude_key, (count, 2))
    frequency = 4.0 * jax.random.normal(direction_key, (count, 2))
    phase = jax.random.uniform(phase_key, (count,), maxval=2 * jnp.pi)
    return jnp.sin(grid @ frequency.T + phase) @ amplitude  # (S, S, 4) → (S, S, 2)


def _place_shapes(key: jax.Array) -> _Place:
    """Large shapes come first, as they would hide small ones; some lie within an earlier one."""
    radius_key, centre_key, nest_key, parent_key, offset_key = jax.random.split(key, 5)
    radius = jnp.exp(
        jax.random.uniform(radius_key, (SHAPES,), minval=jnp.log(0.07), maxval=jnp.log(0.85))
    )
    radius = -jnp.sort(-radius)
    centre = jax.random.uniform(centre_key, (SHAPES, 2), minval=-1.0, maxval=1.0)
    numbers = jnp.arange(SHAPES)
    draws = jax.random.uniform(parent_key, (SHAPES,))
    candidate = jnp.floor(draws * numbers).astype(jnp.int32)  # an earlier shape
    nested = (jax.random.uniform(nest_key, (SHAPES,)) < 0.35) & (numbers > 0)
    offset = 0.4 * jax.random.normal(offset_key, (SHAPES, 2))

    def settle(centres, shape):
        number, own, parent, inside, shift = shape
        within = centres[parent] + shift * radius[parent]
        centre = jnp.where(inside, within, own)
        return centres.at[number].set(centre), None

    centre, _ = jax.lax.scan(settle, centre, (numbers, centre, candidate, nested, offset))
    radius = jnp.where(nested, jnp.minimum(radius, 0.5 * radius[candidate]), radius)
    return _Place(centre, radius, jnp.where(nested, candidate, -1))


def _field(key: jax.Array, centre: jax.Array, radius: jax.Array, grid: jax.Array) -> jax.Array:
    """(S, S): the field of one shape, of a kind drawn by chance."""
    kind_key, turn_key, stretch_key, hollow_key, *keys = jax.random.split(key, 8)
    angle = jax.random.uniform(turn_key, maxval=2 * jnp.pi)
    turn = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    stretch = jnp.exp(0.35 * jax.random.normal(stretch_key))
    local = ((grid - centre) @ turn) * jnp.array([stretch, 1 / stretch]) / radius
    kind = jax.random.choice(kind_key, 4, p=jnp.array([0.4, 0.2, 0.15, 0.25]))
    makers = (_blob, _polygon, _tube, _lobes)
    field = jnp.choose(
        kind, [make(k, local) for make, k in zip(makers, keys, strict=True)], mode="clip"
    )
    wall = jax.random.uniform(hollow_key, (2,))
    ring = jnp.minimum(field, 0.15 + 0.3 * wall[1] - field)
    return radius * jnp.where(wall[0] < 0.08, ring, field)


def _blob(key: jax.Array, local: jax.Array) -> jax.Array:
    """A disc whose edge goes in and out."""
    height_key, phase_key, rough_key = jax.random.split(key, 3)
    rough = 0.35 * jax.random.uniform(rough_key)
    height = rough * jax.random.normal(height_key, _ORDERS.shape) * 2 / _ORDERS
    phase = jax.random.uniform(phase_key, _ORDERS.shape, maxval=2 * jnp.pi)
    angle = jnp.arctan2(local[..., 1], local[..., 0])[..., None]
    edge = 1 + (height * jnp.cos(_ORDERS * angle + phase)).sum(-1)
    return jnp.maximum(edge, 0.2) - jnp.linalg.norm(local, axis=-1)


def _polygon(key: jax.Array, local: jax.Array) -> jax.Array:
    """Half planes that meet: three to seven sides."""
    count_key, angle_key, distance_key = jax.random.split(key, 3)
    sides = jax.random.randint(count_key, (), 3, _SIDES + 1)
    numbers = jnp.arange(_SIDES)
    jitter = jax.random.uniform(angle_key, (_SIDES,), minval=-0.3, maxval=0.3)
    angle = 2 * jnp.pi * (numbers + jitter) / sides
    normal = jnp.stack([jnp.cos(angle), jnp.sin(angle)])  # (xy, sides)
    distance = jax.random.uniform(distance_key, (_SIDES,), minval=0.5, maxval=1.0)
    distance = jnp.where(numbers < sides, distance, jnp.inf)
    return (distance - local @ normal).min(-1)


def _tube(key: jax.Array, local: jax.Array) -> jax.Array:
    """A bent line that has a width, which may grow along it."""
    ends_key, width_key, taper_key = jax.random.split(key, 3)
    ends = jax.random.uniform(ends_key, (3, 2), minval=-1.3, maxval=1.3)
    t = jnp.linspace(0, 1, _JOINTS)[:, None]
    axis = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * ends[1] + t**2 * ends[2]  # Bézier, (J, xy)
    width = jax.random.uniform(width_key, minval=0.08, maxval=0.35)
    slope = jax.random.uniform(taper_key, minval=-0.7, maxval=0.7)
    widths = width * (1 + slope * (t[:, 0] - 0.5))  # (J,)
    field = jnp.full(local.shape[:-1], -jnp.inf)
    for i in range(_JOINTS - 1):
        along = axis[i + 1] - axis[i]
        place = ((local - axis[i]) @ along) / jnp.maximum(along @ along, 1e-6)
        place = jnp.clip(place, 0, 1)[..., None]
        distance = jnp.linalg.norm(local - axis[i] - place * along, axis=-1)
        field = jnp.maximum(field, widths[i] - distance)
    return field


def _lobes(key: jax.Array, local: jax.Array) -> jax.Array:
    """Discs that melt into one another."""
    centre_key, radius_key = jax.random.split(key)
    centres = 0.5 * jax.random.normal(centre_key, (_LOBES, 2))
    radii = jax.random.uniform(radius_key, (_LOBES,), minval=0.25, maxval=0.75)
    distance = jnp.linalg.norm(local[..., None, :] - centres, axis=-1)  # (S, S, lobes)
    sharp = 10.0
    return jax.nn.logsumexp(sharp * (radii - distance), axis=-1) / sharp


def _visible(inside: jax.Array, parent: jax.Array) -> jax.Array:
    """(K, S, S) bool: each shape less what later ones hide, parts within it kept as its own."""
    numbers = jnp.arange(SHAPES)

    def hide(masks, shape):
        number, own, its_parent = shape
        mine = (numbers == its_parent)[:, None, None]  # a part of a part hides in the whole
        masks = masks & (mine | ~own)
        return jnp.where((numbers == number)[:, None, None], own, masks), None

    empty = jnp.zeros(inside.shape, bool)
    masks, _ = jax.lax.scan(hide, empty, (numbers, inside, parent))
    return masks


def _paint(key: jax.Array, fields: jax.Array, places: _Place, grid: jax.Array) -> jax.Array:
    """(S, S): the shapes laid over a background, each with its own fill and edge."""
    bank_key, ground_key, *keys = jax.random.split(key, 8)
    size = grid.shape[0]
    bank = jnp.stack(
        [
            jax.image.resize(jax.random.normal(k, (n, n)), (size, size), "linear")
            for k, n in zip(jax.random.split(bank_key, len(TEXTURES)), TEXTURES, strict=True)
        ]
    )  # (T, S, S)
    grey_key, free_key, weight_key, much_key, slope_key, edge_key = keys
    free = jax.random.uniform(free_key, (SHAPES, 3))
    weights = jax.random.normal(weight_key, (SHAPES + 1, len(TEXTURES)))
    much = 0.08 * jax.random.uniform(much_key, (SHAPES + 1, 1)) ** 2
    slope = 0.08 * jax.random.normal(slope_key, (SHAPES + 1, 2))
    edge = jnp.exp(
        jax.random.uniform(edge_key, (SHAPES,), minval=jnp.log(0.004), maxval=jnp.log(0.05))
    )

    def fill(number, grey, inside):
        """Texture and slope about a mean within the shape that is `grey`."""
        relief = jnp.einsum("t,tyx->yx", much[number] * weights[number], bank)
        relief = relief + grid @ slope[number]
        return grey + relief - mean_of(relief, inside)

    # A dark ground is as common as all others together.
    dark = jax.random.uniform(ground_key) < 0.5
    ground = jnp.where(dark, 0.1, 1.0) * jax.random.uniform(grey_key)
    image = fill(SHAPES, ground, jnp.ones((size, size), bool))

    def lay(image, number):
        inside = fields[number] > 0
        # Two of three differ little from what they lie on, and none by less than LEAST_CONTRAST.
        mild = free[number, 0] < 0.65
        step = jnp.where(mild, 0.3 * free[number, 1] ** 2, 0.9 * free[number, 1])
        step = LEAST_CONTRAST + step
        under = mean_of(image, inside)
        brighter = jnp.where(free[number, 2] < 0.5, under + step <= 1, under < step)
        value = jnp.clip(jnp.where(brighter, under + step, under - step), 0, 1)
        share = jax.nn.sigmoid(4 * fields[number] / edge[number])
        return image + share * (fill(number, value, inside) - image), None

    image, _ = jax.lax.scan(lay, image, jnp.arange(SHAPES))
    return image


def mean_of(values: jax.Array, counted: jax.Array) -> jax.Array:
    """The mean of those values that count, as many of any shape; 0 where none does."""
    return (values * counted).sum() / jnp.maximum(counted.sum(), 1)


def _finish(key: jax.Array, image: jax.Array) -> jax.Array:
    """Blur, grain and contrast, as a camera or scanner would add them."""
    blur_key, grain_key, fine_key, coarse_key, gamma_key, flip_key = jax.random.split(key, 6)
    size = image.shape[0]
    sigma = 0.1 + 1.2 * jax.random.uniform(blur_key) ** 2  # pixels
    image = blur(image, sigma)
    grain = jax.random.uniform(grain_key, (2,)) ** 2
    fine = jax.random.normal(fine_key, (size, size))
    coarse = jax.image.resize(
        jax.random.normal(coarse_key, (size // 2, size // 2)), (size, size), "linear"
    )
    image = image + 0.1 * grain[0] * fine + 0.06 * grain[1] * coarse
    image = jnp.clip(image, 0, 1) ** jnp.exp(0.2 * jax.random.normal(gamma_key))
    return jnp.where(jax.random.uniform(flip_key) < 0.5, image, 1 - image)
