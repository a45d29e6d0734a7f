"""By what a scan is known again, whatever its file's name, date and folder.

Both are of the whole scan in canonical orientation: it does not matter which slices of it a run
takes, and of what size.
"""

import hashlib

import numpy as np


def image_digest(hu: np.ndarray) -> str:
    """Of a scan's voxels alone, whatever its mask and affine.

    Args:
      hu: (D, H, W) int16.
    """
    return _digest(np.array(hu.shape, "<i8"), np.asarray(hu, "<i2"))


def label_digest(
    affine: np.ndarray, mask: np.ndarray, organ_pixels: np.ndarray, annotated: np.ndarray
) -> str:
    """Of a mask, and of where it lies.

    Args:
      affine: (4, 4) of the file.
      mask: (D, H, W) bool.
      organ_pixels: (D,) int: HDF5 files tell by themselves which slices show the organ.
      annotated: (D,) bool.
    """
    return _digest(
        np.array(mask.shape, "<i8"),
        np.asarray(affine, "<f8"),
        np.packbits(mask),
        np.asarray(organ_pixels, "<i8"),
        np.packbits(annotated),
    )


def _digest(*parts: np.ndarray) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(np.ascontiguousarray(part).data)
    return found.hexdigest()[:16]
