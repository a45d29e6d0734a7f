"""Blocks of a deep network: what a device holds of each, and what its backward pass computes again.

Memory for time, twice. With `remat` activations within a block are computed again instead of kept;
and weights that lie in parts (`mesh.fsdp`) are made whole block by block, so that with `remat` no
device ever holds those of all blocks.
"""

import re

import flax.linen as nn
import jax

from sammix_jax.sharding import gather, is_divided

# none    every activation is kept
# dots    products with weight matrices are kept; attention, convolutions and all else are not
# blocks  only what goes into each block is kept
POLICIES = ("none", "dots", "blocks")
COMPUTE_DTYPES = ("float32", "bfloat16")
# The names of what is made from `block_class`.
_NAME = re.compile(r"(block|b\d|layer\d)_\d+")


def block_class(block: type[nn.Module], policy: str, static_argnums: tuple[int, ...] = ()):
    """The class of a block that gathers its own weights, under a policy.

    Its modules are to be named so that `gather_outside_blocks` knows them.

    Args:
      block: a module's class.
      policy: one of `POLICIES`.
      static_argnums: arguments of its call that are no arrays; 0 is the module itself.

    Raises:
      ValueError: another policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"remat={policy!r}: expected one of {POLICIES}.")
    if is_divided():
        # Within what is computed again, so that weights are gathered anew for the backward pass.
        block = nn.map_variables(block, "params", trans_in_fn=gather)
    if policy == "none":
        return block
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    return nn.remat(block, policy=keep, static_argnums=static_argnums)


def gather_outside_blocks(variables: dict) -> dict:
    """Makes a model's parameters whole, but for those of blocks, which gather their own.

    Args:
      variables: "params", and collections that are whole already.
    """

    def whole(path, leaf):
        return leaf if any(_NAME.fullmatch(part.key) for part in path) else gather(leaf)

    params = jax.tree_util.tree_map_with_path(whole, variables["params"])
    return variables | {"params": params}
