"""Metrics against closed forms, SciPy and brute force, and the policy on empty masks."""

import itertools
import math

import numpy as np
import pytest
import surface_distance
from scipy import ndimage
from scipy.spatial.distance import cdist, directed_hausdorff
from surface_distance.lookup_tables import create_table_neighbour_code_to_surface_area

from sammix_jax.evaluation.metrics import (
    VolumeScore,
    box_iou,
    classification_metrics,
    dice,
    slice_metrics,
    volume_metrics,
)

SPACING = (2.5, 0.7, 0.9)
PERFECT = VolumeScore(1.0, 1.0, 0.0, 0.0, 0.0, "scored")
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
    assert volume_metrics(mask, mask, SPACING) == PERFECT
    assert volume_metrics(mask, mask, SPACING, tolerance=0) == PERFECT


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_spacing_belongs_to_its_axis(axis):
    # Slid along one axis by 2, a box has two faces, far over 5% of its surface, 2 voxels off.
    truth = box((4, 10), (5, 11), (6, 12))
    score = volume_metrics(truth, np.roll(truth, 2, axis), SPACING)
    assert score.hd95 == pytest.approx(2 * SPACING[axis])
    assert score.dice == pytest.approx(4 / 6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spacing", [(1, 1, 1), SPACING])
def test_surface_metrics_of_boxes(seed, spacing):
    """The definitions spelt out on boxes, where each surface element's area is known.

    An element lies where voxels in and out of the mask meet: the whole side of a voxel on a face,
    the bevel of an edge, the cut of a corner.
    """
    rng = np.random.default_rng(seed)
    low = rng.integers(2, 6, (2, 3))
    high = low + rng.integers(4, 11, (2, 3))
    masks = [box(*zip(a, b, strict=True)) for a, b in zip(low, high, strict=True)]
    sides = np.prod(spacing) / spacing  # mm² of a voxel's side across each axis
    points, areas = [], []
    for mask in masks:
        eight = np.stack(neighbourhoods(mask)).astype(int).reshape(2, 2, 2, *np.add(mask.shape, 1))
        surface = (eight.sum((0, 1, 2)) > 0) & (eight.sum((0, 1, 2)) < 8)
        eight = eight[..., surface]  # (2, 2, 2, N)
        count = eight.sum((0, 1, 2))
        # A plane's normal by the voxels on its two sides; a corner's cut is half of a plane.
        normal = [np.diff(eight.sum(tuple({0, 1, 2} - {axis})), axis=0)[0] for axis in range(3)]
        area = np.linalg.norm(np.stack(normal, 1) / 4 * sides, axis=1)
        points.append(np.argwhere(surface) * spacing)
        areas.append(np.where(count == 1, area / 2, area))
    check_surface_metrics(volume_metrics(*masks, spacing, 1.3), *points, *areas, 1.3)


@pytest.mark.parametrize("seed", range(10))
def test_volume_metrics_by_brute_force(seed):
    """Every pair of surface elements, of 10 × 30 small masks of all kinds and of blobs."""
    rng = np.random.default_rng(seed)
    masks = [mask_pair(rng, rng.integers(1, 9, 3)) for _ in range(30)]
    for truth, prediction in [*masks, (blob(seed, (9, 14, 17)), blob(seed + 50, (9, 14, 17)))]:
        spacing = rng.uniform(0.3, 6, 3)
        diagonal = math.hypot(*spacing)
        areas_of_codes = np.asarray(create_table_neighbour_code_to_surface_area(spacing))
        points, areas = [], []
        for mask in (truth, prediction):
            bits = neighbourhoods(mask)  # the first is the highest bit of the code
            code = sum(bit * 2 ** (7 - i) for i, bit in enumerate(bits))
            surface = (code > 0) & (code < 255)
            points.append(np.argwhere(surface) * spacing)
            areas.append(areas_of_codes[code[surface]])
        tolerance = rng.uniform(0, 2 * diagonal)
        score = volume_metrics(truth, prediction, spacing, tolerance)
        check_surface_metrics(score, *points, *areas, tolerance)
        both, one = np.sum(truth * prediction), np.sum(truth)
        assert score.dice == 2 * both / (one + np.sum(prediction))
        assert score.volume_error == (np.sum(prediction) - one) / one
        # An element is half a voxel's diagonal from some boundary voxel, and the other way round.
        distances = surface_distance.compute_surface_distances(truth, prediction, spacing)
        hausdorff = surface_distance.compute_robust_hausdorff(distances, 100)
        edges = [mask & ~ndimage.binary_erosion(mask) for mask in (truth, prediction)]
        there, back = (
            ndimage.distance_transform_edt(~edges[1 - i], sampling=spacing)[edges[i]].max()
            for i in (0, 1)
        )
        assert abs(hausdorff - max(there, back)) <= diagonal * (1 + 1e-9)
        assert score.assd <= hausdorff * (1 + 1e-9)
        assert score.hd95 <= hausdorff


def neighbourhoods(mask):
    """(D, H, W) → 8 bool (D + 1, H + 1, W + 1): the voxels that meet at each corner of the grid."""
    padded, (d, h, w) = np.pad(mask, 1), np.add(mask.shape, 1)
    steps = itertools.product((0, 1), repeat=3)
    return [padded[z : z + d, y : y + h, x : x + w] for z, y, x in steps]


def check_surface_metrics(score, points, others, areas, other_areas, tolerance):
    """Compares with the definitions, from every pair of two surfaces' (N, 3) points in mm."""
    pairs = cdist(points, others)
    distances, areas = (pairs.min(1), pairs.min(0)), (areas, other_areas)
    total = sum(map(np.sum, areas))
    within = sum(a[d <= tolerance].sum() for d, a in zip(distances, areas, strict=True))
    assert score.nsd == pytest.approx(within / total)
    mean = sum((d * a).sum() for d, a in zip(distances, areas, strict=True)) / total
    assert score.assd == pytest.approx(mean)
    # Where an element ends at 95% of the area but for rounding, the next one is right as well.
    low, high = (
        max(percentile(d, a, 0.95 + r) for d, a in zip(distances, areas, strict=True))
        for r in (-1e-9, 1e-9)
    )
    assert low * (1 - 1e-9) <= score.hd95 <= high * (1 + 1e-9)


def percentile(distance, area, share):
    """The least distance that `share` of the area does not exceed."""
    order = np.argsort(distance)
    reached = np.cumsum(area[order]) / area.sum()
    return distance[order][np.argmax(reached >= share)]


def mask_pair(rng, shape):
    """Two masks, neither empty: of chance, or one the other's like or complement."""
    truth = random_mask(rng, shape)
    if rng.random() < 0.1:
        return truth, truth if truth.all() or rng.random() < 0.5 else ~truth
    return truth, random_mask(rng, shape)


def random_mask(rng, shape):
    """A bool mask of any number of axes, not empty: a voxel, line, plane, box, noise, or all."""
    point = tuple(int(rng.integers(n)) for n in shape)
    axis = int(rng.integers(len(shape)))
    whole = [slice(None)] * len(shape)
    mask = np.zeros(shape, bool)
    match rng.choice(["voxel", "line", "plane", "corner box", "box", "noise", "all"]):
        case "voxel":
            mask[point] = True
        case "line":
            mask[*point[:axis], :, *point[axis + 1 :]] = True
        case "plane":
            mask[*whole[:axis], point[axis], *whole[axis + 1 :]] = True
        case "corner box":
            mask[tuple(slice(i, None) for i in point)] = True
        case "box":
            mask[tuple(slice(i, i + int(rng.integers(1, 4))) for i in point)] = True
        case "noise":
            mask = rng.random(shape) < rng.uniform(0.05, 0.95)
            mask[point] = True
        case "all":
            mask[:] = True
    return mask


def test_nsd_at_its_tolerance():
    truth = box((4, 10), (5, 11), (6, 12))
    slid = np.roll(truth, 2, axis=1)
    # Every element has one of the other surface at 2 mm or less; two faces have none nearer.
    assert volume_metrics(truth, slid, (1, 1, 1), tolerance=2).nsd == 1
    assert volume_metrics(truth, slid, (1, 1, 1)).nsd == 1
    assert 0 < volume_metrics(truth, slid, (1, 1, 1), tolerance=1.99).nsd < 1


def test_assd_pools_both_surfaces():
    # A voxel's surface is small, so the mean over both is that of the large surface, nearly.
    truth, prediction = box((2, 18), (2, 22), (2, 26)), box((9, 10), (11, 12), (13, 14))
    distances = surface_distance.compute_surface_distances(truth, prediction, SPACING)
    from_truth, from_prediction = surface_distance.compute_average_surface_distance(distances)
    score = volume_metrics(truth, prediction, SPACING)
    assert score.assd == pytest.approx(from_truth, rel=0.01)
    assert abs(score.assd - (from_truth + from_prediction) / 2) > 0.01 * score.assd


def test_volume_error_has_a_sign():
    small, large = box((4, 8), (4, 8), (4, 8)), box((4, 8), (4, 8), (4, 16))
    assert volume_metrics(small, large, SPACING).volume_error == 2
    assert volume_metrics(large, small, SPACING).volume_error == pytest.approx(-2 / 3)


def test_field_of_view_changes_nothing():
    truth, prediction = blob(1, (10, 16, 18)), blob(2, (10, 16, 18))
    wide = [np.pad(mask, ((3, 9), (20, 1), (0, 30))) for mask in (truth, prediction)]
    assert volume_metrics(truth, prediction, SPACING) == volume_metrics(*wide, SPACING)


def test_empty_volumes():
    diagonal = pytest.approx(math.sqrt((6 * 2.5) ** 2 + (8 * 0.7) ** 2 + (10 * 0.9) ** 2))
    nothing = VolumeScore(None, None, None, None, None, "both_empty")
    assert volume_metrics(EMPTY, EMPTY, SPACING) == nothing
    assert not nothing.failed
    for truth, prediction, error, status in (
        (EMPTY, FULL, None, "truth_empty"),
        (FULL, EMPTY, -1, "prediction_empty"),
    ):
        # However wide the tolerance, an absent surface is not within it.
        score = volume_metrics(truth, prediction, SPACING, tolerance=1000)
        assert (score.dice, score.nsd, score.volume_error) == (0, 0, error)
        assert (score.hd95, score.assd) == (diagonal, diagonal)
        assert (score.status, score.failed) == (status, True)
    assert volume_metrics(FULL, FULL, SPACING) == PERFECT


@pytest.mark.parametrize("seed", range(5))
def test_slice_distance_of_all_kinds_of_masks(seed):
    rng = np.random.default_rng(seed)
    masks = [mask_pair(rng, rng.integers(1, 12, 2)) for _ in range(40)]
    for truth, prediction in [*masks, (blob(seed, (30, 41)), blob(seed + 50, (30, 41)))]:
        edges = []
        for mask in (truth, prediction):
            outside = ~np.pad(mask, 1)
            beside = [np.roll(outside, step, axis) for step in (-1, 1) for axis in (0, 1)]
            edges.append(np.argwhere(mask & np.any(beside, axis=0)[1:-1, 1:-1]))
        expected = max(directed_hausdorff(*edges)[0], directed_hausdorff(*edges[::-1])[0])
        found_dice, found = slice_metrics(truth, prediction)
        assert found == pytest.approx(expected, rel=1e-12, abs=0)
        assert found_dice == 2 * np.sum(truth * prediction) / (truth.sum() + prediction.sum())


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
        ((FULL, FULL, SPACING, -1), "tolerance=-1"),
        ((FULL, FULL, SPACING, math.nan), "tolerance=nan"),
    ],
)
def test_rejections_name_the_fix(arguments, message):
    with pytest.raises(ValueError, match=message):
        volume_metrics(*arguments)


@pytest.mark.parametrize("seed", range(20))
def test_classification_by_counting(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 60))
    present = rng.random(count) < rng.uniform(0.1, 0.9)
    present[:2] = True, False
    # One digit: many ties, and values on the threshold.
    probability = np.clip(rng.normal(0.4 + 0.2 * present, 0.3), 0, 1).round(1)
    score = classification_metrics(present, probability)
    pairs = [(p, n) for p in probability[present] for n in probability[~present]]
    auroc = np.mean([1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs])
    assert score.auroc == pytest.approx(auroc)
    told = [(bool(t), p >= 0.5) for t, p in zip(present, probability, strict=True)]
    hit, false_alarm, missed = (told.count(k) for k in ((True, True), (False, True), (True, False)))
    assert score.accuracy == pytest.approx((hit + told.count((False, False))) / count)
    if hit:
        precision, recall = hit / (hit + false_alarm), hit / (hit + missed)
        assert score.f1 == pytest.approx(2 * precision * recall / (precision + recall))
    else:
        assert score.f1 == 0
    assert score.count == count


def test_classification_of_one_class():
    negative = np.zeros(4, bool)
    low, high = np.full(4, 0.1), np.full(4, 0.5)
    score = classification_metrics(negative, low)
    assert (score.accuracy, score.f1, score.auroc, score.count) == (1, None, None, 4)
    score = classification_metrics(negative, high)
    assert (score.accuracy, score.f1, score.auroc) == (0, 0, None)
    score = classification_metrics(~negative, high)
    assert (score.accuracy, score.f1, score.auroc) == (1, 1, None)
    score = classification_metrics(~negative, low)
    assert (score.accuracy, score.f1, score.auroc) == (0, 0, None)


def test_auroc_needs_order_alone():
    present = np.array([True, True, False, False])
    probability = np.array([0.04, 0.03, 0.02, 0.01])
    assert classification_metrics(present, probability).auroc == 1
    assert classification_metrics(~present, probability).auroc == 0
    assert classification_metrics(present, np.full(4, 0.3)).auroc == 0.5


@pytest.mark.parametrize(
    ("present", "probability", "message"),
    [
        ([True, False], [0.5], "one shape"),
        ([[True, False]], [[0.5, 0.5]], "one shape"),
        ([], [], "one slice at least"),
        ([1, 0], [0.5, 0.5], "expected bool"),
        ([True, False], [0.5, math.nan], "0 to 1"),
        ([True, False], [0.5, 1.5], "softmax"),
        ([True, False], [-2.0, 0.5], "softmax"),
    ],
)
def test_classification_rejections(present, probability, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(np.array(present), np.array(probability))


@pytest.mark.parametrize("seed", range(20))
def test_box_iou_counts_pixels(seed):
    corners = np.sort(np.random.default_rng(seed).integers(0, 12, (2, 2, 2)), axis=1)  # box, edge
    a, b = corners.reshape(2, 4)
    masks = np.zeros((2, 12, 12), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, (a, b), strict=True):
        mask[y0:y1, x0:x1] = True
    union = (masks[0] | masks[1]).sum()
    expected = (masks[0] & masks[1]).sum() / union if union else 0
    assert box_iou(a, b) == box_iou(b, a) == pytest.approx(expected)


def test_box_iou():
    assert box_iou((2, 3, 3, 4), (2, 3, 3, 4)) == 1
    assert box_iou((0, 0, 2, 1), (1, 0, 3, 1)) == pytest.approx(1 / 3)
    assert box_iou((0, 0, 1, 1), (0.5, 0.5, 1.5, 1.5)) == pytest.approx(0.25 / 1.75)
    # Boxes that touch, boxes apart along both axes, and boxes without an area.
    assert box_iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0
    assert box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert box_iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0
    for wrong in ((0, 0, 1), (2, 0, 1, 1), (0, 2, 1, 1), (0, 0, math.nan, 1)):
        with pytest.raises(ValueError, match="box b"):
            box_iou((0, 0, 1, 1), wrong)
