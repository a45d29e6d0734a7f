"""The device mesh, and where parameters and batches lie on it.

Both axes of the mesh divide the batch. Along `fsdp`, large parameters and their moments are divided
too, so that between steps each device keeps a part (Rajbhandari et al. 2020, "ZeRO", arXiv
1910.02054), and a step makes them whole where it uses them; along `data` they are repeated.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sammix_jax.errors import UserError

_LOG = logging.getLogger(__name__)

AXES = ("data", "fsdp")
# Smaller leaves are repeated: gathering one costs more than keeping it.
LEAST_DIVIDED = 2**14  # elements


def make_mesh(fsdp: int = 1, devices=None) -> Mesh:
    """All devices as (data, fsdp).

    Args:
      fsdp: devices over which parameters are divided; 1 repeats them on every device.
      devices: to use instead of all that there are.

    Raises:
      UserError: `fsdp` does not divide the number of devices, or they are of several TPU slices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    # A GPU has such an index too: of its machine, and several of those are fine.
    slices = {getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"}
    if len(slices) > 1:
        raise UserError(
            f"the {count} devices are of {len(slices)} TPU slices, expected one: several are not "
            "supported; take a larger slice."
        )
    if count % fsdp:
        raise UserError(
            f"mesh.fsdp={fsdp}: does not divide the {count} devices; choose one of "
            f"{', '.join(str(n) for n in range(1, count + 1) if count % n == 0)}."
        )
    # Along a torus of chips too, whose axes `jax.make_mesh` would not divide.
    arranged = mesh_utils.create_device_mesh(
        (count // fsdp, fsdp), devices, allow_split_physical_axes=True
    )
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def divided(leaf, mesh: Mesh) -> NamedSharding:
    """Along its longest axis that `fsdp` divides; small leaves, and those without one, whole."""
    parts = mesh.shape["fsdp"]
    if parts == 1 or math.prod(leaf.shape) < LEAST_DIVIDED:
        return replicated(mesh)
    for axis in sorted(range(len(leaf.shape)), key=lambda i: -leaf.shape[i]):
        if leaf.shape[axis] % parts == 0:
            return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))
    return replicated(mesh)


def place_whole(value: np.ndarray, sharding) -> jax.Array:
    """An array that every process holds → where `sharding` says.

    Of several processes `device_put` would compare what each of them gives.
    """
    return jax.make_array_from_callback(value.shape, sharding, lambda at: value[at])


def state_sharding(state, mesh: Mesh, shard_frozen: bool):
    """Where each leaf of a training state lies.

    Args:
      state: a `TrainState`, or its shapes. Moments have the shapes of their parameters, and so
        lie where these do; statistics are those of the whole batch, on every device.
      mesh: of the run.
      shard_frozen: whether the frozen parameters are divided as well.
    """
    placed = jax.tree.map(lambda leaf: divided(leaf, mesh), state)
    whole = jax.tree.map(lambda _: replicated(mesh), state)
    placed = placed.replace(batch_stats=whole.batch_stats)
    return placed if shard_frozen else placed.replace(frozen=whole.frozen)


def abstract(tree, sharding):
    """Shapes and dtypes of a tree, placed by `sharding` (one, or a tree)."""
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        sharding,
    )


def abstract_state(init: Callable, mesh: Mesh, shard_frozen: bool):
    """The state that `init` makes as shapes, each of which says where it lies: what a checkpoint is
    restored to, and what a step is compiled for. Nothing is computed."""
    shapes = jax.eval_shape(init)
    return abstract(shapes, state_sharding(shapes, mesh, shard_frozen))


def shardings(tree):
    """Where the leaves of a tree lie."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def on_mesh(mesh: Mesh | None, function: Callable) -> Callable:
    """A function to be jitted, within which `gather` knows of the mesh; as it is without one."""
    if mesh is None:
        return function

    @functools.wraps(function)
    def on_it(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return on_it


def is_divided() -> bool:
    """Whether parameters lie in parts here: within `on_mesh`, where `fsdp` is more than 1."""
    return jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1


def gather(tree):
    """Makes the leaves of a tree whole, and their gradients divided again; see `on_mesh`.

    Otherwise the compiler may carry the division of a weight over to the activations it meets.
    """
    return jax.tree.map(_gather, tree) if is_divided() else tree


@jax.custom_vjp
def _gather(leaf: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(leaf, PartitionSpec())


def _divide(_, cotangent: jax.Array) -> tuple[jax.Array]:
    mesh = jax.sharding.get_abstract_mesh()
    return (jax.lax.with_sharding_constraint(cotangent, divided(cotangent, mesh).spec),)


_gather.defvjp(lambda leaf: (_gather(leaf), None), _divide)


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """How L labelled and U other slices lie on the shards of a step.

    Every shard has its quota of both, and every microbatch of a shard too: the rows of a batch are,
    shard by shard and in it microbatch by microbatch, labelled slices and then others. So no slice
    moves between devices, and which slices a microbatch holds does not depend on the shards.

    Attributes:
      labelled, unlabelled: L and U, of the whole batch.
      shards: G, over how many devices it is divided.
      microbatches: A, in how many parts its gradient is accumulated.
    """

    labelled: int
    unlabelled: int
    shards: int = 1
    microbatches: int = 1

    @property
    def size(self) -> int:
        """B = L + U."""
        return self.labelled + self.unlabelled

    @property
    def microbatch(self) -> "BatchLayout":
        """The layout of one microbatch."""
        parts = self.microbatches
        return BatchLayout(self.labelled // parts, self.unlabelled // parts, self.shards)

    def rows(self, shard: int) -> np.ndarray:
        """(B / G,): what lies on a shard, as numbers of slices, the L labelled ones before the U
        others."""
        parts = self.shards * self.microbatches
        found = []
        for micro in range(self.microbatches):
            part = micro * self.shards + shard
            for begin, count in ((0, self.labelled), (self.labelled, self.unlabelled)):
                quota = count // parts
                found += range(begin + part * quota, begin + (part + 1) * quota)
        return np.array(found, np.int64)

    @property
    def order(self) -> np.ndarray:
        """(B,): `rows` of every shard."""
        return np.concatenate([self.rows(shard) for shard in range(self.shards)])

    def split_microbatches(self, x: jax.Array) -> jax.Array:
        """(B, ...) or (L, ...) → (A, B / A, ...) or (A, L / A, ...)."""
        shape = (self.shards, self.microbatches, -1, *x.shape[1:])
        # (B, ...) → (G, A, b, ...) → (A, G, b, ...) → (A, G · b, ...)
        return x.reshape(shape).swapaxes(0, 1).reshape(self.microbatches, -1, *x.shape[1:])

    def first(self, x: jax.Array) -> jax.Array:
        """(B, ...) → (L, ...), the labelled slices of one microbatch."""
        return first_of_each(x, self.labelled, self.shards)

    def join(self, first: jax.Array, rest: jax.Array) -> jax.Array:
        """(L, ...) and (U, ...) → (B, ...), what `first` and `rest` take apart."""
        parts = [x.reshape(self.shards, -1, *x.shape[1:]) for x in (first, rest)]
        both = jnp.concatenate(parts, axis=1)  # (G, L / G, ...), (G, U / G, ...) → (G, B / G, ...)
        return both.reshape(-1, *first.shape[1:])  # → (B, ...)

    def rest(self, x: jax.Array) -> jax.Array:
        """(B, ...) → (U, ...), the other slices of one microbatch."""
        return _of_each(x, slice(self.labelled // self.shards, None), self.shards)


def first_of_each(x: jax.Array, count: int, shards: int) -> jax.Array:
    """(B, ...) → (count, ...): as many of the first rows of each shard."""
    return _of_each(x, slice(0, count // shards), shards)


def _of_each(x: jax.Array, rows: slice, shards: int) -> jax.Array:
    """(B, ...) → (n, ...): these rows of each shard."""
    grouped = x.reshape(shards, -1, *x.shape[1:])  # (B, ...) → (G, B / G, ...)
    return grouped[:, rows].reshape(-1, *x.shape[1:])  # (G, n / G, ...) → (n, ...)


def batch_layout(train, mesh: Mesh) -> BatchLayout:
    """The layout of a run's batches, over all devices if they divide both quotas.

    Args:
      train: `config.train`.
      mesh: of the run.
    """
    sizes, parts = (train.batch_labelled, train.batch_unlabelled), train.accumulate
    shards = mesh.size
    if any(size % (parts * shards) for size in sizes):
        _LOG.warning(
            "%d labelled and %d other slices in %d part(s) cannot be divided over %d devices, so "
            "each device computes the whole batch; make both multiples of %d to use them all.",
            *(*sizes, parts, shards, parts * shards),
        )
        shards = 1
    return BatchLayout(*sizes, shards, parts)


def along_batch(mesh: Mesh, size: int) -> NamedSharding:
    """The leading axis over all devices; a batch they do not divide is replicated."""
    return replicated(mesh) if size % mesh.size else NamedSharding(mesh, PartitionSpec(AXES))


def filled_batch(mesh: Mesh, size: int) -> int:
    """`size`, or the next larger number that all devices share alike."""
    return math.ceil(size / mesh.size) * mesh.size


def rows_sharding(layout: BatchLayout, mesh: Mesh) -> NamedSharding:
    """Where the rows of a batch lie."""
    return NamedSharding(mesh, PartitionSpec(AXES) if layout.shards > 1 else PartitionSpec())


def place_batch(batches, step: int, layout: BatchLayout, mesh: Mesh) -> dict[str, jax.Array]:
    """Reads this process's share of a batch and puts it on its devices.

    Args:
      batches: `batches(step, rows)`, see `data.batches`.
      step: which batch.
      layout: how it is divided.
      mesh: of the run.

    Returns:
      hu (B, S, S) int16 in the layout's order; mask (L, S, S) uint8; image_label (B,) int32.
    """
    sharding = rows_sharding(layout, mesh)
    indices = sharding.addressable_devices_indices_map((layout.shards,)).values()
    here = sorted({index[0].start or 0 for index in indices})
    host = batches(step, np.concatenate([layout.rows(shard) for shard in here]))

    def place(local: np.ndarray) -> jax.Array:
        rows = len(local) // len(here)

        def on_device(index) -> np.ndarray:
            at = here.index((index[0].start or 0) // rows)
            return local[at * rows : (at + 1) * rows]

        shape = (layout.shards * rows, *local.shape[1:])
        return jax.make_array_from_callback(shape, sharding, on_device)

    return {name: place(array) for name, array in host.items()}
