"""From a scan to its masks, whatever the network."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from sammix_jax.data.volumes import Volume
from sammix_jax.inference import predict_volume
from sammix_jax.systems.system import SlicePredictions


@pytest.mark.parametrize("component", ["all", "largest"])
def test_of_a_scans_mask_the_largest_component_may_be_kept(config, component):
    """Over batches, on the scan's own grid and on the slices' alike."""
    config.data.size, config.evaluate.batch, config.evaluate.component = 16, 2, component
    hu = np.zeros((5, 32, 32), np.int16)
    hu[:4, 4:12, 4:12] = hu[2, 20:26, 20:26] = 100

    def predict(variables, hu, truth):
        logits = {"none": jnp.where(hu > 50, 5.0, -5.0)}
        return SlicePredictions(None, None, None, None, logits)

    affine, orientation = np.diag([1.0, 1.0, 2.0, 1.0]), np.array([[0, 1], [1, 1], [2, 1]])
    volume = Volume(Path("scan.nii"), hu, (2.0, 1.0, 1.0), affine, orientation)
    found = predict_volume(predict, {"weight": jnp.zeros(1)}, volume, None, config)
    expected = hu > 50
    if component == "largest":
        expected[2, 20:26, 20:26] = False
    np.testing.assert_array_equal(found.masks["none"], expected)
    squares = found.slices.logits["none"] > 0
    np.testing.assert_array_equal(squares, expected[:, ::2, ::2])
