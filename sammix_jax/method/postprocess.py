"""What becomes of a scan's predictions once all slices have one; on the host."""

import numpy as np
from scipy import ndimage

COMPONENTS = ("all", "largest")


def keep_component(mask: np.ndarray, component: str) -> np.ndarray:
    """Keeps the largest component of a scan's mask, as an organ that is one piece allows.

    Args:
      mask: (D, H, W) bool, of all slices in order.
      component: "largest", in which voxels hang together by faces, edges and corners; "all" leaves
        everything.

    Returns:
      (D, H, W) bool.
    """
    if component == "all":
        return mask
    labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
    if count < 2:
        return mask
    sizes = np.bincount(labels.ravel())
    return labels == 1 + np.argmax(sizes[1:])  # 0 is outside


def rule_out(logits: np.ndarray, component: str) -> np.ndarray:
    """Turns the sign of logits that are above 0 and not of the component that is kept.

    Args:
      logits: (D, H, W) float32 of all slices in order.
      component: as for `keep_component`.
    """
    if component == "all":  # without a copy of every logit
        return logits
    inside = logits > 0
    return np.where(inside & ~keep_component(inside, component), -logits, logits)
