"""The report of an evaluation: one self-contained page, and a picture of every case."""

import base64
import html
import io
import json
from collections.abc import Sequence

from matplotlib.figure import Figure

from sammix_jax import hosts
from sammix_jax.data.files import read_json, whole_file
from sammix_jax.data.paths import Path, as_path
from sammix_jax.data.split_files import LABELS, SPLIT
from sammix_jax.data.splits import PARTS
from sammix_jax.evaluation import figures, page
from sammix_jax.evaluation.results import Evaluation, Example, seen_before
from sammix_jax.evaluation.scores import Case
from sammix_jax.evaluation.tables import Rows, paper_rows, text, volume_rows
from sammix_jax.systems.named import make_system
from sammix_jax.systems.system import ORACLES
from sammix_jax.training.log import read_log

PAGE = "report.html"
SYSTEM_NAMES = {
    "sam_mix": "SAM-Mix",
    "unet": "U-Net",
    "nnunet": "nnU-Net's form",
    "multimix": "MultiMix",
    "transunet": "TransU-Net",
    "prompted_sam": "SAM",
}
PROTOCOL_NOTES = {
    "cam": "automatic: nothing but the image goes in (the headline)",
    "gt_box": "oracle: prompted with the box of the true mask, an upper bound",
    "none": "automatic: nothing but the image goes in, and no prompt is made of it",
    "gt_points": "oracle: prompted with points inside the true mask",
}


def write_report(folder, evaluation: Evaluation, config, workdir) -> Path:
    """Writes `report.html` with results, learning curves and cases, and `SCAN.png` for each case.

    Pictures that an earlier evaluation left in the folder are removed.

    Args:
      folder: receives them.
      evaluation: from `evaluate.evaluate`.
      config: the run's config.
      workdir: whose metrics.csv holds the curves.

    Returns:
      The page's path.
    """
    folder = as_path(folder)
    examples = {example.case.scan: example for example in evaluation.examples}
    for picture in folder.glob("*.png"):
        if picture.stem not in examples and hosts.is_first():
            picture.unlink()
    for name, example in examples.items():
        figures.save(_case(example, config), folder / f"{name}.png")
    with whole_file(folder / PAGE) as partial:
        partial.write_text(_page(evaluation, config, as_path(workdir)), encoding="utf-8")
    return folder / PAGE


def _page(evaluation: Evaluation, config, workdir: Path) -> str:
    results = evaluation.results
    first = evaluation.cases[0].protocol
    cam_note = page.CAM_NOTE.format(box=figures.BOX, truth=figures.TRUTH)
    return page.PAGE.format(
        system=SYSTEM_NAMES[config.model.system],
        organ=html.escape(config.data.organ),
        about=html.escape(_about(results)),
        warnings="".join(
            f'<p class="warning">{html.escape(w)}</p>' for w in _warnings(results, config)
        ),
        protocol=first,
        tiles=_tiles(results["summary"][first]),
        volumes=_protocol_table(volume_rows(results)),
        slices=_protocol_table(paper_rows(results)),
        guidance=_table(_guidance_rows(results)),
        strips=_strips(evaluation),
        curves="".join(
            f'<figure class="plot">{_image(figure, title)}<figcaption>{title}</figcaption></figure>'
            for title, figure in figures.curves(read_log(workdir)).items()
        )
        or "<p>The workdir has no learning curves.</p>",
        cases="".join(_figure(name, e, config) for name, e in _chosen(evaluation.examples)),
        every_case=_table(_case_rows(evaluation.cases), kind="scores"),
        gate=_gate(results),
        component=results["evaluate"]["component"],
        prompt_note=page.PROMPT_NOTE if results["prompt"] else "",
        cam_note=cam_note if results["prompt"] else "",
        tolerance=f"{config.evaluate.nsd_tolerance:g}",
        provenance=_table(_provenance(results, workdir)),
        truth=figures.TRUTH,
        prediction=figures.PREDICTION,
        config=html.escape(json.dumps(results["config"], indent=1)),
    )


def _about(results: dict) -> str:
    settings, scans = results["evaluate"], results["scans"]
    source = f"the {settings['part']} part of the split"
    if settings["root"]:
        drawn = f", {settings['scans']} drawn by seed {settings['seed']}"
        source = settings["root"] + (drawn if settings["scans"] else "")
    return f"{len(scans)} scans of {source}; checkpoint of step {results['checkpoint_step']}"


def _warnings(results: dict, config) -> list[str]:
    warnings = seen_before(results)
    if faults := results["faults"]:
        warnings.append(
            f"{len(faults)} of {len(faults) + len(results['scans'])} scans could not be scored and "
            f"are in no number: {' '.join(faults)}"
        )
    headline = make_system(config).headline
    if headline in ORACLES:
        warnings.append(
            f"An oracle: this system was trained to be prompted by the truth, as {headline} does, "
            "so the scores are no measure of automatic segmentation."
        )
    elif headline not in results["summary"]:
        warnings.append(f"The automatic protocol, {headline}, was not scored.")
    return warnings


def _gate(results: dict) -> str:
    if not results["classifier"]:
        return "none, for there is no classifier"
    return "on" if results["evaluate"]["gate"] else "off"


def _tiles(scores: dict) -> str:
    names = {
        "dice": "Dice",
        "nsd": "NSD",
        "hd95_mm": "HD95, mm",
        "assd_mm": "ASSD, mm",
        "failures": "failures",
    }
    return "".join(
        f"<div><b>{text(scores, name, spread=False)}</b><span>{shown}</span></div>"
        for name, shown in names.items()
    )


def _guidance_rows(results: dict) -> Rows:
    classifier, prompt = results["classifier"], results["prompt"]
    negatives = [
        (f"false positives, {protocol}", text(scores, "false_positive_ml"), "mL a scan")
        for protocol, scores in results["summary"].items()
    ]
    rows = [("measure", "value", "over")]
    if classifier:
        names = {"accuracy": "accuracy", "f1": "F1", "auroc": "AUROC"}
        slices = f"{classifier['slices']} slices"
        rows += [(f"classifier {n}", text(classifier, k), slices) for k, n in names.items()]
    if prompt:
        positives = f"{prompt['slices']} slices with the organ"
        rows += [
            ("IoU of CAM box and true box", text(prompt, "box_iou"), positives),
            ("share of empty CAMs", text(prompt, "empty_cams"), positives),
        ]
    return rows + negatives


def _case_rows(cases: Sequence[Case]) -> Rows:
    columns = {
        "scan": ("scan", str),
        "protocol": ("protocol", str),
        "dice": ("Dice", "{:.3f}".format),
        "nsd": ("NSD", "{:.3f}".format),
        "hd95_mm": ("HD95 [mm]", "{:.1f}".format),
        "assd_mm": ("ASSD [mm]", "{:.1f}".format),
        "volume_error": ("vol. error", "{:+.2f}".format),
        "status": ("status", lambda status: status.replace("_", " ")),
    }
    rows = [
        tuple(
            "–" if getattr(case, name) is None else shown(getattr(case, name))
            for name, (_, shown) in columns.items()
        )
        for case in cases
    ]
    return [tuple(title for title, _ in columns.values()), *rows]


def _provenance(results: dict, workdir: Path) -> Rows:
    split = read_json(workdir / SPLIT)
    return [
        ("what", "number", "which"),
        ("scans", str(len(results["scans"])), ", ".join(results["scans"])),
        *((f"{part} scans of the split", str(len(split[part])), "") for part in PARTS),
        ("labelled slices", str(len(read_json(workdir / LABELS))), ""),
        (f"SHA-256 of {SPLIT}", "", results["split_sha256"]),
        (f"SHA-256 of {LABELS}", "", results["labels_sha256"]),
        ("checkpoint's step", str(results["checkpoint_step"]), ""),
    ]


def _strips(evaluation: Evaluation) -> str:
    values = {
        protocol: [
            c.dice for c in evaluation.cases if c.protocol == protocol and c.dice is not None
        ]
        for protocol, scores in evaluation.summary.items()
        if scores["dice"]
    }
    if not values:
        return ""
    means = {protocol: evaluation.summary[protocol]["dice"] for protocol in values}
    image = _image(figures.strips(values, means, "Dice"), "Dice of each scan under each protocol")
    caption = (
        "Each point is a scan, a red cross one with Dice 0; the diamond is the mean, the bar its "
        "95% interval."
    )
    return f'<figure class="plot">{image}<figcaption>{caption}</figcaption></figure>'


def _chosen(examples: list[Example]) -> list[tuple[str, Example]]:
    """The best, the median and the worst case, each scan once."""
    scored = (e for e in examples if e.case.dice is not None)
    ranked = sorted(scored, key=lambda e: -e.case.dice)
    named = {"best": 0, "worst": len(ranked) - 1, "median": len(ranked) // 2} if ranked else {}
    names: dict[int, str] = {}
    for name, place in named.items():
        names.setdefault(place, name)
    return [(names[place], ranked[place]) for place in sorted(names)]


def _figure(name: str, example: Example, config) -> str:
    case = example.case
    distance = "" if case.hd95_mm is None else f", HD95 {case.hd95_mm:.1f} mm"
    scan = html.escape(case.scan)
    caption = f"<b>{name}</b> {scan}, Dice {case.dice:.3f}{distance}; slice {example.slice + 1}"
    image = _image(_case(example, config), f"{scan}, {name} case")
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _case(example: Example, config) -> Figure:
    return figures.case(
        example.hu,
        example.truth,
        example.predicted,
        example.cam,
        example.box,
        example.true_box,
        config.input.window,
    )


def _protocol_table(rows: Rows) -> str:
    return _table(rows, {protocol: PROTOCOL_NOTES[protocol] for protocol, *_ in rows[1:]}, "scores")


def _table(rows: Rows, notes: dict[str, str] | None = None, kind: str = "") -> str:
    """An HTML table; on a narrow screen each cell names its column."""
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    cells = "".join(f'<th scope="col">{title}</th>' for title in head)
    lines = [f"<thead><tr>{cells}</tr></thead>"]
    for first, *others in body:
        note = f"<small>{(notes or {}).get(first, '')}</small>"
        named = zip(head[1:], others, strict=True)
        cells = "".join(f'<td data-column="{title}">{cell}</td>' for title, cell in named)
        lines.append(f'<tr><th scope="row">{first}{note}</th>{cells}</tr>')
    return f'<div class="scroll"><table class="{kind}">' + "".join(lines) + "</table></div>"


def _image(figure: Figure, about: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{about}" src="data:image/png;base64,{data}">'
