"""Both U-Nets: pinned counts, shapes, gradients, and the authors' form against PyTorch."""

import functools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

from sammix_jax.models.baselines.unet import (
    NnUnet2d,
    UNet,
    deep_supervision_weights,
    nnunet_widths,
)

SMALL = (3, 5, 6)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(5), (3, 16, 24, 2))


@pytest.mark.parametrize(("channels", "parameters"), [(1, 1_962_337), (3, 1_962_625)])
def test_unet_has_the_authors_parameters(channels, parameters):
    variables, output = networks.abstract(UNet(), (2, 64, 96, channels))
    assert set(variables) == {"params"}
    assert networks.count(variables) == parameters
    assert output.logits.shape == (2, 64, 96) and output.logits.dtype == jnp.float32
    assert output.deep == ()


def expect_biases_alone_without_gradient(model, images):
    """A norm takes out what the bias of the convolution before it adds."""
    unreached = networks.without_gradient(model, networks.init(model, images), images)
    assert {name for name in unreached if "/conv" not in name or "head" in name} == set()
    assert all(name.endswith("bias") for name in unreached)


def test_unet_gradient_reaches_every_parameter(images):
    expect_biases_alone_without_gradient(UNet(SMALL, dropout=0.0), images)


def test_unet_slices_keep_to_themselves(images):
    model = UNet(SMALL)
    networks.expect_slices_to_keep_to_themselves(model, networks.init(model, images), images)


def test_dropout_rests_outside_training(images):
    variables = networks.init(UNet(SMALL), images)
    resting = networks.jit(UNet(SMALL).apply)(variables, images).logits
    never = networks.jit(UNet(SMALL, dropout=0.0).apply, static_argnums=2)(variables, images, True)
    np.testing.assert_allclose(resting, never.logits, atol=1e-5)
    with pytest.raises(ValueError, match="key for each slice"):
        UNet(SMALL).apply(variables, images, True)


def test_unet_in_bfloat16(images):
    variables = networks.init(UNet(SMALL), images)
    full = networks.jit(UNet(SMALL).apply)(variables, images).logits
    half = networks.jit(UNet(SMALL, dtype=jnp.bfloat16).apply)(variables, images).logits
    assert half.dtype == jnp.float32
    assert 0 < jnp.abs(half - full).mean() < 0.05 * jnp.abs(full).mean()


def test_nnunet_at_128_pixels():
    model = NnUnet2d(nnunet_widths(128, 128))
    variables, output = networks.abstract(model, (2, 128, 128, 3), train=True)
    assert networks.count(variables) == 20_618_148
    # Decoder resolutions are 128 to 8; 8 is not supervised.
    assert output.logits.shape == (2, 128, 128)
    assert [x.shape for x in output.deep] == [(2, 64, 64), (2, 32, 32), (2, 16, 16)]
    assert networks.abstract(model, (2, 128, 128, 3))[1].deep == ()


def test_nnunet_gradient_reaches_every_parameter(images):
    expect_biases_alone_without_gradient(NnUnet2d((4, 5, 6)), images)


def test_nnunet_begins_as_pytorch_would():
    """The spread of He's initialisation by the fan in that PyTorch counts of each kernel."""
    model, image = NnUnet2d((64, 128, 256)), jnp.zeros((1, 16, 16, 1))
    params = networks.jit(model.init)(jax.random.key(0), image)["params"]
    fans = {
        ("encoder3", "conv1"): 9 * 128,
        ("upsample2",): 4 * 128,  # of 256 → 128: there (in, out, 2, 2), whose second axis counts
        ("head1", "conv"): 64,
    }
    for path, fan in fans.items():
        kernel = functools.reduce(lambda tree, name: tree[name], path, params)["kernel"]
        spread = float(jnp.sqrt(jnp.square(kernel).mean()))
        samples = kernel.size
        assert spread == pytest.approx(np.sqrt(2 / 1.0001 / fan), rel=4 / np.sqrt(2 * samples))


def nnunet_parameters(widths, channels):
    """nnU-Net's own layers, counted one by one."""
    conv = lambda a, b: 9 * a * b + b + 2 * b  # noqa: E731  convolution, bias and affine norm
    total = sum(
        conv(a, b) + conv(b, b) for a, b in zip((channels, *widths[:-1]), widths, strict=True)
    )
    for below, here in zip(widths[1:], widths[:-1], strict=True):
        total += 4 * below * here + here + conv(2 * here, here) + conv(here, here)
    return total + sum(width + 1 for width in widths[:-2])  # heads, less that of the coarsest


@pytest.mark.parametrize("size", [(64, 96), (128, 128), (256, 256)])
def test_nnunet_layers(size):
    widths = nnunet_widths(*size)
    variables, _ = networks.abstract(NnUnet2d(widths), (1, *size, 1))
    assert networks.count(variables) == nnunet_parameters(widths, 1)


def test_nnunet_plans():
    assert nnunet_widths(256, 256) == (32, 64, 128, 256, 512, 512, 512)
    assert nnunet_widths(64, 128) == (32, 64, 128, 256, 512)  # 64 → 4
    assert nnunet_widths(72, 72) == (32, 64, 128, 256)  # 9 is odd
    assert nnunet_widths(7, 7) == (32,)


def test_deep_supervision_weights():
    assert deep_supervision_weights(1) == (1.0,)
    np.testing.assert_allclose(deep_supervision_weights(3), [4 / 7, 2 / 7, 1 / 7])
