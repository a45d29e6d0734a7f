"""SAM's image encoder and SAM-Mix's training step on one NVIDIA GPU, beside PyTorch, in bfloat16.

    python -m benchmarks.speed.gpu

The encoder is built for its input, weights and images in bfloat16, without gradients. The step is
that of `train_step.py`: parameters and Adam in float32, the networks in bfloat16, in PyTorch by
autocast. PyTorch runs in three forms: the official code as it is; the same with
`scaled_dot_product_attention`; and that compiled by `torch.compile` (of the step, both networks).

Each cell is measured in a process of its own, one after another. A program is called once to
compile and twice to warm up; then, five times over, as many calls as fill 0.3 s are made and the
GPU waited for: medians of the five, with the range. Every step is waited for, for its loss. GiB are
the most that arrays took on the GPU at once.

Needs segment-anything and the builds of torch and JAX for CUDA.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from sammix_jax.models.sam import VARIANTS, SamVariant

FORMS = ("pytorch", "sdpa", "compiled", "jax")
NAMES = {
    "pytorch": "PyTorch",
    "sdpa": "its fused attention",
    "compiled": "and compiled",
    "jax": "JAX",
}
BATCHES = {256: 128, 512: 32, 1024: 8}  # images of the encoder, equally many tokens
QUOTAS = (4, 4)  # slices of a step, with a mask and without
STEP_SIDES = (256, 1024)
MEASURES, SECONDS = 5, 0.3
THREADS = 8  # of the host
# Dense bfloat16, from NVIDIA's data sheets, by the names that devices give themselves. An H100 as a
# PCIe card has less.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def encoder_flops(sizes: SamVariant, side: int) -> int:
    """Operations that one image needs: two for each product of the weights' and of attention.

    Left out are position, elementwise work and the tokens with which windows are padded; keys of a
    padded window count, for they take part in attention.
    """
    grid, c = side // sizes.patch_size, sizes.embed_dim
    n = grid * grid
    total = n * 3 * sizes.patch_size**2 * c
    for i in range(sizes.depth):
        keys = n if i in sizes.global_blocks else sizes.window_size**2
        total += 12 * n * c * c + 2 * n * keys * c
    total += n * sizes.prompt_dim * (c + 9 * sizes.prompt_dim)
    return 2 * total


def torch_encoder(form: str, variant: str, side: int) -> Callable[[], None]:
    """A call of PyTorch's encoder on a batch that lies on the GPU."""
    import torch

    from benchmarks.speed.torch_sam import fuse_attention, random_encoder

    encoder = random_encoder(VARIANTS[variant], side)
    if form != "pytorch":
        fuse_attention(encoder)
    encoder = encoder.to("cuda", torch.bfloat16)
    if form == "compiled":
        encoder.compile()
    images = torch.randn(BATCHES[side], 3, side, side, device="cuda", dtype=torch.bfloat16)

    def call() -> None:
        with torch.inference_mode():
            encoder(images)

    return call


def jax_encoder(variant: str, side: int) -> Callable[[], object]:
    """A call of this project's encoder, as `torch_encoder` makes one."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from sammix_jax.models.sam.image_encoder import ImageEncoder

    sizes = dataclasses.replace(VARIANTS[variant], image_size=side)
    encoder = ImageEncoder(sizes, dtype=jnp.bfloat16)
    images = jax.random.normal(jax.random.key(0), (BATCHES[side], side, side, 3), jnp.bfloat16)
    params = jax.jit(encoder.init)(jax.random.key(1), images[:1])
    rng = np.random.default_rng(0)

    def position_drawn(path, leaf):
        if path[-1].key in ("rel_pos_h", "rel_pos_w", "pos_embed"):
            leaf = 0.02 * rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(leaf, jnp.bfloat16)

    params = jax.tree_util.tree_map_with_path(position_drawn, params)
    apply = jax.jit(encoder.apply)
    return lambda: apply(params, images)


def torch_step(form: str, side: int) -> Callable[[], object]:
    """A training step of PyTorch on a batch that lies in the host's memory."""
    from benchmarks.speed.torch_sam_mix import make_step
    from benchmarks.speed.train_step import make_batch

    step = make_step(side, THREADS, "cuda", fused=form != "pytorch", compiled=form == "compiled")
    batch = make_batch(quotas=QUOTAS)
    return lambda: step(batch)


def jax_step(side: int) -> Callable[[], object]:
    """This project's step, as `torch_step` makes it."""
    from benchmarks.speed.train_step import jax_step, make_batch

    step = jax_step(side, THREADS, dtype="bfloat16", quotas=QUOTAS)
    batch = make_batch(quotas=QUOTAS)
    return lambda: step(batch)


def torch_gpu() -> tuple[Callable, Callable, str]:
    """How to wait for the GPU; the most that arrays took on it, in GiB; and its name."""
    import torch

    torch.backends.cudnn.benchmark = True  # convolutions are chosen by trial, as XLA's are
    return (
        lambda _: torch.cuda.synchronize(),
        lambda: torch.cuda.max_memory_allocated() / 2**30,
        torch.cuda.get_device_name(),
    )


def jax_gpu() -> tuple[Callable, Callable, str]:
    """As `torch_gpu`."""
    import jax

    device = jax.devices("gpu")[0]
    return (
        jax.block_until_ready,
        lambda: device.memory_stats()["peak_bytes_in_use"] / 2**30,
        device.device_kind,
    )


def timed(call: Callable, wait: Callable) -> dict:
    """Seconds of one call, compiled and warm."""
    for _ in range(3):
        begin = time.perf_counter()
        wait(call())
    repeats = max(1, round(SECONDS / (time.perf_counter() - begin)))
    times = []
    for _ in range(MEASURES):
        begin = time.perf_counter()
        for _ in range(repeats):
            result = call()
        wait(result)
        times.append((time.perf_counter() - begin) / repeats)
    return {"time": statistics.median(times), "low": min(times), "high": max(times)}


def measure(form: str, what: str, side: int) -> dict:
    """One cell, in this process.

    Args:
      form: one of FORMS.
      what: the variant of an encoder, or "step".
      side: of SAM's input, pixels.
    """
    wait, peak, device = jax_gpu() if form == "jax" else torch_gpu()
    if what == "step":
        call = jax_step(side) if form == "jax" else torch_step(form, side)
    else:
        call = jax_encoder(what, side) if form == "jax" else torch_encoder(form, what, side)
    return timed(call, wait) | {"peak": peak(), "device": device}


def measure_apart(form: str, what: str, side: int) -> dict | None:
    """`measure` in a fresh process; None where it fails, and the error is shown."""
    command = [sys.executable, "-m", "benchmarks.speed.gpu", "--one", form, what, str(side)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{form} {what} {side} failed:\n{done.stderr[-2000:]}", file=sys.stderr, flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def measure_forms(forms: list[str], what: str, side: int) -> dict[str, dict]:
    """The cells of a row, of the forms that did not fail."""
    found = {form: measure_apart(form, what, side) for form in forms}
    return {form: cell for form, cell in found.items() if cell}


def encoder_row(variant: str, side: int, cells: dict[str, dict]) -> str:
    batch, ours = BATCHES[side], cells.get("jax")
    times = _of_each(cells, lambda cell: _milliseconds(cell, batch, 3))
    rate = share = "–"
    if ours:
        flops = encoder_flops(VARIANTS[variant], side) * batch / ours["time"]
        rate = f"{flops / 1e12:.0f}"
        peak = PEAKS.get(ours["device"])
        share = f"{flops / peak:.0%}" if peak else "–"
    return _line(variant, side, batch, *times, *_ratios(cells), rate, share)


def step_row(side: int, cells: dict[str, dict]) -> str:
    times = _of_each(cells, lambda cell: _milliseconds(cell, 1, 1))
    peaks = _of_each(cells, lambda cell: f"{cell['peak']:.1f}")
    return _line(side, f"{QUOTAS[0]} + {QUOTAS[1]}", *times, *_ratios(cells), *peaks)


def _milliseconds(cell: dict, images: int, digits: int) -> str:
    """Of one image of a batch: the median and the range."""
    time, low, high = (f"{cell[key] / images * 1e3:.{digits}f}" for key in ("time", "low", "high"))
    return f"{time} ({low}–{high})"


def _of_each(cells: dict[str, dict], text: Callable[[dict], str]) -> list[str]:
    return [text(cells[form]) if form in cells else "–" for form in FORMS]


def _ratios(cells: dict[str, dict]) -> list[str]:
    """How many times as fast JAX is as the official code, and as the fastest of PyTorch's forms."""
    theirs = {form: cell["time"] for form, cell in cells.items() if form != "jax"}
    if "jax" not in cells or "pytorch" not in theirs:
        return ["–", "–"]
    ours = cells["jax"]["time"]
    return [f"{theirs['pytorch'] / ours:.2f}", f"{min(theirs.values()) / ours:.2f}"]


def _line(*values) -> str:
    return f"| {' | '.join(map(str, values))} |"


def _header(*names: str) -> str:
    return f"\n{_line(*names)}\n|{'---|' * len(names)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="*", default=["vit_b"], choices=VARIANTS)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--sides", type=int, nargs="+", default=list(BATCHES), choices=BATCHES)
    parser.add_argument("--step_sides", type=int, nargs="*", default=list(STEP_SIDES))
    parser.add_argument("--one", nargs=3, help="form, 'step' or variant, side: in this process")
    flags = parser.parse_args()
    if flags.one:
        form, what, side = flags.one
        print(json.dumps(measure(form, what, int(side))))
        return
    ratios = ("× official", "× fastest")
    names = [f"{NAMES[form]}, ms" for form in FORMS]
    print(_header("encoder", "side", "batch", *names, *ratios, "TFLOP/s", "of peak"), flush=True)
    for variant, side in itertools.product(flags.variants, flags.sides):
        cells = measure_forms(flags.forms, variant, side)
        print(encoder_row(variant, side, cells), flush=True)
    names = [f"{NAMES[form]}, ms" for form in FORMS]
    peaks = [f"{NAMES[form]}, GiB" for form in FORMS]
    print(_header("step", "batch", *names, *ratios, *peaks), flush=True)
    for side in flags.step_sides:
        print(step_row(side, measure_forms(flags.forms, "step", side)), flush=True)


if __name__ == "__main__":
    main()
