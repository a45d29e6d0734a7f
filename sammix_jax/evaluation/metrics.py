"""Metrics: of masks, per volume in millimetres and per slice in pixels; of classes; of boxes.

Empty masks never turn into NaN or a free 1: a volume where both masks are empty is not scored and
counted as such; where one of them is empty it is a failure, with Dice and NSD 0 and the image's
diagonal for a distance, and stays in the means.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import surface_distance
from scipy import ndimage, stats
from scipy.spatial import KDTree


@dataclasses.dataclass(frozen=True)
class VolumeScore:
    """Scores of one volume; None for each metric where `status` is 'both_empty'.

    Attributes:
      dice: 0 to 1.
      nsd: normalised surface distance, or surface Dice: share of both surfaces together, by area,
        that lies within the tolerance of the other, 0 to 1.
      hd95: 95th percentile of the symmetric Hausdorff distance, mm.
      assd: average symmetric surface distance, mm.
      volume_error: (predicted - truth) / truth, -1 and up; -1 where the prediction is empty, None
        where the truth is, for nothing can be divided by.
      status: 'scored', 'both_empty', 'truth_empty' or 'prediction_empty'.
    """

    dice: float | None
    nsd: float | None
    hd95: float | None
    assd: float | None
    volume_error: float | None
    status: str

    @property
    def failed(self) -> bool:
        """Whether exactly one of the masks was empty."""
        return self.status in ("truth_empty", "prediction_empty")


@dataclasses.dataclass(frozen=True)
class ClassificationScore:
    """How well probabilities tell which slices show the organ.

    Attributes:
      accuracy: 0 to 1.
      f1: of the positive class, 0 to 1; None where nothing is positive, in truth or prediction.
      auroc: area under the ROC curve, 0 to 1; None where the truth holds a single class.
      count: slices scored.
    """

    accuracy: float
    f1: float | None
    auroc: float | None
    count: int


def dice(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Dice of two bool masks of one shape, 0 to 1.

    Raises:
      ValueError: shapes or types that do not fit, or both masks empty, where Dice is undefined.
    """
    _check(truth, prediction, truth.ndim)
    total = int(np.count_nonzero(truth)) + int(np.count_nonzero(prediction))
    if total == 0:
        raise ValueError("both masks are empty: expected one pixel at least; leave this case out.")
    return 2 * int(np.count_nonzero(truth & prediction)) / total


def volume_metrics(
    truth: np.ndarray,
    prediction: np.ndarray,
    spacing: Sequence[float],
    tolerance: float = 2.0,
) -> VolumeScore:
    """Scores a volume on its own grid.

    Surfaces are those of DeepMind's `surface_distance` (Nikolov et al. 2018): elements sit at the
    corners of voxels, each has an area, and its distance is to the nearest element of the other
    mask. NSD is the area within `tolerance` over the area of both surfaces. HD95 takes each
    direction's 95th percentile by area, and the larger of the two. ASSD is the mean, by area, over
    the elements of both surfaces pooled, not the mean of the two directions' means: they differ
    where the surfaces differ in area.

    Args:
      truth: (D, H, W) bool.
      prediction: (D, H, W) bool.
      spacing: mm between voxels along D, H and W.
      tolerance: mm by which a surface may be off and still count for NSD; a distance of just this
        counts.

    Raises:
      ValueError: shapes or types that do not fit, a spacing that is not three positive numbers, or
        a tolerance that is negative or not a number.
    """
    _check(truth, prediction, 3)
    spacing = tuple(float(s) for s in spacing)
    if len(spacing) != 3 or not all(0 < s < math.inf for s in spacing):
        raise ValueError(f"spacing={spacing}: expected three positive numbers, mm along D, H, W.")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance}: expected mm, 0 or more, such as 2.0.")
    status = {
        (True, True): "scored",
        (True, False): "prediction_empty",
        (False, True): "truth_empty",
        (False, False): "both_empty",
    }[bool(truth.any()), bool(prediction.any())]
    if status == "both_empty":
        return VolumeScore(None, None, None, None, None, status)
    if status != "scored":
        diagonal = math.hypot(*np.multiply(truth.shape, spacing))
        error = -1.0 if status == "prediction_empty" else None
        return VolumeScore(0.0, 0.0, diagonal, diagonal, error, status)
    # The package crops to the bounding box of both masks itself, and its branches for an empty
    # mask, which NumPy 2 breaks, are out of reach here.
    distances = surface_distance.compute_surface_distances(truth, prediction, spacing)
    truth_voxels = int(np.count_nonzero(truth))
    return VolumeScore(
        dice=dice(truth, prediction),
        nsd=float(surface_distance.compute_surface_dice_at_tolerance(distances, tolerance)),
        hd95=float(surface_distance.compute_robust_hausdorff(distances, 95)),
        assd=_average_distance(distances),
        volume_error=(int(np.count_nonzero(prediction)) - truth_voxels) / truth_voxels,
        status=status,
    )


def _average_distance(distances: dict[str, np.ndarray]) -> float:
    """Mean over both surfaces pooled, weighted by area; mm."""
    distance = np.concatenate(
        [distances["distances_gt_to_pred"], distances["distances_pred_to_gt"]]
    )
    area = np.concatenate([distances["surfel_areas_gt"], distances["surfel_areas_pred"]])
    return float(np.average(distance, weights=area))


def slice_metrics(truth: np.ndarray, prediction: np.ndarray) -> tuple[float, float]:
    """Scores a slice that shows the organ, as the paper's table does.

    The distance is the maximum symmetric Hausdorff distance between the centres of the masks'
    boundary pixels: those with a 4-neighbour outside the mask, or at the edge of the image.

    Args:
      truth: (H, W) bool, not empty.
      prediction: (H, W) bool.

    Returns:
      Dice, 0 to 1, and the distance in pixels; 0 and the image's diagonal where the prediction is
      empty.

    Raises:
      ValueError: shapes or types that do not fit, or an empty truth.
    """
    _check(truth, prediction, 2)
    if not truth.any():
        raise ValueError("truth is empty: expected a slice that shows the organ; leave it out.")
    if not prediction.any():
        return 0.0, math.hypot(*truth.shape)
    edges = [np.argwhere(mask & ~ndimage.binary_erosion(mask)) for mask in (truth, prediction)]
    nearest = [
        KDTree(there).query(here)[0].max() for here, there in itertools.permutations(edges, 2)
    ]
    return dice(truth, prediction), float(max(nearest))


def classification_metrics(
    organ_present: np.ndarray, probability: np.ndarray
) -> ClassificationScore:
    """Scores the classifier over slices; a probability of 0.5 or more says that the organ shows.

    AUROC is the share of pairs of a positive and a negative slice where the positive one has the
    higher probability; a tie counts half (Mann–Whitney U).

    Args:
      organ_present: (N,) bool.
      probability: (N,) float in [0, 1].

    Raises:
      ValueError: shapes or types that do not fit, no slices, or values that are no probabilities.
    """
    if organ_present.ndim != 1 or organ_present.shape != probability.shape or not len(probability):
        raise ValueError(
            f"organ_present {organ_present.shape} and probability {probability.shape}: expected "
            "one shape (N,) with one slice at least."
        )
    if organ_present.dtype != bool:
        raise ValueError(f"organ_present is {organ_present.dtype}: expected bool.")
    if not np.all((probability >= 0) & (probability <= 1)):
        raise ValueError(
            f"probability from {probability.min()} to {probability.max()}: expected 0 to 1; apply "
            "a softmax to logits first."
        )
    predicted = probability >= 0.5
    positives, negatives = int(organ_present.sum()), int((~organ_present).sum())
    named = positives + int(predicted.sum())
    auroc = None
    if positives and negatives:
        # The least sum that the positives' ranks can have is that of 1 to `positives`.
        rank_sum = stats.rankdata(probability)[organ_present].sum()
        auroc = (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
    return ClassificationScore(
        accuracy=float(np.mean(predicted == organ_present)),
        f1=2 * int((predicted & organ_present).sum()) / named if named else None,
        auroc=None if auroc is None else float(auroc),
        count=len(probability),
    )


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, 0 to 1; 0 where neither has an area.

    Args:
      a, b: (4,) XYXY in one frame, maximum edge exclusive: a box of one pixel has an area of 1.

    Raises:
      ValueError: not four finite numbers, or a maximum edge below the minimum.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    for name, box in (("a", a), ("b", b)):
        if box.shape != (4,) or not np.isfinite(box).all() or (box[2:] < box[:2]).any():
            raise ValueError(f"box {name}={box}: expected finite x0, y0, x1, y1 with x0 <= x1.")
    overlap = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    intersection = np.prod(np.maximum(overlap, 0))
    union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - intersection
    return float(intersection / union) if union > 0 else 0.0


def _check(truth: np.ndarray, prediction: np.ndarray, ndim: int) -> None:
    if truth.ndim != ndim or truth.shape != prediction.shape:
        raise ValueError(
            f"truth {truth.shape} and prediction {prediction.shape}: expected one shape of {ndim} "
            "axes; resample the prediction onto the truth's grid."
        )
    if truth.dtype != bool or prediction.dtype != bool:
        raise ValueError(
            f"truth is {truth.dtype} and prediction {prediction.dtype}: expected bool; "
            "compare labels or threshold probabilities first."
        )
