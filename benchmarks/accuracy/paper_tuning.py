"""Each system's learning rate and augmentation, chosen on validation patients.

    python -m benchmarks.accuracy.paper_tuning --systems unet samed --share 0.1

Trains on 50 labelled slices of seed 100, which no row of the comparison uses, baselines for a part
of their budget: with each learning rate, then at the best of them with the augmentation turned
round. Prints the best Dice on the three validation patients; what is best goes into
configs/paper.py. A setting that is trained already is not trained again.
"""

import argparse
import logging
import pathlib
import sys

import jax

from benchmarks.accuracy.paper import row_config
from benchmarks.accuracy.rows import make_portal
from configs import paper
from sammix_jax import prepare, train
from sammix_jax.compilation import cache_compilations
from sammix_jax.errors import UserError
from sammix_jax.training.log import read_log

SEED, COUNT = 100, 50
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
# nnU-Net's form keeps its own: SGD at 1e-2 and its augmentation.
SYSTEMS = [system for system in paper.SYSTEMS if system not in ("sam_pp_0", "nnunet")]
HEADER = "| system | steps | learning rate | augmented | Dice, validation |\n|---|---|---|---|---|"


def score(system: str, rate: float, augment: bool, folder: pathlib.Path, share: float) -> float:
    """The best Dice on validation patients that a run of this setting meets."""
    config = row_config(system, COUNT, SEED, folder, share)
    config.train.learning_rate, config.train.augment = rate, augment
    steps = config.train.steps
    workdir = folder / f"tuning-{system}-{steps}-rate={rate:g}-augment={augment}"
    make_portal(config)
    train.train(config, workdir, prepare.prepare(config, workdir))
    jax.clear_caches()
    found = max(value for _, metric, value in read_log(workdir) if metric == "val/dice")
    print(f"| {system} | {steps} | {rate:g} | {augment} | {found:.3f} |", flush=True)
    return found


def choose(system: str, folder: pathlib.Path, share: float) -> None:
    augment = row_config(system, COUNT, SEED, folder).train.augment
    found = {rate: score(system, rate, augment, folder, share) for rate in RATES}
    score(system, max(found, key=found.get), not augment, folder, share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/paper"))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--share", type=float, default=1 / 3, help="of the baselines' steps")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    cache_compilations()
    print(HEADER, flush=True)
    try:
        for system in args.systems:
            choose(system, args.workdir, args.share)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
