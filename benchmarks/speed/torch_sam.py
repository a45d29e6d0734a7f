"""The official PyTorch SAM at any square input, and LoRA on its encoder as people add it."""

from __future__ import annotations

import functools
import importlib.util
import sys
from unittest import mock

import torch
import torch.nn.functional as F
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


def random_encoder(sizes: SamVariant, side: int, seed: int = 0) -> nn.Module:
    """`build_encoder` for inference, position drawn too, which it begins at zero."""
    torch.manual_seed(seed)
    encoder = build_encoder(sizes, side).eval()
    with torch.no_grad():
        for name, leaf in encoder.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                leaf.normal_(std=0.02)
    return encoder


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


class FusedAttention(nn.Module):
    """The official attention block with `scaled_dot_product_attention` for its products; position
    goes in as the mask that is added to the logits."""

    def __init__(self, official: nn.Module):
        super().__init__()
        self.num_heads = official.num_heads
        self.qkv, self.proj = official.qkv, official.proj
        self.rel_pos_h, self.rel_pos_w = official.rel_pos_h, official.rel_pos_w
        # Looked up here: within `forward` the import would cut what torch.compile sees in parts.
        self.get_rel_pos = modeling().image_encoder.get_rel_pos

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) → (B, H, W, C)."""
        b, h, w, c = x.shape
        # (B, H, W, 3C) -> (B, N, 3, M, D) -> (3, B, M, N, D)
        qkv = self.qkv(x).reshape(b, h * w, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        places = q.reshape(b, self.num_heads, h, w, -1)  # (B, M, N, D) -> (B, M, H, W, D)
        table_h, table_w = (
            self.get_rel_pos(side, side, table).to(q.dtype)
            for side, table in ((h, self.rel_pos_h), (w, self.rel_pos_w))
        )
        rel_h = torch.einsum("bmhwd,hkd->bmhwk", places, table_h)
        rel_w = torch.einsum("bmhwd,wkd->bmhwk", places, table_w)
        bias = rel_h[..., :, None] + rel_w[..., None, :]  # (B, M, H, W, H, W)
        bias = bias.reshape(b, self.num_heads, h * w, h * w).to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        # (B, M, N, D) -> (B, N, M, D) -> (B, H, W, C)
        return self.proj(out.transpose(1, 2).reshape(b, h, w, c))


def fuse_attention(encoder: nn.Module) -> None:
    """Puts `FusedAttention` into every block of an official image encoder."""
    for block in encoder.blocks:
        block.attn = FusedAttention(block.attn)


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
