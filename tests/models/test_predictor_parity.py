"""The predictor against `segment_anything.SamPredictor` on the same weights and images."""

import importlib.util
import sys

import numpy as np
import pytest
from PIL import Image
from torch_port import build, official, port

from sammix_jax.models.sam import SamVariant
from sammix_jax.models.sam.predictor import SamPredictor

pytest.importorskip("torch", reason="parity needs torch (requirements/parity.txt)")
try:
    official()
except ImportError:
    pytest.skip("parity needs segment-anything (requirements/parity.txt)", allow_module_level=True)

pytestmark = pytest.mark.torch

SMALL = SamVariant(
    image_size=128,
    patch_size=8,
    embed_dim=64,
    depth=3,
    num_heads=4,
    global_blocks=(1,),
    window_size=7,
    parameters=0,
    prompt_dim=32,
    decoder_mlp_dim=64,
    decoder_heads=4,
)
LOW = 64
SIZES = [(128, 128), (97, 201), (300, 173), (41, 60), (5, 128)]


@pytest.fixture(scope="module")
def pair():
    """The official predictor and ours."""
    model = build(SMALL)
    if importlib.util.find_spec("torchvision") is None:
        # What torchvision does to Pillow images, which is all that the predictor asks of it.
        transforms = sys.modules["segment_anything.utils.transforms"]
        transforms.to_pil_image = Image.fromarray
        transforms.resize = lambda image, size: image.resize(size[::-1], Image.BILINEAR)
    return official().SamPredictor(model), SamPredictor(SMALL, port(model.state_dict()))


def picture(size):
    """Smooth colours with an edge and noise, so that every resize matters."""
    h, w = size
    rng = np.random.default_rng(h)
    y, x = np.mgrid[:h, :w] / np.array([h, w]).reshape(2, 1, 1)
    channels = [x, y, (x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.08]
    noisy = np.stack(channels, axis=-1) * 200 + rng.uniform(0, 55, (h, w, 3))
    return noisy.astype(np.uint8)


def prompts(size):
    h, w = size
    rng = np.random.default_rng(w)
    points = {
        "point_coords": rng.uniform(size=(3, 2)) * (w, h),
        "point_labels": np.array([1, 0, 1]),
    }
    box = {"box": np.array([0.2 * w, 0.1 * h, 0.8 * w, 0.7 * h])}
    mask = {"mask_input": rng.normal(size=(1, LOW, LOW)).astype(np.float32)}
    return {
        "none": {},
        "one point": {name: value[:1] for name, value in points.items()},
        "points": points,
        "box": box,
        "mask": mask,
        "points and box": points | box,
        "all": points | box | mask,
    }


def close(ours, theirs, relative=1e-5):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= relative * np.abs(theirs).max()


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_same_embedding(pair, size, image_format):
    theirs, ours = pair
    for one in pair:
        one.set_image(picture(size), image_format=image_format)
    assert ours.original_size == tuple(theirs.original_size)
    assert ours.input_size == theirs.input_size
    close(np.asarray(ours.features), theirs.features.numpy().transpose(0, 2, 3, 1))


@pytest.mark.parametrize("multimask", [True, False], ids=["multimask", "single mask"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_same_answers(pair, size, multimask):
    for one in pair:
        one.set_image(picture(size))
    worst, count = 0.0, 0
    inside = []
    for name, given in prompts(size).items():
        for logits in (True, False):
            their_masks, their_iou, their_low = pair[0].predict(
                **given, multimask_output=multimask, return_logits=logits
            )
            masks, iou, low = pair[1].predict(
                **given, multimask_output=multimask, return_logits=logits
            )
            assert masks.dtype == their_masks.dtype
            if logits:
                close(masks, their_masks)
                # A pixel may fall to either side where its logit is zero to rounding.
                unsure = np.abs(their_masks) <= 1e-5 * np.abs(their_masks).max()
                worst = max(worst, np.abs(masks - their_masks).max() / np.abs(their_masks).max())
            else:
                assert masks.shape == their_masks.shape
                differing = masks != their_masks
                count += differing.sum()
                assert not (differing & ~unsure).any(), name
                inside.append(masks.mean())
            np.testing.assert_allclose(iou, their_iou, atol=1e-6, rtol=1e-5)
            close(low, their_low)
    print(f"{size}: logits within {worst:.1e} of the largest; {count} pixels differ")
    assert count <= 2 * len(prompts(size))
    assert 0.02 < np.mean(inside) < 0.98  # masks that are neither empty nor full
