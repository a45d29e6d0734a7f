"""Table and figures of the paper's comparison, from the records of its rows."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure

from benchmarks.accuracy import paper_record
from benchmarks.accuracy.cells import Cell, Key, cell_text, cells, in_order
from benchmarks.accuracy.paper_record import Record
from configs.paper import SYSTEMS, get_config
from sammix_jax.errors import UserError
from sammix_jax.evaluation import figures
from sammix_jax.systems.named import make_system
from sammix_jax.systems.system import ORACLES

DIGITS = {"dice": 3, "hd95_mm": 1, "slice_dice": 3, "slice_hausdorff_px": 1}
NAMES = {
    "unet": "U-Net",
    "nnunet": "nnU-Net's form",
    "transunet": "TransU-Net",
    "multimix": "MultiMix",
    "sam_pp_0": "SAM-PP-0",
    "sam_pp": "SAM-PP",
    "samed_lora": "SAMed-style, LoRA",
    "samed": "SAMed-style",
    "labelled_only": "SAM-Mix, labelled slices only",
    "sam_mix_lora": "SAM-Mix, encoder frozen but for LoRA",
    "sam_mix": "SAM-Mix",
    "sam_mix_teacher": "SAM-Mix with a teacher",
    "sam_mix_unprompted": "SAM-Mix, trained without prompts",
    "sam_mix_random": "SAM-Mix, SAM from random weights",
}


@functools.cache
def headline(system: str) -> str:
    """The protocol under which a system stands in the table; the answer goes into `ORACLES`."""
    return make_system(get_config(system)).headline


def paper_cells(records: Mapping[paper_record.Key, Record]) -> dict[Key, Cell]:
    """What the table is made of; systems in the order of `configs.paper.SYSTEMS`.

    Raises:
      UserError: seeds of one cell differ in their steps or in whence SAM began, or two systems
        began from different weights.
    """
    begun_from = {r.sam_weights: system for (system, _, _), r in records.items() if r.sam_weights}
    if len(begun_from) > 1:
        told = ", ".join(f"{system} from {digest}" for digest, system in begun_from.items())
        raise UserError(
            f"rows began from different SAM weights ({told}), so that nobody can compare them; run "
            "those of the older weights again, or remove their lines from the record."
        )
    budgets = {}
    for (system, count, seed), r in records.items():
        first = budgets.setdefault((system, count), (seed, r.steps, r.sam_weights))
        if first[1:] != (r.steps, r.sam_weights):
            raise UserError(
                f"{system}, k={count}: seed {first[0]} has {first[1]} steps from weights "
                f"{first[2]!r}, seed {seed} has {r.steps} from {r.sam_weights!r}; expected the "
                "same of every seed: run one again, or remove its lines from the record."
            )
    return in_order(cells(s for r in records.values() for s in r.scores), SYSTEMS)


def markdown(
    found: dict[Key, Cell], steps: Mapping[tuple[str, int], int], domains: tuple[str, str]
) -> str:
    """The table: a row for each system and number of labels, both domains side by side.

    Args:
      steps: of training, by system and number of labels.
    """
    head = ["system", "k", "steps", "protocol", "seeds"]
    for domain in domains:
        head += [f"{domain}: Dice", "HD95 [mm]", "slice Dice", "slice HD [px]"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for system, count in dict.fromkeys(key[:2] for key in found):
        protocol = headline(system)
        known = [found.get((system, count, domain, protocol, "dice")) for domain in domains]
        seeds = next((str(cell.seeds) for cell in known if cell), "–")
        row = [NAMES[system], str(count), str(steps[system, count]), _marked(protocol), seeds]
        row += [
            cell_text(found.get((system, count, domain, protocol, metric)), digits, interval=False)
            for domain in domains
            for metric, digits in DIGITS.items()
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def plot_labels(found: dict[Key, Cell], domains: tuple[str, str], path: pathlib.Path) -> None:
    """Dice over the number of labels under each system's headline; bars are one std of seeds."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    counts = sorted({key[1] for key in found} - {0})  # what learns from no slice is left out
    systems = [s for s in dict.fromkeys(key[0] for key in found) if s != "sam_pp_0"]
    for axis, domain in zip(figure.subplots(1, len(domains), sharey=True), domains, strict=True):
        for i, system in enumerate(systems):
            known = {
                count: cell
                for count in counts
                if (cell := found.get((system, count, domain, headline(system), "dice")))
            }
            axis.errorbar(
                [count * (1 + 0.03 * (i - len(systems) / 2)) for count in known],
                [cell.mean for cell in known.values()],
                yerr=[cell.std for cell in known.values()],
                marker="o",
                capsize=3,
                color=_colour(system),
                linestyle="--" if headline(system) in ORACLES else "-",
                label=NAMES[system] + (", oracle" if headline(system) in ORACLES else ""),
            )
        axis.set(title=f"phantom, {domain}", xlabel="labelled slices", xscale="log")
        axis.set_xticks(counts, [str(count) for count in counts], minor=False)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("Dice per volume")
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figures.save(figure, path)


def plot_steps(
    curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]], path: pathlib.Path
) -> None:
    """Dice on the validation patients over steps, a line for each run.

    Args:
      curves: system → step and Dice of each of its runs.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for system in sorted(curves, key=list(NAMES).index):
        for j, curve in enumerate(curves[system]):
            label = NAMES[system] if j == 0 else None
            axis.plot(*zip(*curve, strict=True), color=_colour(system), marker=".", label=label)
    axis.set(xlabel="steps", ylabel="Dice, validation patients")
    axis.grid(alpha=0.3)
    axis.legend()
    figures.save(figure, path)


def best_baseline(found: dict[Key, Cell], domain: str, count: int) -> str | None:
    """The system with the highest Dice among those that see the image alone and are no SAM-Mix."""
    known = {
        key[0]: cell.mean
        for key, cell in found.items()
        if key[1:] == (count, domain, "none", "dice") and headline(key[0]) == "none"
    }
    return max(known, key=known.get) if known else None


def _colour(system: str) -> tuple[float, ...]:
    """The same in every figure, whichever systems it shows."""
    return matplotlib.colormaps["tab20"](list(NAMES).index(system))


def _marked(protocol: str) -> str:
    return f"`{protocol}`, oracle" if protocol in ORACLES else f"`{protocol}`"
