"""Which slices of a scan the model sees, and how they lie in its squares."""

import dataclasses
import math

import numpy as np
from PIL import Image

from sammix_jax.data import paper

AIR_HU = -1024
RESIZES = ("fit", "stretch", "paper")


def kept_slices(depth: int, central_fraction: float, slice_range: tuple[float, float]) -> range:
    """Which of a scan's slices are kept.

    Args:
      depth: how many it has.
      central_fraction: below 1, the authors' central slices; 1 leaves the choice to `slice_range`.
      slice_range: (start, stop) as fractions of the depth, from the feet up; slices that lie only
        partly inside are kept too.
    """
    if central_fraction < 1:
        return paper.central_slices(depth, central_fraction)
    # Rounded, or 0.55 * 100 = 55.00000000000001 would take in another slice.
    start, stop = (round(end * depth, 6) for end in slice_range)
    return range(max(0, math.floor(start)), min(depth, math.ceil(stop)))


@dataclasses.dataclass(frozen=True)
class SliceGeometry:
    """Where a slice of a scan lies in the square store slice, in pixels of the store.

    Attributes:
      shape: (H, W) of the scan's slices.
      size: side of the square store slice.
      top, left, height, width: the part of the square that the slice fills; the rest is air.
      resize: how it was made, one of `RESIZES`; `"paper"` is the authors' arithmetic.
    """

    shape: tuple[int, int]
    size: int
    top: int
    left: int
    height: int
    width: int
    resize: str

    def image_to_square(self, image: np.ndarray) -> np.ndarray:
        """(H, W) int16 HU → (size, size) int16 HU, bilinear with antialiasing, padded with air.

        With `resize="paper"` HU are clipped to `paper.WINDOW` first.
        """
        if self.resize == "paper":
            return paper.resize_image(image, self.size)
        square = np.full((self.size, self.size), AIR_HU, np.int16)
        resized = _resize(image, (self.height, self.width))
        square[self._filled] = np.clip(np.rint(resized), -32768, 32767)
        return square

    def mask_to_square(self, mask: np.ndarray) -> np.ndarray:
        """(H, W) bool → (size, size) bool: a pixel is inside where at least half of it is.

        With `resize="paper"` it is inside where the nearest pixel of the scan is.
        """
        if self.resize == "paper":
            return paper.resize_mask(mask, self.size)
        square = np.zeros((self.size, self.size), bool)
        square[self._filled] = _resize(mask, (self.height, self.width)) >= 0.5
        return square

    def logits_to_scan(self, logits: np.ndarray) -> np.ndarray:
        """(size, size) float logits → (H, W) float32, bilinear."""
        return _resize(logits[self._filled], self.shape)

    @property
    def _filled(self) -> tuple[slice, slice]:
        rows = slice(self.top, self.top + self.height)
        return rows, slice(self.left, self.left + self.width)


def slice_geometry(
    shape: tuple[int, int], spacing: tuple[float, float], size: int, resize: str
) -> SliceGeometry:
    """The geometry for a scan's slices.

    Args:
      shape: (H, W) of the slices in pixels.
      spacing: (H, W) pixel size in mm.
      size: side of the square.
      resize: `"fit"` keeps the body's proportions (pixels become square in mm, the longer side
        fills the square, the rest is padded evenly); `"stretch"` fills the square;
        `"paper"` fills it in the authors' arithmetic, which clips HU and loses small masks.

    Raises:
      ValueError: no such resize.
    """
    if resize in ("stretch", "paper"):
        return SliceGeometry(shape, size, 0, 0, size, size, resize)
    if resize != "fit":
        raise ValueError(f"resize={resize!r}: expected one of {RESIZES}.")
    extent = np.multiply(shape, spacing)
    height, width = (int(n) for n in np.maximum(1, np.rint(size * extent / extent.max())))
    top, left = (size - height) // 2, (size - width) // 2
    return SliceGeometry(shape, size, top, left, height, width, resize)


def _resize(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Bilinear with half-pixel centres; antialiased where it shrinks. Returns float32."""
    height, width = shape
    source = Image.fromarray(np.ascontiguousarray(image, np.float32))
    return np.asarray(source.resize((width, height), Image.Resampling.BILINEAR))
