"""SAM in the layout of facebookresearch/segment-anything; MedSAM's files have the same keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from convert.rules import CONV, DECONV, LINEAR, NORM, VALUE, Rule, Table
from sammix_jax.models.sam.sam import Sam
from sammix_jax.models.sam.variants import VARIANTS, get_variant

OFFICIAL = Table(
    name="a SAM in the official layout",
    marker="image_encoder.patch_embed.proj.weight",
    tables=r"image_encoder\.(pos_embed|blocks\.\d+\.attn\.rel_pos_[hw])\b",
    rules=(
        Rule("image_encoder/pos_embed", "image_encoder.pos_embed", VALUE),
        Rule("image_encoder/patch_embed", "image_encoder.patch_embed.proj", CONV),
        Rule(r"image_encoder/block_(\d+)/(norm\d)", r"image_encoder.blocks.\1.\2", NORM),
        Rule(
            r"image_encoder/block_(\d+)/attn/(rel_pos_[hw])",
            r"image_encoder.blocks.\1.attn.\2",
            VALUE,
        ),
        Rule(
            r"image_encoder/block_(\d+)/attn/(qkv|proj)", r"image_encoder.blocks.\1.attn.\2", LINEAR
        ),
        Rule(r"image_encoder/block_(\d+)/mlp/(lin\d)", r"image_encoder.blocks.\1.mlp.\2", LINEAR),
        Rule("image_encoder/neck/conv1", "image_encoder.neck.0", CONV),
        Rule("image_encoder/neck/norm1", "image_encoder.neck.1", NORM),
        Rule("image_encoder/neck/conv2", "image_encoder.neck.2", CONV),
        Rule("image_encoder/neck/norm2", "image_encoder.neck.3", NORM),
        Rule(
            "prompt_encoder/position_encoding/gaussian_matrix",
            "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
            VALUE,
        ),
        Rule(
            "prompt_encoder/point_embeddings",
            tuple(f"prompt_encoder.point_embeddings.{i}.weight" for i in range(4)),
            VALUE,
        ),
        Rule(
            r"prompt_encoder/(not_a_point|no_mask)_embed", r"prompt_encoder.\1_embed.weight", VALUE
        ),
        Rule("prompt_encoder/mask_downscaling/conv1", "prompt_encoder.mask_downscaling.0", CONV),
        Rule("prompt_encoder/mask_downscaling/norm1", "prompt_encoder.mask_downscaling.1", NORM),
        Rule("prompt_encoder/mask_downscaling/conv2", "prompt_encoder.mask_downscaling.3", CONV),
        Rule("prompt_encoder/mask_downscaling/norm2", "prompt_encoder.mask_downscaling.4", NORM),
        Rule("prompt_encoder/mask_downscaling/conv3", "prompt_encoder.mask_downscaling.6", CONV),
        Rule(r"mask_decoder/(iou_token|mask_tokens)", r"mask_decoder.\1.weight", VALUE),
        Rule(
            r"mask_decoder/transformer/layer_(\d)/(self_attn|cross_attn_\w+)/(\w+_proj)",
            r"mask_decoder.transformer.layers.\1.\2.\3",
            LINEAR,
        ),
        Rule(
            r"mask_decoder/transformer/layer_(\d)/(norm\d)",
            r"mask_decoder.transformer.layers.\1.\2",
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
            "mask_decoder.transformer.norm_final_attn",
            NORM,
        ),
        Rule("mask_decoder/upscale1", "mask_decoder.output_upscaling.0", DECONV),
        Rule("mask_decoder/upscale_norm", "mask_decoder.output_upscaling.1", NORM),
        Rule("mask_decoder/upscale2", "mask_decoder.output_upscaling.3", DECONV),
        *(
            Rule(
                rf"mask_decoder/hypernetwork_(\d)/lin{i + 1}",
                rf"mask_decoder.output_hypernetworks_mlps.\1.layers.{i}",
                LINEAR,
            )
            for i in range(3)
        ),
        *(
            Rule(
                f"mask_decoder/iou_head/lin{i + 1}",
                f"mask_decoder.iou_prediction_head.layers.{i}",
                LINEAR,
            )
            for i in range(3)
        ),
    ),
)


@functools.cache
def sam_shapes(variant: str) -> dict[str, tuple[int, ...]]:
    """Flat parameter paths and shapes of a variant without LoRA."""
    side = 2 * get_variant(variant).patch_size  # the tables keep the native size at any input
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = jax.eval_shape(Sam(variant).init, jax.random.key(0), images)
    leaves = traverse_util.flatten_dict(variables["params"], sep="/")
    return {path: tuple(leaf.shape) for path, leaf in leaves.items()}


def resize_tables(arrays: dict[str, np.ndarray], variant: str, image_size: int) -> None:
    """Brings a model's tables of positions to another size of image, in place.

    As the image encoder does by itself, on the way; Hugging Face's does not.

    Args:
      arrays: flat path → array, of the variant's native size.
      image_size: side of the images in pixels, a multiple of the patch size.
    """
    sizes = get_variant(variant)
    side = image_size // sizes.patch_size
    if side == sizes.grid_size:
        return
    shapes = {"image_encoder/pos_embed": (1, side, side, sizes.embed_dim)}
    for i in sizes.global_blocks:  # the windows of the others stay as large as they are
        for table in ("rel_pos_h", "rel_pos_w"):
            path = f"image_encoder/block_{i}/attn/{table}"
            shapes[path] = (2 * side - 1, arrays[path].shape[1])
    for path, shape in shapes.items():
        table = arrays[path]
        resized = jax.image.resize(table.astype(np.float32), shape, "linear", antialias=False)
        arrays[path] = np.asarray(resized, table.dtype)


SAM_MODELS = {name: functools.partial(sam_shapes, name) for name in VARIANTS}
