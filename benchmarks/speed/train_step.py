"""A training step of SAM-Mix on the CPU: this project beside PyTorch.

    python -m benchmarks.speed.train_step --sides 256 1024 --rounds 3 --repeats 3

Both take one labelled and one unlabelled int16 slice of 256 × 256 and return when the parameters
are updated: window, ResNet-38 on both slices, Grad-CAM, mask and box; SAM's vit_b with LoRA at
`side` on the labelled one; Dice and cross-entropy, gradients, Adam. All is float32 from random
weights, and nothing is recomputed in the backward pass except what this project's attention does by
itself, and more with `--ours jax_dots`, which sets `model.remat=dots`. The PyTorch step is
`torch_sam_mix.py`, from the official modules built for the side; the JAX one is what
`main.py` trains with under configs/lits.py:standard, where SAM's position tables keep their native
size and are resized in every step.

Processes, cores, threads, repeats and the whole peak are as in `encoder.py`. The rise is
counted from what is resident when weights and Adam's moments are loaded, in both: initialising a
state holds more for a moment than the state does.

Needs requirements/parity.txt, for the official package.
"""

from __future__ import annotations

import functools

import numpy as np

from benchmarks.speed.side_by_side import SideBySide, resident_megabytes, run

SIZE = 256  # of the slices, pixels
LABELLED = UNLABELLED = 1


def torch_step(side: int, threads: int):
    """Returns PyTorch's step as a function of a batch, weights and moments loaded."""
    from benchmarks.speed.torch_sam_mix import make_step

    return make_step(side, threads)


def jax_step(
    side: int,
    threads: int,
    dtype: str = "float32",
    quotas: tuple[int, int] = (LABELLED, UNLABELLED),
    remat: str = "none",
):
    """Returns this project's step, as `torch_step` does; XLA sizes its pool by the cores.

    Args:
      dtype: compute type.
      quotas: slices with a mask and without.
      remat: a name in `blocks.POLICIES`.
    """
    import jax

    from configs import lits
    from sammix_jax.sharding import batch_layout, make_mesh, replicated
    from sammix_jax.systems.sam_mix import SamMixSystem
    from sammix_jax.training.optim import make_optimiser
    from sammix_jax.training.step import jit_train_step, make_init

    config = lits.get_config("standard")
    config.model.image_size = side
    config.model.dtype = dtype
    config.model.remat = remat
    config.train.batch_labelled, config.train.batch_unlabelled = quotas
    mesh = make_mesh()
    layout, sharding = batch_layout(config.train, mesh), replicated(mesh)
    system, optimiser = SamMixSystem.of(config), make_optimiser(config.train, steps=1)
    state = jax.jit(make_init(system, optimiser, config), out_shardings=sharding)()
    jax.block_until_ready(state)
    train_step = jit_train_step(system, optimiser, config, layout, mesh, sharding)

    def step(batch):
        nonlocal state
        state, metrics = train_step(state, jax.device_put(batch, sharding))
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step


def make_batch(
    side: int = 0, quotas: tuple[int, int] = (LABELLED, UNLABELLED)
) -> dict[str, np.ndarray]:
    """Noise about soft tissue, with a brighter ellipse and its mask in the labelled slices.

    The slices are of one size, whatever SAM's input is.
    """
    labelled, unlabelled = quotas
    rng = np.random.default_rng(1)
    hu = rng.normal(40, 60, (labelled + unlabelled, SIZE, SIZE))
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    organ = ((x - 0.35) / 0.2) ** 2 + ((y - 0.45) / 0.25) ** 2 < 1
    hu[:labelled, organ] += 80
    return {
        "hu": hu.astype(np.int16),
        "mask": np.repeat(organ[None].astype(np.uint8), labelled, axis=0),
        "image_label": np.array([1] * labelled + [0] * unlabelled, np.int32),
    }


STEPS = SideBySide(
    module="benchmarks.speed.train_step",
    title=f"SAM-Mix training step, vit_b and ResNet-38, batch {LABELLED} + {UNLABELLED}, float32",
    makers={
        "pytorch": torch_step,
        "jax": jax_step,
        "jax_dots": functools.partial(jax_step, remat="dots"),
    },
    make_input=make_batch,
    sides=(256, 1024),
    slices=LABELLED + UNLABELLED,
    loaded=resident_megabytes,
)


if __name__ == "__main__":
    run(STEPS)
