"""How fast batches come out of a slice store, with no model behind them.

    python -m benchmarks.speed.input_pipeline --workdir=runs/input_pipeline

Prepares a phantom at 256 × 256 as training would, draws the labelled slices, and takes batches of
1 + 1 and 8 + 8 slices for some seconds, on one thread, as `prefetch` does. The store has just been
written and lies in the page cache: this is what the host's work costs, not the disk. Beside the
rate stand the bytes that travel to the device for each slice: int16 HU, its share of the masks and
the labels.
"""

import argparse
import os
import pathlib
import platform
import statistics
import time

import jax
import numpy as np

from sammix_jax.config import default_config
from sammix_jax.data.batches import Batches
from sammix_jax.data.slices import SliceStore
from sammix_jax.prepare import prepare

SIZES = ((1, 1), (8, 8))  # labelled, unlabelled


def make_store(workdir, scans: int, size: int) -> SliceStore:
    config = default_config()
    config.data.phantom.scans = scans
    config.data.size = size
    return prepare(config, workdir)


def make_batches(store: SliceStore, sizes: tuple[int, int], labelled: int = 50) -> Batches:
    """`labelled` slices that show the organ lend their masks; all others are unlabelled."""
    every = [s for scan in store.records for s in store.slices(scan)]
    positive = [s for s in every if store.image_label(s) == 1]
    chosen = np.random.default_rng(0).permutation(len(positive))[:labelled]
    with_mask = tuple(positive[i] for i in chosen)
    taken = set(with_mask)
    return Batches(store, with_mask, tuple(s for s in every if s not in taken), sizes, seed=0)


def bytes_per_slice(batches: Batches) -> float:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(batches(0))) / sum(batches.sizes)


def slices_per_second(batches: Batches, seconds: float) -> float:
    """Over at least `seconds`, after one pass over the slices that brings all into memory."""
    warm = len(batches.unlabelled) // batches.sizes[1] + 1
    for step in range(warm):
        batches(step)
    begin, steps = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        batches(warm + steps)
        steps += 1
    return steps * sum(batches.sizes) / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, default="runs/input_pipeline")
    parser.add_argument("--scans", type=int, default=6)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each round, at least")
    flags = parser.parse_args()
    store = make_store(flags.workdir, flags.scans, flags.size)
    count = sum(len(record.slices) for record in store.records.values())
    print(
        f"batches from a store of {count} slices of {flags.size} x {flags.size}; numpy "
        f"{np.__version__}; {platform.platform()}; {len(os.sched_getaffinity(0))} cores, 1 thread; "
        f"median of {flags.rounds} rounds of {flags.seconds:g} s\n\n"
        "| batch | slices/s (range) | KB per slice |\n|---|---|---|"
    )
    for sizes in SIZES:
        batches = make_batches(store, sizes)
        rates = [slices_per_second(batches, flags.seconds) for _ in range(flags.rounds)]
        print(
            f"| {sizes[0]} + {sizes[1]} | {statistics.median(rates):.0f} "
            f"({min(rates):.0f}–{max(rates):.0f}) | {bytes_per_slice(batches) / 1000:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
