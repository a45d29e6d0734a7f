"""One run of a benchmark on the phantom: trained once, scored in its own domain and in another."""

import logging
import pathlib
import re
import sys
import time

import jax

from benchmarks.accuracy.cells import Row
from sammix_jax import evaluate, prepare, train
from sammix_jax.compilation import cache_compilations
from sammix_jax.config_files import check_workdir
from sammix_jax.config_rules import check_config, check_files
from sammix_jax.data import phantom
from sammix_jax.errors import UserError
from sammix_jax.evaluation import results

DOMAINS = ("portal", "unenhanced")
SECOND_SCANS, SECOND_SEED = 6, 1


def run_rows(planned, config_of, folder: pathlib.Path, write) -> None:
    """Runs rows one after another; ends the program where one cannot be, at best before the first.

    Args:
      planned: (seed, count, variant) of each row; seeds outermost, so that a run that is cut short
        has all rows of the first seed.
      config_of: `(variant, count, seed) -> config`.
      folder: of the benchmark.
      write: called after each row with all that are finished in the folder, to write their tables.
    """
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("sammix_jax").setLevel(logging.INFO)
    cache_compilations()
    planned = list(planned)
    try:
        for seed, count, variant in planned:
            config = config_of(variant, count, seed)
            check_config(config)
            check_files(config)
            check_workdir(config, row_folder(folder, variant, count, seed))
        if folder.is_dir():
            finished_rows(config_of, folder)
        for seed, count, variant in planned:
            begin = time.monotonic()
            run_row(config_of(variant, count, seed), variant, count, seed, folder)
            print(f"{variant} k={count} seed={seed}: {time.monotonic() - begin:.0f} s", flush=True)
            write(finished_rows(config_of, folder))
    except UserError as error:
        sys.exit(f"error: {error}")


def row_folder(folder: pathlib.Path, variant: str, count: int, seed: int) -> pathlib.Path:
    """The workdir of a row."""
    return folder / f"{variant}-k{count}-s{seed}"


def finished_rows(config_of, folder: pathlib.Path) -> list[Row]:
    """All rows in the folder that are trained and scored in both domains, by whichever run.

    Raises:
      UserError: one was made with other settings than `config_of` says.
    """
    names = [re.fullmatch(r"(\w+)-k(\d+)-s(\d+)", path.name) for path in sorted(folder.iterdir())]
    rows = []
    for variant, count, seed in (name.groups() for name in names if name):
        count, seed = int(count), int(seed)
        config, workdir = config_of(variant, count, seed), row_folder(folder, variant, count, seed)
        check_workdir(config, workdir)
        scored = []
        for domain, root in zip(DOMAINS, scored_roots(folder), strict=True):
            config.evaluate.root = root
            if results.saved_results(config, workdir) is not None:
                where = results.results_folder(config, workdir)
                scored.append(Row(variant, count, seed, domain, where))
        if len(scored) == len(DOMAINS):
            rows += scored
    return rows


def scored_roots(folder: pathlib.Path) -> tuple[str, str]:
    """`evaluate.root` of both domains: the split's own test patients, and a folder of others."""
    return "", str(folder / "unenhanced")


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


def run_row(config, variant: str, count: int, seed: int, folder: pathlib.Path) -> None:
    """Trains and scores one row in both domains, as far as that is not done.

    Args:
      config: of `place_row`.
      variant: what differs between rows beside labels and seed.
      folder: of the benchmark; the row's workdir lies in it.

    Raises:
      UserError: the row's folder was made with other settings.
    """
    workdir = row_folder(folder, variant, count, seed)
    # Training checks it too, but a finished row is not trained.
    check_workdir(config, workdir)
    make_portal(config)
    roots = scored_roots(folder)
    phantom.write_lits(roots[1], SECOND_SCANS, SECOND_SEED, phantom.DOMAINS["unenhanced"])
    for root in roots:
        config.evaluate.root = root
        if results.saved_results(config, workdir) is None:
            train.train(config, workdir, prepare.prepare(config, workdir))
            evaluate.evaluate(config, workdir)
            jax.clear_caches()
