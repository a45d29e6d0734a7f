"""One image at a time, prompted in pixels of the original image: SAM's predictor.

Source: Kirillov et al., "Segment Anything", ICCV 2023; `predictor.py` and `utils/transforms.py`
of facebookresearch/segment-anything, whose arithmetic this follows on images of any size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sammix_jax.models.sam.inputs import normalise, stack_images
from sammix_jax.models.sam.mask_decoder import MULTIMASK, SINGLE_MASK
from sammix_jax.models.sam.sam import Sam, postprocess_masks
from sammix_jax.models.sam.variants import SamVariant, get_variant

Size = tuple[int, int]  # H, W in pixels


@functools.partial(jax.jit, static_argnums=0)
def _encode(sam, params, squares, input_sizes):
    images = normalise(squares, input_sizes)
    return sam.apply({"params": params}, images, method=Sam.encode_image)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _decode(sam, params, embeddings, side, prompts):
    return sam.apply(
        {"params": params}, embeddings, input_size=(side, side), method=Sam.decode, **prompts
    )


_postprocess = jax.jit(postprocess_masks, static_argnums=(1, 2, 3))


class SamPredictor:
    """Encodes an image once, then answers prompts about it.

    `set_image`, `predict` and `reset_image` take and return what those of
    `segment_anything.SamPredictor` do. Each new number of points compiles the decoder once more,
    each new size of picture the resizing of the masks; the encoder is compiled once. For many
    prompts at once, give `features` to `predict_masks` as its `embeddings`.

    Attributes:
      sam: the model.
      params: its parameters, on the device.
      image_size: side of the square that the encoder sees, pixels.
      is_image_set: whether `predict` may be called.
      original_size, input_size: (H, W) of the current image before and after resizing.
      features: (1, h, w, C), the current image's embedding.
    """

    def __init__(
        self,
        sam: Sam | SamVariant | str,
        params: Mapping[str, Any],
        image_size: int | None = None,
    ) -> None:
        """Holds a model.

        Args:
          sam: the module, or the variant or its name for a model without LoRA.
          params: its parameter tree, with 'image_encoder', 'prompt_encoder' and 'mask_decoder'.
          image_size: side of the encoder's input in pixels, best that of the training; None takes
            the variant's native one.

        Raises:
          ValueError: unknown variant, parameters that are not those of this model, or an image size
            that is no multiple of the patch size.
        """
        self.sam = sam if isinstance(sam, Sam) else Sam(sam)
        sizes = get_variant(self.sam.variant)
        self.image_size = sizes.image_size if image_size is None else image_size
        if self.image_size < 1 or self.image_size % sizes.patch_size:
            raise ValueError(
                f"image_size is {self.image_size}; expected a multiple of the patch size, "
                f"{sizes.patch_size}."
            )
        _check_params(self.sam, params, self.image_size)
        self.params = jax.device_put(params)
        self.reset_image()

    def reset_image(self) -> None:
        """Forgets the current image."""
        self.is_image_set = False
        self.original_size: Size | None = None
        self.input_size: Size | None = None
        self.features: jax.Array | None = None

    def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
        """Encodes an image.

        Args:
          image: (H, W, 3) uint8, of any size.
          image_format: 'RGB' or 'BGR', the order of its channels.

        Raises:
          ValueError: another shape, type or format.
        """
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format is {image_format!r}; expected 'RGB' or 'BGR'.")
        image = np.asarray(image)
        self.reset_image()
        squares, input_sizes, _ = stack_images([image], self.image_size)
        if image_format == "BGR":
            squares = squares[..., ::-1]
        self.features = _encode(self.sam, self.params, squares, input_sizes)
        self.original_size = image.shape[:2]
        self.input_size = tuple(input_sizes[0].tolist())
        self.is_image_set = True

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Answers one prompt about the current image; its parts combine.

        Args:
          point_coords: (N, 2) pixels of the original image, x then y; needs `point_labels`.
          point_labels: (N,) integers: 1 inside the object, 0 outside, -1 padding.
          box: (4,) or (1, 4) pixels of the original image: x and y of the top left, then of the
            bottom right.
          mask_input: (1, 4h, 4w) logits, one of the `low_res_logits` of an earlier answer; 4h is
            256 for the official variants at their native size.
          multimask_output: M = 3 masks for an ambiguous prompt such as one point, otherwise M = 1.
          return_logits: return the masks' logits instead of thresholding them at 0.

        Returns:
          Three arrays of the caller's own.
          masks: (M, H, W) bool, or float32 with `return_logits`, on the original image.
          iou: (M,) float32, the estimated IoU of each mask.
          low_res_logits: (M, 4h, 4w) float32.

        Raises:
          RuntimeError: no image is set.
          ValueError: shapes or labels other than these, points without labels or the reverse, or
            coordinates that are not finite.
        """
        if not self.is_image_set:
            raise RuntimeError("No image is set: call set_image(image) before predict.")
        prompts = self._prompts(point_coords, point_labels, box, mask_input)
        logits, iou = _decode(self.sam, self.params, self.features, self.image_size, prompts)
        kept = MULTIMASK if multimask_output else SINGLE_MASK
        low_res_logits, iou = logits[0, 0, kept], iou[0, 0, kept]
        masks = _postprocess(
            low_res_logits, self.input_size, self.original_size, (self.image_size, self.image_size)
        )
        if not return_logits:
            masks = masks > 0
        return np.array(masks), np.array(iou), np.array(low_res_logits)

    def _prompts(self, point_coords, point_labels, box, mask_input) -> dict[str, jax.Array]:
        """Checks shapes; brings coordinates to the input; adds the axes B = 1 and P = 1."""
        low_side = 4 * self.features.shape[1]
        if np.shape(box) == (1, 4):
            box = np.reshape(box, 4)
        given = {
            "point_coords": (point_coords, ("N", 2)),
            "point_labels": (point_labels, ("N",)),
            "box": (box, (4,)),
            "mask_input": (mask_input, (1, low_side, low_side)),
        }
        for name, (value, shape) in given.items():
            if value is None:
                continue
            found = np.shape(value)
            n = found[0] if found else 0
            if found != tuple(n if length == "N" else length for length in shape):
                expected = str(shape).replace("'", "")
                raise ValueError(f"{name} has shape {found}; expected {expected}. {_FIX[name]}")
        if (point_coords is None) != (point_labels is None):
            raise ValueError("point_coords and point_labels go together: pass both or neither.")
        if point_coords is not None and len(point_coords) != len(point_labels):
            raise ValueError(
                f"{len(point_coords)} point_coords, but {len(point_labels)} point_labels: give "
                "every point one label."
            )

        if point_labels is not None and not np.isin(point_labels, (-1, 0, 1)).all():
            raise ValueError(
                f"point_labels are {np.asarray(point_labels).tolist()}. {_FIX['point_labels']}"
            )
        numbers = {"point_coords": point_coords, "box": box, "mask_input": mask_input}
        for name, value in numbers.items():
            if value is not None and not np.isfinite(np.asarray(value, np.float64)).all():
                raise ValueError(f"{name} holds NaN or infinity. {_FIX[name]}")

        # As the original does: scaled in float64, then rounded once to float32.
        ratio = np.divide(self.input_size, self.original_size)[::-1]
        prompts = {}
        if point_coords is not None:
            points = np.asarray(point_coords, np.float64) * ratio
            prompts["points"] = np.float32(points)[None, None]
            prompts["labels"] = np.asarray(point_labels, np.int32)[None, None]
        if box is not None:
            corners = np.asarray(box, np.float64).reshape(2, 2) * ratio
            prompts["boxes"] = np.float32(corners).reshape(1, 1, 4)
        if mask_input is not None:
            prompts["masks"] = np.asarray(mask_input, np.float32)[None]
        return prompts


_FIX = {
    "point_coords": "Give each point as x, y in pixels of the original image.",
    "point_labels": "Give each point 1 (inside), 0 (outside) or -1 (padding).",
    "box": (
        "Give one box as x0, y0, x1, y1; for several, give predictor.features as embeddings to "
        "predict_masks."
    ),
    "mask_input": "Pass one answer's low_res_logits[i : i + 1].",
}


def _check_params(sam: Sam, params: Mapping[str, Any], side: int) -> None:
    """Raises ValueError unless `params` has exactly the model's leaves."""
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    expected = jax.eval_shape(sam.init, jax.random.key(0), image)["params"]
    expected = traverse_util.flatten_dict(expected, sep="/")
    found = traverse_util.flatten_dict(dict(params), sep="/")
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    reshaped = sorted(
        f"{path} of {np.shape(found[path])}, not {expected[path].shape}"
        for path in expected.keys() & found.keys()
        if np.shape(found[path]) != expected[path].shape
    )
    if missing or unknown or reshaped:
        problems = [
            f"{len(paths)} {what} ({', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''})"
            for what, paths in (
                ("missing", missing),
                ("unknown", unknown),
                ("ill-shaped", reshaped),
            )
            if paths
        ]
        raise ValueError(
            f"The parameters are not those of {sam.variant} with lora_rank {sam.lora_rank}: "
            f"{'; '.join(problems)}. Pass the tree under 'params', choose the variant and LoRA "
            "rank that it was made with, or merge LoRA by sammix_jax.models.lora.merge_lora."
        )
