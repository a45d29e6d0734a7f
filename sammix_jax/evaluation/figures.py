"""Pictures that a person looks at: a mask on its scan, a case with its CAM, curves and scores."""

import re

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sammix_jax.data.files import whole_file
from sammix_jax.data.volumes import Volume

TRUTH, PREDICTION, BOX, FAILURE = "#4cc38a", "#ff9f1c", "#5aa9ff", "#e5484d"
# Ink that reads on white and on black; plots are transparent.
INK = "#8a8f98"

# Title → the metrics that it shows.
CURVES = {
    "loss in training, and its parts": re.compile(r"train/(\w+_)?loss"),
    "validation: Dice per volume, accuracy per slice": re.compile(r"val/(dice|accuracy)"),
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
        show(axis, volume.hu[z], window, aspect=volume.spacing[1] / volume.spacing[2])
        contour(axis, mask[z], PREDICTION)
        axis.set_title(f"slice {z + 1} of {len(mask)}", color="white", fontsize=10)
    return figure


def case(
    hu: np.ndarray,
    truth: np.ndarray,
    predicted: np.ndarray,
    cam: np.ndarray | None,
    box: np.ndarray | None,
    true_box: np.ndarray | None,
    window: tuple[float, float],
) -> Figure:
    """One slice: contours of truth and prediction above; the CAM and the boxes below, if any.

    Args:
      hu, truth, predicted, cam: (H, W) int16, bool, bool, and float in [0, 1]; None where the
        system has no CAM.
      box: (4,) XYXY in pixels, of the CAM; None without one.
      true_box: the same of the truth, dashed; None where there is none.
      window: HU shown as black and as white.
    """
    panels = 1 if cam is None else 2
    figure = Figure(figsize=(3.6, 3.6 * panels), layout="constrained", facecolor="black")
    lines = {"truth": TRUTH, "prediction": PREDICTION} | ({} if box is None else {"CAM's box": BOX})
    figure.legend(
        handles=[Line2D([], [], color=colour, label=name) for name, colour in lines.items()],
        loc="outside lower center",
        ncols=len(lines),
        frameon=False,
        labelcolor="white",
        fontsize=8,
    )
    above, *others = figure.subplots(panels, 1, squeeze=False)[:, 0]
    show(above, hu, window)
    contour(above, truth, TRUTH)
    contour(above, predicted, PREDICTION)
    if not others:
        return figure
    (below,) = others
    show(below, hu, window)
    below.imshow(cam, cmap="inferno", alpha=0.5, vmin=0, vmax=1)
    _rectangle(below, box, BOX, "-")
    if true_box is not None:
        _rectangle(below, true_box, TRUTH, "--")
    return figure


def curves(rows: list[tuple[int, str, float]]) -> dict[str, Figure]:
    """Loss and validation over steps, by title, from the rows of metrics.csv; those there are."""
    figures = {}
    for title, metrics in CURVES.items():
        points = {}
        for step, metric, value in rows:
            if metrics.fullmatch(metric):
                points.setdefault(metric, []).append((step, value))
        if not points:
            continue
        figure, axis = _plot()
        for name, known in sorted(points.items(), key=lambda item: len(item[0])):
            axis.plot(*zip(*known, strict=True), label=name.split("/")[1], marker=".")
        axis.set_xlabel("step")
        axis.legend(frameon=False, labelcolor=INK)
        figures[title] = figure
    return figures


def strips(values: dict[str, list[float]], means: dict[str, dict], label: str) -> Figure:
    """A strip of points for each name, one a scan, with the mean and its interval below.

    Args:
      values: name → one value a scan, at least 0; zeros are drawn as failures.
      means: name → "mean", and "low" and "high" of its interval or None.
      label: of the values' axis.
    """
    figure, axis = _plot(height=0.7 + 0.6 * len(values))
    for row, (name, points) in enumerate(values.items()):
        known = np.array(points)
        # Spread so that equal points are seen; the same at each drawing.
        places = row - 0.18 + 0.1 * np.sin(2.4 * np.arange(len(known)))
        axis.scatter(known, places, s=26, color=PREDICTION, alpha=0.75, linewidths=0)
        failed = known == 0
        axis.scatter(known[failed], places[failed], s=44, color=FAILURE, marker="x")
        found = means[name]
        if found["low"] is not None:
            axis.plot([found["low"], found["high"]], [row + 0.2] * 2, color=BOX, linewidth=2.5)
        axis.plot([found["mean"]], [row + 0.2], marker="D", color=BOX, markersize=6)
    axis.set_yticks(range(len(values)), list(values))
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.set_xlabel(label)
    axis.grid(axis="y", visible=False)
    return figure


def save(figure: Figure, path, notes: dict[str, str] | None = None) -> None:
    """Writes a PNG, whole or not at all.

    Args:
      figure: what to draw.
      path: of the file.
      notes: kept in the file, by keyword; seen by who asks for them.
    """
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=110, metadata=notes)


def _plot(height: float = 3.0):
    """A figure with one axis, narrow enough to be read on a telephone."""
    figure = Figure(figsize=(5.4, height), layout="constrained", facecolor="none")
    axis = figure.subplots()
    axis.set_facecolor("none")
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["bottom", "left"]].set_color(INK)
    axis.tick_params(colors=INK)
    axis.xaxis.label.set_color(INK)
    axis.grid(color=INK, alpha=0.25)
    return figure, axis


def show(axis, hu: np.ndarray, window: tuple[float, float], aspect: float = 1.0) -> None:
    """Draws a slice (H, W) of HU; `aspect` is the height of a pixel over its width."""
    axis.imshow(hu, cmap="gray", vmin=window[0], vmax=window[1], aspect=aspect)
    axis.axis("off")


def contour(axis, mask: np.ndarray, colour: str) -> None:
    """Draws the outline of a mask (H, W), if it has one."""
    if mask.any() and not mask.all():
        axis.contour(mask.astype(float), levels=[0.5], colors=colour, linewidths=1.5)


def _rectangle(axis, box: np.ndarray, colour: str, style: str) -> None:
    x0, y0, x1, y1 = box - 0.5  # pixel edges, where imshow puts centres on whole numbers
    corners = [x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0]
    axis.plot(*corners, color=colour, linestyle=style, linewidth=1.5)
