"""The paper's comparison on the phantom: systems × labelled slices × seeds × two domains.

    make bench-paper
    make bench-paper ARGS="--seeds 0 --counts 50 --systems unet samed sam_mix sam_mix_random"

Each row is a workdir below --workdir; a finished one is taken as it is, one that was stopped goes
on, so that the rows may be split over several runs or machines that share the folder. After each
row, scores.csv and curves.csv in --record hold what the rows of both folders have (of a row that is
in both, the workdir's), and paper.md, paper.csv, paper.png and steps.png there are made from them.
"""

import argparse
import itertools
import pathlib
import sys
from collections.abc import Mapping

from benchmarks.accuracy.cells import write_cells
from benchmarks.accuracy.paper_record import Key, Record, read_records, records_of, write_records
from benchmarks.accuracy.paper_tables import (
    best_baseline,
    markdown,
    paper_cells,
    plot_labels,
    plot_steps,
)
from benchmarks.accuracy.rows import DOMAINS, place_row, run_rows
from configs import paper
from sammix_jax.errors import UserError

# SAM-PP-0 learns from nothing: one row of it serves all.
UNTRAINED = "sam_pp_0"
SHOWN_COUNT = 50  # whose learning curves are drawn
SHARED = (("train", "steps"), ("train", "warmup_steps"), ("log", "validate_every_steps"))


def row_config(system: str, count: int, seed: int, folder: pathlib.Path, share: float = 1.0):
    """The config of one row.

    Args:
      share: of a baseline's steps, validated as many times; SAM-Mix's budget is a tenth already.

    Raises:
      UserError: no such system.
    """
    config = paper.get_config(system)
    # A run wants a labelled slice even where none is learned from.
    place_row(config, 1 if system == UNTRAINED else count, seed, folder)
    if system in paper.BASELINES:
        for part, field in SHARED:
            if config[part][field]:
                config[part][field] = max(1, round(config[part][field] * share))
    return config


def planned(systems, counts, seeds):
    """(seed, count, system) of every row."""
    for seed, count, system in itertools.product(seeds, counts, systems):
        if system != UNTRAINED:
            yield seed, count, system
        elif (seed, count) == (seeds[0], counts[0]):
            yield 0, 0, system


def check_budgets(rows, config_of, records: Mapping[Key, Record]) -> None:
    """Rows of another budget than the record's would be refused once they are trained.

    Args:
      rows: (seed, count, system) of those to come.
      config_of: `(system, count, seed) -> config`.
      records: what is kept.

    Raises:
      UserError: a row's steps are not those of its system and number of labels in the record.
    """
    kept = {(system, count): record.steps for (system, count, _), record in records.items()}
    for seed, count, system in rows:
        steps = config_of(system, count, seed).train.steps
        if kept.get((system, count), steps) != steps:
            raise UserError(
                f"{system}, k={count}: {steps} steps, where the record has "
                f"{kept[system, count]}; say the record's --share, or another --record."
            )


def write_tables(records: dict[Key, Record], folder: pathlib.Path) -> str:
    """Writes the table and figures of these records; returns the table."""
    found = paper_cells(records)
    write_cells(found, folder / "paper.csv")
    steps = {(system, count): r.steps for (system, count, _), r in records.items()}
    table = markdown(found, steps, DOMAINS)
    (folder / "paper.md").write_text(table, encoding="utf-8")
    plot_labels(found, DOMAINS, folder / "paper.png")
    best = best_baseline(found, DOMAINS[0], SHOWN_COUNT)
    curves: dict[str, list] = {}
    for (system, count, _), record in sorted(records.items()):
        if system in ("sam_mix", best) and count == SHOWN_COUNT:
            curves.setdefault(system, []).append(record.curve)
    if curves:
        plot_steps(curves, folder / "steps.png")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/paper"))
    parser.add_argument("--systems", nargs="+", choices=paper.SYSTEMS, default=list(paper.SYSTEMS))
    parser.add_argument("--counts", nargs="+", type=int, default=[5, 50, 100])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=1.0, help="of the baselines' steps")
    parser.add_argument("--record", type=pathlib.Path, help="default: the workdir")
    args = parser.parse_args()
    kept = args.record or args.workdir

    def config_of(system: str, count: int, seed: int):
        return row_config(system, count, seed, args.workdir, args.share)

    def write(rows) -> None:
        records = read_records(kept) | records_of(rows, config_of)
        write_tables(records, kept)  # refuses rows that do not go together, which are not kept then
        write_records(kept, records)

    rows = list(planned(args.systems, args.counts, args.seeds))
    try:
        check_budgets(rows, config_of, read_records(kept))
    except UserError as error:
        sys.exit(f"error: {error}")
    run_rows(rows, config_of, args.workdir, write)
    print(f"\n{(kept / 'paper.md').read_text(encoding='utf-8')}")


if __name__ == "__main__":
    main()
