"""One run of a benchmark on the phantom: trained once, scored in its own domain and in another."""

import pathlib

import jax

from benchmarks.cells import Row
from sammix_jax import evaluate, prepare, results, train
from sammix_jax.config import check_workdir
from sammix_jax.data import phantom

DOMAINS = ("portal", "unenhanced")
SECOND_SCANS, SECOND_SEED = 6, 1


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
