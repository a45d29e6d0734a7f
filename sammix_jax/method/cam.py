"""Class activation maps, and the mask and box they become (SAM-Mix, arXiv 2412.08575, figure 1).

Everything has static shapes, works on a batch, and may be called inside `jax.jit`. Coordinates are
pixels with the origin at the upper left corner of the image; boxes are XYXY and their maximum edge
is one past the last pixel.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

METHODS = ("grad_cam", "cam")
COMPONENTS = ("largest", "peak", "all")


class CamPrompt(NamedTuple):
    """What the classifier tells the segmentation branch.

    Attributes:
      cam: (B, H, W) float32 in [0, 1].
      mask: (B, H, W) bool, the part of the CAM that counts as the object.
      box: (B, 4) float32 XYXY pixels around the mask; the central box where the mask is empty.
      empty: (B,) bool, whether the mask is empty.
    """

    cam: jax.Array
    mask: jax.Array
    box: jax.Array
    empty: jax.Array


@functools.partial(jax.jit, static_argnames=("target",))
def plain_cam(features: jax.Array, head_kernel: jax.Array, target: int) -> jax.Array:
    """The class activation map of Zhou et al. 2016 (arXiv 1512.04150), over the map's area.

    Args:
      features: (B, h, w, D) feature map that is pooled.
      head_kernel: (D, K) weights of the head.
      target: class, 0 to K - 1.

    Returns:
      (B, h, w) float32, negative where a place speaks against the class; not normalised.

    Raises:
      ValueError: shapes that do not fit, or a class that the head lacks.
    """
    if features.ndim != 4 or head_kernel.ndim != 2 or features.shape[-1] != head_kernel.shape[0]:
        raise ValueError(
            f"features {features.shape} and head_kernel {head_kernel.shape}: expected (B, h, w, D) "
            "and (D, K); pass the map that the head pools."
        )
    if not 0 <= target < head_kernel.shape[1]:
        raise ValueError(
            f"target={target}: expected a class from 0 to {head_kernel.shape[1] - 1} of the head."
        )
    _, h, w, _ = features.shape
    weights = head_kernel[:, target].astype(jnp.float32) / (h * w)
    # As exact everywhere: what a pixel is rounded by may take it over the mask's threshold.
    return jnp.matmul(features.astype(jnp.float32), weights, precision="highest")


@functools.partial(jax.jit, static_argnames=("target",))
def grad_cam(features: jax.Array, head_kernel: jax.Array, target: int) -> jax.Array:
    """Grad-CAM (Selvaraju et al. 2017) of a linear head on global average pooling.

    The gradient of such a class score is the same at every position, the head's weights over the
    map's area, so no backward pass is needed: it is the plain map without its negative evidence.

    Args, Raises: as for `plain_cam`.

    Returns:
      (B, h, w) float32, not negative, not normalised.
    """
    return jax.nn.relu(plain_cam(features, head_kernel, target))


def grad_cam_by_gradient(
    score_fn: Callable[[jax.Array], jax.Array], features: jax.Array, target: int
) -> jax.Array:
    """Grad-CAM (Selvaraju et al. 2017) by a backward pass, for any head.

    Args:
      score_fn: features (B, h, w, D) → logits (B, K); must treat each image on its own.
      features: (B, h, w, D) feature map.
      target: class, 0 to K - 1.

    Returns:
      (B, h, w) float32, not negative, not normalised.
    """
    features = features.astype(jnp.float32)
    gradient = jax.grad(lambda f: score_fn(f)[:, target].sum())(features)
    weights = gradient.mean(axis=(1, 2))  # (B, D)
    return jax.nn.relu(jnp.einsum("bhwd,bd->bhw", features, weights, precision="highest"))


@jax.jit
def normalise_cam(cam: jax.Array) -> jax.Array:
    """(B, h, w) → the same in [0, 1], min–max per image; a constant map becomes zeros."""
    cam = cam.astype(jnp.float32)
    low = cam.min(axis=(1, 2), keepdims=True)
    span = cam.max(axis=(1, 2), keepdims=True) - low
    return (cam - low) / jnp.where(span > 0, span, 1)


@functools.partial(jax.jit, static_argnames=("size",))
def resize_cam(cam: jax.Array, size: tuple[int, int]) -> jax.Array:
    """(B, h, w) → (B, H, W) with size = (H, W); bilinear, half-pixel centres, no antialiasing."""
    return jax.image.resize(cam, (cam.shape[0], *size), "linear", antialias=False)


@functools.partial(jax.jit, static_argnames=("mode",))
def connected_component(mask: jax.Array, cam: jax.Array, mode: str) -> jax.Array:
    """Keeps one 8-connected component of each mask.

    Args:
      mask: (B, H, W) bool.
      cam: (B, H, W) float; read by mode 'peak' alone.
      mode: 'largest' keeps the component of most pixels, 'peak' the one that holds the highest CAM
        value within the mask, 'all' keeps every component. Ties go to the one that comes first in
        raster order.

    Returns:
      (B, H, W) bool; empty where the mask is empty.

    Raises:
      ValueError: another mode, or shapes that differ.
    """
    if mode not in COMPONENTS:
        raise ValueError(f"mode={mode!r}: expected one of {COMPONENTS}.")
    if mask.ndim != 3 or mask.shape != cam.shape:
        raise ValueError(
            f"mask {mask.shape} and cam {cam.shape}: expected one shape (B, H, W); "
            "resize the CAM first."
        )
    if mode == "all":
        return mask
    batch, height, width = mask.shape
    labels = _component_labels(mask).reshape(batch, height * width)
    if mode == "largest":
        sizes = jax.vmap(lambda x: jnp.zeros_like(x).at[x].add(1, mode="drop"))(labels)
        # A component is named by its first pixel, so argmax settles ties in raster order.
        chosen = jnp.argmax(sizes, axis=1)
    else:
        inside = jnp.where(mask, cam, -jnp.inf).reshape(labels.shape)
        peak = jnp.argmax(inside, axis=1)
        chosen = jnp.take_along_axis(labels, peak[:, None], axis=1)[:, 0]
    return mask & (labels == chosen[:, None]).reshape(mask.shape)


def _component_labels(mask: jax.Array) -> jax.Array:
    """(B, H, W) bool → int32: raster index of the first pixel of its component, H·W outside.

    Each label points at a pixel of the same component that comes no later. A round takes the least
    label among the neighbours, hands it to the pixel that the label points at, and follows the
    pointers. Few rounds suffice however a component winds: six for a spiral that fills 256×256.
    When one changes nothing, no pixel has a neighbour with a lesser label: the labels are final.
    """
    batch, height, width = mask.shape
    outside = height * width

    # vmap, not index arrays over the batch: a batch sharded over devices then stays where it is.
    @jax.vmap
    def offer(old, least):
        return old.at[old].min(least, mode="drop")

    @jax.vmap
    def follow(label):
        return label.at[label].get(mode="fill", fill_value=outside)

    def round_(state):
        old, _ = state
        least = _neighbour_minimum(old.reshape(mask.shape), outside)
        least = jnp.where(mask, least, outside).reshape(old.shape)
        # The offer reaches far pixels at once; without it a label walks a pixel a round.
        new = jnp.minimum(least, offer(old, least))
        for _ in range(3):
            new = follow(new)
        return new, jnp.any(new != old)

    index = jnp.arange(outside, dtype=jnp.int32)
    start = jnp.where(mask.reshape(batch, outside), index, outside)
    return lax.while_loop(lambda state: state[1], round_, (start, True))[0].reshape(mask.shape)


def _neighbour_minimum(x: jax.Array, fill: int) -> jax.Array:
    """Minimum over the 3×3 neighbourhood of (B, H, W), first along columns, then along rows."""
    for axis in (1, 2):
        length = x.shape[axis]
        pad = [(1, 1) if axis == i else (0, 0) for i in range(3)]
        padded = jnp.pad(x, pad, constant_values=fill)
        before = lax.slice_in_dim(padded, 0, length, axis=axis)
        after = lax.slice_in_dim(padded, 2, length + 2, axis=axis)
        x = jnp.minimum(x, jnp.minimum(before, after))
    return x


@jax.jit
def mask_to_box(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tight boxes around masks.

    Args:
      mask: (B, H, W) bool.

    Returns:
      Boxes (B, 4) float32 XYXY in pixels, maximum edge one past the last pixel, zeros where the
      mask is empty; and empty (B,) bool.
    """
    columns, rows = mask.any(axis=1), mask.any(axis=2)  # (B, W), (B, H)
    (x0, x1), (y0, y1) = _extent(columns), _extent(rows)
    empty = ~columns.any(axis=1)
    boxes = jnp.stack([x0, y0, x1, y1], axis=1).astype(jnp.float32)
    return jnp.where(empty[:, None], 0.0, boxes), empty


def _extent(occupied: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(B, N) bool → first occupied position and one past the last, (B,) int32 each."""
    first = jnp.argmax(occupied, axis=1)
    past = occupied.shape[1] - jnp.argmax(occupied[:, ::-1], axis=1)
    return first, past


def central_box(height: int, width: int) -> jax.Array:
    """(4,) float32 XYXY: the middle half of each side, the prompt of an image with no CAM."""
    return jnp.array([width / 4, height / 4, 3 * width / 4, 3 * height / 4], jnp.float32)


@functools.partial(jax.jit, static_argnames=("size", "threshold", "component"))
def cam_prompt(
    cam: jax.Array, size: tuple[int, int], threshold: float = 0.2, component: str = "largest"
) -> CamPrompt:
    """CAM → mask and box on the image's grid, with no gradient through any of them.

    The CAM is normalised, resized, and cut at `threshold`; one component is kept, and a tight box
    put around it.

    Args:
      cam: (B, h, w) float, from `grad_cam`; already normalised or not.
      size: (H, W) of the images.
      threshold: share of the peak from which a pixel counts, in (0, 1].
      component: mode of `connected_component`.

    Raises:
      ValueError: a threshold out of range, or an unknown component.
    """
    if not 0 < threshold <= 1:
        raise ValueError(
            f"threshold={threshold}: expected a share of the peak in (0, 1], such as 0.2."
        )
    cam = resize_cam(normalise_cam(lax.stop_gradient(cam)), size)
    mask = connected_component(cam >= threshold, cam, component)
    boxes, empty = mask_to_box(mask)
    boxes = jnp.where(empty[:, None], central_box(*size), boxes)
    return CamPrompt(cam, mask, boxes, empty)
