"""Metrics against closed forms and SciPy's distance transform, and the policy on empty masks."""

import math

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist

from sammix_jax.metrics import VolumeScore, dice, slice_metrics, volume_metrics

SPACING = (2.5, 0.7, 0.9)
EMPTY = np.zeros((6, 8, 10), bool)
FULL = np.ones((6, 8, 10), bool)
# The surface_distance package reaches SciPy by names that SciPy 2 will drop.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:surface_distance")


def blob(seed, shape):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2)
    return noise > 0.5 * noise.std()


def box(z, y, x):
    mask = np.zeros((20, 24, 28), bool)
    mask[slice(*z), slice(*y), slice(*x)] = True
    return mask


def test_dice():
    truth = np.array([True, True, False, False])
    assert dice(truth, truth) == 1
    assert dice(truth, ~truth) == 0
    assert dice(truth, np.array([True, False, False, False])) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="both masks are empty"):
        dice(truth & ~truth, truth & ~truth)


def test_perfect_volume():
    mask = blob(0, (12, 20, 24))
    assert volume_metrics(mask, mask, SPACING) == VolumeScore(1.0, 0.0, "scored")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_spacing_belongs_to_its_axis(axis):
    # Slid along one axis by 2, a box has two faces, far over 5% of its surface, 2 voxels off.
    truth = box((4, 10), (5, 11), (6, 12))
    score = volume_metrics(truth, np.roll(truth, 2, axis), SPACING)
    assert score.hd95 == pytest.approx(2 * SPACING[axis])
    assert score.dice == pytest.approx(4 / 6)


@pytest.mark.parametrize("seed", range(6))
def test_hd95_against_distance_transforms(seed):
    """The definition spelt out on boxes of 1 mm voxels, where each element's area is known.

    An element lies where voxels in and out of the mask meet: 1 mm² on a face, the bevel of an edge,
    the cut of a corner.
    """
    rng = np.random.default_rng(seed)
    low = rng.integers(2, 6, (2, 3))
    high = low + rng.integers(4, 11, (2, 3))
    masks = [box(*zip(a, b, strict=True)) for a, b in zip(low, high, strict=True)]
    surfaces, areas = [], []
    for mask in masks:
        # Voxels that meet at each corner of the grid, 0 to 8.
        meeting = ndimage.convolve(np.pad(mask, 1).astype(int), np.ones((2, 2, 2)), mode="constant")
        area = np.zeros(meeting.shape)
        area[meeting == 4] = 1
        area[meeting == 2] = math.sqrt(2) / 2
        area[meeting == 1] = math.sqrt(3) / 8
        surfaces.append((meeting > 0) & (meeting < 8))
        areas.append(area)
    expected = 0
    for here, there in ((0, 1), (1, 0)):
        distance = ndimage.distance_transform_edt(~surfaces[there])[surfaces[here]]
        area = areas[here][surfaces[here]]
        order = np.argsort(distance)
        share = np.cumsum(area[order]) / area.sum()
        expected = max(expected, distance[order][np.searchsorted(share, 0.95)])
    assert volume_metrics(*masks, (1, 1, 1)).hd95 == pytest.approx(expected)


def test_hd95_of_blobs_is_bounded_by_the_maximum():
    for seed in range(5):
        truth, prediction = blob(seed, (12, 20, 24)), blob(seed + 100, (12, 20, 24))
        corners = [
            (count > 0) & (count < 8)
            for count in (
                ndimage.convolve(np.pad(m, 1).astype(int), np.ones((2, 2, 2)), mode="constant")
                for m in (truth, prediction)
            )
        ]
        there = ndimage.distance_transform_edt(~corners[1], sampling=SPACING)[corners[0]]
        back = ndimage.distance_transform_edt(~corners[0], sampling=SPACING)[corners[1]]
        hd95 = volume_metrics(truth, prediction, SPACING).hd95
        assert max(np.median(there), np.median(back)) < hd95 <= max(there.max(), back.max())


def test_field_of_view_changes_nothing():
    truth, prediction = blob(1, (10, 16, 18)), blob(2, (10, 16, 18))
    wide = [np.pad(mask, ((3, 9), (20, 1), (0, 30))) for mask in (truth, prediction)]
    assert volume_metrics(truth, prediction, SPACING) == volume_metrics(*wide, SPACING)


def test_empty_volumes():
    diagonal = math.sqrt((6 * 2.5) ** 2 + (8 * 0.7) ** 2 + (10 * 0.9) ** 2)
    assert volume_metrics(EMPTY, EMPTY, SPACING) == VolumeScore(None, None, "both_empty")
    for truth, prediction, status in (
        (EMPTY, FULL, "truth_empty"),
        (FULL, EMPTY, "prediction_empty"),
    ):
        score = volume_metrics(truth, prediction, SPACING)
        assert (score.dice, score.status, score.failed) == (0, status, True)
        assert score.hd95 == pytest.approx(diagonal)
    assert volume_metrics(FULL, FULL, SPACING) == VolumeScore(1.0, 0.0, "scored")


@pytest.mark.parametrize("seed", range(5))
def test_slice_distance_is_the_hausdorff_distance_of_boundaries(seed):
    truth, prediction = blob(seed, (30, 41)), blob(seed + 50, (30, 41))
    points = []
    for mask in (truth, prediction):
        outside = ~np.pad(mask, 1)
        touches = outside[:-2, 1:-1] | outside[2:, 1:-1] | outside[1:-1, :-2] | outside[1:-1, 2:]
        points.append(np.argwhere(mask & touches))
    distances = cdist(*points)
    expected = max(distances.min(0).max(), distances.min(1).max())
    found_dice, found = slice_metrics(truth, prediction)
    assert found == pytest.approx(expected)
    assert found_dice == dice(truth, prediction)


def test_empty_slices():
    truth = np.zeros((30, 40), bool)
    with pytest.raises(ValueError, match="truth is empty"):
        slice_metrics(truth, ~truth)
    truth[3, 4] = True
    assert slice_metrics(truth, truth) == (1, 0)
    assert slice_metrics(truth, np.zeros_like(truth)) == (0, 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FULL, FULL[1:], SPACING), "resample"),
        ((FULL[0], FULL[0], SPACING), "3 axes"),
        ((FULL.astype(np.uint8), FULL, SPACING), "expected bool"),
        ((FULL, FULL, (1, 1)), "spacing"),
        ((FULL, FULL, (1, 0, 1)), "spacing"),
        ((FULL, FULL, (1, math.nan, 1)), "spacing"),
    ],
)
def test_rejections_name_the_fix(arguments, message):
    with pytest.raises(ValueError, match=message):
        volume_metrics(*arguments)
