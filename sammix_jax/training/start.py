"""What a run starts from: weight files, a trained workdir, or random values."""

import json
import logging

import numpy as np
from flax import traverse_util

from sammix_jax import hosts
from sammix_jax.config_files import differing_fields, load_config, preprocessing
from sammix_jax.data.paths import as_path
from sammix_jax.data.split_files import IMAGES, training_scans
from sammix_jax.errors import UserError
from sammix_jax.sharding import place_whole
from sammix_jax.training.step import TrainState
from sammix_jax.training.trained import load_model
from sammix_jax.weights import digests, fill, load_weights, training_choices

_LOG = logging.getLogger(__name__)

# What may start at random, where what is started from lacks it.
LORA = r".*/lora_[qkv]/[ab]"


def load_pretrained(state: TrainState, config) -> tuple[TrainState, int | None]:
    """Puts the values of `model.start_from`, or else of `model.sam_weights` and
    `model.classifier_weights`, in a new state.

    Of the files LoRA and the classifier's head keep their random start. Arrays go straight to where
    the state's lie, not through a compiled program, which would hold them as constants.

    Returns:
      The state, and of which step the workdir's model is; None without one.

    Raises:
      UserError: a file or workdir that is missing, of another model, or does not fit leaf by leaf.
    """
    stats = traverse_util.flatten_dict(state.batch_stats, sep="/")
    leaves = state.trainable | state.frozen | stats
    step = None
    if config.model.start_from:
        values, step = _of_workdir(leaves, config)
    else:
        values = _of_files(leaves, config)

    def replaced(leaves: dict) -> dict:
        return {
            path: place_whole(values[path], leaf.sharding) if path in values else leaf
            for path, leaf in leaves.items()
        }

    state = state.replace(
        trainable=replaced(state.trainable),
        teacher=replaced(state.teacher),
        frozen=replaced(state.frozen),
        batch_stats=traverse_util.unflatten_dict(replaced(stats), sep="/"),
    )
    return state, step


def begun_from(config, step: int | None) -> dict:
    """What is kept of the start in WORKDIR/weights.json: the files' digests; of a workdir its step,
    and by what the scans are known that trained it and chose its checkpoint.

    Args:
      config: the run's.
      step: of the model that `load_pretrained` found in a workdir.

    Raises:
      UserError: the workdir lacks what it is to be known by.
    """
    workdir = config.model.start_from
    if not workdir:
        return digests(config)
    begun = digests(config) | {"model.start_from": f"step {step} of {workdir}"}
    if not (as_path(workdir) / IMAGES).exists():
        _LOG.warning(
            "model.start_from=%s: has no %s, so nobody can tell which scans trained that model; "
            "score the new one on none of them.",
            workdir,
            IMAGES,
        )
        return begun
    try:
        scans = training_scans(load_config(workdir), workdir)
    except UserError as error:
        raise UserError(f"model.start_from={workdir}: {error} Copy the whole workdir.") from error
    begun |= {"trained_on": sorted(scans.digests), "chose": sorted(scans.chose)}
    return begun


def _of_files(leaves: dict, config) -> dict[str, np.ndarray]:
    values = {}
    for prefix, file, model, may_lack in (
        ("sam", config.model.sam_weights, config.model.sam, (LORA,)),
        ("classifier", config.model.classifier_weights, config.model.classifier, (r"head/.*",)),
    ):
        if file:
            choices = training_choices(config) if prefix == "sam" else None
            weights = load_weights(file, prefix, model, choices)
            _LOG.info("the %s begins from %s", {"sam": "SAM"}.get(prefix, prefix), file)
            values |= fill(leaves, weights, prefix, source=file, may_lack=may_lack)
    return values


def _of_workdir(leaves: dict, config) -> tuple[dict[str, np.ndarray], int]:
    workdir = config.model.start_from
    begun = load_config(workdir)
    shown = (preprocessing(json.loads(c.to_json())) for c in (begun, config))
    if differing := differing_fields(*shown):
        _LOG.warning(
            "model.start_from=%s: trained with %s, so that slices looked otherwise to it.",
            workdir,
            ", ".join(differing),
        )
    model = load_model(begun, workdir)
    variables = hosts.to_host(model.variables)
    kept = {
        path: leaf
        for part in variables.values()
        for path, leaf in traverse_util.flatten_dict(part, sep="/").items()
    }
    values = {}
    for prefix in sorted({path.split("/")[0] for path in leaves | kept}):
        below = {
            path.removeprefix(f"{prefix}/"): leaf
            for path, leaf in kept.items()
            if path.startswith(f"{prefix}/")
        }
        values |= fill(leaves, below, prefix, source=workdir, may_lack=(LORA,))
    return values, model.step
