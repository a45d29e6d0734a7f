"""Converts SAM between the official files, Hugging Face's and this project's.

python -m convert.sam --input=sam_vit_b_01ec64.pth --output=sam_vit_b.safetensors
python -m convert.sam --input=WORKDIR --output=sam.pth
python -m convert.sam --input=WORKDIR --output=FOLDER

Reads official files (MedSAM's too), Hugging Face's model.safetensors or its folder, this project's
.safetensors, and the best checkpoint of a training run, whose LoRA is merged; writes any but the
last. The layout and the variant are recognised from the content.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from absl import flags
from flax import traverse_util

from convert.hf_rules import HUGGING_FACE, check_folder, find_file, write_folder
from convert.program import run
from convert.rules import recognise
from convert.sam_rules import OFFICIAL, SAM_MODELS, resize_tables, sam_shapes
from convert.sources import (
    Cast,
    caster,
    foreign,
    import_torch,
    read_metadata,
    read_tensors,
    refuse_input,
    to_torch,
)
from sammix_jax.config_files import load_config
from sammix_jax.config_rules import CHOICES
from sammix_jax.data.files import sha256, whole_file
from sammix_jax.data.paths import Path, as_path, resolved
from sammix_jax.data.split_files import SPLIT
from sammix_jax.errors import UserError
from sammix_jax.models.lora import merge_lora
from sammix_jax.models.sam.variants import get_variant
from sammix_jax.systems.named import HOLD_SAM
from sammix_jax.training.trained import load_model
from sammix_jax.weights import DTYPES, IMAGE_KEYS, read_weights, write_weights

FORMATS = {
    "sammix": "one .safetensors for this project",
    "official": "one .pth for segment_anything",
    "hf": "a folder for transformers.SamModel",
}


class Loaded(NamedTuple):
    """A SAM in this project's layout: flat path → array, where it comes from, and what is known of
    the images that it learned from, as in the metadata of a weight file."""

    arrays: dict[str, np.ndarray]
    variant: str
    source: str
    sha256: str
    images: dict[str, str]

    @property
    def normalise(self) -> str:
        return self.images.get("normalise", "sam")

    @property
    def image_size(self) -> int:
        return int(self.images.get("image_size", get_variant(self.variant).image_size))


def convert(
    path,
    output,
    form: str | None = None,
    dtype: str | None = None,
    normalise: str | None = None,
) -> tuple[str, list[str]]:
    """Converts one model.

    Args:
      path: weight file, Hugging Face folder or workdir.
      output: file or new folder to write.
      form: a key of `FORMATS`; None takes it from the output's ending.
      dtype: type to store; None keeps the input's.
      normalise: `input.normalise` of the images that the model learned from, where its file does
        not tell.

    Returns:
      The variant found, and what the user of an exported model must know, a line each.

    Raises:
      UserError: an input that cannot be read or is no SAM, an output that cannot be written;
        nothing is left behind then.
    """
    path, output = as_path(path), as_path(output)
    form = _check_output(output, form)
    refuse_input(path, output)
    sam = load(path, caster(path, dtype), normalise)
    notes = _notes(sam, form)
    if form == "sammix":
        metadata = {
            "kind": "sam",
            "model": sam.variant,
            "source": sam.source,
            "sha256": sam.sha256,
            **sam.images,
        }
        write_weights(output, sam.arrays, metadata)
    elif form == "official":
        _write_official(output, OFFICIAL.to_theirs(sam.arrays))
    else:
        resize_tables(sam.arrays, sam.variant, sam.image_size)
        sizes = dataclasses.replace(get_variant(sam.variant), image_size=sam.image_size)
        write_folder(output, HUGGING_FACE.to_theirs(sam.arrays), sizes, sam.images)
    return sam.variant, notes


def load(path: Path, cast: Cast, normalise: str | None) -> Loaded:
    """Reads a SAM from any source; `cast` is applied to every array, `normalise` is `convert`'s."""
    if path.is_dir() and (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        return _load_workdir(path, cast, normalise)
    if path.is_dir():
        path = find_file(path)
    source = read_tensors(path)
    if "image_encoder/patch_embed/kernel" in source:
        return _load_own(path, cast, normalise)
    for table in (OFFICIAL, HUGGING_FACE):
        if table.marker in source:
            variant = recognise(path, source, table, SAM_MODELS)
            images = _of_images(path, read_metadata(path), variant, normalise)
            if table is HUGGING_FACE:
                check_folder(path.parent, get_variant(variant), images)
            digest = sha256(path)
            arrays = table.to_ours(path, sam_shapes(variant), source, cast)
            return Loaded(arrays, variant, path.name, digest, images)
    raise foreign(path, source, "a SAM: official, Hugging Face's or this project's")


def _load_workdir(workdir: Path, cast: Cast, normalise: str | None) -> Loaded:
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
    variables = load_model(config, workdir).variables
    params = merge_lora(variables["params"]["sam"])
    leaves = traverse_util.flatten_dict(params, sep="/")
    arrays = {path: cast(path, np.asarray(leaf)) for path, leaf in leaves.items()}
    known = {"normalise": config.input.normalise, "image_size": str(config.model.image_size)}
    images = _of_images(workdir, known, config.model.sam, normalise)
    return Loaded(arrays, config.model.sam, resolved(workdir).name, "", images)


def _load_own(path: Path, cast: Cast, normalise: str | None) -> Loaded:
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
    images = _of_images(path, metadata, variant, normalise)
    arrays = {name: cast(name, array) for name, array in arrays.items()}
    return Loaded(arrays, variant, path.name, sha256(path), images)


def _of_images(
    path: Path, metadata: Mapping[str, str], variant: str, normalise: str | None
) -> dict[str, str]:
    """What a file's metadata, or else the user, says of the images that its model learned from."""
    images = {key: metadata[key] for key in IMAGE_KEYS if key in metadata}
    known, choices = images.get("normalise", "sam"), CHOICES["input.normalise"]
    if known not in choices:
        raise UserError(f"{path}: says normalise={known}, expected one of {', '.join(choices)}.")
    patch = get_variant(variant).patch_size
    size = images.get("image_size", str(patch))
    if not size.isdecimal() or int(size) % patch or not int(size):
        raise UserError(
            f"{path}: says image_size={size}, expected a multiple of {variant}'s patch of {patch}."
        )
    if normalise and images.setdefault("normalise", normalise) != normalise:
        raise UserError(f"{path}: says normalise={known}, and --normalise={normalise}.")
    return images


def _notes(sam: Loaded, form: str) -> list[str]:
    """Where an exported model, used as its package does by itself, would not be the one trained."""
    if form == "sammix":  # its metadata says it
        return []
    notes, native, official = [], get_variant(sam.variant).image_size, form == "official"
    stored = sam.arrays["image_encoder/patch_embed/kernel"].dtype
    if not official and stored.itemsize < 4:
        notes.append(
            f"stored as {stored}, which transformers keeps, while its processor gives float32: "
            "from_pretrained(..., dtype=torch.float32), or convert with --dtype=float32."
        )
    if official and sam.variant == "mini":
        notes.append(
            "segment_anything's registry builds vit_b, vit_l and vit_h, no mini; transformers "
            "loads the Hugging Face folder (--format=hf)."
        )
    if sam.image_size != native:
        does = (
            f"segment_anything's registry builds for {native} alone, where this model gives other "
            "masks; the Hugging Face folder (--format=hf) keeps the size."
            if official
            else f"the folder is of that size, not of the native {native}: its tables of "
            "positions, config.json and processor."
        )
        notes.append(f"trained at image_size={sam.image_size}; {does}")
    if sam.normalise != "sam":
        does = (
            "before predicting call sam.pixel_mean.fill_(0) and sam.pixel_std.fill_(255)."
            if official
            else "the folder's processor brings 0..255 to [0, 1] and does no more."
        )
        stretch = " Stretch each image to 0..255 first." if sam.normalise == "minmax" else ""
        notes.append(f"trained with normalise={sam.normalise}; {does}{stretch}")
    return notes


def _check_output(output: Path, form: str | None) -> str:
    """The form of an output that may be written; refused before the work, not after it."""
    endings = {"sammix": (".safetensors",), "official": (".pth", ".pt"), "hf": ("",)}
    if form is None:
        fitting = [name for name, ends in endings.items() if output.suffix in ends]
        if not fitting:
            raise UserError(
                f"{output}: expected a name ending in .safetensors (this project) or .pth "
                "(official), or a new folder (Hugging Face); or say --format."
            )
        form = fitting[0]
    if form == "hf":
        if output.is_file() or (output.is_dir() and any(output.iterdir())):
            raise UserError(f"{output}: exists; a Hugging Face model needs a new folder.")
    elif output.suffix not in endings[form]:
        raise UserError(
            f"{output}: --format={form} expects a name ending in {' or '.join(endings[form])}."
        )
    elif output.is_dir():
        raise UserError(f"{output}: is a folder; expected the name of a file.")
    return form


def _write_official(output: Path, arrays: dict[str, np.ndarray]) -> None:
    torch = import_torch(output)
    state = {key: to_torch(array) for key, array in arrays.items()}
    with whole_file(output) as partial:
        try:
            torch.save(state, partial)
        except RuntimeError as error:  # how its writer reports a full disk
            raise OSError(str(error)) from error


def main(given: flags.FlagValues) -> list[str]:
    variant, notes = convert(given.input, given.output, given.format, given.dtype, given.normalise)
    return [f"{given.output}: {variant}", *(f"note: {note}" for note in notes)]


if __name__ == "__main__":
    flags.DEFINE_string(
        "input", None, "A weight file, Hugging Face folder or WORKDIR.", required=True
    )
    flags.DEFINE_string("output", None, "The file or folder to write.", required=True)
    flags.DEFINE_enum("dtype", None, DTYPES, "Type to store; the input's without it.")
    forms = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    flags.DEFINE_enum(
        "format",
        None,
        list(FORMATS),
        f"{forms}. By default as the output ends: .safetensors, .pth, none.",
    )
    flags.DEFINE_enum(
        "normalise",
        None,
        CHOICES["input.normalise"],
        "Of the images that the model learned from, where its file does not tell; MedSAM: minmax.",
    )
    run(main)
