"""Results as tables: rows of text for a page, lines of text for a terminal."""

from collections.abc import Sequence

Rows = list[tuple[str, ...]]

DIGITS = {
    "dice": 3,
    "nsd": 3,
    "hd95_mm": 1,
    "assd_mm": 1,
    "absolute_volume_error": 2,
    "slice_dice": 3,
    "slice_hausdorff_px": 1,
    "false_positive_ml": 1,
    "accuracy": 3,
    "f1": 3,
    "auroc": 3,
    "box_iou": 3,
    "empty_cams": 3,
}
COUNTS = ("scored", "failures", "not_scored")
PAPER_TITLE = "to compare with the paper: slices with the organ, 256x256 px"


def result_table(results: dict) -> str:
    """Results as lines of text.

    Args:
      results: the content of results.json, or `seeds.over_seeds` of several.
    """
    classifier, prompt = results["classifier"], results["prompt"]
    negatives = ", ".join(f"{p} {text(s, 'false_positive_ml')}" for p, s in _items(results))
    guidance = []
    if classifier:
        guidance.append(
            f"classifier  accuracy {text(classifier, 'accuracy')}, F1 {text(classifier, 'f1')}, "
            f"AUROC {text(classifier, 'auroc')}"
        )
    if prompt:
        found = f"box IoU {text(prompt, 'box_iou')}, empty CAMs {text(prompt, 'empty_cams')}"
        guidance.append(f"prompt      {found}")
    guidance.append(f"false positives on slices without the organ [mL]  {negatives}")
    volumes, slices = _lines(volume_rows(results)), _lines(paper_rows(results))
    return "\n".join([*volumes, "", PAPER_TITLE, *slices, "", *guidance])


def volume_rows(results: dict) -> Rows:
    """A head and a row a protocol: what is scored per volume on the scan's own grid."""
    tolerance = results["evaluate"]["nsd_tolerance"]
    head = ("protocol", "Dice", f"NSD {tolerance:g} mm", "HD95 [mm]", "ASSD [mm]", "vol. error")
    scores = ("nsd", "hd95_mm", "assd_mm", "absolute_volume_error")
    rows = [
        (
            p,
            text(s, "dice", interval=True),
            *(text(s, name) + _of(s, name) for name in scores),
            *(text(s, name) for name in COUNTS),
        )
        for p, s in _items(results)
    ]
    return [(*head, "scored", "failures", "not scored"), *rows]


def paper_rows(results: dict) -> Rows:
    """A head and a row a protocol: what is scored per slice, as the paper does."""
    scores = ("slice_dice", "slice_hausdorff_px")
    rows = [(p, *(text(s, name) + _of(s, name) for name in scores)) for p, s in _items(results)]
    return [("protocol", "slice Dice", "slice HD [px]"), *rows]


def text(scores: dict, name: str, interval: bool = False, spread: bool = True) -> str:
    """One score: mean ± standard deviation [interval] where it is over several, "–" if none."""
    value, counted = scores[name], name in COUNTS
    if value is None:
        return "–"
    if not isinstance(value, dict):
        return f"{value:.{0 if counted else DIGITS[name]}f}"
    digits = 1 if counted else DIGITS[name]  # a count's mean over runs is no whole number
    shown = f"{value['mean']:.{digits}f}"
    if spread and value["count"] > 1:
        shown += f" ± {value['std']:.{digits}f}"
    if interval and value.get("low") is not None:
        shown += f" [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
    return shown


def _of(scores: dict, name: str) -> str:
    """How many scans have this score, where they are fewer than were scored."""
    value, scored = scores[name], scores["scored"]
    if value is None:
        return ""
    scored = scored["mean"] if isinstance(scored, dict) else scored
    scans = value.get("scans", value["count"])  # over runs `count` is of runs
    return f" (of {scans:.3g})" if scans < scored else ""


def _items(results: dict):
    return results["summary"].items()


def _lines(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
