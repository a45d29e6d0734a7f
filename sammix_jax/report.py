"""Pictures and the report: what a person looks at after a run."""

import base64
import html
import io
import json
import pathlib

import numpy as np
from matplotlib.figure import Figure

from sammix_jax.data.files import whole_file
from sammix_jax.data.volumes import Volume
from sammix_jax.evaluate import Evaluation, Example
from sammix_jax.train_log import read_log

TRUTH, PREDICTION, BOX = "#4cc38a", "#ff9f1c", "#5aa9ff"

PROTOCOL_NOTES = {
    "cam": "automatic: nothing but the image goes in (the headline)",
    "gt_box": "oracle: prompted with the box of the true mask, an upper bound",
    "none": "no prompt: neither CAM box nor CAM fusion",
}


def write_overlay(path, volume: Volume, mask: np.ndarray, config) -> None:
    """A PNG of three axial slices through the predicted organ, or through the scan if it is empty.

    Args:
      path: the PNG.
      volume: the scan.
      mask: (D, H, W) bool.
      config: for the window.
    """
    rows = np.flatnonzero(mask.any(axis=(1, 2)))
    first, last = (rows[0], rows[-1]) if len(rows) else (0, len(mask) - 1)
    levels = np.unique(np.rint(np.linspace(first, last, 5)[1:-1]).astype(int))
    figure = Figure(figsize=(4 * len(levels), 4.4), layout="constrained", facecolor="black")
    for axis, z in zip(figure.subplots(1, len(levels), squeeze=False)[0], levels, strict=True):
        _show(axis, volume.hu[z], config, aspect=volume.spacing[1] / volume.spacing[2])
        _contour(axis, mask[z], PREDICTION)
        axis.set_title(f"slice {z + 1} of {len(mask)}", color="white", fontsize=10)
    _save(figure, path)


def write_case(path, example: Example, config) -> None:
    """A PNG of one evaluated scan: contours of truth and prediction, and the CAM with its box."""
    _save(_example_figure(example, config), path)


def write_report(path, evaluation: Evaluation, table: str, config, workdir) -> None:
    """`report.html`: one self-contained page with results, learning curves and cases.

    Args:
      path: the page.
      evaluation: from `evaluate.evaluate`.
      table: its result table as text.
      config: the run's config.
      workdir: whose metrics.csv holds the curves.
    """
    notes = "".join(f"<li><b>{p}</b> {PROTOCOL_NOTES[p]}</li>" for p in config.evaluate.protocols)
    gate = "on" if config.evaluate.gate else "off"
    scored = [e for e in evaluation.examples if e.dice is not None]
    ranked = sorted(scored, key=lambda e: -e.dice)
    chosen = {"best": 0, "median": len(ranked) // 2, "worst": len(ranked) - 1} if ranked else {}
    figures = "".join(
        f"<figure>{_image(_example_figure(ranked[i], config))}<figcaption>{name}: "
        f"{html.escape(ranked[i].scan)}, Dice {ranked[i].dice:.3f}</figcaption></figure>"
        for name, i in chosen.items()
    )
    page = _PAGE.format(
        title=f"SAM-Mix: {html.escape(config.data.organ)}",
        scans=html.escape(config.evaluate.root or f"the {config.evaluate.part} part of the split"),
        table=html.escape(table),
        notes=notes,
        gate=gate,
        curves=_image(_curves(read_log(workdir))),
        figures=figures,
        truth=TRUTH,
        prediction=PREDICTION,
        box=BOX,
        config=html.escape(json.dumps(json.loads(config.to_json()), indent=1)),
    )
    with whole_file(pathlib.Path(path)) as partial:
        partial.write_text(page)


def _curves(rows: list[tuple[int, str, float]]) -> Figure:
    panels = {
        "loss": ("train/loss", "train/classification_loss", "train/dice_loss"),
        "validation": ("val/dice", "val/accuracy"),
    }
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for name in names:
            points = [(step, value) for step, metric, value in rows if metric == name]
            if points:
                axis.plot(*zip(*points, strict=True), label=name.split("/")[1], marker=".")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    return figure


def _example_figure(example: Example, config) -> Figure:
    figure = Figure(figsize=(7.2, 3.6), layout="constrained", facecolor="black")
    left, right = figure.subplots(1, 2)
    _show(left, example.hu, config)
    _contour(left, example.truth, TRUTH)
    _contour(left, example.predicted, PREDICTION)
    _show(right, example.hu, config)
    right.imshow(example.cam, cmap="inferno", alpha=0.5, vmin=0, vmax=1)
    x0, y0, x1, y1 = example.box - 0.5
    right.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color=BOX, linewidth=1.5)
    return figure


def _show(axis, hu: np.ndarray, config, aspect: float = 1.0) -> None:
    low, high = config.input.window
    axis.imshow(hu, cmap="gray", vmin=low, vmax=high, aspect=aspect)
    axis.axis("off")


def _contour(axis, mask: np.ndarray, colour: str) -> None:
    if mask.any() and not mask.all():
        axis.contour(mask.astype(float), levels=[0.5], colors=colour, linewidths=1.5)


def _save(figure: Figure, path) -> None:
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _image(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/png;base64,{data}">'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem }}
pre {{ background: #f4f4f4; padding: 1rem; overflow-x: auto; font-size: 14px }}
img {{ max-width: 100% }} figure {{ margin: 1rem 0 }} figcaption {{ color: #555 }}
</style></head><body>
<h1>{title}</h1>
<p>Scans: {scans}. Dice and HD95 per volume on the scan's own grid; slice columns on slices that
show the organ, at the model's slice size. Mean ± standard deviation over scans.</p>
<pre>{table}</pre>
<ul>{notes}</ul>
<p>Gate by the classifier: {gate}. A scan where truth and prediction are both empty is not scored;
one where either is empty counts as a failure, with Dice 0 and the image's diagonal as HD95.</p>
<h2>Learning curves</h2>{curves}
<h2>Cases</h2>
<p>Left: <b style="color:{truth}">truth</b> and <b style="color:{prediction}">prediction</b>.
Right: the class activation map and its <b style="color:{box}">box</b>. The slice that shows most of
the organ.</p>
{figures}
<h2>Config</h2><details><summary>every field</summary><pre>{config}</pre></details>
</body></html>
"""
