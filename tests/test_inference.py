"""From a scan to its masks, whatever the network."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from sammix_jax.data.volumes import Volume
from sammix_jax.inference import predict_volume
from sammix_jax.systems.system import SlicePredictions


@pytest.fixture
def masks_of(config):
    """`masks_of(component, logits_of)`: what a scan of five slices, organ at 100 HU and the rest at
    0, comes out as, with the mask on the slices' grid."""
    config.data.size, config.evaluate.batch = 16, 2
    hu = np.zeros((5, 32, 32), np.int16)
    hu[:4, 4:12, 4:12] = hu[2, 20:26, 20:26] = 100
    affine, orientation = np.diag([1.0, 1.0, 2.0, 1.0]), np.array([[0, 1], [1, 1], [2, 1]])
    volume = Volume(Path("scan.nii"), hu, (2.0, 1.0, 1.0), affine, orientation)

    def found(component, logits_of=lambda logits: logits):
        def predict(variables, hu, truth):
            logits = {"none": logits_of(jnp.where(hu > 50, 5.0, -5.0))}
            return SlicePredictions(logits)

        config.evaluate.component = component
        whole = predict_volume(predict, {"weight": jnp.zeros(1)}, volume, None, config)
        return whole.masks["none"], whole.slices.logits["none"] > 0

    return found


@pytest.mark.parametrize("component", ["all", "largest"])
def test_of_a_scans_mask_the_largest_component_may_be_kept(masks_of, component):
    """Over batches, on the scan's own grid and on the slices' alike."""
    expected = np.zeros((5, 32, 32), bool)
    expected[:4, 4:12, 4:12] = True
    expected[2, 20:26, 20:26] = component == "all"
    mask, squares = masks_of(component)
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(squares, expected[:, ::2, ::2])


def test_a_bridge_that_interpolation_breaks_holds_nothing(masks_of):
    """One piece on the slices' grid, by pixels that touch at their corners, may be two on the
    scan's; one is kept there too."""

    def bridged(logits):
        for i in range(6, 10):
            logits = logits.at[:, i, i].set(jnp.maximum(logits[:, i, i], 0.1))
        return logits

    mask, squares = masks_of("largest", bridged)
    assert squares[2, 6:13, 6:13].any() and squares[2, 11, 11]
    every, _ = masks_of("all", bridged)
    assert ndimage.label(every, np.ones((3, 3, 3)))[1] > 1
    assert ndimage.label(mask, np.ones((3, 3, 3)))[1] == 1
