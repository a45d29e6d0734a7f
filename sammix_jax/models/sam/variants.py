"""The sizes in which SAM comes, each with the number of parameters it must have."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class SamVariant:
    """Sizes of one SAM model.

    Attributes:
      image_size: side of the native square input, in pixels.
      patch_size: side of a patch, in pixels; every input side must be a multiple of it.
      embed_dim: channels of the image encoder's tokens.
      depth: number of encoder blocks.
      num_heads: attention heads of each encoder block.
      global_blocks: indices of the blocks that attend over the whole grid; the others attend
        inside windows.
      window_size: side of a window, in tokens.
      parameters: learned parameters of the whole model without LoRA. It follows the official
        count, which leaves out the prompt encoder's random Gaussian matrix: that is a constant.
      prompt_dim: channels of the neck, the prompt encoder and the mask decoder.
      decoder_mlp_dim: hidden width of the two-way transformer's MLPs.
      decoder_heads: attention heads of the two-way transformer.

    Source: Kirillov et al., "Segment Anything", ICCV 2023, appendix A; the sizes are those of
    `build_sam.py` in facebookresearch/segment-anything. `mini` is this project's own.
    """

    image_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    global_blocks: tuple[int, ...]
    window_size: int
    parameters: int
    prompt_dim: int = 256
    decoder_mlp_dim: int = 2048
    decoder_heads: int = 8

    @property
    def grid_size(self) -> int:
        """Side of the native token grid."""
        return self.image_size // self.patch_size


VARIANTS: dict[str, SamVariant] = {
    # Small enough to train on a CPU from random weights; for demonstrations and tests.
    "mini": SamVariant(
        image_size=128,
        patch_size=8,
        embed_dim=192,
        depth=6,
        num_heads=3,
        global_blocks=(2, 5),
        window_size=8,
        parameters=3_703_168,
        prompt_dim=128,
        decoder_mlp_dim=512,
        decoder_heads=4,
    ),
    "vit_b": SamVariant(
        image_size=1024,
        patch_size=16,
        embed_dim=768,
        depth=12,
        num_heads=12,
        global_blocks=(2, 5, 8, 11),
        window_size=14,
        parameters=93_735_472,
    ),
    "vit_l": SamVariant(
        image_size=1024,
        patch_size=16,
        embed_dim=1024,
        depth=24,
        num_heads=16,
        global_blocks=(5, 11, 17, 23),
        window_size=14,
        parameters=312_342_832,
    ),
    "vit_h": SamVariant(
        image_size=1024,
        patch_size=16,
        embed_dim=1280,
        depth=32,
        num_heads=16,
        global_blocks=(7, 15, 23, 31),
        window_size=14,
        parameters=641_090_608,
    ),
}


def get_variant(variant: str | SamVariant) -> SamVariant:
    """Looks a variant up by name; a `SamVariant` of the caller's own passes through.

    Raises:
      ValueError: the name is unknown.
    """
    if isinstance(variant, SamVariant):
        return variant
    if variant not in VARIANTS:
        raise ValueError(
            f"Unknown SAM variant {variant!r}: choose one of {sorted(VARIANTS)}, or pass a "
            "SamVariant with your own sizes."
        )
    return VARIANTS[variant]
