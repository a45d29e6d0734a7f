"""SAM in the layout of Hugging Face `transformers.SamModel`, and the folder that it loads."""

from collections.abc import Mapping

import numpy as np

from convert.rules import CONV, DECONV, LINEAR, NORM, VALUE, Rule, Table
from sammix_jax.data.files import read_json, write_json
from sammix_jax.data.paths import Path
from sammix_jax.errors import UserError
from sammix_jax.models.sam.sam import PIXEL_MEAN, PIXEL_STD
from sammix_jax.models.sam.variants import SamVariant
from sammix_jax.weights import save_arrays

_MLP = {1: "proj_in", 2: "layers.0", 3: "proj_out"}

HUGGING_FACE = Table(
    name="a Hugging Face SamModel",
    marker="vision_encoder.patch_embed.projection.weight",
    tables=r"vision_encoder\.(pos_embed|layers\.\d+\.attn\.rel_pos_[hw])\b",
    rules=(
        Rule("image_encoder/pos_embed", "vision_encoder.pos_embed", VALUE),
        Rule("image_encoder/patch_embed", "vision_encoder.patch_embed.projection", CONV),
        Rule(r"image_encoder/block_(\d+)/norm(\d)", r"vision_encoder.layers.\1.layer_norm\2", NORM),
        Rule(
            r"image_encoder/block_(\d+)/attn/(rel_pos_[hw])",
            r"vision_encoder.layers.\1.attn.\2",
            VALUE,
        ),
        Rule(
            r"image_encoder/block_(\d+)/attn/(qkv|proj)",
            r"vision_encoder.layers.\1.attn.\2",
            LINEAR,
        ),
        Rule(r"image_encoder/block_(\d+)/mlp/(lin\d)", r"vision_encoder.layers.\1.mlp.\2", LINEAR),
        Rule(r"image_encoder/neck/conv(\d)", r"vision_encoder.neck.conv\1", CONV),
        Rule(r"image_encoder/neck/norm(\d)", r"vision_encoder.neck.layer_norm\1", NORM),
        Rule(
            "prompt_encoder/position_encoding/gaussian_matrix",
            "shared_image_embedding.positional_embedding",
            VALUE,
        ),
        Rule(
            "prompt_encoder/point_embeddings",
            tuple(f"prompt_encoder.point_embed.{i}.weight" for i in range(4)),
            VALUE,
        ),
        Rule(
            r"prompt_encoder/(not_a_point|no_mask)_embed", r"prompt_encoder.\1_embed.weight", VALUE
        ),
        Rule(
            r"prompt_encoder/mask_downscaling/conv(\d)", r"prompt_encoder.mask_embed.conv\1", CONV
        ),
        Rule(
            r"prompt_encoder/mask_downscaling/norm(\d)",
            r"prompt_encoder.mask_embed.layer_norm\1",
            NORM,
        ),
        Rule(r"mask_decoder/(iou_token|mask_tokens)", r"mask_decoder.\1.weight", VALUE),
        Rule(
            r"mask_decoder/transformer/layer_(\d)/(self_attn|cross_attn_\w+)/(\w+_proj)",
            r"mask_decoder.transformer.layers.\1.\2.\3",
            LINEAR,
        ),
        Rule(
            r"mask_decoder/transformer/layer_(\d)/norm(\d)",
            r"mask_decoder.transformer.layers.\1.layer_norm\2",
            NORM,
        ),
        Rule(
            r"mask_decoder/transformer/layer_(\d)/mlp/(lin\d)",
            r"mask_decoder.transformer.layers.\1.mlp.\2",
            LINEAR,
        ),
        Rule(
            r"mask_decoder/transformer/final_attn_token_to_image/(\w+_proj)",
            r"mask_decoder.transformer.final_attn_token_to_image.\1",
            LINEAR,
        ),
        Rule(
            "mask_decoder/transformer/norm_final_attn",
            "mask_decoder.transformer.layer_norm_final_attn",
            NORM,
        ),
        Rule(r"mask_decoder/upscale(\d)", r"mask_decoder.upscale_conv\1", DECONV),
        Rule("mask_decoder/upscale_norm", "mask_decoder.upscale_layer_norm", NORM),
        *(
            Rule(
                rf"mask_decoder/hypernetwork_(\d)/lin{i}",
                rf"mask_decoder.output_hypernetworks_mlps.\1.{name}",
                LINEAR,
            )
            for i, name in _MLP.items()
        ),
        *(
            Rule(
                f"mask_decoder/iou_head/lin{i}", f"mask_decoder.iou_prediction_head.{name}", LINEAR
            )
            for i, name in _MLP.items()
        ),
    ),
    # The model has one such array under two names.
    aliases={
        "prompt_encoder.shared_embedding.positional_embedding": (
            "shared_image_embedding.positional_embedding"
        )
    },
)


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


def check_folder(folder: Path, sizes: SamVariant, images: Mapping[str, str]) -> None:
    """Holds the configs beside a weight file, where there are any, against the model.

    Args:
      folder: of the weight file.
      sizes: of the model that its arrays fit; no shape shows the heads, windows and global blocks.
      images: what the file, or the user, says of those that the model learned from.

    Raises:
      UserError: a config that differs, or images that nobody says how to normalise.
    """
    if (path := folder / "config.json").is_file():
        given = read_json(path).get("vision_config", {})
        for field in ("num_attention_heads", "window_size", "global_attn_indexes"):
            expected = _model_config(sizes)["vision_config"][field]
            if given.get(field, expected) != expected:
                raise UserError(
                    f"{path}: vision_config.{field}={given[field]}, expected {expected}, as the "
                    "model with arrays of these shapes has it here; another one is not here."
                )
    path = folder / "preprocessor_config.json"
    if "normalise" not in images and path.is_file() and not read_json(path).get("do_normalize", 1):
        raise UserError(
            f"{path}: do_normalize is false, so the model did not learn from images as SAM takes "
            "them: say by --normalise=unit that they lay in [0, 1], or by --normalise=minmax that "
            "each was stretched to it besides."
        )


def write_folder(
    folder: Path, arrays: dict[str, np.ndarray], sizes: SamVariant, images: Mapping[str, str]
) -> None:
    """Writes what `SamModel.from_pretrained` and `SamProcessor.from_pretrained` read.

    Args:
      folder: new or empty.
      arrays: in Hugging Face's layout.
      sizes: of the model and its images, for config.json.
      images: what is known of those that the model learned from: `normalise`, without which it is
        SAM's, goes to preprocessor_config.json; and all to the weights' metadata, to come back.

    Raises:
      UserError: a file cannot be written; none is left then.
    """
    files = [folder / n for n in ("config.json", "preprocessor_config.json", "model.safetensors")]
    try:
        write_json(files[0], _model_config(sizes))
        write_json(files[1], _processor_config(sizes, images.get("normalise", "sam")))
        save_arrays(files[2], arrays, {"format": "pt", **images})
    except UserError:
        for file in files:
            file.unlink(missing_ok=True)
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
            "layer_norm_eps": 1e-6,
        },
        "prompt_encoder_config": {
            "model_type": "sam_prompt_encoder",
            "hidden_size": sizes.prompt_dim,
            "image_size": sizes.image_size,
            "patch_size": sizes.patch_size,
            "image_embedding_size": sizes.grid_size,
            "mask_input_channels": 16,
            "layer_norm_eps": 1e-6,
        },
        "mask_decoder_config": {
            "model_type": "sam_mask_decoder",
            "hidden_size": sizes.prompt_dim,
            "mlp_dim": sizes.decoder_mlp_dim,
            "num_attention_heads": sizes.decoder_heads,
            "iou_head_hidden_dim": sizes.prompt_dim,
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
        "image_mean": [round(float(v) / 255, 6) for v in PIXEL_MEAN],
        "image_std": [round(float(v) / 255, 6) for v in PIXEL_STD],
        "do_pad": True,
        "pad_size": {"height": sizes.image_size, "width": sizes.image_size},
        "mask_pad_size": {"height": low, "width": low},
    }
