"""The predictor and its batched form, at random weights; numbers against PyTorch elsewhere."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from sam_cases import TINY, random_params

from sammix_jax.models.sam import Sam, postprocess_masks
from sammix_jax.models.sam.batched import predict_masks
from sammix_jax.models.sam.inputs import normalise, resize_longest_side, stack_images
from sammix_jax.models.sam.predictor import SamPredictor

SIDE = TINY.image_size
LOW = 4 * TINY.grid_size
SIZES = [(64, 64), (40, 100), (90, 33), (7, 11)]  # native, shrunk, upright, enlarged


@functools.cache
def predictor():
    params = random_params(Sam(TINY), np.zeros((1, SIDE, SIDE, 3), np.float32))
    return SamPredictor(TINY, params)


def picture(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def prompt(size, seed=0):
    """Points, labels and a box inside an image of this size."""
    h, w = size
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(size=(2, 2)), axis=0) * (w, h)
    return {
        "point_coords": rng.uniform(size=(2, 2)) * (w, h),
        "point_labels": np.array([1, 0]),
        "box": corners.reshape(4),
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("multimask", [True, False])
def test_shapes(size, multimask):
    sam = predictor()
    sam.set_image(picture(size))
    masks, iou, low = sam.predict(**prompt(size), multimask_output=multimask)
    count = 3 if multimask else 1
    assert (masks.shape, masks.dtype) == ((count, *size), bool)
    assert (iou.shape, iou.dtype) == ((count,), np.float32)
    assert (low.shape, low.dtype) == ((count, LOW, LOW), np.float32)
    again = sam.predict(mask_input=low[:1], return_logits=True, multimask_output=multimask)
    assert (again[0].shape, again[0].dtype) == ((count, *size), np.float32)
    assert 0 < (again[0] > 0).mean() < 1


def test_logits_threshold_to_the_masks():
    sam = predictor()
    sam.set_image(picture((40, 100)))
    given = prompt((40, 100))
    logits, _, _ = sam.predict(**given, return_logits=True)
    np.testing.assert_array_equal(sam.predict(**given)[0], logits > 0)


def test_bgr_is_rgb_reversed():
    sam = predictor()
    image = picture((40, 100))
    sam.set_image(image)
    rgb = sam.features
    sam.set_image(image[..., ::-1], image_format="BGR")
    np.testing.assert_array_equal(sam.features, rgb)


def test_box_in_original_pixels():
    """Twice the image, pixels doubled, with twice the box, is the same question."""
    sam = predictor()
    image = picture((32, 24))
    answers = []
    for factor in (1, 2):
        sam.set_image(image.repeat(factor, 0).repeat(factor, 1))
        sam.features = np.ones_like(sam.features)  # the two resized images differ slightly
        answers.append(sam.predict(box=factor * np.array([3, 5, 20, 17])))
    np.testing.assert_array_equal(answers[0][1], answers[1][1])
    np.testing.assert_array_equal(answers[0][2], answers[1][2])


@pytest.mark.parametrize("multimask", [True, False])
def test_batch_equals_one_by_one(multimask):
    sam = predictor()
    pictures = [picture(size, seed) for seed, size in enumerate(SIZES)]
    # Two prompts for each image.
    given = [[prompt(size, 2 * i + p) for p in range(2)] for i, size in enumerate(SIZES)]
    names = {"point_coords": "points", "point_labels": "labels", "box": "boxes"}
    stacked = {
        theirs: np.array([[one[name] for one in pair] for pair in given])
        for name, theirs in names.items()
    }
    predict = jax.jit(predict_masks, static_argnames=("sam", "canvas", "multimask_output"))
    logits, iou, low = predict(
        sam.sam,
        sam.params,
        *stack_images(pictures, SIDE),
        canvas=(96, 104),
        multimask_output=multimask,
        **stacked,
    )
    assert logits.shape == (4, 2, 3 if multimask else 1, 96, 104)
    for b, (h, w) in enumerate(SIZES):
        sam.set_image(pictures[b])
        for p in range(2):
            one = sam.predict(**given[b][p], multimask_output=multimask, return_logits=True)
            np.testing.assert_allclose(logits[b, p, :, :h, :w], one[0], atol=1e-4)
            np.testing.assert_allclose(iou[b, p], one[1], atol=1e-4)
            np.testing.assert_allclose(low[b, p], one[2], atol=1e-4)
        assert np.all(np.isneginf(logits[b, :, :, h:]))
        assert np.all(np.isneginf(logits[b, :, :, :, w:]))


def test_batch_without_prompts():
    sam = predictor()
    squares, input_sizes, original_sizes = stack_images([picture((40, 100))], SIDE)
    logits, _, low = predict_masks(
        sam.sam, sam.params, squares, input_sizes, original_sizes, (40, 100)
    )
    expected = postprocess_masks(low, (26, 64), (40, 100), (SIDE, SIDE))
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_batch_needs_both_leading_axes():
    sam = predictor()
    batch = stack_images([picture((40, 100))] * 2, SIDE)
    for given in ({"boxes": np.zeros((2, 4))}, {"points": np.zeros((2, 1, 2))}):
        with pytest.raises(ValueError, match=r"expected \(B, P, "):
            predict_masks(sam.sam, sam.params, *batch, (40, 100), **given)


def test_padding_is_zero_after_normalising():
    squares, input_sizes, original_sizes = stack_images([picture((40, 100)), picture((9, 8))], SIDE)
    np.testing.assert_array_equal(input_sizes, [(26, 64), (64, 57)])
    np.testing.assert_array_equal(original_sizes, [(40, 100), (9, 8)])
    images = np.asarray(normalise(squares + np.uint8(7), input_sizes))
    assert not images[0, 26:].any() and not images[1, :, 57:].any()
    assert np.all(images[0, :26].any(axis=-1)) and np.all(images[1, :, :57].any(axis=-1))


def test_input_size_rounds_halves_up():
    assert resize_longest_side(picture((5, 128)), SIDE).shape == (3, 64, 3)  # 2.5 rows


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8), np.uint8), r"uint8 of shape \(8, 8\); expected uint8, \(H, W, 3\)"),
        (np.zeros((8, 8, 3)), r"float64 of shape .* Scale a CT slice"),
        (np.zeros((1, 2000, 3), np.uint8), "shrink to 0 x 64"),
        (np.zeros((0, 0, 3), np.uint8), "0 x 0 pixels"),
    ],
)
def test_bad_image(image, message):
    with pytest.raises(ValueError, match=message):
        predictor().set_image(image)


def test_bad_format():
    with pytest.raises(ValueError, match="'rgb'; expected 'RGB' or 'BGR'"):
        predictor().set_image(picture((8, 8)), image_format="rgb")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"point_coords": np.zeros((2, 2))}, "go together"),
        ({"point_labels": np.zeros(2)}, "go together"),
        ({"point_coords": np.zeros(2), "point_labels": np.zeros(1)}, r"expected \(N, 2\)"),
        ({"point_coords": np.zeros((2, 2)), "point_labels": np.zeros(3)}, "2 point_coords, but 3"),
        ({"box": np.zeros((2, 4))}, r"box has shape \(2, 4\); expected \(4,\)"),
        ({"mask_input": np.zeros((LOW, LOW))}, r"mask_input .* expected \(1, 32, 32\)"),
    ],
)
def test_bad_prompt(given, message):
    sam = predictor()
    sam.set_image(picture((8, 8)))
    with pytest.raises(ValueError, match=message):
        sam.predict(**given)


def test_no_image():
    sam = predictor()
    sam.set_image(picture((8, 8)))
    sam.reset_image()
    with pytest.raises(RuntimeError, match="call set_image"):
        sam.predict()


def test_a_refused_image_leaves_none_set():
    sam = predictor()
    sam.set_image(picture((8, 8)))
    with pytest.raises(ValueError):
        sam.set_image(np.zeros((8, 8)))
    assert not sam.is_image_set


def test_foreign_parameters_are_refused():
    params = predictor().params
    with pytest.raises(ValueError, match=r"8 missing .*lora"):
        SamPredictor(Sam(TINY, lora_rank=2), params)
    with pytest.raises(ValueError, match=r"unknown .*block_1"):
        SamPredictor(dataclasses.replace(TINY, depth=1, global_blocks=()), params)
    with pytest.raises(ValueError, match=r"ill-shaped .*rel_pos"):
        SamPredictor(dataclasses.replace(TINY, window_size=4), params)
