"""The official PyTorch SAM at any square input, and LoRA on its encoder as people add it."""

from __future__ import annotations

import functools
import importlib.util
import sys
from unittest import mock

import torch
from torch import nn

from sammix_jax.models.sam import SamVariant


@functools.cache
def package():
    """The package `segment_anything`, without needing torchvision.

    Only the package's image transforms and mask generator use it. Stand-ins for its names are
    there while the package is imported, and no longer: other libraries ask for torchvision too.
    """
    stubs = {}
    if importlib.util.find_spec("torchvision") is None:
        for name in ("", ".ops", ".ops.boxes", ".transforms", ".transforms.functional"):
            stubs[f"torchvision{name}"] = mock.MagicMock()
    sys.modules.update(stubs)
    try:
        import segment_anything
    finally:
        for name in stubs:
            del sys.modules[name]
    return segment_anything


def modeling():
    """The networks of `package`."""
    return package().modeling


def build_encoder(sizes: SamVariant, side: int) -> nn.Module:
    """The official image encoder, built for inputs of (side, side)."""
    return modeling().ImageEncoderViT(
        img_size=side,
        patch_size=sizes.patch_size,
        embed_dim=sizes.embed_dim,
        depth=sizes.depth,
        num_heads=sizes.num_heads,
        out_chans=sizes.prompt_dim,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=sizes.window_size,
        global_attn_indexes=sizes.global_blocks,
    )


def build_sam(sizes: SamVariant, side: int, grid: tuple[int, int] | None = None) -> nn.Module:
    """The official SAM, built for inputs of (side, side); its prompt encoder for embeddings of
    `grid` (h, w), where they are of other inputs."""
    h, w = grid or (side // sizes.patch_size, side // sizes.patch_size)
    return modeling().Sam(
        image_encoder=build_encoder(sizes, side),
        prompt_encoder=modeling().PromptEncoder(
            embed_dim=sizes.prompt_dim,
            image_embedding_size=(h, w),
            input_image_size=(h * sizes.patch_size, w * sizes.patch_size),
            mask_in_chans=16,
        ),
        mask_decoder=modeling().MaskDecoder(
            transformer_dim=sizes.prompt_dim,
            transformer=modeling().TwoWayTransformer(
                depth=2,
                embedding_dim=sizes.prompt_dim,
                num_heads=sizes.decoder_heads,
                mlp_dim=sizes.decoder_mlp_dim,
            ),
            iou_head_hidden_dim=sizes.prompt_dim,
        ),
    )


class LoraQkv(nn.Module):
    """A fused projection with low-rank terms on its q and v thirds; k stays as it is."""

    def __init__(self, qkv: nn.Linear, rank: int):
        super().__init__()
        c = qkv.in_features
        self.qkv = qkv
        self.q_a, self.q_b = nn.Linear(c, rank, bias=False), nn.Linear(rank, c, bias=False)
        self.v_a, self.v_b = nn.Linear(c, rank, bias=False), nn.Linear(rank, c, bias=False)
        for a, b in ((self.q_a, self.q_b), (self.v_a, self.v_b)):
            nn.init.normal_(a.weight, std=0.01)
            nn.init.zeros_(b.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) → (..., 3C)."""
        c = x.shape[-1]
        qkv = self.qkv(x)
        qkv[..., :c] += self.q_b(self.q_a(x))
        qkv[..., -c:] += self.v_b(self.v_a(x))
        return qkv


def add_lora(encoder: nn.Module, rank: int) -> None:
    """Freezes an official image encoder and adapts every block of it."""
    encoder.requires_grad_(False)
    for block in encoder.blocks:
        block.attn.qkv = LoraQkv(block.attn.qkv, rank)
