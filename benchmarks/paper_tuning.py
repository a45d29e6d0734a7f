"""Each system's learning rate and augmentation, chosen on validation patients.

    python -m benchmarks.paper_tuning --systems unet samed

Trains every setting of `GRID` on 50 labelled slices of seed 100, which no row of the comparison
uses, for a part of the budget; prints the best Dice on the three validation patients. What is best
goes into configs/paper.py.
"""

import argparse
import itertools
import logging
import pathlib

from benchmarks.paper import row_config
from benchmarks.rows import make_portal
from configs import paper
from sammix_jax import prepare, train
from sammix_jax.train_log import read_log

SEED, COUNT = 100, 50
RATES = (3e-4, 1e-3, 3e-3)
# What is the system's own is left as it is: SGD's rate and augmentation of nnU-Net's form.
GRID = {"nnunet": {"train.learning_rate": (1e-2,), "train.augment": (True,)}}
HEADER = "| system | learning rate | augmented | Dice, validation |\n|---|---|---|---|"
COMMON = {"train.learning_rate": RATES, "train.augment": (False, True)}


def settings(system: str):
    """Each setting of a system's grid, as a dict of fields."""
    grid = GRID.get(system, COMMON)
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def score(system: str, fields: dict, folder: pathlib.Path, share: float) -> float:
    """The best Dice on validation patients that a run of these fields meets."""
    config = row_config(system, COUNT, SEED, folder, share)
    config.update_from_flattened_dict(fields)
    name = "-".join(f"{field.split('.')[-1]}={value}" for field, value in fields.items())
    workdir = folder / f"tuning-{system}-{name}"
    make_portal(config)
    train.train(config, workdir, prepare.prepare(config, workdir))
    return max(value for _, metric, value in read_log(workdir) if metric == "val/dice")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/paper"))
    systems = [system for system in paper.SYSTEMS if system != "sam_pp_0"]
    parser.add_argument("--systems", nargs="+", choices=systems, default=systems)
    parser.add_argument("--share", type=float, default=1 / 3, help="of each system's steps")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    print(HEADER, flush=True)
    for system in args.systems:
        for fields in settings(system):
            found = score(system, fields, args.workdir, args.share)
            rate, augment = fields["train.learning_rate"], fields["train.augment"]
            print(f"| {system} | {rate:g} | {augment} | {found:.3f} |", flush=True)


if __name__ == "__main__":
    main()
