"""Windowing, normalisation and augmentation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sammix_jax.models.sam.sam import PIXEL_MEAN, PIXEL_STD
from sammix_jax.preprocess import augment, to_rgb, window


def test_window():
    hu = jnp.array([-1000, -160, 40, 240, 3000], jnp.int16)
    np.testing.assert_allclose(window(hu, (-160.0, 240.0)), [0, 0, 0.5, 1, 1])


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


def squares(count=4, size=48):
    images = np.zeros((count, size, size), np.float32)
    images[:, 14:30, 18:40] = 1
    return jnp.asarray(images)


def test_masks_move_with_their_images():
    images = squares() * 0.6 + 0.2
    masks = squares()[:3]
    moved, moved_masks = augment(images, masks, jax.random.key(0))
    assert moved.shape == images.shape and moved_masks.shape == masks.shape
    assert set(np.unique(moved_masks)) == {0, 1}
    for image, mask, before in zip(moved, moved_masks, masks, strict=False):
        inside, outside = float(image[mask > 0].mean()), float(image[mask == 0].mean())
        assert inside > outside + 0.3  # in register, whatever contrast was drawn
        assert float(jnp.abs(mask - before).sum()) > 10  # and not where it was


def test_augmentation_is_a_function_of_the_key():
    images, masks = squares(), squares()[:2]
    a, b, c = (augment(images, masks, jax.random.key(k))[0] for k in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert float(jnp.abs(a - c).max()) > 0.1
    assert float(jnp.abs(a[0] - a[1]).max()) > 0.1  # one draw per slice


def test_augmented_images_stay_in_range():
    moved, _ = augment(squares(8), squares(8), jax.random.key(3))
    assert float(moved.min()) >= 0 and float(moved.max()) <= 1
