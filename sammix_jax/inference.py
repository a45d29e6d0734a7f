"""Slices in, masks out: the one path that validation, evaluation and prediction share."""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from sammix_jax import hosts
from sammix_jax.data.volumes import Volume
from sammix_jax.method.postprocess import keep_component, rule_out
from sammix_jax.method.preprocess import scale_slices
from sammix_jax.models.blocks import gather_outside_blocks
from sammix_jax.sharding import (
    along_batch,
    filled_batch,
    on_mesh,
    place_whole,
)
from sammix_jax.systems.system import SlicePredictions, System


def make_predict(
    system: System,
    config,
    protocols: tuple[str, ...],
    mesh: Mesh | None = None,
    gate: bool | None = None,
):
    """Returns the jitted `predict(variables, hu, truth) -> SlicePredictions` for one batch.

    `truth` is read by `system.ORACLES` alone, and is None without them.

    Args:
      system, config: of the run.
      protocols: what to predict by.
      mesh: on which the variables lie; None where no part of them is divided.
      gate: whether slices that the classifier calls negative get an empty mask; None takes
        `evaluate.gate`.

    Raises:
      ValueError: protocols that the system does not have.
    """
    gated = config.evaluate.gate if gate is None else gate
    if unknown := set(protocols) - set(system.protocols):
        raise ValueError(f"protocols {sorted(unknown)}: expected some of {system.protocols}.")

    def predict(variables: dict, hu: jax.Array, truth: jax.Array | None) -> SlicePredictions:
        images = scale_slices(hu, config.input)  # (B, H, W)
        variables = gather_outside_blocks(variables)
        return system.predict(variables, images, truth, protocols, gated)

    return jax.jit(on_mesh(mesh, predict))


def mesh_of(variables: dict) -> Mesh | None:
    """The mesh on which a model's variables lie; None for arrays of one device."""
    sharding = jax.tree.leaves(variables)[0].sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def predict_slices(
    predict,
    variables: dict,
    hu: np.ndarray,
    truth: np.ndarray | None,
    batch: int,
    shown: str = "",
) -> SlicePredictions:
    """Runs `predict` over N slices in batches of one size, the last one filled up.

    Batches are divided over the devices that hold the variables. Of several processes each needs
    all slices, and gets all predictions.

    Args:
      predict: from `make_predict`.
      variables: the model's parameters and batch statistics.
      hu: (N, H, W) int16.
      truth: (N, H, W) bool for `ORACLES` among the protocols, else None.
      batch: slices at a time; more where that leaves devices without.
      shown: beside a bar; "" for none.
    """
    mesh = mesh_of(variables)
    if mesh:
        batch = filled_batch(mesh, batch)
        sharding = along_batch(mesh, batch)
    else:
        sharding = jax.tree.leaves(variables)[0].sharding

    def place(array: np.ndarray) -> jax.Array:
        filled = np.pad(array, [(0, batch - len(array)), (0, 0), (0, 0)])
        return place_whole(filled, sharding)

    parts = []
    starts = range(0, len(hu), batch)
    hidden = hosts.hides_progress() if shown else True
    for start in tqdm(starts, desc=shown, unit="batch", leave=False, disable=hidden):
        count = min(batch, len(hu) - start)
        chunk = slice(start, start + batch)
        boxed = None if truth is None else place(truth[chunk])
        part = hosts.to_host(predict(variables, place(hu[chunk]), boxed))
        parts.append(jax.tree.map(lambda leaf, n=count: leaf[:n], part))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


class VolumePrediction(NamedTuple):
    """Predictions for a scan of D slices.

    Attributes:
      masks: protocol → (D, H, W) bool on the scan's grid.
      slices: the predictions on the store's grid of side S.
      hu: (D, S, S) int16, what the model saw; None of masks that another program made.
      truth: (D, S, S) bool, or None.
    """

    masks: dict[str, np.ndarray]
    slices: SlicePredictions
    hu: np.ndarray | None
    truth: np.ndarray | None


def predict_volume(
    predict, variables: dict, volume: Volume, truth: np.ndarray | None, config
) -> VolumePrediction:
    """Predicts a whole scan.

    Args:
      predict: from `make_predict`.
      variables: the model's parameters and batch statistics.
      volume: the scan, D slices of (H, W).
      truth: (D, H, W) bool for `ORACLES` among the protocols, else None.
      config: the run's config.
    """
    geometry = volume.geometry(config.data.size, config.data.resize)
    hu = np.stack([geometry.image_to_square(image) for image in volume.hu])
    squares = None if truth is None else np.stack([geometry.mask_to_square(m) for m in truth])
    name = volume.path.name
    slices = predict_slices(predict, variables, hu, squares, config.evaluate.batch, name)
    # On each of the two grids: what hangs together on the one may not on the other.
    component, masks, logits = config.evaluate.component, {}, {}
    for protocol, found in slices.logits.items():
        mask = np.stack([geometry.logits_to_scan(square) > 0 for square in found])
        masks[protocol] = keep_component(mask, component)
        logits[protocol] = rule_out(found, component)
    return VolumePrediction(masks, slices._replace(logits=logits), hu, squares)
