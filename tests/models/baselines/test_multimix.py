"""MultiMix against PyTorch, its saliency against a gradient of its own, and its bridge."""

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

from sammix_jax.models.baselines.multimix import MultiMix
from sammix_jax.models.baselines.unet import UNetEncoder

WIDTHS = (4, 5, 6, 7, 8)
SHALLOW = (3, 5, 6)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(5), (3, 32, 64, 2))


@pytest.fixture(scope="module")
def small():
    return jax.random.normal(jax.random.key(5), (3, 16, 24, 2))


@pytest.fixture(scope="module")
def variables(images):
    return networks.init(MultiMix(WIDTHS), images)


@pytest.fixture(scope="module")
def output(variables, images):
    return networks.jit(MultiMix(WIDTHS).apply)(variables, images)


@pytest.mark.parametrize("channels", [1, 3])
def test_parameters_and_shapes(channels):
    variables, output = networks.abstract(MultiMix(), (2, 64, 96, channels))
    unet = {1: 1_962_337, 3: 1_962_625}[channels]
    bridge, classifier = 9 * (channels + 1) * 128, 256 * 2 + 2
    assert networks.count(variables) == unet + bridge + classifier
    assert [x.shape for x in output] == [(2, 2), (2, 64, 96), (2, 64, 96)]
    assert all(x.dtype == jnp.float32 for x in output)


def test_saliency_is_the_gradient_of_the_top_logit(variables, images, output):
    encoder = UNetEncoder(WIDTHS, 0.25, jnp.float32)
    params = variables["params"]

    @networks.jit
    @jax.vmap
    def gradient(image):
        def top(image):
            maps = encoder.apply({"params": params["encoder"]}, image[None], None)[-1][0]
            h, w, d = maps.shape
            pooled = maps.reshape(h // 2, 2, w // 2, 2, d).max(axis=(1, 3)).mean(axis=(0, 1))
            return (pooled @ params["class_head"]["kernel"] + params["class_head"]["bias"]).max()

        return jax.grad(top)(image)

    expected = jnp.abs(gradient(images)).max(axis=-1)
    np.testing.assert_allclose(output.saliency, expected, atol=1e-4 * expected.max())
    assert expected.max() > 0


def test_saliency_takes_no_dropout(small):
    model = MultiMix(SHALLOW)
    variables = networks.init(model, small)
    keys = jax.random.split(jax.random.key(3), 3)
    trained = networks.jit(model.apply, static_argnums=2)(variables, small, True, keys)
    resting = networks.jit(model.apply)(variables, small)
    scale = resting.saliency.max()
    np.testing.assert_allclose(trained.saliency, resting.saliency, atol=1e-4 * scale)
    assert jnp.abs(trained.class_logits - resting.class_logits).max() > 1e-3


def test_a_slice_of_one_grey_has_no_saliency(small):
    """Behind one, each of the ten norms would multiply a pixel's gradient by 300."""
    images = small.at[1].set(0.25)
    model = MultiMix()
    images = jnp.pad(images[..., :1], ((0, 0), (0, 16), (0, 8), (0, 0)), mode="edge")
    variables = networks.init(model, images)
    output = networks.jit(model.apply)(variables, images)
    assert not output.saliency[1].any() and output.saliency[::2].any(axis=(1, 2)).all()
    assert all(jnp.isfinite(x).all() for x in output)


def test_mask_reads_the_saliency_but_sends_it_no_gradient(small):
    model = MultiMix(SHALLOW)
    variables = networks.init(model, small)

    def mask(head):
        params = variables["params"] | {"class_head": head}
        return model.apply({"params": params}, small).logits

    head = variables["params"]["class_head"]
    # The class head touches the mask through the saliency alone.
    louder, plain = (networks.jit(mask)(x) for x in (jax.tree.map(lambda x: 100 * x, head), head))
    assert jnp.abs(louder - plain).max() > 1e-3
    gradient = networks.jit(jax.grad(lambda head: mask(head).mean()))(head)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_gradient_reaches_every_parameter(small):
    model = MultiMix(SHALLOW, dropout=0.0)
    unreached = networks.without_gradient(model, networks.init(model, small), small)
    # A norm takes out what the bias of the convolution before it adds.
    assert all("/conv" in name and name.endswith("bias") for name in unreached)
    assert not any("head" in name for name in unreached)


def test_slices_keep_to_themselves(small):
    model = MultiMix(SHALLOW)
    networks.expect_slices_to_keep_to_themselves(model, networks.init(model, small), small)


def test_classifier_pools_once_more():
    with pytest.raises(ValueError, match="multiples of 32"):
        MultiMix().init(jax.random.key(0), jnp.zeros((1, 48, 64, 1)))


@pytest.mark.torch
def test_network_is_pytorchs(variables, images, output):
    """The forward pass and the saliency, written again with PyTorch's layers."""
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    params = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), variables["params"])

    def conv(x, layer, padding):
        return f.conv2d(x, layer["kernel"].permute(3, 2, 0, 1), layer["bias"], padding=padding)

    def double(x, block):
        for name in ("conv1", "conv2"):
            x = f.leaky_relu(f.instance_norm(conv(x, block[name], 1)), 0.2)
        return x

    def encode(x):
        maps = []
        for i in range(1, 6):
            x = double(x if i == 1 else f.max_pool2d(x, 2), params["encoder"][f"down{i}"])
            maps.append(x)
        pooled = f.max_pool2d(x, 2).mean((2, 3))
        return maps, pooled @ params["class_head"]["kernel"] + params["class_head"]["bias"]

    def resize(x, factor):
        return f.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=True)

    x = torch.tensor(np.asarray(images)).permute(0, 3, 1, 2).requires_grad_()
    maps, class_logits = encode(x)
    class_logits.max(1)[0].sum().backward()
    saliency = x.grad.abs().max(1, keepdim=True)[0]
    with torch.no_grad():
        bridge = resize(torch.cat([x, saliency], 1), 1 / 8)
        y = double(torch.cat([resize(maps[4], 2), maps[3], bridge], 1), params["decoder"]["up4"])
        for i in (3, 2, 1):
            y = torch.cat([resize(y, 2), maps[i - 1]], 1)
            y = double(y, params["decoder"][f"up{i}"])
        logits = conv(y, params["mask_head"]["conv"], 0)[:, 0]
    theirs = (class_logits.detach(), logits, saliency[:, 0])
    for ours, expected in zip(output, theirs, strict=True):
        expected = expected.numpy()
        np.testing.assert_allclose(ours, expected, atol=1e-3 * np.abs(expected).max())
