"""Whether a checkpoint is whole and of this run: its shapes, its checksums, and what went wrong."""

import functools
import re

import jax
import jax.numpy as jnp

from sammix_jax.config_files import differing_fields

# To which a model gives shapes; its optimiser follows them.
MODEL = ("trainable", "batch_stats", "teacher")

# Codes of TensorStore and XLA that say nothing of a checkpoint: too little memory, or a store that
# does not answer or may not be read.
_PASSING_CODES = re.compile(
    "RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED"
)
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class Damaged(Exception):
    """A checkpoint that lacks a part, or holds other values than were saved."""


def sealed(tree: dict) -> dict:
    """With its checksums. The files' own do not cover the arrays: a flipped bit would go unseen."""
    return tree | {"seal": checksums(tree)}


@jax.jit
def checksums(tree) -> jax.Array:
    """(N,) uint32: the sum of each leaf's bits, which no order and no sharding changes."""

    def checksum(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
        return jnp.sum(bits.astype(jnp.uint32))

    return jnp.stack([checksum(leaf) for leaf in jax.tree.leaves(tree)])


def is_passing(error: BaseException | None) -> bool:
    """Whether the error, or what it came from, is no fault of the checkpoint."""
    while error is not None:
        if isinstance(error, MemoryError) or _PASSING_CODES.search(str(error)):
            return True
        if isinstance(error, OSError) and not isinstance(error, _ABSENT):
            return True
        error = error.__cause__
    return False


def other_shapes(kept: dict, like: dict) -> list[str]:
    """The leaves in which a checkpoint and a run differ: the model's, else the optimiser's."""

    def shapes(tree: dict, parts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path({part: tree.get(part, {}) for part in parts})
        keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
        return {keystr(path): tuple(leaf.shape) for path, leaf in leaves}

    def differing(*parts: str) -> list[str]:
        return differing_fields(shapes(kept, parts), shapes(like, parts))

    return differing(*MODEL) or differing("opt_state")
