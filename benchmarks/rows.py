"""One run of a benchmark on the phantom: trained once, scored in its own domain and in another."""

import logging
import pathlib
import sys
import time

import jax

from benchmarks.cells import Row
from sammix_jax import evaluate, prepare, results, train
from sammix_jax.compilation import cache_compilations
from sammix_jax.config import check_workdir
from sammix_jax.data import phantom
from sammix_jax.errors import UserError

DOMAINS = ("portal", "unenhanced")
SECOND_SCANS, SECOND_SEED = 6, 1


def run_rows(planned, config_of, folder: pathlib.Path, write) -> None:
    """Runs rows one after another; ends the program where one cannot be.

    Args:
      planned: (seed, count, variant) of each row; seeds outermost, so that a run that is cut short
        has all rows of the first seed.
      config_of: `(variant, count, seed) -> config`.
      folder: of the benchmark.
      write: called with the rows so far after each one, to write their tables.
    """
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("sammix_jax").setLevel(logging.INFO)
    cache_compilations()
    rows = []
    for seed, count, variant in planned:
        begin = time.monotonic()
        try:
            rows += run_row(config_of(variant, count, seed), variant, count, seed, folder)
        except UserError as error:
            sys.exit(f"error: {error}")
        print(f"{variant} k={count} seed={seed}: {time.monotonic() - begin:.0f} s", flush=True)
        write(rows)


def make_portal(config) -> None:
    """Makes the phantoms that all rows train on, as far as they are not there."""
    made = config.data.phantom
    phantom.write_lits(
        config.data.root, made.scans, made.seed, phantom.DOMAINS["portal"], made.unlabelled
    )


def place_row(config, count: int, seed: int, folder: pathlib.Path) -> None:
    """Says in `config` what tells a row: its labels and seed, and data that all rows share."""
    config.data.labelled_slices = count
    config.data.labels_seed = config.seed = seed
    config.data.root = str(folder / "portal")
    config.data.store = str(folder / "store")


def run_row(config, variant: str, count: int, seed: int, folder: pathlib.Path) -> list[Row]:
    """Trains and scores one row, as far as that is not done. Returns it for both domains.

    Args:
      config: of `place_row`.
      variant: what differs between rows beside labels and seed.
      folder: of the benchmark; the row's workdir lies in it.

    Raises:
      UserError: the row's folder was made with other settings.
    """
    workdir = folder / f"{variant}-k{count}-s{seed}"
    # Training checks it too, but a finished row is not trained.
    check_workdir(config, workdir)
    make_portal(config)
    second = folder / "unenhanced"
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
