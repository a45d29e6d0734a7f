"""What SAM sees of a slice."""

import jax
import numpy as np
import pytest
from conftest import small_config

from sammix_jax.method.sam_mix import SamMix, sam_mix
from sammix_jax.systems.prompted_sam import PromptedSamSystem


@pytest.fixture
def config():
    config = small_config()
    config.input.normalise = "unit"
    return config


@pytest.fixture
def lines():
    """(1, 256, 256): one column in four is bright, where no centre of a larger pixel lies."""
    return np.zeros((1, 256, 256), np.float32) + (np.arange(256) % 4 == 0)


def test_fine_lines_are_averaged(config, lines):
    """In an input smaller than the slice they are a grey, and neither lost nor stripes."""
    system = PromptedSamSystem.of(config)
    inputs, side = system.model.inputs(lines), config.model.image_size
    assert inputs.shape == (1, side, side, 3)
    np.testing.assert_allclose(inputs[:, :, 1:-1], 0.25, atol=0.04)


def test_fine_lines_reach_sam_mix(config, lines):
    model = sam_mix(config)
    variables = model.init(jax.random.key(0), lines, method=SamMix.encode)
    seen = model.apply(variables, lines, method=SamMix.encode)
    black = model.apply(variables, 0 * lines, method=SamMix.encode)
    assert np.abs(seen - black).max() > 1e-3
