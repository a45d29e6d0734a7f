"""Grad-CAM against its gradient, components against SciPy, and boxes at their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from sammix_jax.method import cam as cams


def reference_component(mask, cam, mode):
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    if count == 0 or mode == "all":
        return mask
    if mode == "largest":
        return labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    peak = np.argmax(np.where(mask, cam, -np.inf))
    return labels == labels.ravel()[peak]


def spiral(height, width):
    """A path one pixel wide that winds inwards with a gap of one pixel."""
    mask = np.pad(np.zeros((height + 2, width + 2), bool), 1, constant_values=True)
    row, column, down, right = 2, 2, 0, 1
    mask[row, column] = True
    turns = 0
    while turns < 2:
        ahead = [(row + i * down, column + i * right) for i in (1, 2)]
        if mask[ahead[0]] or mask[ahead[1]]:
            down, right, turns = right, -down, turns + 1
        else:
            (row, column), turns = ahead[0], 0
            mask[row, column] = True
    return mask[2:-2, 2:-2]


def check_components(masks, cam):
    for mode in cams.COMPONENTS:
        found = np.asarray(cams.connected_component(jnp.asarray(masks), jnp.asarray(cam), mode))
        for i, mask in enumerate(masks):
            expected = reference_component(mask, cam[i], mode)
            np.testing.assert_array_equal(found[i], expected, err_msg=f"{mode} {i}")


@pytest.mark.parametrize("target", [0, 1])
def test_closed_form_is_the_gradient(target):
    features = jax.random.normal(jax.random.key(0), (3, 5, 7, 16))
    kernel = jax.random.normal(jax.random.key(1), (16, 2))
    closed = cams.grad_cam(features, kernel, target)
    real = cams.grad_cam_by_gradient(lambda f: f.mean((1, 2)) @ kernel + 0.3, features, target)
    assert closed.shape == (3, 5, 7) and closed.dtype == jnp.float32
    assert closed.min() == 0 and closed.max() > 0
    np.testing.assert_allclose(closed, real, atol=1e-5, rtol=1e-5)


def test_gradient_form_takes_any_head():
    features = jax.random.normal(jax.random.key(0), (2, 4, 6, 8))

    def score(f):
        return jnp.tanh(f).sum((1, 2))

    weights = (1 / np.cosh(np.asarray(features)) ** 2).mean((1, 2))[:, 3]
    expected = np.maximum(features[..., 3] * weights[:, None, None], 0)
    found = jax.jit(lambda f: cams.grad_cam_by_gradient(score, f, 3))(features)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_normalise():
    cam = jnp.stack([jnp.arange(6.0).reshape(2, 3) - 2, jnp.full((2, 3), 7.0), jnp.zeros((2, 3))])
    found = cams.normalise_cam(cam)
    np.testing.assert_allclose(found[0], np.arange(6).reshape(2, 3) / 5)
    assert not found[1:].any()
    np.testing.assert_allclose(cams.normalise_cam(found), found)


def test_resize_is_bilinear_with_half_pixel_centres():
    cam = np.random.default_rng(0).random((2, 4, 3)).astype(np.float32)
    rows, columns = (np.arange(10) + 0.5) * 4 / 10 - 0.5, (np.arange(15) + 0.5) * 3 / 15 - 0.5
    grid = np.meshgrid(rows, columns, indexing="ij")
    expected = [ndimage.map_coordinates(c, grid, order=1, mode="nearest") for c in cam]
    np.testing.assert_allclose(cams.resize_cam(cam, (10, 15)), expected, atol=1e-6)


@pytest.mark.parametrize("size", [(16, 16), (13, 29), (40, 9)])
def test_components_of_noise(size):
    rng = np.random.default_rng(0)
    density = np.repeat([0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.95], 20)
    masks = rng.random((len(density), *size)) < density[:, None, None]
    check_components(masks, rng.random(masks.shape).astype(np.float32))


def test_components_of_blobs():
    rng = np.random.default_rng(1)
    noise = ndimage.gaussian_filter(rng.normal(size=(16, 96, 80)), (0, 4, 4))
    check_components(noise > 0.5 * noise.std(), noise.astype(np.float32))


def test_components_of_hard_shapes():
    height, width = 37, 52
    rows, columns = np.indices((height, width))
    winding = spiral(height, width)
    comb = (columns % 2 == 0) | (rows == height - 1)
    serpentine = (rows % 2 == 0) | (columns == np.where(rows % 4 == 1, width - 1, 0))
    one = (rows == 20) & (columns == 51)
    masks = np.stack(
        [
            np.zeros((height, width), bool),
            np.ones((height, width), bool),
            winding,
            winding[::-1, ::-1],
            ~winding,
            (rows + columns) % 2 == 0,  # one component only where diagonals join
            (rows % 2 == 0) & (columns % 2 == 0),  # all alike: the first wins
            comb,
            serpentine,
            rows == columns[:, ::-1],
            one,
        ]
    )
    assert ndimage.label(winding, np.ones((3, 3)))[1] == 1 and winding.sum() > 800
    check_components(masks, np.random.default_rng(2).random(masks.shape).astype(np.float32))


def test_component_of_long_spiral():
    mask = np.stack([spiral(256, 256), spiral(256, 256).T])
    check_components(mask, mask.astype(np.float32))


def test_peak_tie_takes_the_first():
    mask = jnp.zeros((1, 3, 7), bool).at[0, 1, 1].set(True).at[0, 1, 4:6].set(True)
    found = cams.connected_component(mask, jnp.ones((1, 3, 7)), "peak")
    np.testing.assert_array_equal(np.argwhere(found[0]), [[1, 1]])


def test_boxes():
    mask = np.zeros((4, 6, 9), bool)
    mask[0, 2:5, 3:4] = True
    mask[1, 0, 0] = mask[1, 5, 8] = True
    mask[2] = True
    boxes, empty = cams.mask_to_box(mask)
    assert boxes.dtype == jnp.float32
    np.testing.assert_array_equal(boxes, [[3, 2, 4, 5], [0, 0, 9, 6], [0, 0, 9, 6], [0, 0, 0, 0]])
    np.testing.assert_array_equal(empty, [False, False, False, True])


def test_prompt():
    cam = np.zeros((3, 4, 6), np.float32)
    cam[0, 1, 1:3] = 2.0  # the larger blob
    cam[0, 3, 5] = 3.0  # the peak
    cam[1] = 5.0  # constant: nothing stands out
    prompt = cams.cam_prompt(cam, (32, 48))
    resized = np.asarray(cams.resize_cam(cams.normalise_cam(cam), (32, 48)))
    np.testing.assert_array_equal(prompt.cam, resized)
    expected = reference_component(resized[0] >= 0.2, resized[0], "largest")
    np.testing.assert_array_equal(prompt.mask[0], expected)
    rows, columns = np.nonzero(expected)
    np.testing.assert_array_equal(
        prompt.box[0], [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    )
    assert not prompt.mask[1:].any()
    np.testing.assert_array_equal(prompt.box[1:], [[12, 8, 36, 24]] * 2)
    np.testing.assert_array_equal(prompt.empty, [False, True, True])

    peak = cams.cam_prompt(cam, (32, 48), component="peak")
    assert peak.mask[0, 31, 47] and not peak.mask[0, 12, 12]
    both = cams.cam_prompt(cam, (32, 48), component="all")
    np.testing.assert_array_equal(both.mask[0], resized[0] >= 0.2)


def test_prompt_passes_no_gradient_and_takes_an_empty_batch():
    def total(cam):
        prompt = cams.cam_prompt(cam, (16, 24))
        return prompt.cam.sum() + prompt.box.sum()

    cam = jax.random.uniform(jax.random.key(0), (2, 4, 6))
    assert not jax.grad(total)(cam).any()
    assert cams.cam_prompt(cam[:0], (16, 24)).box.shape == (0, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cams.grad_cam(jnp.ones((1, 2, 2, 3)), jnp.ones((4, 2)), 1), "head_kernel"),
        (lambda: cams.grad_cam(jnp.ones((1, 2, 2, 4)), jnp.ones((4, 2)), 2), "target=2"),
        (lambda: cams.cam_prompt(jnp.ones((1, 2, 2)), (8, 8), threshold=0.0), "threshold=0.0"),
        (lambda: cams.cam_prompt(jnp.ones((1, 2, 2)), (8, 8), component="best"), "mode='best'"),
        (
            lambda: cams.connected_component(
                jnp.ones((1, 8, 8), bool), jnp.ones((1, 2, 2)), "peak"
            ),
            "resize the CAM",
        ),
    ],
)
def test_rejections_name_the_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_plain_map_keeps_negative_evidence():
    """Where everything speaks against the class, Grad-CAM finds nothing and the plain map does."""
    features = jax.random.uniform(jax.random.key(0), (2, 4, 6, 8), minval=0.1)
    kernel = jax.random.normal(jax.random.key(1), (8, 2)).at[:, 1].set(-1.0)
    plain, grad = (method(features, kernel, 1) for method in (cams.plain_cam, cams.grad_cam))
    np.testing.assert_allclose(plain, -features.sum(-1) / 24, rtol=1e-5)
    assert float(plain.max()) < 0 and not grad.any()
    assert cams.cam_prompt(grad, (32, 48)).empty.all()
    found = cams.cam_prompt(plain, (32, 48))
    assert not found.empty.any() and found.mask.any((1, 2)).all()

    mixed = cams.plain_cam(features - 0.5, kernel, 0)
    assert float(mixed.min()) < 0 < float(mixed.max())
    np.testing.assert_array_equal(jnp.maximum(mixed, 0), cams.grad_cam(features - 0.5, kernel, 0))


@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.9])
def test_the_threshold_is_a_share_of_the_peak(threshold):
    cam = 7 * jax.random.uniform(jax.random.key(0), (2, 4, 6))
    prompt = cams.cam_prompt(cam, (8, 12), threshold, "all")
    resized = cams.resize_cam(cams.normalise_cam(cam), (8, 12))
    np.testing.assert_array_equal(prompt.mask, resized >= threshold)
    assert prompt.mask.any() and not prompt.mask.all()
