"""Label efficiency on the phantom: `configs/labels.py` over variants, numbers of labels and seeds.

    python -m benchmarks.labels --workdir=runs/labels

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
import logging
import os
import pathlib
import sys
import time

import jax

from benchmarks.label_tables import Row, cells, markdown, plot, write_csv
from configs import labels
from sammix_jax import evaluate, prepare, results, train
from sammix_jax.config import check_workdir
from sammix_jax.data import phantom
from sammix_jax.errors import UserError
from sammix_jax.systems.system import PROTOCOLS

DOMAINS = ("portal", "unenhanced")
SECOND_SCANS, SECOND_SEED = 6, 1


def row_config(variant: str, count: int, seed: int, folder: pathlib.Path, steps: int = 0):
    """The config of one row, whose data lie below `folder` as those of all rows.

    Raises:
      UserError: no such variant.
    """
    config = labels.get_config(variant)
    config.data.labelled_slices = count
    config.data.labels_seed = config.seed = seed
    config.data.root = str(folder / "portal")
    config.data.store = str(folder / "store")
    if steps:
        config.train.steps = steps
    return config


def run_row(variant: str, count: int, seed: int, folder: pathlib.Path, steps: int) -> list[Row]:
    """Trains and scores one row, as far as that is not done. Returns it for both domains.

    Raises:
      UserError: no such variant, or the row's folder was made with other settings.
    """
    config = row_config(variant, count, seed, folder, steps)
    workdir = folder / f"{variant}-k{count}-s{seed}"
    # Training checks it too, but a finished row is not trained.
    check_workdir(config, workdir)
    made, second = config.data.phantom, folder / "unenhanced"
    phantom.write_lits(
        config.data.root, made.scans, made.seed, phantom.DOMAINS["portal"], made.unlabelled
    )
    phantom.write_lits(second, SECOND_SCANS, SECOND_SEED, phantom.DOMAINS["unenhanced"])
    rows = []
    for domain, root in zip(DOMAINS, ("", str(second)), strict=True):
        config.evaluate.root = root
        if results.saved_results(config, workdir) is None:
            train.train(config, workdir, prepare.prepare(config, workdir))
            evaluate.evaluate(config, workdir)
            jax.clear_caches()
        rows.append(Row(variant, count, seed, domain, results.results_folder(config, workdir)))
    return rows


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
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("sammix_jax").setLevel(logging.INFO)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = pathlib.Path.home() / ".cache" / "sammix_jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))

    rows = []
    # Seeds outermost: what is cut short has all rows of the first seed.
    for seed, count, variant in itertools.product(args.seeds, args.counts, args.variants):
        begin = time.monotonic()
        try:
            rows += run_row(variant, count, seed, args.workdir, args.steps)
        except UserError as error:
            sys.exit(f"error: {error}")
        print(f"{variant} k={count} seed={seed}: {time.monotonic() - begin:.0f} s", flush=True)
        found = cells(rows)
        write_csv(found, args.workdir / "labels.csv")
        (args.workdir / "labels.md").write_text(markdown(found, DOMAINS, PROTOCOLS))
        plot(found, DOMAINS, args.workdir / "labels.png")
    print(f"\n{(args.workdir / 'labels.md').read_text()}")


if __name__ == "__main__":
    main()
