"""What was prepared, as a picture: whether masks lie on the organ, and scans as they should."""

import numpy as np
from matplotlib.figure import Figure

from sammix_jax.data.slices import ScanRecord, SliceId, SliceStore
from sammix_jax.evaluation.figures import PREDICTION, TRUTH, contour, show

MOST, COLUMNS = 12, 4  # scans, and how many stand side by side


def gallery(store: SliceStore, window: tuple[float, float]) -> Figure:
    """A slice of each scan, or of some along the list of them: the one with most of the organ.

    Slices are shown as the networks see them: the patient's right is on the left, where an R stands
    if the file tells of its axes, and the front above.

    Args:
      store: the prepared slices.
      window: HU shown as black and as white.
    """
    records = list(store.records.values())
    chosen = np.unique(
        np.linspace(0, len(records) - 1, min(MOST, len(records))).round().astype(int)
    )
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure((3 * columns, 3.2 * rows), layout="constrained", facecolor="black")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, i in zip(axes, chosen, strict=False):
        _show_scan(axis, store, records[i], window)
    return figure


def _show_scan(axis, store: SliceStore, record: ScanRecord, window: tuple[float, float]) -> None:
    counts = record.organ_pixels
    position = int(np.argmax(counts)) if any(counts) else len(record.slices) // 2
    where = SliceId(record.name, position)
    show(axis, store.hu(where), window)
    told = f"{record.name}, slice {record.slices[position] + 1} of {record.shape[0]}"
    if not record.has_label:
        told += "\nno mask"
    elif not any(counts):
        told += f"\nno {store.params['organ']}"
    elif store.has_mask(where):
        contour(axis, store.mask(where) > 0, TRUTH)
    else:
        told += "\nannotated in part"
    if record.oriented:
        axis.text(0.02, 0.5, "R", color="white", fontsize=9, transform=axis.transAxes)
    else:
        told += "\nknows no orientation"
    colour = "white" if record.oriented and any(counts) else PREDICTION
    axis.set_title(told, color=colour, fontsize=8)
