"""The standard augmentation."""

import jax
import jax.numpy as jnp
import numpy as np

from sammix_jax.method.augment import distort, move, move_masks, random_moves


def squares(count=4, size=48):
    images = np.zeros((count, size, size), np.float32)
    images[:, 14:30, 18:40] = 1
    return jnp.asarray(images)


def test_masks_move_with_their_images():
    images = squares() * 0.6 + 0.2
    masks = squares()[:3]
    moves = random_moves(jax.random.split(jax.random.key(0), 4), (48, 48))
    moved, moved_masks = move(images, moves), move_masks(masks, moves[:3])
    assert moved.shape == images.shape and moved_masks.shape == masks.shape
    assert set(np.unique(moved_masks)) == {0, 1}
    for image, mask, before in zip(moved, moved_masks, masks, strict=False):
        inside, outside = float(image[mask > 0].mean()), float(image[mask == 0].mean())
        assert inside > outside + 0.5  # in register
        assert float(jnp.abs(mask - before).sum()) > 10  # and not where it was


def test_augmentation_is_a_function_of_the_key():
    images = squares()
    keys = [jax.random.split(jax.random.key(k), 4) for k in (0, 0, 1)]
    for change in (
        lambda keys: move(images, random_moves(keys, (48, 48))),
        lambda keys: distort(images, keys),
    ):
        a, b, c = (change(k) for k in keys)
        np.testing.assert_array_equal(a, b)
        assert float(jnp.abs(a - c).max()) > 0.1
        assert float(jnp.abs(a[0] - a[1]).max()) > 0.1  # one draw per slice


def test_distortion_stays_in_range_and_moves_nothing():
    images, keys = squares(8) * 0.4 + 0.3, jax.random.split(jax.random.key(3), 8)
    for strength in (1.0, 2.0):
        distorted = distort(images, keys, strength)
        assert float(distorted.min()) >= 0 and float(distorted.max()) <= 1
        inside, outside = distorted[:, 16:28, 20:38], distorted[:, :12]
        assert float(inside.mean(axis=(1, 2)).min() - outside.mean(axis=(1, 2)).max()) > 0
    changes = [jnp.abs(distort(images, keys, s) - images).mean() for s in (1.0, 2.0)]
    assert changes[1] > 1.5 * changes[0]
