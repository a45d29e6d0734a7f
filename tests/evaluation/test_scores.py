"""What is scored in a scan: grids, units, what a lost spacing takes away, and the summary."""

import dataclasses
import itertools
import pathlib

import numpy as np
import pytest

from sammix_jax.config import default_config
from sammix_jax.data.geometry import slice_geometry
from sammix_jax.data.volumes import Volume
from sammix_jax.evaluation import metrics
from sammix_jax.evaluation.scores import (
    PAPER_SIDE,
    Case,
    Guidance,
    LabelledScan,
    score_guidance,
    score_scan,
    summarise_cases,
    summarise_guidance,
)
from sammix_jax.inference import VolumePrediction
from sammix_jax.systems.system import SlicePredictions

SHAPE, SPACING = (4, 40, 30), (5.0, 2.0, 2.0)


def disc(shape, centre, radius):
    rows, columns = np.indices(shape)
    return (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2


def labelled(truth, kept=None, affine=None):
    """A scan about a mask; air and water, as nothing here looks at it."""
    if affine is None:
        affine = np.diag([*SPACING[::-1], 1.0])
    hu = np.where(truth, 60, -1000).astype(np.int16)
    volume = Volume(pathlib.Path("scan.nii"), hu, SPACING, affine, np.eye(3, 2))
    kept = range(len(truth)) if kept is None else kept
    return LabelledScan("scan", volume, truth, truth.sum(axis=(1, 2)), kept)


def predicted(scan, mask, side, **changes):
    """A prediction whose logits on the store's grid are those of a mask on the scan's."""
    shape = scan.volume.hu.shape[1:]
    store = slice_geometry(shape, scan.volume.spacing[1:], side, "fit")
    to_squares = lambda masks: np.stack([store.mask_to_square(m) for m in masks])  # noqa: E731
    count = len(mask)
    slices = SlicePredictions(
        organ_probability=np.full(count, 0.9, np.float32),
        cam=np.zeros((count, side, side), np.float32),
        box=np.tile(np.array([0, 0, side, side], np.float32), (count, 1)),
        empty=np.zeros(count, bool),
        logits={"cam": np.where(to_squares(mask), 5.0, -5.0).astype(np.float32)},
    )._replace(**changes)
    return VolumePrediction({"cam": mask}, slices, None, to_squares(scan.truth))


@pytest.fixture
def config():
    return default_config()


@pytest.fixture
def scan():
    truth = np.zeros(SHAPE, bool)
    truth[1:3] = disc(SHAPE[1:], (20, 15), 8)
    return labelled(truth)


def test_a_case_is_the_metrics_on_the_scans_own_grid(scan, config):
    config.evaluate.nsd_tolerance = 3.0
    mask = np.roll(scan.truth, 2, axis=2)
    (case,) = score_scan(scan, predicted(scan, mask, 256), ("cam",), config)
    expected = metrics.volume_metrics(scan.truth, mask, SPACING, 3.0)
    assert (case.dice, case.nsd, case.hd95_mm, case.assd_mm) == (
        expected.dice, expected.nsd, expected.hd95, expected.assd)  # fmt: skip
    assert expected.nsd > metrics.volume_metrics(scan.truth, mask, SPACING, 1.0).nsd
    assert (case.status, case.volume_error) == ("scored", 0.0)
    assert case.truth_ml == pytest.approx(scan.truth.sum() * 0.020)


@pytest.mark.parametrize("side", [64, 128, 256, 512])
def test_slice_columns_are_at_256_pixels_whatever_the_model_sees(scan, config, side):
    config.data.size = side
    mask = np.roll(scan.truth, 2, axis=1)  # of 40 rows that fill the square: 12.8 pixels of 256
    (case,) = score_scan(scan, predicted(scan, mask, side), ("cam",), config)
    pixel = PAPER_SIDE / SHAPE[1]
    # Within two pixels of the coarser grid, whose nearest boundary pixel may be one off.
    assert case.slice_hausdorff_px == pytest.approx(2 * pixel, abs=2 * max(1, 256 / side))
    assert case.slice_dice == pytest.approx(metrics.dice(scan.truth[1], mask[1]), abs=0.02)


def test_at_256_nothing_is_resized(scan, config):
    mask = np.roll(scan.truth, 1, axis=1)
    prediction = predicted(scan, mask, 256)
    (case,) = score_scan(scan, prediction, ("cam",), config)
    logits = prediction.slices.logits["cam"]
    dice, distance = metrics.slice_metrics(prediction.truth[1], logits[1] > 0)
    assert (case.slice_dice, case.slice_hausdorff_px) == (dice, distance)


def test_only_kept_slices_make_the_slice_columns(scan, config):
    mask = scan.truth.copy()
    mask[2] = False
    wrong = labelled(scan.truth, kept=range(2, 4))
    (case,) = score_scan(wrong, predicted(wrong, mask, 256), ("cam",), config)
    assert case.slice_dice == 0 and case.dice == pytest.approx(2 / 3)
    none = labelled(scan.truth, kept=range(3, 4))
    (case,) = score_scan(none, predicted(none, mask, 256), ("cam",), config)
    assert case.slice_dice is None and case.slice_hausdorff_px is None


def test_false_positives_are_those_of_slices_without_the_organ(scan, config):
    mask = np.roll(scan.truth, 3, axis=2)
    mask[0, :2, :5] = True
    (case,) = score_scan(scan, predicted(scan, mask, 256), ("cam",), config)
    assert case.false_positive_ml == pytest.approx(10 * 0.020)


def test_a_lost_spacing_takes_every_millimetre(scan, config):
    lost = labelled(scan.truth, affine=np.diag([-1.0, -1.0, 1.0, 1.0]))
    mask = scan.truth.copy()
    mask[1] = False
    (case,) = score_scan(lost, predicted(lost, mask, 256), ("cam",), config)
    assert (case.nsd, case.hd95_mm, case.assd_mm) == (None, None, None)
    assert (case.truth_ml, case.predicted_ml, case.false_positive_ml) == (None, None, None)
    assert case.volume_error == -0.5 and case.dice == pytest.approx(2 / 3)


@pytest.mark.parametrize(("tilt", "measured"), [(0.0, True), (0.05, True), (1.0, False)])
def test_a_sheared_grid_has_no_distances(scan, config, tilt, measured):
    """Turned as a whole by 20° it has; tilted by as much as `tilt` mm a slice of 5 it has not."""
    sheared = np.diag([*SPACING[::-1], 1.0])
    sheared[1, 2] = tilt
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.35), -np.sin(0.35)], [np.sin(0.35), np.cos(0.35)]]
    tilted = labelled(scan.truth, affine=turn @ sheared)
    (case,) = score_scan(tilted, predicted(tilted, scan.truth, 256), ("cam",), config)
    assert (case.nsd, case.hd95_mm, case.assd_mm) == ((1, 0, 0) if measured else (None,) * 3)
    assert case.truth_ml == pytest.approx(scan.truth.sum() * 0.020) and case.dice == 1


def test_the_cams_box_is_compared_where_the_organ_shows(scan):
    side = 64
    box = np.tile(np.array([0, 0, side, side], np.float32), (4, 1))
    truth = predicted(scan, scan.truth, side).truth
    rows, columns = truth[1].any(1).nonzero()[0], truth[1].any(0).nonzero()[0]
    box[1] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    empty = np.array([True, False, True, True])
    prediction = predicted(scan, scan.truth, side, box=box, empty=empty)
    found = score_guidance(scan, prediction)
    height, width = rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0]
    np.testing.assert_allclose(found.box_iou, [1, height * width / side**2])
    assert found.cam_empty.tolist() == [False, True]
    assert found.organ_present.tolist() == [False, True, True, False]

    classifier, prompt = summarise_guidance([found, found])
    assert prompt == {"box_iou": found.box_iou.mean(), "empty_cams": 0.5, "slices": 4}
    # Every slice is called positive: half are, and no order tells them apart.
    assert classifier == {
        "accuracy": 0.5, "f1": pytest.approx(2 / 3), "auroc": 0.5, "slices": 8}  # fmt: skip


def test_no_prompt_to_score_without_the_organ():
    nothing = Guidance(np.zeros(3, bool), np.zeros(3), np.zeros(0), np.zeros(0, bool))
    classifier, prompt = summarise_guidance([nothing])
    assert prompt == {"box_iou": None, "empty_cams": None, "slices": 0}
    assert classifier["auroc"] is None and classifier["f1"] is None
    assert classifier["accuracy"] == 1


_SCANS = (f"s{n}" for n in itertools.count())


def case(status, dice, hd95, error=None, false_positive=0.0):
    return Case(
        next(_SCANS), "cam", status, dice, dice, hd95, hd95, error, dice, None, false_positive, 0, 0
    )


def test_the_interval_is_over_patients():
    """Six patients with five scans each: 30 scans are no 30 independent ones."""
    rng = np.random.default_rng(0)
    of_patient = rng.normal(0.9, 0.02, 6)
    cases = [
        dataclasses.replace(case("scored", of_patient[p], 4.0, 0.0), scan=f"p{p}_{s}")
        for p in range(6)
        for s in range(5)
    ]
    alone = summarise_cases(cases[::5])["dice"]
    together, apart = (summarise_cases(cases, pattern)["dice"] for pattern in (r"^p\d", ""))
    assert together["mean"] == pytest.approx(alone["mean"]) and together["count"] == 30
    assert together["low"] == pytest.approx(alone["low"])
    assert together["high"] == pytest.approx(alone["high"])
    assert apart["high"] - apart["low"] < 0.6 * (together["high"] - together["low"])


def test_failures_stay_in_the_mean():
    summary = summarise_cases([
        case("scored", 0.9, 4.0, -0.2),
        case("prediction_empty", 0.0, 100.0, -1.0),
        case("truth_empty", 0.0, 100.0, None, false_positive=8.0),
        case("both_empty", None, None),
    ])  # fmt: skip
    assert (summary["scored"], summary["failures"], summary["not_scored"]) == (3, 2, 1)
    assert summary["dice"]["mean"] == pytest.approx(0.3) and summary["dice"]["count"] == 3
    assert summary["dice"]["std"] == pytest.approx(np.std([0.9, 0, 0], ddof=1))
    assert 0 <= summary["dice"]["low"] <= summary["dice"]["mean"] <= summary["dice"]["high"]
    assert summary["hd95_mm"]["mean"] == pytest.approx(68.0)
    assert summary["absolute_volume_error"]["mean"] == pytest.approx(0.6)
    assert summary["false_positive_ml"] | {"low": 0, "high": 0, "std": 0} == {
        "mean": 2.0, "std": 0, "count": 4, "low": 0, "high": 0}  # fmt: skip
    assert summary["slice_hausdorff_px"] is None
    assert summarise_cases([case("both_empty", None, None)])["dice"] is None
