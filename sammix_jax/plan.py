"""Whether a run fits, told before it: the real steps, compiled ahead of time on shapes alone.

For a TPU no TPU is needed: its compiler, `libtpu`, comes with requirements/tpu.txt.
"""

import contextlib
import dataclasses
import math
import os
import re

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from sammix_jax.errors import UserError
from sammix_jax.flops import count_flops
from sammix_jax.inference import make_predict
from sammix_jax.sharding import (
    abstract_state,
    along_batch,
    batch_layout,
    filled_batch,
    make_mesh,
    rows_sharding,
    shardings,
)
from sammix_jax.systems.named import make_system
from sammix_jax.systems.system import ORACLES
from sammix_jax.training.optim import make_optimiser
from sammix_jax.training.step import jit_train_step, make_init

GIB = 2**30
# GiB that a program may take on each device, as the compiler tells of one that takes more.
CHIPS = {"v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25}
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


@dataclasses.dataclass(frozen=True)
class Target:
    """What to compile for: the devices, real or described, and the memory of each in bytes."""

    name: str
    devices: list
    memory: int


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What one compiled step takes.

    Attributes:
      name: 'train' or 'predict'.
      slices: of one step, over all devices.
      parts: bytes on each device by part: parameters, optimiser, activations and others.
      total: bytes on each device at the peak; infinite where the compiler gave up without a number.
      flops: operations of a step, over all devices.
      collectives: kind → how many the compiled program holds.
    """

    name: str
    slices: int
    parts: dict[str, int]
    total: float
    flops: int
    collectives: dict[str, int]


def find_target(topology: str) -> Target:
    """The devices of a topology.

    Args:
      topology: such as 'v5e:2x4', 'v4:2x2x1', 'v6e:2x4', 'v5p:2x2x1'; 'cpu', 'gpu' or 'tpu' for
        the devices at hand.

    Raises:
      UserError: no such topology, no compiler for it, or no such devices at hand.
    """
    if topology in ("cpu", "gpu", "tpu"):
        try:
            devices = jax.devices(topology)
        except RuntimeError as error:
            raise UserError(
                f"--topology={topology}: no such device at hand ({error}); plan on a machine that "
                f"has one, or for a TPU by its name, as in --topology=v5e:2x4."
            ) from error
        return Target(topology, devices, _memory_at_hand(devices[0]))
    chip = topology.partition(":")[0]
    if chip not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+){1,2}", topology):
        raise UserError(
            f"--topology={topology}: expected cpu, gpu, tpu, or a chip ({', '.join(CHIPS)}) with "
            "its grid, as in v5e:2x4."
        )
    # Off a TPU the library would ask a metadata server which TPU it is on.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # No TPU is used, so nobody else need be kept from it.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = {}
    if chip == "v4":  # whose two cores are one device to JAX
        options["chip_config_name"] = "megacore"
    grid = [int(side) for side in topology.partition(":")[2].split("x")]
    if min(grid[:2]) < 2:  # hosts have 2 x 2 chips, but for such slices
        options["chips_per_host_bounds"] = tuple(grid + [1] * (3 - len(grid)))
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except Exception as error:  # the library's own errors have no common class
        raise UserError(
            f"--topology={topology}: cannot be compiled for ({str(error).splitlines()[0]}); "
            "install requirements/tpu.txt in its own environment, and name a grid that exists."
        ) from error
    return Target(topology, list(described.devices), int(CHIPS[chip] * GIB))


def _memory_at_hand(device) -> int:
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def plan(config, target: Target) -> list[StepPlan]:
    """Compiles the train and the predict step of a config, as a run would.

    Raises:
      UserError: a config that does not go with the devices.
    """
    return [plan_train(config, target), plan_predict(config, target)]


def plan_train(config, target: Target) -> StepPlan:
    """Compiles the train step; see `plan`."""
    mesh = make_mesh(config.mesh.fsdp, target.devices)
    layout = batch_layout(config.train, mesh)
    system, state = _state(config, mesh)
    side = config.data.size
    rows = rows_sharding(layout, mesh)
    batch = {
        "hu": jax.ShapeDtypeStruct((layout.size, side, side), np.int16, sharding=rows),
        "mask": jax.ShapeDtypeStruct((layout.labelled, side, side), np.uint8, sharding=rows),
        "image_label": jax.ShapeDtypeStruct((layout.size,), np.int32, sharding=rows),
    }
    step = jit_train_step(system, _optimiser(config), config, layout, mesh, shardings(state))
    return _step_plan("train", layout.size, step, (state, batch), _parts(state), target)


def plan_predict(config, target: Target) -> StepPlan:
    """Compiles the predict step; see `plan`."""
    mesh = make_mesh(config.mesh.fsdp, target.devices)
    system, state = _state(config, mesh)
    count, side = filled_batch(mesh, config.evaluate.batch), config.data.size
    placed = along_batch(mesh, count)
    hu = jax.ShapeDtypeStruct((count, side, side), np.int16, sharding=placed)
    truth = None
    if system.headline in ORACLES:
        truth = jax.ShapeDtypeStruct(hu.shape, np.bool_, sharding=placed)
    predict = make_predict(system, config, (system.headline,), mesh, gate=True)
    parts = _parts(state)
    parts = {name: parts[name] for name in ("trained parameters", "frozen parameters")}
    return _step_plan("predict", count, predict, (state.variables, hu, truth), parts, target)


def _optimiser(config):
    return make_optimiser(config.train, config.train.steps or 1)


def _state(config, mesh: Mesh):
    """The system and the shapes of its training state."""
    system = make_system(config)
    init = make_init(system, _optimiser(config), config)
    return system, abstract_state(init, mesh, config.mesh.shard_frozen)


def _parts(state) -> dict[str, int]:
    return {
        "trained parameters": _bytes(state.trainable),
        "frozen parameters": _bytes(state.frozen) + _bytes(state.batch_stats),
        "optimiser": _bytes(state.opt_state),
        "teacher": _bytes(state.teacher),
    }


def _bytes(tree) -> int:
    """On each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _step_plan(name: str, slices: int, step, args: tuple, parts: dict, target: Target) -> StepPlan:
    with _no_fused_kernels():
        flops = count_flops(step, *args)
    try:
        on_gpu = target.devices[0].platform == "gpu"
        with contextlib.nullcontext() if on_gpu else _no_fused_kernels():
            compiled = step.lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        # A TPU's compiler knows the chip's memory, and gives up beyond it.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = exhausted_bytes(str(error))
        return StepPlan(name, slices, parts, sum(parts.values()) + needed, flops, {})
    memory = compiled.memory_analysis()
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes  # the new state takes the old one's place
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    working = {
        "activations": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    collectives = count_collectives(compiled.as_text())
    return StepPlan(name, slices, parts | working, total, flops, collectives)


def _no_fused_kernels():
    """On a machine with a GPU, traces as for a CPU: what a GPU's fused kernels compute cannot be
    counted, and a program for a TPU must not hold them."""
    if jax.default_backend() != "gpu":
        return contextlib.nullcontext()
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError as error:
        platforms = os.environ.get("JAX_PLATFORMS")
        raise UserError(
            f"JAX_PLATFORMS={platforms}: --mode=plan counts operations as for a CPU, which that "
            f"leaves out; set JAX_PLATFORMS={platforms},cpu or unset it."
        ) from error


def exhausted_bytes(message: str) -> float:
    """What a compiler that ran out of memory says that it would have needed; infinite without."""
    found = re.search(r"\((\d+(?:\.\d+)?)([KMG])\) exceeds", message)
    return float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[found[2]] if found else math.inf


def count_collectives(program: str) -> dict[str, int]:
    """How many of each kind a compiled program's text holds; a started one counts once."""
    return {
        kind: found
        for kind in COLLECTIVES
        if (found := len(re.findall(rf" {kind}(?:-start)?\(", program)))
    }


def target_line(target: Target) -> str:
    count = len(target.devices)
    return f"{target.name}: {count} device(s) with {target.memory / GIB:.1f} GiB each"


def plan_table(plans: list[StepPlan], target: Target) -> str:
    """The plans for people to read."""
    lines = [target_line(target)]
    for one in plans:
        lines.append(f"\n{one.name} step of {one.slices} slices, on each device")
        lines += [f"  {part:20} {size / GIB:8.3f} GiB" for part, size in one.parts.items() if size]
        verdict = "fits" if one.total <= target.memory else "DOES NOT FIT"
        lines.append(f"  {'total':20} {one.total / GIB:8.3f} GiB   {verdict}")
        listed = ", ".join(f"{count} {kind}" for kind, count in one.collectives.items())
        work = f"{one.flops / 1e12:.3f} TFLOP over all devices"
        lines.append(f"  {work}; collectives: {listed or 'none'}")
    return "\n".join(lines)
