"""Reads a SAM from whatever holds one, with what is known of how it was trained."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from flax import traverse_util

from convert.hf_folder import check_folder, find_file
from convert.hf_rules import HUGGING_FACE
from convert.rules import recognise
from convert.sam_rules import OFFICIAL, SAM_MODELS, sam_shapes
from convert.sources import Cast, foreign, read_metadata, read_tensors, refuse_input
from sammix_jax.config_files import load_config
from sammix_jax.config_rules import CHOICES
from sammix_jax.data.files import sha256
from sammix_jax.data.paths import Path, resolved
from sammix_jax.data.split_files import SPLIT
from sammix_jax.errors import UserError
from sammix_jax.models.lora import merge_lora
from sammix_jax.models.sam.variants import get_variant
from sammix_jax.systems.named import HOLD_SAM
from sammix_jax.training.trained import load_model
from sammix_jax.weights import MASKS, TRAINED_WITH, read_weights, training_choices


class Loaded(NamedTuple):
    """A SAM in this project's layout: flat path → array, where it comes from, and what is known of
    how it was trained, as in the metadata of a weight file."""

    arrays: dict[str, np.ndarray]
    variant: str
    source: str
    sha256: str
    trained: dict[str, str]

    @property
    def normalise(self) -> str:
        return self.trained.get("normalise", "sam")

    @property
    def image_size(self) -> int:
        return int(self.trained.get("image_size", get_variant(self.variant).image_size))


def load_sam(path: Path, output: Path, cast: Cast, told: Mapping[str, str]) -> Loaded:
    """Reads a SAM from any source that the output does not replace.

    Args:
      cast: is applied to every array.
      told: what the user says of the training, by the names of `weights.TRAINED_WITH`.
    """
    if path.is_dir() and (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        return _load_workdir(path, cast, told)
    if path.is_dir():
        path = find_file(path)
    refuse_input(path, output)
    source = read_tensors(path)
    if "image_encoder/patch_embed/kernel" in source:
        return _load_own(path, cast, told)
    for table in (OFFICIAL, HUGGING_FACE):
        if table.marker in source:
            variant = recognise(path, source, table, SAM_MODELS)
            trained = _trained(path, read_metadata(path), variant, told)
            if table is HUGGING_FACE:
                check_folder(path.parent, get_variant(variant), trained)
            digest = sha256(path)
            arrays = table.to_ours(path, sam_shapes(variant), source, cast)
            return Loaded(arrays, variant, path.name, digest, trained)
    raise foreign(path, source, "a SAM: official, Hugging Face's or this project's")


def _load_workdir(workdir: Path, cast: Cast, told: Mapping[str, str]) -> Loaded:
    config = load_config(workdir)
    if config.model.system not in HOLD_SAM:
        raise UserError(
            f"{workdir}: a run of model.system={config.model.system}, which holds no SAM; expected "
            f"one of {', '.join(HOLD_SAM)}."
        )
    if config.model.system == "sam_mix" and config.cam.fusion == "concat":
        raise UserError(
            f"{workdir}: a run of cam.fusion=concat, whose decoder learned behind a fusion layer "
            "that a SAM has no place for; expected add or none. Segment with this run by python "
            "-m sammix_jax.main --mode=predict, or train one with --config.cam.fusion=add."
        )
    pretrained = workdir / f"sam_{config.model.sam}.safetensors"
    if pretrained.exists() and not (workdir / SPLIT).exists():
        raise UserError(f"{workdir}: a pretraining, which wrote {pretrained.name}: give that file.")
    _, variables, step = load_model(config, workdir)
    params = merge_lora(variables["params"]["sam"])
    leaves = traverse_util.flatten_dict(params, sep="/")
    arrays = {path: cast(path, np.asarray(leaf)) for path, leaf in leaves.items()}
    known = {"image_size": str(config.model.image_size), **training_choices(config)}
    trained = _trained(workdir, known, config.model.sam, told)
    source = f"{resolved(workdir).name}, step {step}"
    return Loaded(arrays, config.model.sam, source, "", trained)


def _load_own(path: Path, cast: Cast, told: Mapping[str, str]) -> Loaded:
    arrays, metadata = read_weights(path)
    variant = metadata.get("model")
    shapes = {name: array.shape for name, array in arrays.items()}
    sound = metadata.get("kind") == "sam" and variant in SAM_MODELS
    if not sound or shapes != sam_shapes(variant):
        raise UserError(
            f"{path}: says that it is {metadata.get('kind')} {variant}, but its arrays are not "
            f"that model's, or it is no SAM; expected one of {', '.join(SAM_MODELS)}, as python -m "
            "convert.sam writes it."
        )
    trained = _trained(path, metadata, variant, told)
    arrays = {name: cast(name, array) for name, array in arrays.items()}
    return Loaded(arrays, variant, path.name, sha256(path), trained)


def _trained(
    path: Path, metadata: Mapping[str, str], variant: str, told: Mapping[str, str]
) -> dict[str, str]:
    """What a file's metadata, or else the user, says of how its model was trained."""
    trained = {key: metadata[key] for key in TRAINED_WITH if key in metadata}
    for key, value in told.items():
        if trained.setdefault(key, value) != value:
            raise UserError(f"{path}: says {key}={trained[key]}, and --{key}={value}.")
    for key, choices in (("normalise", CHOICES["input.normalise"]), ("mask_choice", MASKS)):
        if (known := trained.get(key, choices[0])) not in choices:
            raise UserError(f"{path}: says {key}={known}, expected one of {', '.join(choices)}.")
    patch = get_variant(variant).patch_size
    size = trained.get("image_size", str(patch))
    if not size.isdecimal() or int(size) % patch or not int(size):
        raise UserError(
            f"{path}: {'--image_size' if 'image_size' in told else 'says image_size'}={size}, "
            f"expected a multiple of {variant}'s patch of {patch}."
        )
    return trained
