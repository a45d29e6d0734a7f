"""Simulated prompts: boxes near the mask, points where they belong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sammix_jax.method.cam import mask_to_box
from sammix_jax.pretrain.prompts import (
    JITTER,
    MOST_JITTER,
    corrections,
    jittered_boxes,
    random_points,
)

B, P, SIDE = 6, 3, 16


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(1), B)


@pytest.fixture(scope="module")
def masks():
    """A rectangle for each prompt."""
    rng = np.random.default_rng(0)
    masks = np.zeros((B, P, SIDE, SIDE), bool)
    for mask in masks.reshape(-1, SIDE, SIDE):
        y, x = rng.integers(0, 8, 2)
        mask[y : y + rng.integers(3, 8), x : x + rng.integers(3, 8)] = True
    return jnp.asarray(masks)


def test_boxes_stay_near_the_mask_and_within_the_image(keys, masks):
    tight = np.asarray(mask_to_box(masks.reshape(-1, SIDE, SIDE))[0]).reshape(B, P, 4)
    boxes = np.asarray(jittered_boxes(keys, masks))
    assert boxes.min() >= 0 and boxes.max() <= SIDE
    moved = np.abs(boxes - tight)
    assert moved.max() <= MOST_JITTER * SIDE + 1e-5
    assert moved.max() > 0.5 * MOST_JITTER * SIDE  # and do not simply repeat it
    assert JITTER * 3 > MOST_JITTER  # so that the limit is what binds here


def test_the_box_of_an_empty_mask_is_the_image(keys):
    boxes = jittered_boxes(keys, jnp.zeros((B, P, SIDE, SIDE), bool))
    assert np.abs(np.asarray(boxes) - [0, 0, SIDE, SIDE]).max() <= MOST_JITTER * SIDE + 1e-5


def test_points_lie_in_their_region_on_the_inputs_grid(keys, masks):
    size = 4 * SIDE
    points = np.asarray(random_points(keys, masks, size))
    cells = np.floor((points + 0.5) * SIDE / size).astype(int)
    for b in range(B):
        for p in range(P):
            x, y = cells[b, p]
            assert masks[b, p, y, x]
    # The centre of a cell of 4 pixels lies between the second and the third.
    np.testing.assert_array_equal(points % 4, 1.5)


def test_points_are_drawn_evenly():
    mask = jnp.zeros((2000, 1, 4, 4), bool).at[:, :, 1, 1].set(True).at[:, :, 2, 3].set(True)
    points = np.asarray(random_points(jax.random.split(jax.random.key(0), 2000), mask, 4))[:, 0]
    share = (points == [1.0, 1.0]).all(axis=1).mean()
    assert 0.45 < share < 0.55
    assert ((points == [1.0, 1.0]).all(1) | (points == [3.0, 2.0]).all(1)).all()


def test_corrections_are_clicks_on_what_is_wrong(keys, masks):
    predicted = jnp.roll(masks, 2, axis=-1)  # lacks the left edge, spills over the right one
    points, labels = corrections(keys, predicted, masks, SIDE)
    cells = np.asarray(points).astype(int)
    kinds = set()
    for b in range(B):
        for p in range(P):
            x, y = cells[b, p]
            assert predicted[b, p, y, x] != masks[b, p, y, x]
            assert labels[b, p] == int(masks[b, p, y, x])
            kinds.add(int(labels[b, p]))
    assert kinds == {0, 1}


def test_where_nothing_is_wrong_the_click_confirms(keys, masks):
    points, labels = corrections(keys, masks, masks, SIDE)
    cells = np.asarray(points).astype(int)
    assert (np.asarray(labels) == 1).all()
    for b in range(B):
        for p in range(P):
            x, y = cells[b, p]
            assert masks[b, p, y, x]
