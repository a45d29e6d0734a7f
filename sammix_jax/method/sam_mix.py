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

from sammix_jax.method.cam import CamPrompt, cam_prompt, grad_cam, grad_cam_by_gradient, plain_cam
from sammix_jax.method.preprocess import to_rgb
from sammix_jax.method.prompted_sam import PromptedSam, sam_fields
from sammix_jax.models.classifier import Classifier
from sammix_jax.models.sam.choice import Masks
from sammix_jax.models.sam.variants import get_variant
from sammix_jax.sharding import first_of_each

POSITIVE = 1  # the class "this slice shows the organ"

FUSIONS = ("add", "concat", "none")
BOX_SOURCES = ("cam", "gt")


class SamMixOutput(NamedTuple):
    """What one forward pass gives: class logits (B, 2) of all slices, and the CAM prompt and masks
    of the N that are segmented."""

    class_logits: jax.Array
    prompt: CamPrompt
    masks: Masks


class SamMix(PromptedSam, kw_only=True):
    """The two tasks and the path between them; fields as in `config.model`, `.cam` and `.input`."""

    classifier_arch: str
    classifier_stride: int
    freeze_batch_norm: bool
    cam_method: str
    cam_layer: str
    cam_threshold: float
    cam_component: str
    cam_fusion: str
    cam_soft: bool
    cam_box: bool

    def setup(self):
        super().setup()
        self.classifier = Classifier(
            arch=self.classifier_arch,
            output_stride=self.classifier_stride,
            dtype=self.dtype,
            remat=self.remat,
            freeze_batch_norm=self.freeze_batch_norm,
        )
        if self.cam_fusion == "concat":
            self.fusion = nn.Dense(
                get_variant(self.sam_variant).prompt_dim,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=_identity_beside_the_mask,
            )

    def __call__(
        self,
        images: jax.Array,
        segmented: int,
        train: bool = False,
        boxes: jax.Array | None = None,
        shards: int = 1,
    ) -> SamMixOutput:
        """Classifies every slice and segments the first `segmented` of them.

        SAM, the larger part, runs on no other slice.

        Args:
          images: (B, H, W) float32 in [0, 1], windowed.
          segmented: N, how many slices to segment.
          train: whether BatchNorm uses the batch's statistics.
          boxes: (P, 4) XYXY in pixels, P ≤ N: prompts of the first P slices in place of the CAM's.
          shards: G; with more than one, the slices come in G groups of B / G, in each of which the
            first N / G are segmented and the first P / G have a box.
        """
        class_logits, features = self.classify(images, train)
        images, features = (first_of_each(x, segmented, shards) for x in (images, features))
        prompt = self.prompt(images, features)
        embeddings = self.fuse(self.encode(images), prompt)
        if boxes is not None:
            # (P, 4) → (G, P / G, 4), (N, 4) → (G, N / G, 4)
            given, cams = (x.reshape(shards, -1, 4) for x in (boxes, prompt.box))
            box = jnp.concatenate([given, cams[:, given.shape[1] :]], axis=1)
            prompt = prompt._replace(box=box.reshape(-1, 4))  # (G, N / G, 4) → (N, 4)
        box = prompt.box if self.cam_box else None
        masks = self.segment(embeddings, images.shape[1:], boxes=box)
        return SamMixOutput(class_logits, prompt, masks)

    def classify(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """(B, H, W) → class logits (B, 2) and the last feature map (B, h, w, D)."""
        return self.classifier(to_rgb(images, self.normalisation), train)

    def prompt(self, images: jax.Array, features: jax.Array) -> CamPrompt:
        """CAM of the positive class → CAM mask and box on the slices' grid.

        Args:
          images: (B, H, W) as given to `classify`.
          features: (B, h, w, D), its feature map.
        """
        if self.cam_layer == "last":
            head = self.classifier.variables["params"]["head"]["kernel"]
            method = grad_cam if self.cam_method == "grad_cam" else plain_cam
            cam = method(features, head, POSITIVE)
        else:
            # Unbound, so that JAX may differentiate it here; by running statistics, under which a
            # slice's gradient is its own.
            classifier, variables = self.classifier.unbind()

            def score(at_layer):
                return classifier.apply(
                    variables, at_layer, self.cam_layer, method=Classifier.logits_from
                )

            rgb = to_rgb(images, self.normalisation)
            at_layer = classifier.apply(
                variables, rgb, self.cam_layer, method=Classifier.features_at
            )
            cam = grad_cam_by_gradient(score, at_layer, POSITIVE)
        return cam_prompt(cam, images.shape[1:], self.cam_threshold, self.cam_component)

    def fuse(self, embeddings: jax.Array, prompt: CamPrompt | None) -> jax.Array:
        """⊕ of the figure: the CAM mask, averaged onto the grid, is added to every channel.

        Args:
          embeddings: (B, h, w, C) image embeddings.
          prompt: of the same slices; None fuses nothing.
        """
        if self.cam_fusion == "none" or (prompt is None and self.cam_fusion == "add"):
            return embeddings
        if prompt is None:  # the projection has learned to stand between encoder and decoder
            grid = jnp.zeros((*embeddings.shape[:3], 1), embeddings.dtype)
        else:
            cam = prompt.cam if self.cam_soft else prompt.mask.astype(jnp.float32)
            rows, columns = (
                _area_weights(target, source)
                for target, source in zip(embeddings.shape[1:3], cam.shape[1:], strict=True)
            )
            grid = jnp.einsum("hH,bHW,wW->bhw", rows, cam, columns)
            grid = grid[..., None].astype(embeddings.dtype)  # (B, h, w, 1)
        if self.cam_fusion == "add":
            return embeddings + grid
        return self.fusion(jnp.concatenate([embeddings, grid], axis=-1))


def _identity_beside_the_mask(key, shape: tuple[int, int], dtype=jnp.float32) -> jax.Array:
    """(C + 1, C): every channel passes through, and the mask has no say yet."""
    return jnp.eye(*shape, dtype=dtype)


def _area_weights(target: int, source: int) -> np.ndarray:
    """(target, source): each target cell's average over the source cells that it covers."""
    edges = np.arange(target + 1) * source / target
    low = np.maximum(edges[:-1, None], np.arange(source))
    high = np.minimum(edges[1:, None], np.arange(source) + 1)
    return np.maximum(high - low, 0).astype(np.float32) * target / source


def sam_mix(config) -> SamMix:
    """The model that a config describes; `config_rules.check_config` says what it may hold."""
    return SamMix(
        **sam_fields(config),
        classifier_arch=config.model.classifier,
        classifier_stride=config.model.classifier_stride,
        freeze_batch_norm=config.model.freeze_batch_norm,
        cam_method=config.cam.method,
        cam_layer=config.cam.layer,
        cam_threshold=config.cam.threshold,
        cam_component=config.cam.component,
        cam_fusion=config.cam.fusion,
        cam_soft=config.cam.soft,
        cam_box=config.cam.box,
    )
