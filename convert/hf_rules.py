"""SAM in the layout of Hugging Face `transformers.SamModel`."""

from convert.rules import CONV, DECONV, LINEAR, NORM, VALUE, Rule, Table

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
