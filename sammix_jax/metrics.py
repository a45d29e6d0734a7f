"""Segmentation metrics, per volume in millimetres and per slice in pixels.

Empty masks never turn into NaN or a free 1: a volume where both masks are empty is not scored and
counted as such; where one of them is empty it is a failure, with Dice 0 and the image's diagonal
for a distance, and stays in the means.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import surface_distance
from scipy import ndimage


@dataclasses.dataclass(frozen=True)
class VolumeScore:
    """Scores of one volume; None for each metric where `status` is 'both_empty'.

    Attributes:
      dice: 0 to 1.
      hd95: 95th percentile of the symmetric Hausdorff distance, mm.
      status: 'scored', 'both_empty', 'truth_empty' or 'prediction_empty'.
    """

    dice: float | None
    hd95: float | None
    status: str

    @property
    def failed(self) -> bool:
        """Whether exactly one of the masks was empty."""
        return self.status in ("truth_empty", "prediction_empty")


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
    truth: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]
) -> VolumeScore:
    """Scores a volume on its own grid.

    HD95 is that of DeepMind's `surface_distance`: surface elements sit at the corners of voxels;
    each direction's 95th percentile is weighted by their area; the larger direction counts.

    Args:
      truth: (D, H, W) bool.
      prediction: (D, H, W) bool.
      spacing: mm between voxels along D, H and W.

    Raises:
      ValueError: shapes or types that do not fit, or a spacing that is not three positive numbers.
    """
    _check(truth, prediction, 3)
    spacing = tuple(float(s) for s in spacing)
    if len(spacing) != 3 or not all(0 < s < math.inf for s in spacing):
        raise ValueError(f"spacing={spacing}: expected three positive numbers, mm along D, H, W.")
    status = {
        (True, True): "scored",
        (True, False): "prediction_empty",
        (False, True): "truth_empty",
        (False, False): "both_empty",
    }[bool(truth.any()), bool(prediction.any())]
    if status == "both_empty":
        return VolumeScore(None, None, status)
    if status != "scored":
        return VolumeScore(0.0, math.hypot(*np.multiply(truth.shape, spacing)), status)
    # The package crops to the bounding box of both masks itself, and its branches for an empty
    # mask, which NumPy 2 breaks, are out of reach here.
    distances = surface_distance.compute_surface_distances(truth, prediction, spacing)
    hd95 = surface_distance.compute_robust_hausdorff(distances, 95)
    return VolumeScore(dice(truth, prediction), float(hd95), status)


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
    truth_edge = truth & ~ndimage.binary_erosion(truth)
    prediction_edge = prediction & ~ndimage.binary_erosion(prediction)
    to_prediction = ndimage.distance_transform_edt(~prediction_edge)[truth_edge].max()
    to_truth = ndimage.distance_transform_edt(~truth_edge)[prediction_edge].max()
    return dice(truth, prediction), float(max(to_prediction, to_truth))


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
