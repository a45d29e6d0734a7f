"""Scenes: drawn from their key alone, and such that what is to be found can be seen."""

import ast
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from sammix_jax.pretrain import scenes
from sammix_jax.pretrain.scenes import SHAPES, draw_scenes

SIZE = 32
_draw = jax.jit(draw_scenes, static_argnums=1)


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(5), 12)


@pytest.fixture(scope="module")
def drawn(keys):
    return _draw(keys, SIZE)


def test_shapes_and_ranges(drawn):
    assert drawn.images.shape == (12, SIZE, SIZE) and drawn.images.dtype == jnp.float32
    assert drawn.masks.shape == (12, SHAPES, SIZE, SIZE) and drawn.masks.dtype == bool
    assert np.isfinite(drawn.images).all()
    assert drawn.images.min() >= 0 and drawn.images.max() <= 1


def test_a_scene_follows_from_its_key_wherever_it_lies_in_the_batch(keys, drawn):
    order = np.random.default_rng(0).permutation(len(keys))
    again = _draw(keys[order], SIZE)
    # On some CPUs to the last bit; on others that one differs in a few values, by their place.
    np.testing.assert_allclose(again.images, drawn.images[order], rtol=0, atol=2**-23)
    np.testing.assert_array_equal(again.masks, drawn.masks[order])


def test_no_scene_comes_twice(drawn):
    images = np.asarray(drawn.images)
    for i in range(len(images)):
        for j in range(i):
            assert np.abs(images[i] - images[j]).mean() > 0.02


def test_most_scenes_offer_several_shapes_of_useful_size(drawn):
    share = np.asarray(drawn.masks).mean(axis=(2, 3))
    useful = ((share > 0.004) & (share < 0.7)).sum(axis=1)
    assert np.median(useful) >= 4
    # Some hold few shapes, some many.
    assert useful.min() <= 3 and useful.max() >= 8


def test_a_pixel_belongs_to_the_shape_on_top(drawn):
    owners, masks = np.asarray(drawn.owners), np.asarray(drawn.masks)
    assert owners.shape == (12, SIZE, SIZE) and owners.min() == -1
    covered = masks.any(axis=1)
    np.testing.assert_array_equal(owners >= 0, covered)
    for b in range(12):
        for k in range(SHAPES):
            assert masks[b, k][owners[b] == k].all()  # whose mask holds it


def test_what_is_to_be_found_differs_from_what_lies_around_it(drawn):
    steps = []
    for image, masks in zip(np.asarray(drawn.images), np.asarray(drawn.masks), strict=True):
        for mask in masks:
            if mask.mean() < 0.01 or mask.mean() > 0.7:
                continue
            around = ndimage.binary_dilation(mask, iterations=4) & ~ndimage.binary_dilation(mask)
            inner = ndimage.binary_erosion(mask)
            if around.any() and inner.any():
                steps.append(abs(image[inner].mean() - image[around].mean()))
    # Some are hard, as in any picture: neighbours may be alike that differ from what both lie on.
    assert np.median(steps) > 0.1
    assert np.quantile(steps, 0.2) > 0.04


def test_a_shape_differs_from_what_it_lies_on(keys):
    """However strong its texture and slope, and however bright or dark what lies below."""
    grid = scenes._grid(SIZE)
    square = jnp.abs(grid).max(-1) < 0.5
    # One shape only, with an edge so sharp that nothing is blurred by it.
    fields = jnp.full((SHAPES, SIZE, SIZE), -9.0).at[3].set(jnp.where(square, 9.0, -9.0))
    nothing = jnp.full_like(fields, -9.0)
    places = scenes._place_shapes(keys[0])
    paint = jax.jit(jax.vmap(lambda key, f: scenes._paint(key, f, places, grid), (0, None)))
    many = jax.random.split(jax.random.key(1), 400)
    over, under = (np.asarray(paint(many, f)) for f in (fields, nothing))
    np.testing.assert_allclose(over[:, ~square], under[:, ~square], atol=1e-6)
    steps = np.abs((over - under)[:, square].mean(axis=1))
    assert steps.min() > scenes.LEAST_CONTRAST - 1e-4
    assert np.median(steps) < 0.25  # two of three differ little


def test_later_shapes_hide_earlier_ones_but_parts_stay_in_their_whole():
    inside = np.zeros((SHAPES, 4, 4), bool)
    inside[0, :, :] = True  # the whole square
    inside[1, 0, :] = True  # part of 0: its top row
    inside[2, :, 0] = True  # part of nothing: the left column, above both
    parent = np.full(SHAPES, -1)
    parent[1] = 0
    masks = np.asarray(scenes._visible(jnp.asarray(inside), jnp.asarray(parent)))
    np.testing.assert_array_equal(masks[0][:, 1:], True)  # its part counts
    np.testing.assert_array_equal(masks[0][:, 0], False)  # hidden
    np.testing.assert_array_equal(masks[1][0], [False, True, True, True])
    np.testing.assert_array_equal(masks[2], inside[2])
    assert not masks[3:].any()


def test_nested_shapes_lie_near_their_whole_and_are_smaller(keys):
    places = jax.vmap(scenes._place_shapes)(keys)
    parent, radius, centre = (np.asarray(x) for x in (places.parent, places.radius, places.centre))
    nested = 0
    for b, k in np.argwhere(parent >= 0):
        whole = parent[b, k]
        assert whole < k
        if parent[b, whole] < 0:  # else the whole was made smaller itself
            assert radius[b, k] <= 0.5 * radius[b, whole] * 1.001
            nested += 1
        assert np.linalg.norm(centre[b, k] - centre[b, whole]) < 3 * radius[b, whole]
    assert nested > 10


def test_no_anatomy_enters():
    tree = ast.parse(inspect.getsource(scenes))
    imported = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
    }
    libraries = {"typing", "NamedTuple", "jax", "jax.numpy", "numpy", None}
    assert imported <= libraries | {"sammix_jax.method.augment", "blur"}
