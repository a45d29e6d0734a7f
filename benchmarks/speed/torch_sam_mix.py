"""One training step of SAM-Mix in PyTorch, from the official SAM modules.

What the step computes is what `sammix_jax` computes under its default config, with the window
applied in the step: `tests/benchmarks/test_torch_sam_mix.py` holds the two together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

from benchmarks.speed.torch_resnet38 import ResNet38
from benchmarks.speed.torch_sam import add_lora, build_sam, fuse_attention
from sammix_jax.models.sam import VARIANTS, SamVariant

VARIANT = "vit_b"
RANK = 8
WINDOW = (-160.0, 240.0)  # HU
POSITIVE = 1  # the class "this slice shows the organ"
THRESHOLD = 0.2  # of the CAM's peak
SEGMENTATION_WEIGHT = 0.5
SMOOTH = 1.0  # of Dice, pixels
LEARNING_RATE = 1e-4
MEMORY_FORMAT = torch.channels_last


class Output(NamedTuple):
    """Class logits (B, 2) of all slices; CAM masks (L, 1, H, W), their boxes (L, 4) XYXY and the
    final mask's logits (L, H, W) of the labelled ones."""

    class_logits: torch.Tensor
    cam_mask: torch.Tensor
    boxes: torch.Tensor
    mask_logits: torch.Tensor


class SamMix(nn.Module):
    """SAM with LoRA, prompted by the class activation map of a ResNet-38."""

    def __init__(self, sizes: SamVariant, side: int, rank: int = RANK):
        super().__init__()
        self.side = side
        self.sam = build_sam(sizes, side)
        add_lora(self.sam.image_encoder, rank)
        self.classifier = ResNet38().to(memory_format=MEMORY_FORMAT)

    def forward(self, hu: torch.Tensor, labelled: int) -> Output:
        """Classifies (B, H, W) int16 slices and segments the first `labelled` of them."""
        low, high = WINDOW
        images = (hu[:, None].float().clamp(low, high) - low) / (high - low)  # (B, 1, H, W)
        class_logits, features = self.classifier(_to_rgb(images))
        size = images.shape[2:]
        mask, boxes = cam_prompt(features[:labelled], self.classifier.fc.weight[POSITIVE], size)

        shape = (self.side, self.side)
        resized = F.interpolate(images[:labelled], shape, mode="bilinear", antialias=True)
        embeddings = self.sam.image_encoder(_to_rgb(resized))
        grid = embeddings.shape[2:]
        embeddings = embeddings + F.adaptive_avg_pool2d(mask, grid)  # to every channel
        return Output(class_logits, mask, boxes, self._segment(embeddings, boxes, size))

    def _segment(self, embeddings: torch.Tensor, boxes: torch.Tensor, size) -> torch.Tensor:
        """Logits (L, *size), for each slice the mask of the highest predicted IoU."""
        scale = self.side / boxes.new_tensor([size[1], size[0], size[1], size[0]])
        sparse, dense = self.sam.prompt_encoder(points=None, boxes=boxes * scale, masks=None)
        position = self.sam.prompt_encoder.get_dense_pe()
        chosen = []
        # The decoder takes one image, and any number of prompts for it.
        for i in range(len(embeddings)):
            masks, iou = self.sam.mask_decoder(
                image_embeddings=embeddings[i : i + 1],
                image_pe=position,
                sparse_prompt_embeddings=sparse[i : i + 1],
                dense_prompt_embeddings=dense[i : i + 1],
                multimask_output=True,
            )  # (1, 3, 4h, 4w), (1, 3)
            best = int(iou[0].argmax())
            chosen.append(masks[:, best : best + 1])
        return F.interpolate(torch.cat(chosen), size, mode="bilinear")[:, 0]


def _to_rgb(images: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) → (B, 3, H, W), each slice stretched to [0, 1]; one of a single value is 0."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    stretched = (images - low) / (high - low).clamp_min(1e-12)
    return stretched.expand(-1, 3, -1, -1)


@torch.no_grad()
def cam_prompt(features: torch.Tensor, head: torch.Tensor, size) -> tuple:
    """Grad-CAM → mask and box.

    Under pooling and a linear head the gradient at every place is the head's weights over the
    map's area, so that no backward pass is needed.

    Args:
      features: (L, D, h, w), the map that is pooled.
      head: (D,) weights of the class.
      size: (H, W) of the slices.

    Returns:
      Masks (L, 1, H, W) in {0, 1}, and boxes (L, 4) XYXY, the maximum edge one past the last pixel;
      the central box where the mask is empty.
    """
    cam = F.relu(torch.einsum("bdhw,d->bhw", features, head))
    low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
    cam = (cam - low) / torch.where(high > low, high - low, 1.0)
    cam = F.interpolate(cam[:, None], size, mode="bilinear")[:, 0]
    height, width = size
    masks, boxes = [], []
    for above in (cam >= THRESHOLD).cpu().numpy():
        labels, count = ndimage.label(above, structure=np.ones((3, 3)))
        mask = np.zeros_like(above)
        box = (width / 4, height / 4, 3 * width / 4, 3 * height / 4)
        if count:
            largest = 1 + int(np.bincount(labels.ravel())[1:].argmax())
            mask = labels == largest
            rows, columns = ndimage.find_objects(labels)[largest - 1]
            box = (columns.start, rows.start, columns.stop, rows.stop)
        masks.append(mask)
        boxes.append(box)
    masks = torch.from_numpy(np.stack(masks)[:, None]).to(features)
    return masks, torch.tensor(boxes, dtype=features.dtype, device=features.device)


def sam_mix_loss(output: Output, masks: torch.Tensor, image_label: torch.Tensor) -> tuple:
    """The loss, its cross-entropy over all slices and its Dice over those with masks (L, H, W)."""
    classification = F.cross_entropy(output.class_logits, image_label)
    probability = output.mask_logits.sigmoid()
    overlap = (probability * masks).sum((1, 2))
    total = probability.sum((1, 2)) + masks.sum((1, 2))
    dice = (1 - (2 * overlap + SMOOTH) / (total + SMOOTH)).mean()
    return classification + SEGMENTATION_WEIGHT * dice, classification, dice


def make_optimiser(model: nn.Module) -> torch.optim.Optimizer:
    """Adam over what is trained, in the fused form that PyTorch has for CPUs too.

    Its moments are made here rather than in the first step, so that a process holds them as soon
    as it has loaded its weights, as it does in JAX.
    """
    trained = [leaf for leaf in model.parameters() if leaf.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=LEARNING_RATE, fused=True)
    for leaf in trained:
        optimiser.state[leaf] = {
            "step": torch.zeros((), device=leaf.device),
            "exp_avg": torch.zeros_like(leaf),
            "exp_avg_sq": torch.zeros_like(leaf),
        }
    return optimiser


def train_step(model: SamMix, optimiser: torch.optim.Optimizer, batch: dict) -> float:
    """One step on NumPy arrays: hu (B, H, W) int16, the labelled slices first, mask (L, H, W) uint8
    and image_label (B,) int32. Returns the loss.

    On a GPU the forward pass is cast to bfloat16 where PyTorch says that it may be.
    """
    device = next(model.parameters()).device
    hu, masks, image_label = (
        torch.from_numpy(batch[name]).to(device) for name in ("hu", "mask", "image_label")
    )
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        output = model(hu, labelled=len(masks))
        loss, _, _ = sam_mix_loss(output, masks.float(), image_label.long())
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return float(loss.detach())


def make_step(
    side: int, threads: int, device: str = "cpu", fused: bool = False, compiled: bool = False
):
    """Returns `step(batch) -> loss` of a new model, SAM's input (side, side).

    Args:
      device: where it trains.
      fused: whether attention is `scaled_dot_product_attention`.
      compiled: whether both networks are.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = SamMix(VARIANTS[VARIANT], side).train().to(device)
    if fused:
        fuse_attention(model.sam.image_encoder)
    if compiled:
        model.sam.image_encoder.compile()
        model.classifier.compile()
    optimiser = make_optimiser(model)
    return lambda batch: train_step(model, optimiser, batch)
