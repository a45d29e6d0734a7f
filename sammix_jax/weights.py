"""Weight files of this project, and starting a model from one.

A file is one `.safetensors`. Its keys are flat parameter paths, such as
`image_encoder/block_3/attn/qkv/kernel`; running statistics of BatchNorm are the leaves `mean` and
`var`. Its metadata says what it is:

    format   'sammix_jax'
    version  '1'
    kind     'sam' or 'classifier'
    model    the variant or the architecture: 'vit_b', 'resnet50', ...
    source   name of the file that the values come from, or of the workdir, with the step
    sha256   of that file, '' where there is no single one
    normalise, image_size, mask_choice  those of its training, where they are known

The programs in `convert/` write such files.
"""

import logging
import re
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sammix_jax.data.files import local_copy, sha256, whole_file
from sammix_jax.data.paths import as_path
from sammix_jax.errors import UserError
from sammix_jax.models.sam.predictor import SamPredictor

FORMAT = {"format": "sammix_jax", "version": "1"}
KINDS = ("sam", "classifier")
TRAINED_WITH = ("normalise", "image_size", "mask_choice")
MASKS = ("argmax_iou", "single", "index 0", "index 1", "index 2")  # values of mask_choice
DTYPES = ("float32", "float16", "bfloat16")

_LOG = logging.getLogger(__name__)

_LISTED = 8  # names per kind of mistake that an error spells out


def read_weights(path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a weight file.

    Returns:
      Path → array in the file's type, and the metadata.

    Raises:
      UserError: no such file, a damaged one, or one that is not this project's.
    """
    path = as_path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file.")
    if path.is_dir() or path.suffix != ".safetensors":
        raise UserError(
            f"{path}: a {'folder' if path.is_dir() else 'file of another kind'}, expected a "
            ".safetensors of this project; bring it in by python -m convert.sam or python -m "
            "convert.classifier."
        )
    try:
        with local_copy(path) as local, safe_open(local, framework="np") as file:
            metadata = file.metadata() or {}
            if any(metadata.get(key) != value for key, value in FORMAT.items()):
                raise UserError(
                    f"{path}: a .safetensors of another kind (metadata {metadata}), expected "
                    f"{FORMAT}; bring it in by python -m convert.sam or python -m "
                    "convert.classifier."
                )
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read as .safetensors ({error}); it is truncated or of another "
            "kind: fetch or convert it again."
        ) from error


def digests(config) -> dict[str, str]:
    """`sha256` of the files that a run begins from, by field; "" where the config names none, or
    `model.start_from` takes their place."""
    files = {
        "model.sam_weights": config.model.sam_weights,
        "model.classifier_weights": config.model.classifier_weights,
    }
    read = not config.model.start_from
    return {field: sha256(path) if path and read else "" for field, path in files.items()}


def write_weights(path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a weight file, whole or not at all.

    Args:
      path: ends in .safetensors.
      arrays: path → array, of a type in `DTYPES`.
      metadata: `kind`, `model`, `source`, `sha256`; `FORMAT` is added.

    Raises:
      UserError: another type or kind, or the disk refuses.
    """
    path = as_path(path)
    if metadata.get("kind") not in KINDS:
        raise UserError(f"{path}: kind {metadata.get('kind')!r}; expected one of {KINDS}.")
    odd = sorted({str(a.dtype) for a in arrays.values()} - set(DTYPES))
    if odd:
        raise UserError(
            f"{path}: arrays of type {', '.join(odd)}; expected {', '.join(DTYPES)}, "
            "as --dtype of the converters makes them."
        )
    save_arrays(path, arrays, {**metadata, **FORMAT})


def save_arrays(path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a `.safetensors` with any keys, whole or not at all."""
    # The writer takes an array's memory as it lies, so that a transposed view would be scrambled.
    arrays = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
    with whole_file(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # the user's; the writer makes files that only they can read
        try:
            save_file(arrays, partial, metadata=dict(metadata))
            partial.chmod(mode)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def training_choices(config) -> dict[str, str]:
    """What a weight file keeps of the config that its model was trained with, but for the size."""
    mask = config.model.mask_choice
    return {
        "normalise": config.input.normalise,
        "mask_choice": f"index {config.model.mask_index}" if mask == "index" else mask,
    }


def load_weights(
    path, kind: str, model: str, choices: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """`read_weights`, refusing a file of another kind or model.

    Another choice among SAM's masks than the file's is told in the log: what it had not chosen it
    has not trained.

    Args:
      choices: `training_choices` of the run, to hold against those that the file may name.

    Raises:
      UserError: as `read_weights`, or the file holds something else, or learned from images that
        were normalised otherwise.
    """
    arrays, metadata = read_weights(path)
    found = (metadata.get("kind"), metadata.get("model"))
    if found != (kind, model):
        field = {"sam": "model.sam", "classifier": "model.classifier"}[kind]
        raise UserError(
            f"{path}: weights of {found[0]} {found[1]}, but {field} is {model}; set the field to "
            "the file's model, or give another file."
        )
    differing = {k: metadata[k] for k, v in (choices or {}).items() if metadata.get(k, v) != v}
    if asked := differing.get("normalise"):
        raise UserError(
            f"{path}: pretrained on images normalised by {asked!r}, but input.normalise is "
            f"{choices['normalise']!r}; set --config.input.normalise={asked}."
        )
    if asked := differing.get("mask_choice"):
        choice, _, index = asked.partition(" ")
        fields = (
            f"--config.model.mask_choice={choice}"
            + f" --config.model.mask_index={index}" * bool(index)
        )
        _LOG.warning(
            "%s: learned to give the mask of mask_choice=%s, and this run takes that of %s; go on "
            "from what was learned by %s.",
            path,
            asked,
            choices["mask_choice"],
            fields,
        )
    return arrays


def fill(
    leaves: Mapping[str, jax.Array | jax.ShapeDtypeStruct],
    weights: Mapping[str, np.ndarray],
    prefix: str,
    *,
    source: str,
    may_lack: Iterable[str] = (),
) -> dict[str, np.ndarray]:
    """Finds for every leaf below `prefix` its value: each leaf filled once, each key used once.

    Args:
      leaves: flat path → array or its shape and type; leaves outside of `prefix` are left alone.
      weights: path below `prefix` → array.
      prefix: such as 'sam', without a slash.
      source: where the weights come from, for the error.
      may_lack: regular expressions of paths below `prefix` that need no value, such as LoRA's.

    Returns:
      Path → array in the leaf's type, for the leaves that have a value; the others keep theirs.

    Raises:
      UserError: lists leaves without a value, keys without a leaf, and shapes that differ.
    """
    wanted = {
        path.removeprefix(f"{prefix}/"): leaf
        for path, leaf in leaves.items()
        if path.startswith(f"{prefix}/")
    }
    optional = {path for path in wanted if any(re.fullmatch(p, path) for p in may_lack)}
    mistakes = {
        "without a value": sorted(wanted.keys() - weights.keys() - optional),
        "without a place": sorted(weights.keys() - wanted.keys()),
        "of another shape": [
            f"{path} {weights[path].shape}, expected {wanted[path].shape}"
            for path in sorted(wanted.keys() & weights.keys())
            if tuple(weights[path].shape) != tuple(wanted[path].shape)
        ],
    }
    if any(mistakes.values()):
        raise UserError(
            f"{source}: does not fit the model below {prefix!r}: {list_mistakes(mistakes)}. Use "
            "weights made for this model, or change the model's fields in the config."
        )
    return {
        f"{prefix}/{path}": np.asarray(weights[path], leaf.dtype)
        for path, leaf in wanted.items()
        if path in weights
    }


def list_mistakes(mistakes: Mapping[str, list[str]]) -> str:
    """Names the first few of each kind: '2 without a value (a, b); 1 without a place (c)'."""
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:_LISTED])}{', ...' * (len(names) > _LISTED)})"
        for what, names in mistakes.items()
        if names
    )


def load_predictor(path) -> SamPredictor:
    """Holds the SAM of a weight file, at the image size that the file names.

    Args:
      path: a `.safetensors` of this project, as `python -m convert.sam` writes it.

    Raises:
      UserError: a file that cannot be read, holds no SAM or not the one that it names, or learned
        from images on another scale than SAM's.
    """
    arrays, metadata = read_weights(path)
    kind, model = metadata.get("kind"), metadata.get("model")
    if kind != "sam":
        raise UserError(
            f"{path}: weights of {kind} {model}, expected a SAM; give a file that python -m "
            "convert.sam wrote."
        )
    asked = metadata.get("normalise", "sam")
    if asked != "sam":
        raise UserError(
            f"{path}: learned from images normalised by {asked!r}, but the predictor normalises by "
            "'sam'; give another file, or apply Sam to images that "
            f"sammix_jax.method.preprocess.to_rgb normalised by {asked!r}."
        )
    # As in training, whatever the type that they are stored in.
    params = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    choice = metadata.get("mask_choice", "argmax_iou")
    if choice != "argmax_iou":
        how = "its single mask" if choice == "single" else f"the mask of {choice} of its three"
        call = "multimask_output=False" if choice == "single" else "it, whatever its score"
        _LOG.warning("%s: learned to give %s alone: predict with %s.", path, how, call)
    size = metadata.get("image_size")
    try:
        tree = traverse_util.unflatten_dict(params, sep="/")
        return SamPredictor(model, tree, size and int(size))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
