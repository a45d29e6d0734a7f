"""What becomes of a scan's predictions once all slices have one; on the host."""

import numpy as np
from scipy import ndimage

COMPONENTS = ("all", "largest")


def keep_component(logits: np.ndarray, component: str) -> np.ndarray:
    """Keeps the largest component of a scan's mask, as an organ that is one piece allows.

    Args:
      logits: (D, H, W) float32 of all slices in order; above 0 is inside.
      component: "largest" turns the sign of what is inside and not of the largest component, in
        which voxels hang together by faces, edges and corners; "all" leaves everything.

    Returns:
      (D, H, W) float32.
    """
    if component == "all":
        return logits
    inside = logits > 0
    labels, count = ndimage.label(inside, np.ones((3, 3, 3)))
    if count < 2:
        return logits
    sizes = np.bincount(labels.ravel())
    largest = 1 + np.argmax(sizes[1:])  # 0 is outside
    return np.where(inside & (labels != largest), -logits, logits)
