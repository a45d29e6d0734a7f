"""What the backward pass computes again instead of keeping it: memory for time."""

import flax.linen as nn
import jax

# none    every activation is kept
# dots    products with weight matrices are kept; attention, convolutions and all else are not
# blocks  only what goes into each block is kept
POLICIES = ("none", "dots", "blocks")


def rematerialised(block: type[nn.Module], policy: str, static_argnums: tuple[int, ...] = ()):
    """The class of a block under a policy.

    Args:
      block: a module's class.
      policy: one of `POLICIES`.
      static_argnums: arguments of its call that are no arrays; 0 is the module itself.

    Raises:
      ValueError: another policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"remat={policy!r}: expected one of {POLICIES}.")
    if policy == "none":
        return block
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    return nn.remat(block, policy=keep, static_argnums=static_argnums)
