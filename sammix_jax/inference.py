"""Slices in, masks out: the one path that validation, evaluation and prediction share."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from sammix_jax import hosts
from sammix_jax.cam import mask_to_box
from sammix_jax.checkpoint import Checkpoints, abstract
from sammix_jax.data.geometry import slice_geometry
from sammix_jax.data.paths import as_path
from sammix_jax.data.volumes import Volume
from sammix_jax.errors import UserError
from sammix_jax.optim import make_optimiser
from sammix_jax.preprocess import scale_slices
from sammix_jax.sam_mix import POSITIVE, SamMix, sam_mix
from sammix_jax.sharding import along_batch, make_mesh, state_sharding
from sammix_jax.train_step import make_init

# Logit of a pixel that is ruled out whole: far below 0, finite, so that resizing stays sound.
OUTSIDE = -20.0


class SlicePredictions(NamedTuple):
    """Predictions for N slices, on the store's grid.

    Attributes:
      organ_probability: (N,) float32, the classifier's probability that the slice shows the organ.
      cam: (N, H, W) float32 in [0, 1].
      box: (N, 4) float32 XYXY, the CAM's box; the central box where the CAM is empty.
      empty: (N,) bool, whether the CAM is empty.
      logits: protocol → (N, H, W) float32; above 0 is inside the organ.
    """

    organ_probability: np.ndarray
    cam: np.ndarray
    box: np.ndarray
    empty: np.ndarray
    logits: dict[str, np.ndarray]


def make_predict(model: SamMix, config, protocols: tuple[str, ...], gate: bool | None = None):
    """Returns the jitted `predict(variables, hu, truth) -> SlicePredictions` for one batch.

    `truth` is read by the protocol `gt_box` alone, and is None without it. `gate` says whether
    slices that the classifier calls negative get an empty mask; None takes `evaluate.gate`.
    """
    gated = config.evaluate.gate if gate is None else gate

    def predict(variables: dict, hu: jax.Array, truth: jax.Array | None) -> SlicePredictions:
        images = scale_slices(hu, config.input)  # (B, H, W)
        size = images.shape[1:]
        model_ = model.bind(variables)
        class_logits, features = model_.classify(images)
        prompt = model_.prompt(images, features)
        embeddings = model_.encode(images)
        organ_probability = jax.nn.softmax(class_logits.astype(jnp.float32))[:, POSITIVE]
        negative = (organ_probability < 0.5) & gated
        logits = {}
        for protocol in protocols:
            if protocol == "cam":
                box = prompt.box if config.cam.box else None
                mask = model_.segment(embeddings, size, prompt, box).logits
                outside = negative
            elif protocol == "gt_box":
                box, outside = mask_to_box(truth)
                mask = model_.segment(embeddings, size, prompt, box).logits
            else:
                mask = model_.segment(embeddings, size, None, None).logits
                outside = negative
            logits[protocol] = jnp.where(outside[:, None, None], OUTSIDE, mask)
        return SlicePredictions(organ_probability, prompt.cam, prompt.box, prompt.empty, logits)

    return jax.jit(predict)


def predict_slices(
    predict, variables: dict, hu: np.ndarray, truth: np.ndarray | None, batch: int
) -> SlicePredictions:
    """Runs `predict` over N slices in batches of one size, the last one filled up.

    Batches are divided over the devices that hold the variables. Of several processes each needs
    all slices, and gets all predictions.

    Args:
      predict: from `make_predict`.
      variables: the model's parameters and batch statistics.
      hu: (N, H, W) int16.
      truth: (N, H, W) bool for the protocol `gt_box`, else None.
      batch: slices at a time.
    """
    sharding = jax.tree.leaves(variables)[0].sharding
    if isinstance(sharding, NamedSharding):
        sharding = along_batch(sharding.mesh, batch)

    def place(array: np.ndarray) -> jax.Array:
        filled = np.pad(array, [(0, batch - len(array)), (0, 0), (0, 0)])
        return jax.device_put(filled, sharding)

    parts = []
    for start in range(0, len(hu), batch):
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
      hu: (D, S, S) int16, what the model saw.
      truth: (D, S, S) bool, or None.
    """

    masks: dict[str, np.ndarray]
    slices: SlicePredictions
    hu: np.ndarray
    truth: np.ndarray | None


def predict_volume(
    predict, variables: dict, volume: Volume, truth: np.ndarray | None, config
) -> VolumePrediction:
    """Predicts a whole scan.

    Args:
      predict: from `make_predict`.
      variables: the model's parameters and batch statistics.
      volume: the scan, D slices of (H, W).
      truth: (D, H, W) bool for the protocol `gt_box`, else None.
      config: the run's config.
    """
    geometry = slice_geometry(
        volume.hu.shape[1:], volume.spacing[1:], config.data.size, config.data.resize
    )
    hu = np.stack([geometry.image_to_square(image) for image in volume.hu])
    squares = None if truth is None else np.stack([geometry.mask_to_square(m) for m in truth])
    slices = predict_slices(predict, variables, hu, squares, config.evaluate.batch)
    masks = {
        protocol: np.stack([geometry.logits_to_scan(square) > 0 for square in logits])
        for protocol, logits in slices.logits.items()
    }
    return VolumePrediction(masks, slices, hu, squares)


def load_model(config, workdir) -> tuple[SamMix, dict]:
    """The trained model of a workdir and its variables, the best by validation.

    Raises:
      UserError: the workdir has no checkpoint, or one whose weights were trained on other input.
    """
    folder = as_path(workdir) / "checkpoints"
    if not folder.exists():
        raise UserError(f"{folder}: no checkpoint there; train the workdir first.")
    model = sam_mix(config)
    shapes = jax.eval_shape(make_init(model, make_optimiser(config.train, steps=1), config))
    # There may be fewer devices than trained it.
    mesh = make_mesh(math.gcd(config.mesh.fsdp, jax.device_count()))
    like = abstract(shapes, state_sharding(shapes, mesh, config.mesh.shard_frozen))
    with Checkpoints(workdir) as checkpoints:
        checkpoints.check_preprocessing(config)
        state = checkpoints.restore_best(like)
    return model, state.variables
