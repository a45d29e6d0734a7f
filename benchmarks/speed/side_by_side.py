"""PyTorch and JAX in turn, each measurement in a process of its own on the same cores."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

ARENAS = "1"  # one malloc arena: with more, both frameworks slow down and keep freed memory


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


def resident_megabytes() -> float:
    """What stays resident, where loading itself has peaked higher."""
    gc.collect()
    time.sleep(1)  # XLA frees a program's temporaries a moment after its results are there
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


class SideBySide(NamedTuple):
    """A comparison.

    Attributes:
      module: its name, as in `python -m benchmarks.speed.encoder`.
      title: what runs, at which batch and precision.
      makers: "pytorch", "jax" and other forms of the latter → `make(side, threads)`, which loads
        weights and returns the function to be timed; that one returns when its work is done.
      make_input: side → what both functions are given.
      sides: pixels, by default.
      slices: how many one call takes; 0 leaves slices per second out of the table.
      loaded: MiB above which the peak's rise is counted, asked once all is loaded.
    """

    module: str
    title: str
    makers: dict[str, Callable[[int, int], Callable[[Any], Any]]]
    make_input: Callable[[int], Any]
    sides: tuple[int, ...]
    slices: int = 0
    loaded: Callable[[], float] = peak_megabytes


def measure(made: SideBySide, framework: str, side: int, threads: int, repeats: int) -> dict:
    """Runs one framework in this process; times in seconds, memory in MiB."""
    call = made.makers[framework](side, threads)
    loaded = made.loaded()
    given = made.make_input(side)
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        call(given)
        times.append(time.perf_counter() - start)
    peak = peak_megabytes()
    return {"first": times[0], "times": times[1:], "peak": peak, "rise": peak - loaded}


def measure_apart(module: str, framework: str, side: int, threads: int, repeats: int) -> dict:
    """`measure` in a fresh process of this process group."""
    environment = os.environ | {
        "MALLOC_ARENA_MAX": ARENAS,
        "OMP_NUM_THREADS": str(threads),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", module, "--one", framework]
    command += ["--sides", str(side), "--threads", str(threads), "--repeats", str(repeats)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def summarise(rounds: list[dict]) -> dict:
    """Medians over rounds; the time's range beside them."""
    times = [t for one in rounds for t in one["times"]]
    medians = {key: statistics.median(one[key] for one in rounds) for key in ("peak", "rise")}
    return medians | {"time": statistics.median(times), "low": min(times), "high": max(times)}


def header(slices: int) -> str:
    names = ["side", *(["slices/s PyTorch", "JAX"] if slices else [])]
    unit = "s/step" if slices else "s"
    names += [f"{unit} PyTorch (range)", f"{unit} JAX (range)", "ratio"]
    names += ["rise MiB PyTorch", "JAX", "ratio", "peak MiB PyTorch", "JAX", "ratio"]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def row(side: int, results: dict[str, list[dict]], slices: int) -> str:
    """The line of one side; of `results`, PyTorch's come first."""
    pair = [summarise(rounds) for rounds in results.values()]

    def cells(key: str, form: str) -> list[str]:
        theirs, ours = (one[key] for one in pair)
        return [format(theirs, form), format(ours, form), f"{ours / theirs:.2f}"]

    values = [str(side), *([f"{slices / one['time']:.3f}" for one in pair] if slices else [])]
    *times, ratio = cells("time", ".3f")
    ranges = [f"{one['low']:.3f}–{one['high']:.3f}" for one in pair]
    values += [f"{t} ({r})" for t, r in zip(times, ranges, strict=True)]
    values += [ratio, *cells("rise", ".0f"), *cells("peak", ".0f")]
    return f"| {' | '.join(values)} |"


def run(made: SideBySide) -> None:
    """The command: prints versions, settings and the table."""
    parser = argparse.ArgumentParser(prog=made.module, description=made.title)
    parser.add_argument("--sides", type=int, nargs="+", default=list(made.sides))
    parser.add_argument("--rounds", type=int, default=3, help="processes for each framework")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs in each process")
    parser.add_argument("--threads", type=int, default=2, help="threads, and cores used")
    parser.add_argument("--ours", choices=list(made.makers)[1:], default="jax")
    parser.add_argument("--one", choices=made.makers, help="measure one framework, in this process")
    flags = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: flags.threads]
    os.sched_setaffinity(0, cores)
    if flags.one:
        print(json.dumps(measure(made, flags.one, flags.sides[0], flags.threads, flags.repeats)))
        return
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "jax", "jaxlib"))
    print(
        f"{made.title}; {versions}; {platform.platform()}; "
        f"{len(cores)} cores, {flags.threads} threads; MALLOC_ARENA_MAX={ARENAS}; "
        f"XLA_FLAGS={os.environ.get('XLA_FLAGS', '')!r}; {flags.ours}; "
        f"{flags.rounds} processes x {flags.repeats} runs, medians\n\n{header(made.slices)}",
        flush=True,
    )
    for side in flags.sides:
        results = {name: [] for name in ("pytorch", flags.ours)}
        for _ in range(flags.rounds):
            for name in results:
                one = measure_apart(made.module, name, side, flags.threads, flags.repeats)
                results[name].append(one)
        print(row(side, results, made.slices), flush=True)
