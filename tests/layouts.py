"""Ten training steps in every layout: `python tests/layouts.py OUT.npz`, in processes of their own.

On eight forced host devices, or on the four of two processes. Writes the loss of each step and the
parameters and statistics after the last, by layout; of two layouts also what they predict.
"""

import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import conftest  # noqa: F401 — before JAX, which reads its settings
import jax
import numpy as np
import optax
from conftest import small_config
from jax.sharding import Mesh

from sammix_jax import hosts, sharding
from sammix_jax.inference import make_predict, predict_slices
from sammix_jax.sharding import (
    BatchLayout,
    abstract_state,
    batch_layout,
    make_mesh,
    place_batch,
    shardings,
)
from sammix_jax.systems.sam_mix import SamMixSystem
from sammix_jax.training.checkpoint import Checkpoints
from sammix_jax.training.step import TrainState, jit_train_step, make_init

STEPS = 10
LEARNING_RATE = 0.002
# (devices, fsdp, accumulate)
LAYOUTS = {
    8: [(1, 1, 1), (2, 1, 1), (8, 1, 1), (8, 8, 1), (1, 1, 2), (8, 2, 2)],
    4: [(4, 2, 1)],
}
RESUMED = ((1, 1, 1), (8, 8, 1))
PREDICTING = ((1, 1, 1), (8, 8, 1))
BEGINNING = ((4, 2, 1),)
# So that fsdp divides SAM's matrices too, small as they are here.
sharding.LEAST_DIVIDED = 2**9


def config_of_layouts():
    """Everything a step may hold: augmentation, boxes, fusion, trained whole, labels unknown."""
    config = small_config()
    config.train.batch_labelled, config.train.batch_unlabelled = 16, 16
    config.loss.bce = 1.0
    # A CAM of 64 x 64 always has a pixel within rounding of the threshold, which then falls to
    # either side: with the binary mask, layouts would differ by what one such pixel adds.
    config.cam.soft = True
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


class Layout(NamedTuple):
    """What a layout compiles, and where its state lies."""

    system: SamMixSystem
    mesh: Mesh
    batches: BatchLayout
    shapes: TrainState
    init: Callable
    step: Callable

    def place(self, state: TrainState) -> TrainState:
        """A state of host arrays, where this layout has it."""
        return jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), state, self.shapes)


def build(devices: int, fsdp: int, accumulate: int) -> Layout:
    config = config_of_layouts()
    config.train.accumulate = accumulate
    mesh = make_mesh(fsdp, jax.devices()[:devices])
    layout = batch_layout(config.train, mesh)
    assert layout.shards == devices
    system = SamMixSystem.of(config)
    # Adam divides by a gradient's own size. Where it is zero but for rounding, as of the biases of
    # keys, it would step by that rounding's sign at full length.
    optimiser = optax.sgd(LEARNING_RATE)
    init = make_init(system, optimiser, config)
    shapes = abstract_state(init, mesh, shard_frozen=True)
    placed = shardings(shapes)
    divided = {path for path, leaf in placed.trainable.items() if leaf.spec}
    assert any(path.startswith("sam/image_encoder/") for path in divided) == (fsdp > 1)
    step = jit_train_step(system, optimiser, config, layout, mesh, placed)
    step = step.lower(shapes, place_batch(batches, 0, layout, mesh)).compile()
    return Layout(system, mesh, layout, shapes, jax.jit(init, out_shardings=placed), step)


def take(layout: Layout, state: TrainState, start: int, stop: int):
    """Takes steps; returns the state and the losses."""
    losses = []
    for i in range(start, stop):
        batch = place_batch(batches, i, layout.batches, layout.mesh)
        with jax.transfer_guard("disallow"):
            state, metrics = layout.step(state, batch)
            losses.append(jax.device_get(metrics["loss"]))
    return state, losses


def listed(name: str, losses: list, state: TrainState) -> dict[str, np.ndarray]:
    whole = hosts.to_host({"params": state.trainable, "stats": state.batch_stats})
    leaves = {
        f"{name}:{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(whole)
    }
    return {f"{name}:loss": np.array(losses), **leaves}


def predicted(layout: Layout, state: TrainState) -> dict[str, np.ndarray]:
    """By the true box: that of a CAM may fall to either side of a pixel."""
    system, batch = layout.system, batches(0, range(16))
    predict = make_predict(system, system.config, ("gt_box",), layout.mesh)
    found = predict_slices(predict, state.variables, batch["hu"], batch["mask"] > 0, batch=16)
    return {"logits": found.logits["gt_box"], "organ": found.organ_probability}


def resumed(begun: TrainState, before: Layout, after: Layout) -> dict[str, np.ndarray]:
    """Half of the steps in one layout, the others from its checkpoint in another."""
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        state, first = take(before, before.place(begun), 0, STEPS // 2)
        checkpoints.save_frozen(state)
        checkpoints.save(state, STEPS // 2)
        checkpoints.wait()
        state, second = take(after, checkpoints.restore(after.shapes), STEPS // 2, STEPS)
    return listed("resumed", first + second, state)


def main(out: str) -> None:
    hosts.join()
    built = {layout: build(*layout) for layout in LAYOUTS[jax.device_count()]}
    hosts.wait_for_all("compiled")  # at its first collective one waits 30 seconds for the others
    results = {}
    begun = hosts.to_host(next(iter(built.values())).init())
    for layout, program in built.items():
        # Compiling how to begin takes as long as ten steps: on one device, and on two processes'.
        state = program.init() if layout in BEGINNING else program.place(begun)
        state, losses = take(program, state, 0, STEPS)
        name = "-".join(map(str, layout))
        results |= listed(name, losses, state)
        if layout in PREDICTING:
            found = predicted(program, program.place(begun))
            results |= {f"{name}:predicted {kind}": array for kind, array in found.items()}
    if RESUMED[0] in built:
        results |= resumed(begun, *(built[layout] for layout in RESUMED))
    if hosts.is_first():
        np.savez(out, **results)


if __name__ == "__main__":
    main(sys.argv[1])
