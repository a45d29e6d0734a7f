"""The authors' preprocessing, to the bit (arXiv 2412.08575 and their preprocessing script).

Of each scan the central slices; of each slice the HU clipped to the window, as int16, resized by
Pillow, then float16 and `(x + 3055) / 8866` in float16. The result lies in [0.327, 0.372] on 186
levels, about 2 HU apart, so a store keeps the resized int16 and `LEVELS` tells what it becomes.

Slices are (H, W) in canonical orientation. In which orientation the authors resized is not known:
transposed slices differ by a rounding of 1 HU, mirrored masks by up to one pixel of the scan.
"""

import math

import numpy as np
from PIL import Image

WINDOW = (-160, 240)  # HU, both ends included: centre 40, width 400
SIZE = 256
CENTRAL_FRACTION = 0.3


def _float16_scale(hu: np.ndarray) -> np.ndarray:
    # Neither constant is a float16: they round to 3056 and 8864.
    return (hu.astype(np.float16) + np.float16(3055)) / np.float16(8866)


LEVELS = _float16_scale(np.arange(WINDOW[0], WINDOW[1] + 1))  # (401,) float16, ascending


def central_slices(depth: int, fraction: float = CENTRAL_FRACTION) -> range:
    """Of `depth` slices the central `range(ceil(m - fm), floor(m + fm))`, m = (depth - 1) / 2."""
    middle = (depth - 1) / 2
    return range(math.ceil(middle - fraction * middle), math.floor(middle + fraction * middle))


def resize_image(hu: np.ndarray, size: int = SIZE) -> np.ndarray:
    """(H, W) int16 HU → (size, size) int16 HU in the window, bilinear with antialiasing.

    Pillow takes int16 as 32-bit integers and rounds after the rows and again after the columns.
    """
    clipped = np.clip(hu, *WINDOW).astype(np.int32)
    resized = Image.fromarray(clipped).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized).astype(np.int16)


def resize_mask(mask: np.ndarray, size: int = SIZE) -> np.ndarray:
    """(H, W) bool → (size, size) bool, nearest neighbour: small parts may vanish."""
    source = Image.fromarray(mask.astype(np.uint8))
    return np.asarray(source.resize((size, size), Image.Resampling.NEAREST)).astype(bool)


def scale(hu: np.ndarray) -> np.ndarray:
    """Integer HU in the window, any shape → float16, `(x + 3055) / 8866` in float16 arithmetic.

    Raises:
      ValueError: HU beyond the window.
    """
    low, high = WINDOW
    if hu.size and (hu.min() < low or hu.max() > high):
        raise ValueError(f"HU from {hu.min()} to {hu.max()}: expected {low} to {high}; clip first.")
    return LEVELS[hu - low]


def unscale(scaled: np.ndarray) -> np.ndarray:
    """Scaled values, any shape → the lowest HU that scales to the same bits, int16.

    Raises:
      ValueError: values that no HU of the window gives.
    """
    index = np.minimum(np.searchsorted(LEVELS, scaled), len(LEVELS) - 1)
    strange = LEVELS[index] != scaled  # NaN too
    if strange.any():
        raise ValueError(
            f"{np.unique(scaled[strange])[:5].tolist()}: expected values of (x + 3055) / 8866 in "
            f"float16, x in {WINDOW}; no HU gives these."
        )
    return (index + WINDOW[0]).astype(np.int16)
