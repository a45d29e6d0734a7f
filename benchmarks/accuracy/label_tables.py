"""Tables and figure of the label-efficiency benchmark, from each row's evaluation folder."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterable

from matplotlib.figure import Figure

from benchmarks.accuracy.cells import (
    Cell,
    Key,
    Row,
    cell_text,
    cells,
    diagnostic_cells,
    in_order,
    read_scores,
)
from configs.labels import VARIANTS
from sammix_jax.evaluation import figures

METRICS = {"dice": 3, "nsd": 3, "hd95_mm": 1, "assd_mm": 1}  # digits shown
# What guides the segmentation, the same under every protocol: parts of results.json.
DIAGNOSTICS = {"box_iou": "prompt", "empty_cams": "prompt", "auroc": "classifier"}
NAMES = {
    "sam_mix": "SAM-Mix",
    "no_fusion": "without CAM fusion",
    "no_box": "without CAM box",
    "teacher": "with teacher",
}


def label_cells(rows: Iterable[Row]) -> dict[Key, Cell]:
    """What the tables are made of; variants in the order of `configs.labels.VARIANTS`."""
    rows = list(rows)
    found = cells(read_scores(rows, METRICS)) | diagnostic_cells(rows, DIAGNOSTICS)
    return in_order(found, VARIANTS)


def markdown(found: dict[Key, Cell], domains: tuple[str, ...], protocols: tuple[str, ...]) -> str:
    """What the numbers are, then the method under each protocol, its parts, and its guidance."""
    variants = list(dict.fromkeys(key[0] for key in found))
    counts = sorted({key[1] for key in found})
    lines = [
        _legend(found),
        "",
        "| k | domain | protocol | Dice | NSD 2 mm | HD95 [mm] | ASSD [mm] |",
        "|" + "---|" * 7,
    ]
    for k in counts:
        for domain in domains:
            for protocol in protocols:
                scores = (
                    cell_text(found.get(("sam_mix", k, domain, protocol, metric)), digits)
                    for metric, digits in METRICS.items()
                )
                lines.append(f"| {k} | {domain} | `{protocol}` | " + " | ".join(scores) + " |")
    for protocol in protocols:
        head = [f"{domain}, k = {k}" for domain in domains for k in counts]
        lines += ["", f"Dice under `{protocol}`:", "", "| | " + " | ".join(head) + " |"]
        lines.append("|---" * (len(head) + 1) + "|")
        for variant in variants:
            scores = (
                cell_text(found.get((variant, k, domain, protocol, "dice")), 3, interval=False)
                for domain in domains
                for k in counts
            )
            lines.append(f"| {NAMES[variant]} | " + " | ".join(scores) + " |")
    lines += [
        "",
        "Guidance, over the slices of all patients: IoU of the CAM's box with the true one and the "
        "share of empty CAMs, on slices that show the organ (the central box stands in for that of "
        "an empty CAM); the classifier's AUROC on all slices:",
        "",
        "| | domain | k | box IoU | empty CAMs | AUROC |",
        "|" + "---|" * 6,
    ]
    for variant, domain, k in itertools.product(variants, domains, counts):
        values = (cell_text(found.get((variant, k, domain, "", name)), 3) for name in DIAGNOSTICS)
        lines.append(f"| {NAMES[variant]} | {domain} | {k} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def _legend(found: dict[Key, Cell]) -> str:
    scores = [cell for key, cell in found.items() if key[4] in METRICS]
    seeds, patients = (
        _span(getattr(cell, name) for cell in scores) for name in ("seeds", "patients")
    )
    return (
        f"Means; seeds: {seeds}, patients of a domain: {patients}. ± is the standard deviation "
        "between seeds; brackets hold the 95% bootstrap interval over the patients, each taken as "
        "the mean of its seeds. Of so few patients such an interval holds the true mean less often "
        "than it says: of normal values 85% of the time with 5, 90% with 10. Every score names its "
        "protocol: `cam` takes nothing but the image, `gt_box` is prompted by the box of the true "
        "mask, `none` has no prompt."
    )


def _span(numbers: Iterable[int]) -> str:
    known = sorted(set(numbers))
    return str(known[0]) if len(known) == 1 else f"{known[0]} to {known[-1]}"


def plot(found: dict[Key, Cell], domains: tuple[str, ...], path: pathlib.Path) -> None:
    """Dice under `cam` over the number of labels; bars are the standard deviation over seeds."""
    variants = list(dict.fromkeys(key[0] for key in found))
    counts = sorted({key[1] for key in found})
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, domain in zip(figure.subplots(1, len(domains), sharey=True), domains, strict=True):
        for i, variant in enumerate(variants):
            known = [
                (k + 0.01 * k * (i - len(variants) / 2), found[variant, k, domain, "cam", "dice"])
                for k in counts
                if (variant, k, domain, "cam", "dice") in found
            ]
            axis.errorbar(
                [place for place, _ in known],
                [cell.mean for _, cell in known],
                yerr=[cell.std for _, cell in known],
                marker="o",
                capsize=3,
                label=NAMES[variant],
            )
        axis.set(title=f"phantom, {domain}", xlabel="labelled slices", xscale="log")
        axis.set_xticks(counts, [str(k) for k in counts], minor=False)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("Dice per volume, protocol cam")
    figure.axes[0].legend()
    figures.save(figure, path)
