"""The predictor and its batched form, at random weights; numbers against PyTorch elsewhere."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from sam_cases import TINY, random_params

from sammix_jax.errors import UserError
from sammix_jax.models.sam import Sam, postprocess_masks
from sammix_jax.models.sam.batched import predict_masks
from sammix_jax.models.sam.inputs import normalise, resize_longest_side, stack_images
from sammix_jax.models.sam.predictor import SamPredictor
from sammix_jax.weights import load_predictor, write_weights

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


def test_answers_are_the_callers_own():
    sam = predictor()
    sam.set_image(picture((40, 100)))
    for logits in (True, False):
        for answer in sam.predict(return_logits=logits):
            answer[...] = 0


def test_a_box_may_have_an_axis_of_its_own():
    sam = predictor()
    sam.set_image(picture((40, 100)))
    box = prompt((40, 100))["box"]
    for one, other in zip(sam.predict(box=box), sam.predict(box=box[None]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_image_size():
    larger = SamPredictor(TINY, predictor().params, image_size=2 * SIDE)
    larger.set_image(picture((40, 100)))
    assert larger.features.shape[1:3] == (2 * TINY.grid_size, 2 * TINY.grid_size)
    assert larger.input_size == (51, 128)
    masks, _, low = larger.predict(**prompt((40, 100)))
    assert masks.shape == (3, 40, 100) and low.shape == (3, 2 * LOW, 2 * LOW)
    for size in (0, SIDE + 1):
        with pytest.raises(ValueError, match=rf"image_size is {size}; expected a multiple of .* 8"):
            SamPredictor(TINY, predictor().params, image_size=size)


def test_the_readmes_snippet(tmp_path):
    """With the small SAM and a disc in the box."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "predictor" in block)
    y, x = np.mgrid[:300, :340]
    disc = ((x - 170) / 130) ** 2 + ((y - 170) / 110) ** 2 < 1
    grey = np.where(disc, 180, 60).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "picture.png")
    files = {
        "sam_vit_b.safetensors": ROOT / "weights" / "sam_mini.safetensors",
        "picture.png": tmp_path / "picture.png",
    }
    for name, path in files.items():
        assert name in code
        code = code.replace(name, str(path))
    found = {}
    exec(code, found)
    assert found["predictor"].image_size == 256  # as the file's metadata say
    mask = found["masks"][found["iou"].argmax()]
    assert (mask & disc).sum() / (mask | disc).sum() > 0.8


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"kind": "classifier", "model": "resnet18"}, "weights of classifier resnet18, expected"),
        ({"normalise": "minmax"}, "normalised by 'minmax', but the predictor normalises by 'sam'"),
        ({"model": "vit_x"}, "Unknown SAM variant 'vit_x'"),
        ({"image_size": "100"}, "image_size is 100; expected a multiple"),
        ({}, "The parameters are not those of mini .* 227 missing"),
    ],
)
def test_files_that_the_predictor_refuses(tmp_path, metadata, message):
    path = tmp_path / "w.safetensors"
    told = {"kind": "sam", "model": "mini", "source": "", "sha256": ""}
    write_weights(path, {"a": np.zeros(2, np.float32)}, told | metadata)
    with pytest.raises(UserError, match=rf"w\.safetensors: .*{message}"):
        load_predictor(path)


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
    with pytest.raises(ValueError, match=r"canvas=\(40, 99\): .* expected at least \(40, 100\)"):
        predict_masks(sam.sam, sam.params, squares, input_sizes, original_sizes, (40, 99))


def test_batch_of_an_encoded_image():
    """The picture is not encoded again: it may be another one."""
    sam = predictor()
    size = (40, 100)
    sam.set_image(picture(size))
    boxes = [prompt(size, seed)["box"] for seed in range(3)]
    other = stack_images([picture(size, seed=1)], SIDE)
    logits, iou, low = predict_masks(
        sam.sam, sam.params, *other, size, boxes=np.array([boxes]), embeddings=sam.features
    )
    for p, box in enumerate(boxes):
        one = sam.predict(box=box, return_logits=True)
        for found, expected in zip((logits, iou, low), one, strict=True):
            np.testing.assert_allclose(found[0, p], expected, atol=1e-4)


def test_batch_needs_all_axes():
    sam = predictor()
    batch = stack_images([picture((40, 100))] * 2, SIDE)
    cases = [
        ({"boxes": np.zeros((2, 4))}, r"boxes have shape \(2, 4\); expected \(B, P, 4\)"),
        ({"boxes": np.zeros((2, 1, 5))}, r"boxes .* expected \(B, P, 4\)"),
        ({"points": np.zeros((2, 1, 2))}, r"points .* expected \(B, P, N, 2\)"),
        ({"embeddings": np.zeros((3, 4, 4, 8))}, r"3 embeddings of 2 images"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            predict_masks(sam.sam, sam.params, *batch, (40, 100), **given)


def test_padding_is_zero_after_normalising():
    assert [part.shape for part in stack_images([], SIDE)] == [(0, SIDE, SIDE, 3), (0, 2), (0, 2)]
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
        ({"point_coords": np.zeros((1, 2)), "point_labels": [2]}, r"are \[2\]\. Give each point 1"),
        ({"point_coords": [[0, np.nan]], "point_labels": [1]}, "point_coords holds NaN"),
        ({"box": [0, 0, np.inf, 4]}, "box holds NaN or infinity"),
        ({"box": np.zeros((2, 4))}, r"box has shape \(2, 4\); expected \(4,\).*embeddings"),
        ({"mask_input": np.zeros((LOW, LOW))}, r"mask_input .* expected \(1, 32, 32\)"),
        ({"mask_input": np.full((1, LOW, LOW), np.nan)}, "mask_input holds NaN or infinity"),
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
