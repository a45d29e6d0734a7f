"""What is scored in one scan, and how scans are summarised."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sammix_jax.data.geometry import SliceGeometry
from sammix_jax.data.splits import whose
from sammix_jax.evaluation import metrics
from sammix_jax.evaluation.intervals import summarise
from sammix_jax.evaluation.scans import LabelledScan
from sammix_jax.inference import VolumePrediction
from sammix_jax.method.cam import mask_to_box

# Side of the slices that the paper scores, pixels; columns to compare with it have this one.
PAPER_SIDE = 256


@dataclasses.dataclass(frozen=True)
class Case:
    """One scan under one protocol; a row of cases.csv.

    Attributes:
      scan, protocol: which.
      status, dice, nsd, hd95_mm, assd_mm, volume_error: as in `metrics.VolumeScore`, 3D, of all
        slices on the scan's own grid. No nsd, hd95_mm and assd_mm where the file has lost its
        spacing, or its grid is sheared (gantry tilt).
      slice_dice, slice_hausdorff_px: means over those kept slices that show the organ, on a grid of
        `PAPER_SIDE` squared: the columns to compare with the paper's. None without such slices.
      false_positive_ml: what is predicted on slices that do not show the organ, mL; this and the
        next two None where the file has lost its spacing.
      truth_ml, predicted_ml: volumes, mL.
    """

    scan: str
    protocol: str
    status: str
    dice: float | None
    nsd: float | None
    hd95_mm: float | None
    assd_mm: float | None
    volume_error: float | None
    slice_dice: float | None
    slice_hausdorff_px: float | None
    false_positive_ml: float | None
    truth_ml: float | None
    predicted_ml: float | None


@dataclasses.dataclass(frozen=True)
class Guidance:
    """What the classifier and its CAM say of one scan, the same under every protocol; None what a
    system does not have.

    Attributes:
      organ_present: (D,) bool, the image-level labels.
      organ_probability: (D,) float, the classifier's.
      box_iou: (N,) float, of the CAM's box with the true one on the store's grid, where N slices
        show the organ; the central box stands in for that of an empty CAM.
      cam_empty: (N,) bool.
    """

    organ_present: np.ndarray
    organ_probability: np.ndarray | None
    box_iou: np.ndarray | None
    cam_empty: np.ndarray | None


def score_scan(
    scan: LabelledScan, prediction: VolumePrediction, protocols: Sequence[str], config
) -> list[Case]:
    """A case for each protocol.

    Args:
      scan: what is true.
      prediction: what is predicted, under these protocols at least.
      protocols: to score, in this order.
      config: the run's; reads `data.size`, `data.resize` and `evaluate.nsd_tolerance`.
    """
    volume, resize = scan.volume, config.data.resize
    stored, paper = (volume.geometry(side, resize) for side in (config.data.size, PAPER_SIDE))
    squares = {z: paper.mask_to_square(scan.truth[z]) for z in scan.kept}
    squares = {z: square for z, square in squares.items() if square.any()}
    measurable = volume.has_spacing and not volume.is_sheared  # surface-distance knows boxes alone
    cases = []
    for protocol in protocols:
        mask, logits = prediction.masks[protocol], prediction.slices.logits[protocol]
        score = metrics.volume_metrics(
            scan.truth, mask, volume.spacing, config.evaluate.nsd_tolerance
        )
        per_slice = [
            metrics.slice_metrics(truth, _paper_square(logits[z], stored, paper))
            for z, truth in squares.items()
        ]
        slice_dice, slice_hausdorff = (
            np.mean(per_slice, axis=0).tolist() if per_slice else (None, None)
        )
        cases.append(
            Case(
                scan=scan.name,
                protocol=protocol,
                status=score.status,
                dice=score.dice,
                nsd=score.nsd if measurable else None,
                hd95_mm=score.hd95 if measurable else None,
                assd_mm=score.assd if measurable else None,
                volume_error=score.volume_error,
                slice_dice=slice_dice,
                slice_hausdorff_px=slice_hausdorff,
                false_positive_ml=volume.millilitres(mask[scan.organ_pixels == 0]),
                truth_ml=volume.millilitres(scan.truth),
                predicted_ml=volume.millilitres(mask),
            )
        )
    return cases


def score_guidance(scan: LabelledScan, prediction: VolumePrediction) -> Guidance:
    """Compares what the classifier says of a scan with what is true."""
    slices = prediction.slices
    true_boxes, absent = (np.asarray(found) for found in mask_to_box(prediction.truth))
    shown = np.flatnonzero(~absent)
    box_iou, cam_empty = None, None
    if slices.box is not None:
        box_iou = np.array([metrics.box_iou(slices.box[z], true_boxes[z]) for z in shown])
        cam_empty = slices.empty[shown]
    return Guidance(scan.organ_pixels > 0, slices.organ_probability, box_iou, cam_empty)


def summarise_cases(cases: Sequence[Case], patient: str = "") -> dict:
    """Summarises the scans under one protocol.

    Args:
      cases: of each scan.
      patient: `data.patient`, by which scans of one patient are known.

    "scored" counts scans where truth or prediction holds the organ, "failures" those of them where
    only one does, "not_scored" scans where neither does. Each metric has its `intervals.Moments` as
    a dict, or None where no scan has a value. Scans that are not scored have a false-positive
    volume, 0, and nothing else.
    """
    status = [case.status for case in cases]
    unscored, scored = status.count("both_empty"), status.count("scored")
    patients = [whose(case.scan, patient) for case in cases]

    def moments(name: str, of=lambda value: value) -> dict | None:
        values = [getattr(case, name) for case in cases]
        found = summarise([None if v is None else of(v) for v in values], patients)
        return found and dataclasses.asdict(found)

    return {
        "scored": len(cases) - unscored,
        "failures": len(cases) - unscored - scored,
        "not_scored": unscored,
        "dice": moments("dice"),
        "nsd": moments("nsd"),
        "hd95_mm": moments("hd95_mm"),
        "assd_mm": moments("assd_mm"),
        "absolute_volume_error": moments("volume_error", abs),
        "slice_dice": moments("slice_dice"),
        "slice_hausdorff_px": moments("slice_hausdorff_px"),
        "false_positive_ml": moments("false_positive_ml"),
    }


def summarise_guidance(scans: Sequence[Guidance]) -> tuple[dict | None, dict | None]:
    """The classifier's scores and the prompt's, pooled over the slices of all scans.

    Returns:
      "accuracy", "f1", "auroc" and the number of "slices"; and, of the slices that show the organ
      on the store's grid, the mean "box_iou", the share of "empty_cams", both None without such
      slices, and the number of "slices". None in place of either that a system does not have.
    """
    classifier, prompt = None, None
    if all(scan.organ_probability is not None for scan in scans):
        score = metrics.classification_metrics(
            np.concatenate([scan.organ_present for scan in scans]),
            np.concatenate([scan.organ_probability for scan in scans]),
        )
        classifier = {
            "accuracy": score.accuracy,
            "f1": score.f1,
            "auroc": score.auroc,
            "slices": score.count,
        }
    if all(scan.box_iou is not None for scan in scans):
        box_iou = np.concatenate([scan.box_iou for scan in scans])
        empty = np.concatenate([scan.cam_empty for scan in scans])
        prompt = {
            "box_iou": float(box_iou.mean()) if len(box_iou) else None,
            "empty_cams": float(empty.mean()) if len(empty) else None,
            "slices": len(box_iou),
        }
    return classifier, prompt


def _paper_square(logits: np.ndarray, stored: SliceGeometry, paper: SliceGeometry) -> np.ndarray:
    """(S, S) logits → (PAPER_SIDE, PAPER_SIDE) bool, bilinear; the same grid where S is that.

    From the part that the scan fills in one square to that which it fills in the other, as the two
    may be rounded apart.
    """
    filled = dataclasses.replace(stored, shape=(paper.height, paper.width)).logits_to_scan(logits)
    square = np.zeros((PAPER_SIDE, PAPER_SIDE), bool)
    rows = slice(paper.top, paper.top + paper.height)
    square[rows, paper.left : paper.left + paper.width] = filled > 0
    return square
