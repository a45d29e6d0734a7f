"""How a promptable model is scored on one box and one point."""

import jax.numpy as jnp
import numpy as np

from sammix_jax.pretrain.score import (
    TEST,
    VALIDATION,
    Prompted,
    deepest_pixel,
    held_out_scenes,
    make_answer,
    prompt_ious,
    prompted,
)


class Boxes:
    """Stands in for SAM: answers a box with the box, and a point with the square around it.

    The second of its three masks is right and thought best; the others are empty.
    """

    def bind(self, variables):
        return self

    def encode_image(self, images):
        return images

    def decode(self, embeddings, input_size, boxes=None, points=None, labels=None):
        size = input_size[0]
        y, x = jnp.mgrid[:size, :size]
        if boxes is not None:
            x0, y0, x1, y1 = (boxes[:, 0, i, None, None] for i in range(4))
        else:
            x0, y0 = (points[:, 0, 0, i, None, None] - 2 for i in range(2))
            x1, y1 = x0 + 5, y0 + 5
        inside = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
        logits = jnp.where(inside, 1.0, -1.0)[:, None, None]  # (B, 1, 1, S, S)
        empty = -jnp.ones_like(logits)
        iou = jnp.array([0.99, 0.1, 0.9, 0.5])
        return (
            jnp.concatenate([empty, empty, logits, empty], axis=2),
            jnp.broadcast_to(iou, (len(logits), 1, 4)),
        )


def test_the_mask_that_the_model_thinks_best_is_compared_with_the_truth():
    masks = np.zeros((5, 16, 16), bool)
    masks[:, 4:9, 3:8] = True  # five by five: what a point is answered with
    masks[4, 9:12, 3:8] = True
    examples = prompted(np.zeros((5, 16, 16), np.float32), masks)
    answer = make_answer(Boxes(), "unit")
    found = prompt_ious(answer, {"params": {}}, examples, batch=3)  # the last filled up
    np.testing.assert_allclose(found["box"], 1.0)
    np.testing.assert_allclose(found["point"], [1.0] * 4 + [25 / 40])


def test_the_point_lies_deepest():
    mask = np.zeros((12, 12), bool)
    mask[1:4, 1:11] = True
    mask[3:10, 3:10] = True
    x, y = deepest_pixel(mask)
    assert 5 <= x <= 7 and 4 <= y <= 7
    edge = np.ones((6, 6), bool)  # the image ends where the mask does
    assert deepest_pixel(edge) in {(2, 2), (2, 3), (3, 2), (3, 3)}


def test_held_out_scenes_are_always_the_same_and_each_has_something_to_find():
    examples = held_out_scenes(12, 32, TEST)
    again = held_out_scenes(12, 32, TEST)
    assert isinstance(examples, Prompted)
    np.testing.assert_array_equal(examples.images, again.images)
    # What chose the best checkpoint is not what is reported of it.
    chosen_by = held_out_scenes(12, 32, VALIDATION)
    for image in chosen_by.images:
        assert np.abs(examples.images - image).mean(axis=(1, 2)).min() > 0.01
    assert examples.masks.any(axis=(1, 2)).all()
    for mask, (x, y), box in zip(examples.masks, examples.points, examples.boxes, strict=True):
        assert mask[int(y), int(x)]
        assert mask[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])].sum() == mask.sum()
