"""The method's wiring."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sammix_jax.method.sam_mix import _area_weights, sam_mix


@pytest.fixture
def images():
    return jax.random.uniform(jax.random.key(0), (3, 64, 64))


def build(config, images):
    model = sam_mix(config)
    return model, jax.jit(lambda: model.init(jax.random.key(1), images, segmented=2))()


def shapes_of(config, images, **arguments):
    """The output's shapes, from tracing alone."""
    model = sam_mix(config)
    init = functools.partial(model.init_with_output, **arguments)
    return jax.eval_shape(init, jax.random.key(1), images)[0]


def test_outputs(config, images):
    output = shapes_of(config, images, segmented=2)
    assert output.class_logits.shape == (3, 2)
    assert output.prompt.mask.shape == (2, 64, 64) and output.prompt.box.shape == (2, 4)
    assert output.masks.logits.shape == (2, 64, 64)
    assert output.masks.candidates.shape == (2, 3, 64, 64) and output.masks.iou.shape == (2, 3)


def test_final_mask_is_the_one_of_highest_predicted_iou(config, images):
    model, variables = build(config, images)
    masks = model.apply(variables, images, segmented=3).masks
    for b in range(3):
        best = int(masks.iou[b].argmax())
        np.testing.assert_array_equal(masks.logits[b], masks.candidates[b, best])


def test_single_mask(config, images):
    config.model.mask_choice = "single"
    assert shapes_of(config, images, segmented=1).masks.candidates.shape == (1, 1, 64, 64)


def test_no_gradient_flows_through_the_cam(config, images):
    """The segmentation loss reaches SAM, and not the classifier that prompts it."""
    model, variables = build(config, images)

    def loss(params):
        masks = model.apply(variables | {"params": params}, images, segmented=2).masks
        return (masks.logits**2).mean()

    grads = jax.jit(jax.grad(loss))(variables["params"])
    norm = lambda tree: sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert norm(grads["classifier"]) == 0
    assert norm(grads["sam"]["image_encoder"]) > 0
    assert norm(grads["sam"]["mask_decoder"]) > 0
    assert norm(grads["sam"]["prompt_encoder"]["point_embeddings"]) > 0


@pytest.mark.parametrize(("field", "value"), [("fusion", "none"), ("box", False)])
def test_fusion_and_box_reach_the_mask(config, images, field, value):
    model, variables = build(config, images)
    config.cam[field] = value
    other = sam_mix(config).apply(variables, images, segmented=2)
    here = model.apply(variables, images, segmented=2)
    assert float(jnp.abs(here.masks.logits - other.masks.logits).max()) > 1e-3
    np.testing.assert_array_equal(here.prompt.mask, other.prompt.mask)


def test_boxes_are_scaled_to_sams_frame(config, images):
    """The same box, given on a slice half the size, is the same prompt."""
    model, variables = build(config, images)
    embeddings = model.apply(variables, images, method="encode")
    box = jnp.array([[10.0, 20.0, 50.0, 40.0]] * 3)

    def candidates(size, boxes):
        masks = model.apply(variables, embeddings, size, None, boxes, method="segment")
        return masks.iou

    whole = candidates((64, 64), box)
    np.testing.assert_allclose(whole, candidates((32, 32), box / 2), rtol=1e-4, atol=1e-6)
    assert float(jnp.abs(whole - candidates((64, 64), box / 2)).max()) > 1e-5


def test_area_weights_average():
    mask = np.random.default_rng(0).random((12, 20))
    rows, columns = _area_weights(3, 12), _area_weights(5, 20)
    expected = mask.reshape(3, 4, 5, 4).mean(axis=(1, 3))
    np.testing.assert_allclose(rows @ mask @ columns.T, expected, rtol=1e-6)
    np.testing.assert_allclose(_area_weights(5, 12).sum(axis=1), 1, rtol=1e-6)


def test_unlabelled_slices_do_not_change_the_masks(config, images):
    """Outside of training, a slice's mask depends on that slice alone."""
    model, variables = build(config, images)
    together = model.apply(variables, images, segmented=1).masks.logits
    alone = model.apply(variables, images[:1], segmented=1).masks.logits
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_a_given_box_prompts_even_where_the_cams_does_not(config, images):
    """So that the row prompted by the truth is what it says, also without CAM boxes."""
    config.cam.box = False
    model, variables = build(config, images)
    embeddings = model.apply(variables, images, method="encode")
    boxes = jnp.array([[[4.0, 4.0, 20.0, 20.0]] * 3, [[30.0, 30.0, 60.0, 60.0]] * 3])
    one, two = (
        model.apply(variables, embeddings, (64, 64), None, box, method="segment").logits
        for box in boxes
    )
    assert float(jnp.abs(one - two).max()) > 1e-3
