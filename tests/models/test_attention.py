"""Every way through the encoder's attention, held to the plain definition."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sam_cases import TINY, equations, normal, random_params

from sammix_jax.models.sam import image_encoder
from sammix_jax.models.sam.attention import attend, attend_fused, can_fuse, relative_embeddings
from sammix_jax.models.sam.image_encoder import Attention, ImageEncoder


def plain_attention(params, x, heads, window):
    """Attention as written down: pad, cut windows, add the bias, one query at a time."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = np.asarray(x, np.float64)
    b, h, w, c = x.shape
    d = c // heads
    side_h, side_w = (window, window) if window else (h, w)
    padded = np.pad(x, ((0, 0), (0, -h % side_h), (0, -w % side_w), (0, 0)))
    qkv = padded @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    out = np.zeros_like(padded)
    for i0 in range(0, padded.shape[1], side_h):
        for j0 in range(0, padded.shape[2], side_w):
            tile = qkv[:, i0 : i0 + side_h, j0 : j0 + side_w]
            tile = tile.reshape(b, side_h, side_w, 3, heads, d)
            q, k, v = (tile[:, :, :, third] for third in range(3))
            for i in range(side_h):
                for j in range(side_w):
                    query = q[:, i, j]
                    logits = np.einsum("bmd,bhwmd->bmhw", query, k) / np.sqrt(d)
                    row = params["rel_pos_h"][i - np.arange(side_h) + side_h - 1]
                    column = params["rel_pos_w"][j - np.arange(side_w) + side_w - 1]
                    logits += np.einsum("bmd,hd->bmh", query, row)[..., None]
                    logits += np.einsum("bmd,wd->bmw", query, column)[..., None, :]
                    weights = np.exp(logits - logits.max(axis=(2, 3), keepdims=True))
                    weights /= weights.sum(axis=(2, 3), keepdims=True)
                    value = np.einsum("bmhw,bhwmd->bmd", weights, v)
                    out[:, i0 + i, j0 + j] = value.reshape(b, c)
    return out[:, :h, :w] @ params["proj"]["kernel"] + params["proj"]["bias"]


@pytest.mark.parametrize("query_chunk", [1024, 24, 10], ids=["whole", "even", "uneven"])
@pytest.mark.parametrize("shape", [(7, 7), (4, 6)], ids=["square", "oblong"])
@pytest.mark.parametrize("window", [0, 3], ids=["global", "window"])
def test_every_attention_path_equals_the_plain_one(window, shape, query_chunk):
    # On the oblong grid the table of the global rows is one for 6, to be resized to 4.
    module = Attention(2, window, table_side=window or shape[1], query_chunk=query_chunk)
    x = normal(0, 2, *shape, 16)
    params = random_params(module, x)
    reference = dict(params)
    if not window:
        for axis, name in enumerate(("rel_pos_h", "rel_pos_w")):
            rows = 2 * shape[axis] - 1
            reference[name] = jax.image.resize(params[name], (rows, 8), "linear", antialias=False)
    expected = plain_attention(reference, x, heads=2, window=window)
    out = jax.jit(module.apply)({"params": params}, x)
    np.testing.assert_allclose(out, expected, atol=2e-6)


def attention_inputs():
    q, k, v = (normal(seed, 2, 6, 5, 2, 8) for seed in range(3))
    return q, k, v, normal(3, 11, 8), normal(4, 9, 8)


PATHS = {
    f"{how}-{chunks}": functools.partial(attend, query_chunk=size, fold=how == "folded")
    for how in ("folded", "added")
    for chunks, size in (("whole", 30), ("even", 10), ("uneven", 7))
}
# The kernel is a GPU's; what it is given can be computed anywhere.
PATHS["fused"] = functools.partial(attend_fused, implementation="xla")


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_every_path_and_its_gradient_equal_the_plain_one(path):
    def plain(q, k, v, table_h, table_w):
        rel_h = jnp.einsum("bhwmd,hkd->bmhwk", q, relative_embeddings(table_h, 6))
        rel_w = jnp.einsum("bhwmd,wkd->bmhwk", q, relative_embeddings(table_w, 5))
        logits = jnp.einsum("bhwmd,bijmd->bmhwij", q, k) / np.sqrt(8)
        logits += rel_h[..., :, None] + rel_w[..., None, :]
        weights = jax.nn.softmax(logits, axis=(-2, -1))
        return jnp.einsum("bmhwij,bijmd->bhwmd", weights, v)

    def value_and_gradient(function):
        def loss(inputs):
            out = function(*inputs)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, has_aux=True))(attention_inputs())

    ours, expected = value_and_gradient(path), value_and_gradient(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), ours, expected)


def device_of(platform, capability="", version="cuda 13000"):
    client = types.SimpleNamespace(platform_version=version)
    return types.SimpleNamespace(platform=platform, compute_capability=capability, client=client)


HOPPER = device_of("gpu", "9.0")


@pytest.mark.parametrize(
    ("device", "grid", "dtype", "fused"),
    [
        (HOPPER, 64, jnp.bfloat16, True),
        (HOPPER, 64, jnp.float32, False),
        (HOPPER, 97, jnp.bfloat16, False),
        (device_of("gpu", "10.3"), 32, jnp.bfloat16, True),
        (device_of("gpu", "10.3"), 64, jnp.bfloat16, False),
        (device_of("gpu", "7.5"), 14, jnp.bfloat16, False),
        (device_of("gpu", "8.0"), 32, jnp.float16, True),
        (device_of("gpu", "8.0"), 64, jnp.bfloat16, False),
        (device_of("gpu", "gfx942", "rocm 70000"), 14, jnp.bfloat16, False),
        (device_of("tpu", version="libtpu"), 14, jnp.bfloat16, False),
    ],
)
def test_fused_where_there_is_a_kernel(device, grid, dtype, fused, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert can_fuse(64, grid, grid, dtype) is fused


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN's kernel needs an NVIDIA GPU")
@pytest.mark.parametrize("side", [14, 64])
def test_the_kernel_and_its_gradient(side):
    if not can_fuse(64, side, side, jnp.bfloat16):
        pytest.skip("no kernel of this width on this GPU")
    q, k, v = (normal(seed, 1, side, side, 2, 64).astype(jnp.bfloat16) for seed in range(3))
    tables = normal(3, 2 * side - 1, 64), normal(4, 2 * side - 1, 64)

    def value_and_gradient(function):
        def loss(inputs):
            out = function(*inputs).astype(jnp.float32)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, has_aux=True))((q, k, v, *tables))

    ours, expected = value_and_gradient(attend_fused), value_and_gradient(attend)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)  # both round to bfloat16


def test_another_default_device_is_not_fused_for(monkeypatch):
    cpu = jax.local_devices(backend="cpu")[0]
    monkeypatch.setattr(
        jax, "local_devices", lambda backend="gpu": [HOPPER] if backend == "gpu" else [cpu]
    )
    assert can_fuse(64, 14, 14, jnp.bfloat16)
    for device in (cpu, "cpu"):
        with jax.default_device(device):
            assert not can_fuse(64, 14, 14, jnp.bfloat16)


def test_a_module_that_fuses_equals_one_that_does_not(monkeypatch):
    """Windows, padding and the order of heads, through the module that chooses."""
    module = Attention(2, 3, table_side=3)
    x = normal(0, 2, 4, 7, 16)
    params = {"params": random_params(module, x)}
    expected = module.apply(params, x)
    calls = []

    def fused(*inputs):
        calls.append(inputs)
        return attend_fused(*inputs, implementation="xla")

    monkeypatch.setattr(image_encoder, "can_fuse", lambda *_: True)
    monkeypatch.setattr(image_encoder, "attend_fused", fused)
    np.testing.assert_allclose(module.apply(params, x), expected, atol=2e-6)
    assert len(calls) == 1


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "added"])
def test_large_logits_stay_finite(fold):
    q, *rest = attention_inputs()
    out = attend(1e4 * q, *rest, fold=fold)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "added"])
def test_bfloat16_keeps_softmax_in_float32(fold):
    inputs = attention_inputs()
    rounded = [x.astype(jnp.bfloat16) for x in inputs]
    softmax = [
        eqn.outvars[0].aval.dtype
        for eqn in equations(jax.make_jaxpr(functools.partial(attend, fold=fold))(*rounded).jaxpr)
        if eqn.primitive.name in ("exp", "reduce_max", "reduce_sum", "div")
    ]
    assert len(softmax) >= 4 and set(softmax) == {jnp.dtype(jnp.float32)}
    out = attend(*rounded, fold=fold)
    assert out.dtype == jnp.bfloat16
    expected = attend(*(x.astype(jnp.float32) for x in rounded))
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.05)


def test_chunks_never_hold_all_logits():
    def loss(inputs, query_chunk):
        return jnp.sum(attend(*inputs, query_chunk=query_chunk))

    def holds_all(query_chunk):
        jaxpr = jax.make_jaxpr(jax.grad(loss), static_argnums=1)(attention_inputs(), query_chunk)
        sizes = [var.aval.size for eqn in equations(jaxpr.jaxpr) for var in eqn.outvars]
        return max(sizes) >= 2 * 2 * 30 * 30

    assert holds_all(30)
    assert not holds_all(6)


def test_relative_embeddings_index_query_minus_key():
    table = jnp.arange(7.0)[:, None]
    places = relative_embeddings(table, 4)[..., 0]
    assert places[0, 0] == places[3, 3] == 3
    assert places[3, 0] == 6
    assert places[0, 3] == 0


def test_remat_changes_nothing():
    sizes = dataclasses.replace(TINY, depth=1, global_blocks=(0,))
    images = normal(1, 1, 48, 80, 3)
    params = random_params(ImageEncoder(sizes), images)

    def loss(params, remat):
        encoder = ImageEncoder(sizes, remat=remat, query_chunk=20)
        return jnp.mean(encoder.apply({"params": params}, images) ** 2)

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain, remat = gradient(params, "none"), gradient(params, "blocks")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, remat)
