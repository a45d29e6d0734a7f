"""Ten training steps in every layout: `python tests/layouts.py OUT.npz`, a process of its own.

On eight forced host devices, or with JAX_COORDINATOR_ADDRESS on as many as the processes have
together. Writes the loss of each step and the state after the last, by layout.
"""

import sys

import conftest  # noqa: F401 — before JAX, which reads its settings
import jax
import numpy as np
from conftest import small_config
from sam_cases import TINY

from sammix_jax import hosts
from sammix_jax.optim import make_optimiser
from sammix_jax.sam_mix import sam_mix
from sammix_jax.sharding import (
    batch_layout,
    make_mesh,
    place_batch,
    replicated,
    state_sharding,
)
from sammix_jax.train_step import make_init, make_train_step

STEPS = 10
# (devices, fsdp, accumulate)
LAYOUTS = [
    *((1, 1, 1), (2, 1, 1), (2, 2, 1), (8, 1, 1), (8, 8, 1), (8, 2, 1)),
    *((1, 1, 2), (2, 1, 2), (8, 2, 2)),
]


def config_of_layouts():
    """Everything a step may hold: augmentation, boxes, fusion, trained whole, labels unknown."""
    config = small_config()
    config.train.batch_labelled, config.train.batch_unlabelled = 16, 16
    config.train.schedule, config.train.warmup_steps = "constant", 0
    config.train.learning_rate = 1e-4
    config.loss.bce = 1.0
    return config


def batches(step: int, rows) -> dict[str, np.ndarray]:
    """Noise with a bright square on the slices that show the organ."""
    rng = np.random.default_rng(step)
    hu = rng.normal(0, 60, (32, 64, 64)).astype(np.int16)
    label = rng.integers(-1, 2, 32).astype(np.int32)
    label[:16] = 1
    mask = np.zeros((32, 64, 64), np.uint8)
    for i in np.flatnonzero(label == 1):
        y, x = rng.integers(8, 30, 2)
        mask[i, y : y + 24, x : x + 18] = 1
    hu += 120 * mask.astype(np.int16)
    rows = np.asarray(rows)
    return {"hu": hu[rows], "mask": mask[rows[rows < 16]], "image_label": label[rows]}


def run(devices: int, fsdp: int, accumulate: int) -> dict[str, np.ndarray]:
    config = config_of_layouts()
    config.train.accumulate = accumulate
    mesh = make_mesh(fsdp, jax.devices()[:devices])
    layout = batch_layout(config.train, mesh)
    assert layout.shards == devices
    model = sam_mix(config).clone(sam_variant=TINY)
    optimiser = make_optimiser(config.train, STEPS)
    init = make_init(model, optimiser, config)
    sharding = state_sharding(jax.eval_shape(init), mesh, shard_frozen=True)
    state = jax.jit(init, out_shardings=sharding)()
    step = jax.jit(
        make_train_step(model, optimiser, config, layout, unroll=True),
        out_shardings=(sharding, replicated(mesh)),
        donate_argnums=0,
    )
    losses = []
    for i in range(STEPS):
        batch = place_batch(batches, i, layout, mesh)
        with jax.transfer_guard("disallow"):
            state, metrics = step(state, batch)
            losses.append(jax.device_get(metrics["loss"]))
    whole = hosts.to_host({"params": state.trainable, "stats": state.batch_stats})
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(whole)
    }
    return {"loss": np.array(losses), **found}


def main(out: str) -> None:
    hosts.join()
    count = jax.device_count()
    layouts = LAYOUTS if count == 8 else [(count, fsdp, a) for fsdp in (1, 2) for a in (1, 2)]
    results = {}
    for layout in layouts:
        name = "-".join(map(str, layout))
        results |= {f"{name}:{key}": value for key, value in run(*layout).items()}
    if hosts.is_first():
        np.savez(out, **results)


if __name__ == "__main__":
    main(sys.argv[1])
