"""TransU-Net: the published count, its parts, and the small variant's behaviour."""

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

from sammix_jax.models.baselines.transunet import (
    VARIANTS,
    Bottleneck,
    ResNetV2,
    StandardisedConv,
    TransUNet,
)


def official_parameters(classes, side):
    """R50-ViT-B_16 of Beckschen/TransUNet at `side` pixels, counted layer by layer."""
    total = 3 * 64 * 49 + 2 * 64  # root
    before = 64
    for stage, units in enumerate((3, 4, 9)):
        width, out = 64 * 2**stage, 256 * 2**stage
        for unit in range(units):
            total += before * width + 9 * width**2 + width * out + 2 * (2 * width + out)
            total += before * out + 2 * out if unit == 0 else 0
            before = out
    total += 1024 * 768 + 768 + (side // 16) ** 2 * 768  # patch and position embeddings
    layer = 4 * (768**2 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    total += 12 * layer + 2 * 768
    total += 9 * 768 * 512 + 2 * 512
    for into, out in ((512 + 512, 256), (256 + 256, 128), (128 + 64, 64), (64, 16)):
        total += 9 * out * (into + out) + 4 * out
    return total + classes * (9 * 16 + 1)


def test_the_published_count():
    # The published network has 105.28 M with nine classes at 224 pixels; one class has 1,160 less.
    assert official_parameters(9, 224) == 105_277_081
    model = TransUNet("r50_vit_b16", 224)
    variables, output = networks.abstract(model, (2, 224, 224, 3))
    assert networks.count(variables["params"]) == official_parameters(1, 224) == 105_275_921
    assert output.logits.shape == (2, 224, 224) and output.logits.dtype == jnp.float32
    variables, _ = networks.abstract(TransUNet("r50_vit_b16", 256), (1, 256, 256, 1))
    assert networks.count(variables["params"]) == official_parameters(1, 256) == 105_322_001


def test_maps_of_the_resnet():
    model = ResNetV2(VARIANTS["r50_vit_b16"], jnp.float32)
    images = jax.ShapeDtypeStruct((1, 224, 256, 3), jnp.float32)
    x, skips = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0], images)
    assert x.shape == (1, 14, 16, 1024)
    assert [s.shape[1:] for s in skips] == [(28, 32, 512), (56, 64, 256), (112, 128, 64)]


def test_mini_at_128_pixels():
    variables, output = networks.abstract(TransUNet("mini", 128), (2, 128, 128, 3))
    assert networks.count(variables["params"]) == 2_950_129
    assert output.logits.shape == (2, 128, 128) and output.deep == ()


def standardised(kernel):
    kernel = np.asarray(kernel, np.float64)
    axes = (0, 1, 2)
    return (kernel - kernel.mean(axes)) / np.sqrt(kernel.var(axes) + 1e-5)


def test_standardised_conv():
    x = jax.random.normal(jax.random.key(0), (1, 6, 8, 3))
    model = StandardisedConv(4, 3, 2, jnp.float32)
    variables = model.init(jax.random.key(1), x)
    kernel = standardised(variables["params"]["kernel"])
    padded = np.pad(np.asarray(x[0]), ((1, 1), (1, 1), (0, 0)))
    expected = [
        [np.einsum("hwc,hwcd->d", padded[r : r + 3, c : c + 3], kernel) for c in (0, 2, 4, 6)]
        for r in (0, 2, 4)
    ]
    np.testing.assert_allclose(model.apply(variables, x)[0], expected, atol=1e-4)


@pytest.mark.torch
def test_bottleneck_is_pytorchs():
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    x = jax.random.normal(jax.random.key(0), (2, 9, 12, 6))
    model = Bottleneck(width=4, stride=2, groups=2, dtype=jnp.float32)
    variables = networks.init(model, x)
    params = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), variables["params"])

    def conv(x, name, stride=1):
        kernel = torch.tensor(standardised(params[name]["kernel"]), dtype=torch.float32)
        pad = kernel.shape[0] // 2
        return f.conv2d(x, kernel.permute(3, 2, 0, 1), stride=stride, padding=pad)

    def norm(x, name, groups, eps=1e-6):
        return f.group_norm(x, groups, params[name]["scale"], params[name]["bias"], eps)

    y = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)
    shortcut = norm(conv(y, "projection", 2), "projection_norm", 16, 1e-5)
    y = f.relu(norm(conv(y, "conv1"), "norm1", 2))
    y = f.relu(norm(conv(y, "conv2", 2), "norm2", 2))
    y = f.relu(norm(conv(y, "conv3"), "norm3", 2) + shortcut)
    found = networks.jit(model.apply)(variables, x)
    np.testing.assert_allclose(found, y.permute(0, 2, 3, 1), atol=1e-4)


TINY = VARIANTS["mini"]._replace(
    width=8, groups=4, hidden=12, mlp=16, layers=1, head_width=9, decoder=(8, 7, 6, 5)
)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(5), (3, 32, 48, 1))


@pytest.fixture(scope="module")
def tiny():
    return TransUNet(TINY, (32, 48))


@pytest.fixture(scope="module")
def variables(tiny, images):
    return networks.init(tiny, images)


def test_skip_at_a_quarter_is_padded(variables, images):
    model = ResNetV2(TINY, jnp.float32)
    resnet = {"params": variables["params"]["resnet"]}
    rgb = jnp.repeat(images, 3, axis=-1)
    _, (_, quarter, _) = networks.jit(model.apply)(resnet, rgb)
    assert quarter.shape == (3, 8, 12, 32)
    assert not quarter[:, -1].any() and not quarter[:, :, -1].any()
    assert quarter[:, -2].any() and quarter[:, :, -2].any()


def test_gradient_reaches_every_parameter(tiny, variables, images):
    unreached = networks.without_gradient(tiny.clone(dropout=0.0), variables, images)
    # The softmax takes out what the keys' bias adds to all logits of a query.
    assert {name for name in unreached if not name.endswith("attention/key/bias")} == set()


def test_slices_keep_to_themselves(tiny, variables, images):
    networks.expect_slices_to_keep_to_themselves(tiny, variables, images)


def test_batch_norm_follows_train(tiny, variables, images):
    keys = jax.random.split(jax.random.key(3), 3)
    apply = networks.jit(tiny.apply, static_argnums=2, static_argnames="mutable")
    _, updates = apply(variables, images, True, keys, mutable=("batch_stats",))
    _, kept = apply(variables, images, False, None, mutable=("batch_stats",))
    old, new = (jax.tree.leaves(x["batch_stats"]) for x in (variables, updates))
    assert all((a != b).any() for a, b in zip(old, new, strict=True))
    still = jax.tree.leaves(kept["batch_stats"])
    assert all((a == b).all() for a, b in zip(old, still, strict=True))


def test_grey_is_repeated(tiny, variables, images):
    apply = networks.jit(lambda v, a, b: (tiny.apply(v, a).logits, tiny.apply(v, b).logits))
    grey, rgb = apply(variables, images, jnp.repeat(images, 3, axis=-1))
    np.testing.assert_allclose(grey, rgb, atol=1e-5)


def test_wrong_input_is_refused():
    images = jnp.zeros((1, 64, 64, 3))
    with pytest.raises(ValueError, match="expected one of"):
        TransUNet("vit", 64).init(jax.random.key(0), images)
    with pytest.raises(ValueError, match=r"\(B, 128, 96, 1 or 3\)"):
        TransUNet("mini", (128, 96)).init(jax.random.key(0), images)
    with pytest.raises(ValueError, match="multiples of 16"):
        TransUNet("mini", 72).init(jax.random.key(0), jnp.zeros((1, 72, 72, 3)))
