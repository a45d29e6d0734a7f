"""Whether a checkpoint is whole and of this run: its shapes, its checksums, and what went wrong."""

import contextlib
import functools
import gc
import inspect
import re
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sammix_jax import hosts
from sammix_jax.config_files import differing_fields
from sammix_jax.errors import UserError
from sammix_jax.sharding import abstract, replicated

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


def unsealed(read: Callable[[dict], dict], like: dict, folder) -> dict:
    """What was `sealed`, read again; of several processes by all or by none.

    Args:
      read: takes shapes, dtypes and shardings, with the seal's, and returns the arrays.
      like: of the tree without its seal.
      folder: where it lies, for messages.

    Raises:
      Damaged: it cannot be read, or its checksums are others.
      UserError: it cannot be read for now; or what `read` raised.
    """
    fault = None
    with unfinished_reads_untold():
        try:
            seal = {"seal": jax.eval_shape(checksums, like)}
            seal = abstract(seal, replicated(jax.tree.leaves(like)[0].sharding.mesh))
            restored = read(like | seal)
        except Exception as error:  # Orbax raises this very class, among others
            fault = error
    if hosts.any_process(fault is not None):  # a part that only one of them reads
        passing = hosts.any_process(is_passing(fault))
        if isinstance(fault, UserError):
            raise fault
        told = str(fault).splitlines()[0][:200] if fault else "by another process"
        if passing:
            raise UserError(
                f"{folder}: cannot be read now ({told}); run again when it can, or with more "
                "memory. Nothing was moved or lost."
            ) from fault
        raise Damaged(f"cannot be read ({told})") from fault
    if not np.array_equal(restored.pop("seal"), checksums(restored)):
        raise Damaged("holds other values than were saved")
    return restored


@contextlib.contextmanager
def unfinished_reads_untold():
    """At a fault Orbax leaves the reads of all other arrays as they are. As they are collected,
    Python would tell of each, thousands of lines under which the fault is lost."""
    untold = sys.unraisablehook
    sys.unraisablehook = lambda left: None if inspect.iscoroutine(left.object) else untold(left)
    try:
        yield
        gc.collect()
    finally:
        sys.unraisablehook = untold


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
