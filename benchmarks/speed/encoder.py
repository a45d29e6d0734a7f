"""SAM's image encoder on the CPU: this project beside the official PyTorch code.

    python -m benchmarks.speed.encoder --sides 256 512 1024 --rounds 3 --repeats 3

Every measurement runs in a process of its own, PyTorch and JAX in turn, on the same cores, with
as many threads as cores, the same glibc arena setting and the same input. Both encoders are vit_b
built for the input's size, with random float32 weights. PyTorch runs in inference mode. A process
loads weights, runs once to warm up (which compiles, in JAX), then takes `repeats` times; the table
gives medians over the rounds.

Memory is the process's peak resident set (ru_maxrss): the whole peak, and its rise above the peak
right after loading the weights, compilation included.

Needs requirements/parity.txt, for the official package.
"""

from __future__ import annotations

import numpy as np

from benchmarks.speed.side_by_side import SideBySide, run

VARIANT = "vit_b"


def torch_encoder(side: int, threads: int):
    """Returns the official encoder as a function of (1, side, side, 3) float32, weights loaded."""
    import torch

    from benchmarks.speed.torch_sam import random_encoder
    from sammix_jax.models.sam import VARIANTS

    torch.set_num_threads(threads)
    encoder = random_encoder(VARIANTS[VARIANT], side)

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


def make_images(side: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((1, side, side, 3), np.float32)


ENCODERS = SideBySide(
    module="benchmarks.speed.encoder",
    title=f"{VARIANT} encoder, batch 1, float32",
    makers={"pytorch": torch_encoder, "jax": jax_encoder},
    make_input=make_images,
    sides=(256, 512, 1024),
)


if __name__ == "__main__":
    run(ENCODERS)
