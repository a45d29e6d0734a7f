"""Pictures that a person looks at: a mask on its scan, a case with its CAM, learning curves."""

import numpy as np
from matplotlib.figure import Figure

from sammix_jax.data.files import whole_file
from sammix_jax.data.volumes import Volume

TRUTH, PREDICTION, BOX = "#4cc38a", "#ff9f1c", "#5aa9ff"

CURVES = {
    "loss": ("train/loss", "train/classification_loss", "train/dice_loss"),
    "validation": ("val/dice", "val/accuracy"),
}


def overlay(volume: Volume, mask: np.ndarray, window: tuple[float, float]) -> Figure:
    """Three axial slices through the predicted organ, or through the scan if there is none.

    Args:
      volume: the scan.
      mask: (D, H, W) bool.
      window: HU shown as black and as white.
    """
    shown = np.flatnonzero(mask.any(axis=(1, 2)))
    if not len(shown):
        shown = np.arange(len(mask))
    levels = np.unique(shown[[len(shown) // 4, len(shown) // 2, 3 * len(shown) // 4]])
    figure = Figure(figsize=(4 * len(levels), 4.4), layout="constrained", facecolor="black")
    for axis, z in zip(figure.subplots(1, len(levels), squeeze=False)[0], levels, strict=True):
        _show(axis, volume.hu[z], window, aspect=volume.spacing[1] / volume.spacing[2])
        _contour(axis, mask[z], PREDICTION)
        axis.set_title(f"slice {z + 1} of {len(mask)}", color="white", fontsize=10)
    return figure


def case(
    hu: np.ndarray,
    truth: np.ndarray,
    predicted: np.ndarray,
    cam: np.ndarray,
    box: np.ndarray,
    window: tuple[float, float],
) -> Figure:
    """One slice: contours of truth and prediction on the left, the CAM and its box on the right.

    Args:
      hu, truth, predicted, cam: (H, W) int16, bool, bool, and float in [0, 1].
      box: (4,) XYXY in pixels.
      window: HU shown as black and as white.
    """
    figure = Figure(figsize=(7.2, 3.6), layout="constrained", facecolor="black")
    left, right = figure.subplots(1, 2)
    _show(left, hu, window)
    _contour(left, truth, TRUTH)
    _contour(left, predicted, PREDICTION)
    _show(right, hu, window)
    right.imshow(cam, cmap="inferno", alpha=0.5, vmin=0, vmax=1)
    x0, y0, x1, y1 = box - 0.5  # pixel edges, where imshow puts centres on whole numbers
    right.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color=BOX, linewidth=1.5)
    return figure


def curves(rows: list[tuple[int, str, float]]) -> Figure:
    """Loss and validation over steps, from the rows of metrics.csv."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, 2), CURVES.items(), strict=True):
        for name in names:
            points = [(step, value) for step, metric, value in rows if metric == name]
            if points:
                axis.plot(*zip(*points, strict=True), label=name.split("/")[1], marker=".")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    return figure


def save(figure: Figure, path) -> None:
    """Writes a PNG, whole or not at all."""
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _show(axis, hu: np.ndarray, window: tuple[float, float], aspect: float = 1.0) -> None:
    axis.imshow(hu, cmap="gray", vmin=window[0], vmax=window[1], aspect=aspect)
    axis.axis("off")


def _contour(axis, mask: np.ndarray, colour: str) -> None:
    if mask.any() and not mask.all():
        axis.contour(mask.astype(float), levels=[0.5], colors=colour, linewidths=1.5)
