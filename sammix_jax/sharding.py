"""The device mesh and where arrays lie on it."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh() -> Mesh:
    """All devices along `data`; `fsdp` is there for sharded parameters."""
    return jax.make_mesh(
        (jax.device_count(), 1), ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def along_batch(mesh: Mesh, size: int) -> NamedSharding:
    """The leading axis over all devices; a batch they do not divide is replicated."""
    if size % mesh.size:
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def place_batch(batch: dict, mesh: Mesh) -> dict:
    """Moves a host batch onto the mesh."""
    return {
        name: jax.device_put(array, along_batch(mesh, len(array))) for name, array in batch.items()
    }
