"""Label efficiency on the phantom: `configs/labels.py` over variants, numbers of labels and seeds.

    python -m benchmarks.accuracy.labels --workdir=runs/labels

Trains each row and scores it on the six unseen patients of its own domain (portal phase) and on six
of the second domain (unenhanced, other scanner, other orientation), under the three protocols. All
rows share the scans, the patients of each part and the two test sets; a seed draws the labelled
slices and the initial weights. A row that is done is not done again, so the command may be stopped
and repeated; a row that was made with other settings is refused. WORKDIR receives `labels.md`, the
tables, `labels.csv`, the same numbers, and `labels.png`.

On the CPU, with MALLOC_ARENA_MAX=1 as in the Makefile: 2 to 4 minutes a row.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib

from benchmarks.accuracy.cells import write_cells
from benchmarks.accuracy.label_tables import label_cells, markdown, plot
from benchmarks.accuracy.rows import DOMAINS, place_row, run_rows
from configs import labels
from sammix_jax.systems.sam_mix import SamMixSystem


def row_config(variant: str, count: int, seed: int, folder: pathlib.Path, steps: int = 0):
    """The config of one row, whose data lie below `folder` as those of all rows.

    Raises:
      UserError: no such variant.
    """
    config = labels.get_config(variant)
    place_row(config, count, seed, folder)
    if steps:
        config.train.steps = steps
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/labels"))
    parser.add_argument(
        "--variants", nargs="+", choices=labels.VARIANTS, default=list(labels.VARIANTS)
    )
    parser.add_argument("--counts", nargs="+", type=int, default=[5, 50, 100])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=0, help="0 takes the config's")
    args = parser.parse_args()

    def write(rows) -> None:
        found = label_cells(rows)
        write_cells(found, args.workdir / "labels.csv")
        (args.workdir / "labels.md").write_text(markdown(found, DOMAINS, SamMixSystem.protocols))
        plot(found, DOMAINS, args.workdir / "labels.png")

    run_rows(
        itertools.product(args.seeds, args.counts, args.variants),
        lambda variant, count, seed: row_config(variant, count, seed, args.workdir, args.steps),
        args.workdir,
        write,
    )
    print(f"\n{(args.workdir / 'labels.md').read_text(encoding='utf-8')}")


if __name__ == "__main__":
    main()
