"""How well a promptable model answers one box or one point, on images that it has not seen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy import ndimage

from sammix_jax.method.cam import mask_to_box
from sammix_jax.method.losses import mask_iou
from sammix_jax.method.preprocess import to_rgb
from sammix_jax.models.blocks import gather_outside_blocks
from sammix_jax.models.sam.choice import choose_masks
from sammix_jax.models.sam.sam import Sam
from sammix_jax.pretrain.scenes import draw_scenes
from sammix_jax.pretrain.step import LARGEST, SMALLEST
from sammix_jax.sharding import on_mesh

# Streams that no training step draws from, whatever its seed: what chooses the best checkpoint, and
# what is reported of it.
VALIDATION, TEST = 2**32 - 1, 2**32 - 2
TOGETHER = 32  # scenes drawn at a time: each takes a field of its size for every shape


@dataclasses.dataclass(frozen=True)
class Prompted:
    """Images, one mask of each, and what prompts for it.

    Attributes:
      images: (N, S, S) float32 in [0, 1].
      masks: (N, S, S) bool, not empty.
      boxes: (N, 4) float32 XYXY in pixels, tight.
      points: (N, 2) float32, x and y of the pixel that lies deepest in the mask.
    """

    images: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray
    points: np.ndarray


def prompted(images: np.ndarray, masks: np.ndarray) -> Prompted:
    """Adds the prompts. Images (N, S, S) float32 in [0, 1], masks (N, S, S) bool, none empty."""
    boxes = np.asarray(mask_to_box(jnp.asarray(masks))[0])
    points = np.stack([deepest_pixel(mask) for mask in masks]).astype(np.float32)
    return Prompted(images, masks, boxes, points)


def deepest_pixel(mask: np.ndarray) -> tuple[int, int]:
    """x and y of the pixel of a mask (S, S) that is farthest from its edge."""
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(np.argmax(depth), depth.shape)
    return x, y


def held_out_scenes(count: int, size: int, stream: int) -> Prompted:
    """`count` scenes of VALIDATION or TEST, with one shape of each."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), stream), count)
    draw, rng = jax.jit(draw_scenes, static_argnums=1), np.random.default_rng(0)
    images, chosen = [], []
    for start in range(0, count, TOGETHER):
        scenes = jax.device_get(draw(keys[start : start + TOGETHER], size))
        share = scenes.masks.mean(axis=(2, 3))
        sound = (share > SMALLEST) & (share < LARGEST)
        for image, masks, fit in zip(scenes.images, scenes.masks, sound, strict=True):
            if fit.any():
                images.append(image)
                # A copy: a view would keep the masks of all that were drawn with it.
                chosen.append(masks[rng.choice(np.flatnonzero(fit))].copy())
    return prompted(np.stack(images), np.stack(chosen))


def make_answer(sam: Sam, normalisation: str, mesh: Mesh | None = None):
    """Returns the jitted `answer(variables, images, masks, boxes, points) -> IoU`.

    IoU, "box" and "point", (B,) float32 each, is on the images' own grid; boxes (B, 4), points
    (B, 2). Of the three masks the one is taken that the model itself thinks best. `mesh` is that
    on which the variables lie; None where no part of them is divided.
    """

    def answer(variables, images, masks, boxes, points):
        size = images.shape[1:]
        bound = sam.bind(gather_outside_blocks(variables))
        embeddings = bound.encode_image(to_rgb(images, normalisation))

        def iou(**prompt):
            logits, iou = bound.decode(embeddings, input_size=size, **prompt)
            answers = choose_masks(logits[:, 0], iou[:, 0], size, "argmax_iou", 0)
            return mask_iou(answers.logits > 0, masks)

        points = points[:, None, None]  # (B, P=1, N=1, xy)
        labels = jnp.ones(points.shape[:3], jnp.int32)
        return {"box": iou(boxes=boxes[:, None]), "point": iou(points=points, labels=labels)}

    return jax.jit(on_mesh(mesh, answer))


def prompt_ious(answer, variables, examples: Prompted, batch: int = 32) -> dict[str, np.ndarray]:
    """IoU of each example from its box and from its point: "box" and "point", (N,) float32."""
    parts, count = [], len(examples.images)
    arrays = [getattr(examples, field.name) for field in dataclasses.fields(examples)]
    for start in range(0, count, batch):
        # The last batch is filled up, so that one program serves all.
        rows = np.minimum(np.arange(start, start + batch), count - 1)
        ious = answer(variables, *(array[rows] for array in arrays))
        parts.append({name: np.asarray(iou)[: count - start] for name, iou in ious.items()})
    return jax.tree.map(lambda *ious: np.concatenate(ious), *parts)
