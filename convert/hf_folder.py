"""The folder that `SamModel` and `SamProcessor` of Hugging Face load: weights and configs."""

import contextlib
from collections.abc import Mapping

import numpy as np

from sammix_jax.data.files import read_object, write_json
from sammix_jax.data.paths import Path
from sammix_jax.errors import UserError
from sammix_jax.models.sam.sam import PIXEL_MEAN, PIXEL_STD
from sammix_jax.models.sam.variants import SamVariant
from sammix_jax.weights import save_arrays

# What no array's shape shows of a model, by the part of config.json that says it.
_UNSEEN = {
    "vision_config": ("num_attention_heads", "window_size", "global_attn_indexes", "hidden_act"),
    "prompt_encoder_config": ("hidden_act",),
    "mask_decoder_config": ("num_attention_heads", "hidden_act"),
}
# Where a processor's settings lie, of older and of newer versions of transformers.
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
# Of images in [0, 1], by the processor's names.
_MOMENTS = {
    "image_mean": [round(float(v) / 255, 6) for v in PIXEL_MEAN],
    "image_std": [round(float(v) / 255, 6) for v in PIXEL_STD],
}


def find_file(folder: Path) -> Path:
    """The weight file of a folder.

    Raises:
      UserError: there is none, or there are several.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    if parts := [p.name for p in folder.glob("*.index.json")]:
        raise UserError(
            f"{folder}: a model in several files ({parts[0]}), expected one: save it again with "
            "max_shard_size='100GB'."
        )
    if adapters := [p.name for p in folder.glob("adapter_model.*")]:
        raise UserError(
            f"{folder}: PEFT's {adapters[0]}, which is LoRA alone; merge it into its model "
            "(merge_and_unload) and save that."
        )
    raise UserError(
        f"{folder}: no model.safetensors (Hugging Face), and no config.json with checkpoints (a "
        "training run) there; give a weight file, or one of these folders."
    )


def check_folder(folder: Path, sizes: SamVariant, trained: Mapping[str, str]) -> None:
    """Holds the configs beside a weight file, where there are any, against the model.

    Args:
      folder: of the weight file.
      sizes: of the model that its arrays fit; no shape shows the heads, windows and global blocks.
      trained: what the file, or the user, says of how the model was trained.

    Raises:
      UserError: a config that differs, or images that nobody says how to normalise.
    """
    path = folder / "config.json"
    said = read_object(path) if path.is_file() else {}
    for part, fields in _UNSEEN.items():
        given, expected = _part(path, said, part), _model_config(sizes)[part]
        for field in fields:
            if given.get(field, expected[field]) != expected[field]:
                raise UserError(
                    f"{path}: {part}.{field}={given[field]}, expected {expected[field]}, as the "
                    "model with arrays of these shapes has it here; another one is not here."
                )
    for name in _PROCESSORS:
        if "normalise" not in trained and (folder / name).is_file():
            _check_processor(folder / name)


def _part(path: Path, said: dict, name: str) -> dict:
    part = said.get(name, {})
    if not isinstance(part, dict):
        raise UserError(f"{path}: {name} is {part!r}, expected an object.")
    return part


def _check_processor(path: Path) -> None:
    """Raises a UserError where images are normalised otherwise than SAM's."""
    said = read_object(path)
    if "image_processor" in said:
        said = _part(path, said, "image_processor")
    if not said.get("do_normalize", True):
        raise UserError(
            f"{path}: do_normalize is false, so the model did not learn from images as SAM takes "
            "them: say by --normalise=unit that they lay in [0, 1], or by --normalise=minmax that "
            "each was stretched to it besides."
        )
    for field, expected in _MOMENTS.items():
        given = said.get(field, expected)
        if np.shape(given) != (3,) or not np.allclose(given, expected, atol=1e-3):
            raise UserError(
                f"{path}: {field}={given}, expected SAM's {expected}; a model that learned from "
                "images on another scale is not here. If it learned from SAM's all the same, say "
                "--normalise=sam."
            )


def write_folder(
    folder: Path, arrays: dict[str, np.ndarray], sizes: SamVariant, trained: Mapping[str, str]
) -> None:
    """Writes what `SamModel.from_pretrained` and `SamProcessor.from_pretrained` read.

    Args:
      folder: new or empty.
      arrays: in Hugging Face's layout.
      sizes: of the model and its images, for config.json.
      trained: what is known of how the model was trained: `normalise`, without which it is SAM's,
        goes to preprocessor_config.json; and all to the weights' metadata, to come back.

    Raises:
      UserError: a file cannot be written; none is left then.
    """
    files = [folder / n for n in ("config.json", "preprocessor_config.json", "model.safetensors")]
    try:
        write_json(files[0], _model_config(sizes))
        write_json(files[1], _processor_config(sizes, trained.get("normalise", "sam")))
        save_arrays(files[2], arrays, {"format": "pt", **trained})
    except UserError:
        for file in files:
            with contextlib.suppress(OSError):  # such as a folder that is none
                file.unlink()
        raise


def _model_config(sizes: SamVariant) -> dict:
    return {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "vision_config": {
            "model_type": "sam_vision_model",
            "hidden_size": sizes.embed_dim,
            "num_hidden_layers": sizes.depth,
            "num_attention_heads": sizes.num_heads,
            "mlp_dim": 4 * sizes.embed_dim,
            "output_channels": sizes.prompt_dim,
            "num_pos_feats": sizes.prompt_dim // 2,
            "image_size": sizes.image_size,
            "patch_size": sizes.patch_size,
            "window_size": sizes.window_size,
            "global_attn_indexes": list(sizes.global_blocks),
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
        },
        "prompt_encoder_config": {
            "model_type": "sam_prompt_encoder",
            "hidden_size": sizes.prompt_dim,
            "image_size": sizes.image_size,
            "patch_size": sizes.patch_size,
            "image_embedding_size": sizes.grid_size,
            "mask_input_channels": 16,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
        },
        "mask_decoder_config": {
            "model_type": "sam_mask_decoder",
            "hidden_size": sizes.prompt_dim,
            "mlp_dim": sizes.decoder_mlp_dim,
            "num_attention_heads": sizes.decoder_heads,
            "iou_head_hidden_dim": sizes.prompt_dim,
            "hidden_act": "relu",
            # Of the two-way transformer alone. The official model has 1e-5 there; Hugging Face's
            # default of 1e-6 is a slight departure from it.
            "layer_norm_eps": 1e-5,
        },
    }


def _processor_config(sizes: SamVariant, normalise: str) -> dict:
    """SAM's preprocessing: resize the longer side, normalise, pad to a square.

    Images that were not normalised as SAM's lay in [0, 1], where the rescaling brings them.
    """
    low = 4 * sizes.grid_size
    return {
        "image_processor_type": "SamImageProcessor",
        "processor_class": "SamProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": sizes.image_size},
        "mask_size": {"longest_edge": low},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": normalise == "sam",
        **_MOMENTS,
        "do_pad": True,
        "pad_size": {"height": sizes.image_size, "width": sizes.image_size},
        "mask_pad_size": {"height": low, "width": low},
    }
