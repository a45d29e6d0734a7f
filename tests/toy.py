"""A model small enough to be compiled in a moment."""

import jax.numpy as jnp

from sammix_jax.method.cam import CamPrompt
from sammix_jax.method.sam_mix import Masks, SamMixOutput
from sammix_jax.sharding import first_of_each
from sammix_jax.training.step import TrainState


class Toy:
    """Two weights in place of two networks: one times the slice is the mask, one the class.

    Args:
      ballast: elements of a parameter that does nothing but make checkpoints large.
    """

    def __init__(self, ballast: int = 1):
        self._ballast = ballast

    def init(self, key, images, *, segmented):
        sam = {"kernel": jnp.array(0.3), "ballast": jnp.arange(self._ballast, dtype=jnp.float32)}
        return {
            "params": {"sam": sam, "classifier": {"kernel": jnp.array(-0.2)}},
            "batch_stats": {},
        }

    def apply(self, variables, images, *, segmented, shards=1, mutable=None, **_):
        weights = variables["params"]
        scores = weights["classifier"]["kernel"] * images.mean((1, 2))
        logits = weights["sam"]["kernel"] * first_of_each(images, segmented, shards)
        masks = Masks(logits, logits[:, None], jnp.zeros((segmented, 1)))
        prompt = CamPrompt(logits, logits > 0, None, jnp.zeros(segmented, bool))
        output = SamMixOutput(jnp.stack([-scores, scores], axis=1), prompt, masks)
        return (output, {"batch_stats": {}}) if mutable else output


def toy_state(optimiser, teacher: bool = False) -> TrainState:
    weights = {"sam/kernel": jnp.array(0.3), "classifier/kernel": jnp.array(-0.2)}
    taught = dict(weights) if teacher else {}
    return TrainState(jnp.array(0), weights, {}, {}, optimiser.init(weights), taught)
