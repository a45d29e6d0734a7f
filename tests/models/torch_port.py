"""The official PyTorch SAM with random weights, and those weights in this project's tree."""

import re

import numpy as np
from flax import traverse_util

try:
    import torch

    from benchmarks.speed import torch_sam
except ImportError:  # the parity tests skip themselves then
    torch = None

# Official name -> path here; applied in order, every match of every line.
_NAMES = [
    (r"\.", "/"),
    (r"^image_encoder/patch_embed/proj", "image_encoder/patch_embed"),
    (r"^image_encoder/blocks/", "image_encoder/block_"),
    (r"/neck/0", "/neck/conv1"),
    (r"/neck/1", "/neck/norm1"),
    (r"/neck/2", "/neck/conv2"),
    (r"/neck/3", "/neck/norm2"),
    (r"/pe_layer/positional_encoding_gaussian_matrix", "/position_encoding/gaussian_matrix"),
    (r"/mask_downscaling/0", "/mask_downscaling/conv1"),
    (r"/mask_downscaling/1", "/mask_downscaling/norm1"),
    (r"/mask_downscaling/3", "/mask_downscaling/conv2"),
    (r"/mask_downscaling/4", "/mask_downscaling/norm2"),
    (r"/mask_downscaling/6", "/mask_downscaling/conv3"),
    (r"/(not_a_point_embed|no_mask_embed|iou_token|mask_tokens)/weight", r"/\1"),
    (r"/transformer/layers/", "/transformer/layer_"),
    (r"/output_upscaling/0", "/upscale1"),
    (r"/output_upscaling/1", "/upscale_norm"),
    (r"/output_upscaling/3", "/upscale2"),
    (r"/output_hypernetworks_mlps/", "/hypernetwork_"),
    (r"/iou_prediction_head/", "/iou_head/"),
    (r"/layers/0", "/lin1"),
    (r"/layers/1", "/lin2"),
    (r"/layers/2", "/lin3"),
    (r"(norm[^/]*)/weight", r"\1/scale"),
    (r"/weight", "/kernel"),
]


def official():
    """The official `segment_anything` package, without needing torchvision."""
    return torch_sam.package()


def port(state):
    """Turns an official state dict into nested parameters; each name is used exactly once."""
    ported = {}
    points = {}
    for name, tensor in state.items():
        value = tensor.detach().numpy()
        corner = re.fullmatch(r"prompt_encoder\.point_embeddings\.(\d)\.weight", name)
        if corner:
            points[int(corner[1])] = value[0]
            continue
        path = name
        for pattern, target in _NAMES:
            path = re.sub(pattern, target, path)
        if path.endswith("kernel"):
            if value.ndim == 2:
                value = value.T
            elif "upscale" in path:
                value = value.transpose(2, 3, 0, 1)  # (C, D, 2, 2) -> (2, 2, C, D)
            else:
                value = value.transpose(2, 3, 1, 0)  # (D, C, H, W) -> (H, W, C, D)
        if path in ported:
            raise ValueError(f"{name} falls on {path}, which is filled already: mend the table.")
        ported[path] = np.ascontiguousarray(value)
    if points:
        ported["prompt_encoder/point_embeddings"] = np.stack([points[i] for i in range(4)])
    return traverse_util.unflatten_dict(ported, sep="/")


def build(sizes, grid=None):
    """The official model of these sizes with every weight random, none left at 0 or 1."""
    torch.manual_seed(0)
    model = torch_sam.build_sam(sizes, sizes.image_size, grid)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                leaf.normal_(std=0.2)
            elif leaf.ndim == 1:
                leaf.add_(0.1 * torch.randn_like(leaf))
    return model.eval().requires_grad_(False)


def to_torch(x):
    """(B, H, W, C) array to (B, C, H, W) tensor."""
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def from_torch(x):
    """(B, C, H, W) tensor to (B, H, W, C) array."""
    return np.moveaxis(x.numpy(), 1, -1)


def encode_theirs(model, given):
    """Official sparse and dense embeddings of prompts (P, ...)."""
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    points = (tensors["points"], tensors["labels"]) if "points" in tensors else None
    masks = tensors["masks"][:, None] if "masks" in tensors else None
    return model.prompt_encoder(points=points, boxes=tensors.get("boxes"), masks=masks)


def decode_theirs(model, embedding, given):
    """Official logits (P, 4, 4h, 4w) and IoU (P, 4) of one image's embedding (h, w, C)."""
    sparse, dense = encode_theirs(model, given)
    logits, iou = model.mask_decoder.predict_masks(
        image_embeddings=to_torch(embedding[None]),
        image_pe=model.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
    )
    return logits.numpy(), iou.numpy()
