"""The largest component of a scan's mask."""

import numpy as np
import pytest

from sammix_jax.method.postprocess import keep_component, rule_out


@pytest.fixture
def logits():
    """A bar through three slices that bends by a corner; a larger square in one slice alone, and a
    speck beside it."""
    logits = np.full((4, 12, 12), -2.0, np.float32)
    logits[0, 1:4, 1:4] = logits[1, 4:7, 4:7] = logits[2, 4:7, 4:7] = 3.0
    logits[3, 0:5, 8:12] = 4.0
    logits[3, 9, 9] = 5.0
    return logits


def test_the_largest_is_so_in_3d(logits):
    kept = rule_out(logits, "largest")
    np.testing.assert_array_equal(kept[:3], logits[:3])  # 27 voxels
    np.testing.assert_array_equal(kept[3], -np.abs(logits[3]))  # 20 and 1
    assert kept.dtype == np.float32
    np.testing.assert_array_equal(keep_component(logits > 0, "largest"), kept > 0)


def test_what_is_one_piece_or_none_is_left(logits):
    np.testing.assert_array_equal(rule_out(logits, "all"), logits)
    np.testing.assert_array_equal(keep_component(logits > 0, "all"), logits > 0)
    for whole in (logits[:3], np.full((2, 3, 3), -1.0, np.float32)):
        np.testing.assert_array_equal(rule_out(whole, "largest"), whole)
        np.testing.assert_array_equal(keep_component(whole > 0, "largest"), whole > 0)
