"""nnU-Net's augmentation."""

import jax
import jax.numpy as jnp
import numpy as np

from sammix_jax.method.augment import move, nnunet_distort, nnunet_moves


def test_nnunets_moves_mirror_turn_and_scale():
    """Of four slices about one is neither turned nor scaled, and these are mirrored by whole
    pixels."""
    image = np.random.default_rng(0).random((1, 15, 21)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 64)
    moves = nnunet_moves(keys, (15, 21))
    images = np.asarray(move(jnp.repeat(jnp.asarray(image), 64, axis=0), moves))
    mirrors = [image[0, ::a, ::b] for a in (1, -1) for b in (1, -1)]
    counts = [sum(np.allclose(one, mirror, atol=1e-5) for one in images) for mirror in mirrors]
    assert all(3 <= count <= 20 for count in counts)
    assert 25 <= sum(counts) <= 55  # 0.8 x 0.8 of 64 are 41
    assert np.abs(np.asarray(moves[0] - moves[1])).max() > 1


def test_nnunets_distortions_are_each_slices_own():
    rng = np.random.default_rng(0)
    image = np.clip(0.5 + 0.2 * rng.normal(size=(24, 24)), 0, 1).astype(np.float32)
    images = jnp.repeat(jnp.asarray(image)[None], 40, axis=0)
    keys = jax.random.split(jax.random.key(3), 40)
    found = np.asarray(nnunet_distort(images, keys))
    assert found.shape == images.shape and found.min() >= 0 and found.max() <= 1
    assert np.isfinite(found).all()
    same = np.array([np.array_equal(one, image) for one in found])
    assert 2 <= same.sum() <= 20  # 0.9 0.8 0.85 0.85 0.75 0.9 0.7 of 40 are 10
    alone = np.asarray(nnunet_distort(images[:7], keys[33:]))
    np.testing.assert_allclose(alone, found[33:], atol=1e-6)
    for grey, most in ((0.5, 1e-5), (0.3, 0.2 * 0.25 + 1e-5)):  # the middle keeps its brightness
        flat = np.asarray(nnunet_distort(jnp.full((40, 8, 8), grey), keys))
        assert np.abs(flat - grey).max() <= most
    assert np.abs(flat - grey).max() > 0.01
