"""The shared layers against NumPy and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sammix_jax.models.baselines.layers import (
    InstanceNorm,
    dropout,
    dropout_keys,
    expect_images,
    shrink,
    upsample,
)


@pytest.fixture
def maps():
    return jax.random.normal(jax.random.key(0), (2, 16, 24, 3))


def test_instance_norm(maps):
    x = np.asarray(maps, np.float64) * 3 + 7
    expected = (x - x.mean((1, 2), keepdims=True)) / np.sqrt(x.var((1, 2), keepdims=True) + 1e-5)
    norm = InstanceNorm(use_bias=False, use_scale=False)
    np.testing.assert_allclose(norm.apply({}, jnp.asarray(x)), expected, atol=1e-5)
    affine = {"params": {"scale": jnp.array([1.0, 2, 3]), "bias": jnp.array([4.0, 5, 6])}}
    expected = expected * np.array([1, 2, 3]) + np.array([4, 5, 6])
    np.testing.assert_allclose(InstanceNorm().apply(affine, jnp.asarray(x)), expected, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("shape", [(16, 24), (1, 3), (2, 1)])
def test_upsample_is_pytorchs_with_aligned_corners(shape):
    torch = pytest.importorskip("torch")
    x = jax.random.normal(jax.random.key(0), (2, *shape, 3))
    theirs = torch.nn.functional.interpolate(
        torch.tensor(np.asarray(x)).permute(0, 3, 1, 2),
        scale_factor=2,
        mode="bilinear",
        align_corners=True,
    )
    np.testing.assert_allclose(upsample(x), theirs.permute(0, 2, 3, 1), atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("factor", [2, 8])
def test_shrink_is_pytorchs_with_aligned_corners(maps, factor):
    torch = pytest.importorskip("torch")
    theirs = torch.nn.functional.interpolate(
        torch.tensor(np.asarray(maps)).permute(0, 3, 1, 2),
        scale_factor=1 / factor,
        mode="bilinear",
        align_corners=True,
    )
    np.testing.assert_allclose(shrink(maps, factor), theirs.permute(0, 2, 3, 1), atol=1e-5)


def test_dropout_zeroes_a_share_and_scales_the_rest():
    keys = jax.random.split(jax.random.key(0), 4)
    dropped = dropout(jnp.ones((4, 50, 60, 3)), 0.25, keys, 0)
    np.testing.assert_allclose(jnp.unique(dropped), [0, 1 / 0.75], rtol=1e-6)
    assert abs(float((dropped == 0).mean()) - 0.25) < 0.01


def test_dropout_belongs_to_the_slice_and_the_layer():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jnp.ones((3, 8, 8, 2))
    whole = dropout(x, 0.5, keys, 1)
    for i in range(3):
        np.testing.assert_array_equal(whole[i], dropout(x[i : i + 1], 0.5, keys[i : i + 1], 1)[0])
    assert (whole[0] != whole[1]).any() and (whole[1] != whole[2]).any()
    assert (whole != dropout(x, 0.5, keys, 2)).any()
    assert dropout(x, 0.5, None, 1) is x


def test_dropout_asks_for_keys_only_where_it_is_at_work():
    keys = jax.random.split(jax.random.key(0), 3)
    assert dropout_keys(keys, True, 0.5) is keys
    assert dropout_keys(keys, False, 0.5) is None and dropout_keys(None, True, 0.0) is None
    with pytest.raises(ValueError, match="a key for each slice"):
        dropout_keys(None, True, 0.5)


@pytest.mark.parametrize("shape", [(16, 16, 3), (1, 16, 24, 1), (1, 24, 16, 1), (1, 0, 16, 1)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="multiples of 16"):
        expect_images(jnp.zeros(shape), 16)
