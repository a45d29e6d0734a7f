"""Converts SAM between the official files, Hugging Face's and this project's.

python -m convert.sam --input=sam_vit_b_01ec64.pth --output=sam_vit_b.safetensors
python -m convert.sam --input=WORKDIR --output=sam.pth
python -m convert.sam --input=WORKDIR --output=FOLDER

Reads official files (MedSAM's too), Hugging Face's model.safetensors or its folder, this project's
.safetensors, and the best checkpoint of a training run, whose LoRA is merged; writes any but the
last. The layout and the variant are recognised from the content.
"""

import dataclasses

import numpy as np
from absl import flags

from convert.hf_folder import write_folder
from convert.hf_rules import HUGGING_FACE
from convert.program import run
from convert.sam_rules import OFFICIAL, resize_tables
from convert.sam_sources import Loaded, load_sam
from convert.sources import caster, import_torch, to_torch
from sammix_jax.config_rules import CHOICES
from sammix_jax.data.files import whole_file
from sammix_jax.data.paths import Path, as_path
from sammix_jax.errors import UserError
from sammix_jax.models.sam.variants import get_variant
from sammix_jax.weights import DTYPES, MASKS, TRAINED_WITH, write_weights

FORMATS = {
    "sammix": "one .safetensors for this project",
    "official": "one .pth for segment_anything",
    "hf": "a folder for transformers.SamModel",
}


def convert(
    path,
    output,
    form: str | None = None,
    dtype: str | None = None,
    *,
    normalise: str | None = None,
    image_size: int | None = None,
    mask_choice: str | None = None,
) -> tuple[str, list[str]]:
    """Converts one model.

    Args:
      path: weight file, Hugging Face folder or workdir.
      output: file or new folder to write.
      form: a key of `FORMATS`; None takes it from the output's ending.
      dtype: type to store; None keeps the input's.
      normalise, image_size, mask_choice: how the model was trained, where its file does not tell:
        `input.normalise`, the side of its images in pixels, and one of `weights.MASKS`.

    Returns:
      The variant found, and what the user of an exported model must know, a line each.

    Raises:
      UserError: an input that cannot be read or is no SAM, an output that cannot be written;
        nothing is left behind then.
    """
    path, output = as_path(path), as_path(output)
    form = _check_output(output, form)
    told = {"normalise": normalise, "image_size": image_size, "mask_choice": mask_choice}
    told = {key: str(value) for key, value in told.items() if value is not None}
    sam = load_sam(path, output, caster(path, dtype), told)
    notes = _notes(sam, form)
    if form == "sammix":
        metadata = {
            "kind": "sam",
            "model": sam.variant,
            "source": sam.source,
            "sha256": sam.sha256,
            **sam.trained,
        }
        write_weights(output, sam.arrays, metadata)
    elif form == "official":
        _write_official(output, OFFICIAL.to_theirs(sam.arrays))
    else:
        resize_tables(sam.arrays, sam.variant, sam.image_size)
        sizes = dataclasses.replace(get_variant(sam.variant), image_size=sam.image_size)
        write_folder(output, HUGGING_FACE.to_theirs(sam.arrays), sizes, sam.trained)
    return sam.variant, notes


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
            "masks; the Hugging Face folder (--format=hf) keeps the size, and a .pth that comes "
            f"back here needs --image_size={sam.image_size}."
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
    choice = sam.trained.get("mask_choice", "argmax_iou")
    if choice == "single":
        notes.append(
            "trained with mask_choice=single: predict with multimask_output=False; the three masks "
            "that come without it have not learned."
        )
    elif choice != "argmax_iou":
        notes.append(
            f"trained with mask_choice={choice}: of the three masks take that one, counted from 0, "
            "whatever their scores; the others have not learned."
        )
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
    told = {key: given[key].value for key in TRAINED_WITH}
    variant, notes = convert(given.input, given.output, given.format, given.dtype, **told)
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
    flags.DEFINE_integer("image_size", None, "Their side in pixels, where its file does not tell.")
    flags.DEFINE_enum(
        "mask_choice",
        None,
        MASKS,
        "Which of its masks the model learned to give, likewise; MedSAM: single.",
    )
    run(main)
