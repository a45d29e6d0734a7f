"""Windowing and normalisation."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from sammix_jax.config import default_config
from sammix_jax.data import paper
from sammix_jax.method.preprocess import scale_slices, to_rgb, window
from sammix_jax.models.sam.sam import PIXEL_MEAN, PIXEL_STD


def test_window():
    hu = jnp.array([-1000, -160, 40, 240, 3000], jnp.int16)
    np.testing.assert_allclose(window(hu, (-160.0, 240.0)), [0, 0, 0.5, 1, 1])


def inputs(scaling, window=(-160.0, 240.0)):
    return ml_collections.ConfigDict({"scaling": scaling, "window": window})


@pytest.mark.parametrize("compiled", [True, False])
def test_the_device_sees_the_authors_bits(compiled):
    scale = jax.jit(scale_slices, static_argnums=1) if compiled else scale_slices
    config = ml_collections.FrozenConfigDict(inputs("paper"))
    hu = np.random.default_rng(0).permutation(np.arange(-160, 241)).reshape(1, 401, 1)
    values = np.asarray(scale(jnp.asarray(hu, jnp.int16), config))
    assert values.dtype == np.float32 and values.shape == hu.shape
    authors = (hu.astype(np.float16) + 3055) / 8866
    assert authors.dtype == np.float16
    np.testing.assert_array_equal(
        values.view(np.uint32), authors.astype(np.float32).view(np.uint32)
    )


def test_hu_beyond_the_window_scale_as_its_ends():
    hu = jnp.array([[[-32768, -1024, 241, 32767]]], jnp.int16)
    low, high = paper.LEVELS[[0, -1]].astype(np.float32)
    np.testing.assert_array_equal(scale_slices(hu, inputs("paper")), [[[low, low, high, high]]])


def test_scaling_by_the_window():
    hu = jnp.array([[[-100, 0, 50, 100]]], jnp.int16)
    scaled = scale_slices(hu, inputs("window", (0.0, 100.0)))
    np.testing.assert_array_equal(scaled, [[[0.0, 0.0, 0.5, 1.0]]])
    with pytest.raises(ValueError, match=r"input\.scaling='none'"):
        scale_slices(hu, inputs("none"))


def test_normalisations():
    images = jnp.stack([jnp.linspace(0.2, 0.6, 16).reshape(4, 4), jnp.zeros((4, 4))])
    unit, minmax, sam = (np.asarray(to_rgb(images, n)) for n in ("unit", "minmax", "sam"))
    assert unit.shape == (2, 4, 4, 3)
    np.testing.assert_allclose(unit[..., 0], images)
    assert minmax[0].min() == 0 and minmax[0].max() == 1
    assert (minmax[1] == 0).all()  # a slice of air: no range to stretch, and no NaN
    expected = (np.asarray(images)[..., None] * 255 - PIXEL_MEAN) / PIXEL_STD
    np.testing.assert_allclose(sam, expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"input\.normalise"):
        to_rgb(images, "none")


def test_the_configs_window_becomes_the_unit_range():
    config = default_config()
    config.input.window = (-50.0, 150.0)
    hu = jnp.array([[[-160, -50, 0, 100, 150, 240]]], jnp.int16)
    np.testing.assert_allclose(scale_slices(hu, config.input), [[[0, 0, 0.25, 0.75, 1, 1]]])
    # The authors' scale knows its own window and no other.
    config.input.scaling = "paper"
    authors = (np.array([[[-160, -50, 0, 100, 150, 240]]], np.float16) + 3055) / 8866
    np.testing.assert_array_equal(scale_slices(hu, config.input), authors.astype(np.float32))
