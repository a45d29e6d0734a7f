"""The report of an evaluation: one self-contained page, and a picture of every case."""

import base64
import html
import io
import json
import pathlib

from matplotlib.figure import Figure

from sammix_jax import figures
from sammix_jax.data.files import whole_file
from sammix_jax.evaluate import Evaluation, Example, result_table
from sammix_jax.train_log import read_log

PROTOCOL_NOTES = {
    "cam": "automatic: nothing but the image goes in (the headline)",
    "gt_box": "oracle: prompted with the box of the true mask, an upper bound",
    "none": "no prompt: neither CAM box nor CAM fusion",
}


def write_report(folder, evaluation: Evaluation, config, workdir) -> pathlib.Path:
    """Writes `report.html` with results, learning curves and cases, and `SCAN.png` for each case.

    Args:
      folder: receives them.
      evaluation: from `evaluate.evaluate`.
      config: the run's config.
      workdir: whose metrics.csv holds the curves.

    Returns:
      The page's path.
    """
    folder = pathlib.Path(folder)
    for example in evaluation.examples:
        figures.save(_case(example, config), folder / f"{example.scan}.png")
    notes = "".join(f"<li><b>{p}</b> {PROTOCOL_NOTES[p]}</li>" for p in config.evaluate.protocols)
    page = _PAGE.format(
        title=f"SAM-Mix: {html.escape(config.data.organ)}",
        scans=html.escape(config.evaluate.root or f"the {config.evaluate.part} part of the split"),
        table=html.escape(result_table(evaluation.summary)),
        notes=notes,
        gate="on" if config.evaluate.gate else "off",
        curves=_image(figures.curves(read_log(workdir))),
        cases="".join(_figure(name, e, config) for name, e in _chosen(evaluation.examples)),
        truth=figures.TRUTH,
        prediction=figures.PREDICTION,
        box=figures.BOX,
        config=html.escape(json.dumps(json.loads(config.to_json()), indent=1)),
    )
    with whole_file(folder / "report.html") as partial:
        partial.write_text(page)
    return folder / "report.html"


def _chosen(examples: list[Example]) -> list[tuple[str, Example]]:
    """The best, the median and the worst case, each scan once."""
    ranked = sorted((e for e in examples if e.dice is not None), key=lambda e: -e.dice)
    named = {"best": 0, "worst": len(ranked) - 1, "median": len(ranked) // 2} if ranked else {}
    names: dict[int, str] = {}
    for name, place in named.items():
        names.setdefault(place, name)
    return [(names[place], ranked[place]) for place in sorted(names)]


def _figure(name: str, example: Example, config) -> str:
    caption = f"{name}: {html.escape(example.scan)}, Dice {example.dice:.3f}"
    return f"<figure>{_image(_case(example, config))}<figcaption>{caption}</figcaption></figure>"


def _case(example: Example, config) -> Figure:
    return figures.case(
        example.hu,
        example.truth,
        example.predicted,
        example.cam,
        example.box,
        config.input.window,
    )


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
one where either is empty counts as a failure, with Dice 0 and the image's diagonal as HD95. No
distance in mm is given for scans whose file has lost its spacing.</p>
<h2>Learning curves</h2>{curves}
<h2>Cases</h2>
<p>Under the first protocol of the table. Left: <b style="color:{truth}">truth</b> and
<b style="color:{prediction}">prediction</b>. Right: the class activation map and its
<b style="color:{box}">box</b>. The slice that shows most of the organ.</p>
{cases}
<h2>Config</h2><details><summary>every field</summary><pre>{config}</pre></details>
</body></html>
"""
