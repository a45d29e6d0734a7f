"""What the harness needs of a system, whatever is inside: the same data, steps and scores for all.

A system is a network with its loss and its way to predict. The step (`training/step.py`) knows the
loss alone; validation, evaluation and prediction know `predict` alone.
"""

import abc
import dataclasses
from collections.abc import Collection
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sammix_jax.errors import UserError
from sammix_jax.method.sam_mix import POSITIVE
from sammix_jax.sharding import BatchLayout

# What goes in when a model is scored.
# cam        the image alone; CAM fusion and CAM box prompt the decoder
# gt_box     the box of the true mask prompts it: an upper bound prompted by the answer
# none       the image alone, without any prompt
# gt_points  points inside the true mask prompt it: prompted by the answer too
PROTOCOLS = ("cam", "gt_box", "none", "gt_points")
# Those in which part of the answer goes in.
ORACLES = ("gt_box", "gt_points")
# Logit of a pixel that is ruled out whole: far below 0, finite, so that resizing stays sound.
OUTSIDE = -20.0


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """What a loss is computed from.

    Attributes:
      hu: (B, H, W) int16, of which L slices lend their masks; `layout` tells which.
      mask: (L, H, W) uint8.
      image_label: (B,) int32: 1 the slice shows the organ, 0 it does not, -1 unknown.
      key: (B,) random keys, each slice's own: a draw follows from it and from nothing else, so that
        a step is the same however its batch is divided.
      labels: (A, B) int32, the image-level labels of all A microbatches of the step. A mean over
        slices that not all of them have alike is one over the whole batch by way of `share`.
      step: () int32, steps taken before.
      layout: how the slices lie.
    """

    hu: jax.Array
    mask: jax.Array
    image_label: jax.Array
    key: jax.Array
    labels: jax.Array
    step: jax.Array
    layout: BatchLayout

    def share(self, here: jax.Array, of_all: jax.Array) -> jax.Array:
        """By what this microbatch's mean over `here` slices counts, so that the mean over the
        microbatches is one over the `of_all` slices of the batch."""
        return here * len(self.labels) / jnp.maximum(of_all, 1)


class SlicePredictions(NamedTuple):
    """Predictions for N slices, on the store's grid; None what a system does not have.

    Attributes:
      logits: protocol → (N, H, W) float32; above 0 is inside the organ.
      organ_probability: (N,) float32, the classifier's probability that the slice shows the organ.
      cam: (N, H, W) float32 in [0, 1].
      box: (N, 4) float32 XYXY, the CAM's box; the central box where the CAM is empty.
      empty: (N,) bool, whether the CAM is empty.
    """

    logits: dict[str, jax.Array]
    organ_probability: jax.Array | None = None
    cam: jax.Array | None = None
    box: jax.Array | None = None
    empty: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class System(abc.ABC):
    """A network, how it learns and how it predicts.

    Attributes:
      model: the network.
      config: the run's.
      protocols: under which it can be scored.
    """

    model: nn.Module
    config: object

    protocols: ClassVar[tuple[str, ...]] = ("none",)

    @classmethod
    @abc.abstractmethod
    def of(cls, config) -> "System":
        """The system that a config describes."""

    @property
    def headline(self) -> str:
        """The protocol that stands for the system, and by which validation chooses the best
        checkpoint: the automatic one, unless it was trained to be prompted by the truth."""
        return "none"

    @abc.abstractmethod
    def init(self, key: jax.Array, images: jax.Array) -> dict:
        """Variables for (1, H, W) float32 images: "params", and "batch_stats" where there are."""

    @abc.abstractmethod
    def loss(
        self, variables: dict, part: Microbatch, teacher: dict | None = None
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], dict]]:
        """The loss of one microbatch.

        Args:
          variables: to differentiate by.
          part: the microbatch.
          teacher: variables of the moving average, where there is one.

        Returns:
          The loss; and metrics, float32 scalars with "loss" and "dice_loss" among them, and the new
          batch statistics, {} where there are none.
        """

    @abc.abstractmethod
    def predict(
        self,
        variables: dict,
        images: jax.Array,
        truth: jax.Array | None,
        protocols: tuple[str, ...],
        gate: bool,
    ) -> SlicePredictions:
        """Segments slices.

        Args:
          variables: the network's.
          images: (B, H, W) float32 in [0, 1].
          truth: (B, H, W) bool, read by `ORACLES` alone; None without them.
          protocols: of `self.protocols`.
          gate: whether slices that the classifier calls negative get an empty mask; nothing where
            there is no classifier.
        """


def scored_protocols(system: System, asked: Collection[str]) -> tuple[str, ...]:
    """Those asked for under which the system can be scored, its headline first.

    Raises:
      UserError: there are none.
    """
    found = tuple(p for p in PROTOCOLS if p in asked and p in system.protocols)
    if not found:
        raise UserError(
            f"evaluate.protocols={tuple(asked)}: expected some of {', '.join(system.protocols)} "
            f"for model.system={system.config.model.system}."
        )
    return tuple(sorted(found, key=lambda p: p != system.headline))


def organ_probability(class_logits: jax.Array) -> jax.Array:
    """(B, 2) → (B,) float32, that a slice shows the organ."""
    return jax.nn.softmax(class_logits.astype(jnp.float32))[:, POSITIVE]


def ruled_out(outside: jax.Array, logits: jax.Array) -> jax.Array:
    """The logits (B, H, W), `OUTSIDE` on every pixel of the slices that (B,) bool names."""
    return jnp.where(outside[:, None, None], OUTSIDE, logits)
