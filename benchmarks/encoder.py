"""SAM's image encoder on the CPU: this project beside the official PyTorch code.

    python -m benchmarks.encoder --sides 256 512 1024 --rounds 3 --repeats 3

Every measurement runs in a process of its own, PyTorch and JAX in turn, on the same cores, with
as many threads as cores, the same glibc arena setting and the same input. Both encoders are vit_b
built for the input's size, with random float32 weights. PyTorch runs in inference mode. A process
loads weights, runs once to warm up (which compiles, in JAX), then takes `repeats` times; the table
gives medians over the rounds.

Memory is the process's peak resident set (ru_maxrss): the whole peak, and its rise above the peak
right after loading the weights, compilation included.

Needs requirements/convert.txt, for the official package.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from unittest import mock

import numpy as np

VARIANT = "vit_b"
ARENAS = "1"  # one malloc arena: with more, both frameworks slow down and keep freed memory


def torch_encoder(side: int, threads: int):
    """Returns the official encoder as a function of (1, side, side, 3) float32, weights loaded."""
    import torch

    # The package imports torchvision for its image transforms; the encoder needs none of it.
    for name in ("", ".ops", ".ops.boxes", ".transforms", ".transforms.functional"):
        sys.modules.setdefault(f"torchvision{name}", mock.MagicMock())
    from segment_anything.modeling import ImageEncoderViT

    from sammix_jax.models.sam import VARIANTS

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    sizes = VARIANTS[VARIANT]
    encoder = ImageEncoderViT(
        img_size=side,
        patch_size=sizes.patch_size,
        embed_dim=sizes.embed_dim,
        depth=sizes.depth,
        num_heads=sizes.num_heads,
        out_chans=sizes.prompt_dim,
        use_rel_pos=True,
        window_size=sizes.window_size,
        global_attn_indexes=sizes.global_blocks,
    ).eval()
    with torch.no_grad():
        for name, leaf in encoder.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                leaf.normal_(std=0.02)

    @torch.inference_mode()
    def encode(images):
        # (B, H, W, C) -> (B, C, H, W)
        return encoder(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))

    return encode


def jax_encoder(side: int, threads: int):
    """Returns this project's encoder, as `torch_encoder` does; XLA sizes its pool by the cores."""
    import dataclasses

    import jax

    from sammix_jax.models.sam import VARIANTS
    from sammix_jax.models.sam.image_encoder import ImageEncoder

    encoder = ImageEncoder(dataclasses.replace(VARIANTS[VARIANT], image_size=side))
    images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), images)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jax.device_put(0.02 * rng.standard_normal(leaf.shape, np.float32)), shapes
    )
    jax.block_until_ready(params)
    apply = jax.jit(encoder.apply)
    return lambda images: jax.block_until_ready(apply(params, images))


ENCODERS = {"pytorch": torch_encoder, "jax": jax_encoder}


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


def measure(framework: str, side: int, threads: int, repeats: int) -> dict:
    """Runs one framework in this process; times in seconds, memory in MiB."""
    encode = ENCODERS[framework](side, threads)
    loaded = peak_megabytes()
    images = np.random.default_rng(1).standard_normal((1, side, side, 3), np.float32)
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        encode(images)
        times.append(time.perf_counter() - start)
    peak = peak_megabytes()
    return {"first": times[0], "times": times[1:], "peak": peak, "rise": peak - loaded}


def measure_apart(framework: str, side: int, threads: int, repeats: int) -> dict:
    """`measure` in a fresh process of this process group."""
    environment = os.environ | {
        "MALLOC_ARENA_MAX": ARENAS,
        "OMP_NUM_THREADS": str(threads),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "benchmarks.encoder", "--one", framework]
    command += ["--sides", str(side), "--threads", str(threads), "--repeats", str(repeats)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def summarise(rounds: list[dict]) -> dict:
    """Medians over rounds; the time's range beside them."""
    times = [t for one in rounds for t in one["times"]]
    medians = {key: statistics.median(one[key] for one in rounds) for key in ("peak", "rise")}
    return medians | {"time": statistics.median(times), "low": min(times), "high": max(times)}


def row(side: int, results: dict[str, list[dict]]) -> str:
    theirs, ours = summarise(results["pytorch"]), summarise(results["jax"])

    def cells(key: str, scale: float, form: str) -> list[str]:
        pair = [format(scale * one[key], form) for one in (theirs, ours)]
        return [*pair, f"{ours[key] / theirs[key]:.2f}"]

    ranges = [f"{one['low']:.3f}–{one['high']:.3f}" for one in (theirs, ours)]
    time_cells = cells("time", 1, ".3f")
    time_cells[:2] = [f"{t} ({r})" for t, r in zip(time_cells[:2], ranges, strict=True)]
    return " | ".join(
        ["", str(side), *time_cells, *cells("rise", 1, ".0f"), *cells("peak", 1, ".0f"), ""]
    ).strip()


HEADER = """\
| side | s PyTorch (range) | s JAX (range) | ratio | rise MiB PyTorch | JAX | ratio \
| peak MiB PyTorch | JAX | ratio |
|---|---|---|---|---|---|---|---|---|---|"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--rounds", type=int, default=3, help="processes for each framework")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs in each process")
    parser.add_argument("--threads", type=int, default=2, help="threads, and cores used")
    parser.add_argument("--one", choices=ENCODERS, help="measure one framework, in this process")
    return parser.parse_args()


def main() -> None:
    flags = parse()
    cores = sorted(os.sched_getaffinity(0))[: flags.threads]
    os.sched_setaffinity(0, cores)
    if flags.one:
        print(json.dumps(measure(flags.one, flags.sides[0], flags.threads, flags.repeats)))
        return
    from importlib import metadata

    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "jax", "jaxlib"))
    print(
        f"{VARIANT} encoder, batch 1, float32; {versions}; {platform.platform()}; "
        f"{len(cores)} cores, {flags.threads} threads; MALLOC_ARENA_MAX={ARENAS}; "
        f"{flags.rounds} processes x {flags.repeats} runs, medians\n\n{HEADER}",
        flush=True,
    )
    for side in flags.sides:
        results = {name: [] for name in ENCODERS}
        for _ in range(flags.rounds):
            for name in ENCODERS:
                results[name].append(measure_apart(name, side, flags.threads, flags.repeats))
        print(row(side, results), flush=True)


if __name__ == "__main__":
    main()
