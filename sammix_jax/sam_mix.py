"""SAM-Mix on one page (Ward and Imran, ISBI 2025, arXiv 2412.08575).

slice ─► SAM image encoder (frozen, LoRA) ─► image embeddings ─⊕─► SAM mask decoder ─► masks
  │                                                             ▲           ▲
  └──► classifier ─► feature map ─► class logits                │           │
                         └─► Grad-CAM ─► CAM mask ─► downsample ┘           │
                                            └─► bounding box ─► prompt encoder
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sammix_jax.cam import CamPrompt, cam_prompt, grad_cam
from sammix_jax.models.resnet import Classifier
from sammix_jax.models.sam.sam import Sam
from sammix_jax.preprocess import to_rgb

POSITIVE = 1  # the class "this slice shows the organ"

FUSIONS = ("add", "none")
MASK_CHOICES = ("argmax_iou", "single")
DTYPES = ("float32", "bfloat16")
# How the decoder may be prompted when a model is scored; `cam` is the headline.
# cam     nothing but the image goes in: CAM fusion and CAM box
# gt_box  the box of the true mask replaces the CAM's: an upper bound prompted by the answer
# none    neither box nor fusion
PROTOCOLS = ("cam", "gt_box", "none")


class Masks(NamedTuple):
    """Masks of SAM's decoder on the slice's grid.

    Attributes:
      logits: (B, H, W) float32, the final mask.
      candidates: (B, M, H, W) float32, the masks it was chosen from.
      iou: (B, M) float32, their predicted IoU.
    """

    logits: jax.Array
    candidates: jax.Array
    iou: jax.Array


class SamMixOutput(NamedTuple):
    """What one forward pass gives: class logits (B, 2) of all slices, and the CAM prompt and masks
    of the first L, which are segmented."""

    class_logits: jax.Array
    prompt: CamPrompt
    masks: Masks


class SamMix(nn.Module):
    """The two tasks and the path between them; fields as in `config.model`, `.cam` and `.input`."""

    sam_variant: str
    image_size: int
    lora_rank: int
    lora_targets: tuple[str, ...]
    classifier_arch: str
    classifier_stride: int
    freeze_batch_norm: bool
    cam_threshold: float
    cam_component: str
    cam_fusion: str
    cam_box: bool
    mask_choice: str
    normalisation: str
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self):
        self.sam = Sam(
            variant=self.sam_variant,
            lora_rank=self.lora_rank,
            lora_targets=self.lora_targets,
            dtype=self.dtype,
            remat=self.remat,
        )
        self.classifier = Classifier(
            arch=self.classifier_arch,
            output_stride=self.classifier_stride,
            dtype=self.dtype,
            freeze_batch_norm=self.freeze_batch_norm,
        )

    def __call__(self, images: jax.Array, labelled: int, train: bool = False) -> SamMixOutput:
        """Classifies every slice and segments the first `labelled` of them.

        Only these have masks to learn from, so SAM, the larger part, runs on no other slice.

        Args:
          images: (B, H, W) float32 in [0, 1], windowed.
          labelled: L, how many slices to segment.
          train: whether BatchNorm uses the batch's statistics.
        """
        class_logits, features = self.classify(images, train)
        prompt = self.prompt(features[:labelled], images.shape[1:])
        embeddings = self.encode(images[:labelled])
        box = prompt.box if self.cam_box else None
        masks = self.segment(embeddings, images.shape[1:], prompt.mask, box)
        return SamMixOutput(class_logits, prompt, masks)

    def classify(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """(B, H, W) → class logits (B, 2) and the last feature map (B, h, w, D)."""
        return self.classifier(to_rgb(images, self.normalisation), train)

    def prompt(self, features: jax.Array, size: tuple[int, int]) -> CamPrompt:
        """Feature map → Grad-CAM → CAM mask and box on the slice's (H, W) grid."""
        head = self.classifier.variables["params"]["head"]["kernel"]
        cam = grad_cam(features, head, POSITIVE)
        return cam_prompt(cam, size, self.cam_threshold, self.cam_component)

    def encode(self, images: jax.Array) -> jax.Array:
        """(B, H, W) → image embeddings (B, h, w, C)."""
        shape = (len(images), self.image_size, self.image_size)
        resized = jax.image.resize(images, shape, "linear", antialias=False)
        return self.sam.encode_image(to_rgb(resized, self.normalisation))

    def segment(
        self,
        embeddings: jax.Array,
        size: tuple[int, int],
        cam_mask: jax.Array | None,
        boxes: jax.Array | None,
    ) -> Masks:
        """Prompts the mask decoder.

        Args:
          embeddings: (B, h, w, C) image embeddings.
          size: (H, W) of the slices.
          cam_mask: (B, H, W) fused with the embeddings, or None.
          boxes: (B, 4) XYXY in pixels of the slice, or None.
        """
        if cam_mask is not None:
            embeddings = self._fuse(embeddings, cam_mask)
        if boxes is not None:
            scale = self.image_size / jnp.array([size[1], size[0], size[1], size[0]], jnp.float32)
            boxes = (boxes * scale)[:, None]  # (B, P=1, 4)
        low_res_logits, iou = self.sam.decode(
            embeddings, input_size=(self.image_size, self.image_size), boxes=boxes
        )  # (B, 1, 4, 4h, 4w), (B, 1, 4)
        # Token 0 is for one mask without ambiguity, 1 to 3 for whole, part and subpart.
        kept = slice(0, 1) if self.mask_choice == "single" else slice(1, 4)
        logits, iou = low_res_logits[:, 0, kept], iou[:, 0, kept]
        candidates = jax.image.resize(
            logits.astype(jnp.float32), (*logits.shape[:2], *size), "linear", antialias=False
        )  # (B, M, H, W)
        best = jnp.argmax(iou, axis=1)[:, None, None, None]
        final = jnp.take_along_axis(candidates, best, axis=1)[:, 0]  # (B, H, W)
        return Masks(final, candidates, iou.astype(jnp.float32))

    def _fuse(self, embeddings: jax.Array, cam_mask: jax.Array) -> jax.Array:
        """⊕ of the figure: the CAM mask, averaged onto the grid, is added to every channel."""
        if self.cam_fusion == "none":
            return embeddings
        rows, columns = (
            _area_weights(target, source)
            for target, source in zip(embeddings.shape[1:3], cam_mask.shape[1:], strict=True)
        )
        mask = jnp.einsum("hH,bHW,wW->bhw", rows, cam_mask.astype(jnp.float32), columns)
        return embeddings + mask[..., None].astype(embeddings.dtype)


def _area_weights(target: int, source: int) -> np.ndarray:
    """(target, source): each target cell's average over the source cells that it covers."""
    edges = np.arange(target + 1) * source / target
    low = np.maximum(edges[:-1, None], np.arange(source))
    high = np.minimum(edges[1:, None], np.arange(source) + 1)
    return np.maximum(high - low, 0).astype(np.float32) * target / source


def sam_mix(config) -> SamMix:
    """The model that a config describes; `config_rules.check_config` says what it may hold."""
    return SamMix(
        sam_variant=config.model.sam,
        image_size=config.model.image_size,
        lora_rank=config.model.lora_rank,
        lora_targets=tuple(config.model.lora_targets),
        classifier_arch=config.model.classifier,
        classifier_stride=config.model.classifier_stride,
        freeze_batch_norm=config.model.freeze_batch_norm,
        cam_threshold=config.cam.threshold,
        cam_component=config.cam.component,
        cam_fusion=config.cam.fusion,
        cam_box=config.cam.box,
        mask_choice=config.model.mask_choice,
        normalisation=config.input.normalise,
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
    )
