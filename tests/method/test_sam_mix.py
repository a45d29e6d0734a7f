"""The method's wiring, on the smallest SAM there is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_sam_mix import arbitrary_variables, forward, noise_images, run, segment, tiny

from sammix_jax.method.sam_mix import _area_weights


@pytest.fixture
def images():
    return noise_images()


@pytest.fixture(scope="module")
def variables():
    return arbitrary_variables()


def two_segmented(model, images):
    return model(images, segmented=2)


def test_a_slices_mask_depends_on_that_slice_alone(variables, images):
    """Outside of training: not on the others, and not on how many of them are segmented."""
    output = run((), variables, two_segmented, images)
    assert output.class_logits.shape == (3, 2)
    assert output.prompt.mask.shape == (2, 64, 64) and output.prompt.box.shape == (2, 4)
    assert output.masks.logits.shape == (2, 64, 64)
    assert output.masks.candidates.shape == (2, 3, 64, 64) and output.masks.iou.shape == (2, 3)
    beside_another = forward((), variables, images.at[2].set(0))
    np.testing.assert_allclose(output.masks.logits, beside_another.masks.logits[:2], atol=1e-4)


def test_no_gradient_flows_through_the_cam(variables, images):
    """The segmentation loss reaches SAM, and not the classifier that prompts it."""
    model = tiny({"cam.soft": True})  # a mask of yes and no would pass on none in any case

    @jax.jit
    @jax.grad
    def gradient_of(params):
        output = model.apply(variables | {"params": params}, images[:1], segmented=1)
        return (output.masks.logits**2).mean()

    def reaches(part):
        return any(leaf.any() for leaf in jax.tree.leaves(part))

    gradient = gradient_of(variables["params"])
    sam = gradient["sam"]
    assert reaches(sam["image_encoder"]) and reaches(sam["mask_decoder"])
    assert reaches(sam["prompt_encoder"]["point_embeddings"])
    assert not reaches(gradient["classifier"])


def on_a_smaller_grid(model, embeddings, boxes):
    return model.segment(model.fuse(embeddings, None), (32, 16), boxes=boxes)


def test_a_given_box_is_in_pixels_of_the_slice(variables):
    """A half as high and a quarter as wide, on a slice that is, it is the same prompt. And it
    prompts even where the CAM's does not, so that the row prompted by the truth is what it says."""
    fields = {"cam.box": False}
    embeddings = jax.random.normal(jax.random.key(2), (1, 8, 8, 32))
    box = jnp.array([[12.0, 20.0, 48.0, 40.0]])
    smaller = box / jnp.array([4.0, 2.0, 4.0, 2.0])
    whole = segment(fields, variables, embeddings, boxes=box).iou
    found = run(fields, variables, on_a_smaller_grid, embeddings, smaller).iou
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-6)
    other = segment(fields, variables, embeddings, boxes=smaller).iou
    assert float(jnp.abs(whole - other).max()) > 1e-3


def test_area_weights_average():
    mask = np.random.default_rng(0).random((12, 20))
    rows, columns = _area_weights(3, 12), _area_weights(5, 20)
    expected = mask.reshape(3, 4, 5, 4).mean(axis=(1, 3))
    np.testing.assert_allclose(rows @ mask @ columns.T, expected, rtol=1e-6)
    np.testing.assert_allclose(_area_weights(5, 12).sum(axis=1), 1, rtol=1e-6)
