"""Points inside the true mask, as prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_systems import SIDE, batch_of, microbatch, tiny_config

from sammix_jax.method.prompted_sam import points_inside
from sammix_jax.sharding import BatchLayout
from sammix_jax.systems.named import make_system


def test_points_lie_in_their_masks_and_follow_from_them():
    masks = np.zeros((3, 12, 20), bool)
    masks[0, 3:6, 10:18], masks[1, 11, 0] = True, True
    keys = jnp.broadcast_to(jax.random.key(0), 3)
    points, labels = points_inside(jnp.asarray(masks), keys, 4)
    assert points.shape == (3, 4, 2)
    for i in range(2):
        assert all(masks[i, int(y), int(x)] for x, y in points[i])
    np.testing.assert_array_equal(labels, [[1] * 4, [1] * 4, [-1] * 4])
    assert len({tuple(p) for p in np.asarray(points[0])}) > 1
    again, _ = points_inside(jnp.asarray(masks[::-1]), keys, 4)
    np.testing.assert_array_equal(again[::-1], points)
    other, _ = points_inside(jnp.asarray(masks), jax.random.split(jax.random.key(1), 3), 4)
    assert not np.array_equal(other[0], points[0])


def test_points_prompt_training_and_scoring(monkeypatch):
    """As many as the config says, in SAM's frame: twice the slice's side here."""
    name = "prompted_sam_points"
    config = tiny_config(name, **{"train.points": 2, "evaluate.points": 3})
    assert config.model.prompt == "points"
    seen = []

    class Spy:
        def apply(self, variables, images, points=None, labels=None):
            seen.append((images.shape, points, labels))
            raise StopIteration

        def bind(self, variables):
            return self

        def encode(self, images):
            return images

        def segment(self, embeddings, size, points, labels):
            assert size == (SIDE, SIDE)
            seen.append((embeddings.shape, points, labels))
            raise StopIteration

    system = type(make_system(config))(Spy(), config)
    batch = batch_of()
    with pytest.raises(StopIteration):
        system.loss({}, microbatch(BatchLayout(2, 2), batch))
    truth = jnp.asarray(batch["mask"] > 0)
    with pytest.raises(StopIteration):
        system.predict({}, jnp.zeros(truth.shape), truth, ("gt_points",), True)
    for (shape, points, labels), count in zip(seen, (2, 3), strict=True):
        assert shape == (2, SIDE, SIDE)
        assert points.shape == (2, count, 2) and (labels == 1).all()
    x, y = np.asarray(seen[1][1]).reshape(-1, 2).T
    assert (x >= 10).all() and (x < 26).all() and (y >= 8).all() and (y < 20).all()
    np.testing.assert_array_equal(seen[1][1][0], seen[1][1][1])  # one mask, one choice of points
