"""Slices to the store's square and back."""

import numpy as np
import pytest

from sammix_jax.data import paper
from sammix_jax.data.geometry import AIR_HU, RESIZES, slice_geometry


def blob(shape):
    y, x = np.mgrid[: shape[0], : shape[1]]
    return ((y - shape[0] * 0.4) / (shape[0] * 0.2)) ** 2 + (
        (x - shape[1] * 0.6) / (shape[1] * 0.15)
    ) ** 2 < 1


def test_fit_keeps_proportions_in_mm():
    geometry = slice_geometry((100, 160), (2.0, 1.0), 128, "fit")  # 200 mm × 160 mm
    assert (geometry.height, geometry.width) == (128, 102)
    assert (geometry.top, geometry.left) == (0, 13)
    stretched = slice_geometry((100, 160), (2.0, 1.0), 128, "stretch")
    assert (stretched.height, stretched.width) == (128, 128)


def test_padding_is_air():
    geometry = slice_geometry((50, 100), (1.0, 1.0), 64, "fit")
    square = geometry.image_to_square(np.full((50, 100), 37, np.int16))
    assert square.shape == (64, 64) and square.dtype == np.int16
    assert (square[:16] == AIR_HU).all() and (square[48:] == AIR_HU).all()
    assert (square[16:48] == 37).all()


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("shape", [(512, 512), (101, 122), (300, 90)])
def test_a_mask_survives_the_way_there_and_back(shape, resize):
    geometry = slice_geometry(shape, (0.8, 0.8), 128, resize)
    mask = blob(shape)
    square = geometry.mask_to_square(mask)
    back = geometry.logits_to_scan(np.where(square, 5.0, -5.0)) > 0
    dice = 2 * (back & mask).sum() / (back.sum() + mask.sum())
    assert back.shape == shape
    assert dice > 0.95, dice


def test_image_and_mask_stay_in_register():
    shape = (90, 133)
    geometry = slice_geometry(shape, (1.0, 1.0), 64, "fit")
    mask = blob(shape)
    image = np.where(mask, 100, -100).astype(np.int16)
    np.testing.assert_array_equal(
        geometry.image_to_square(image) >= 0, geometry.mask_to_square(mask)
    )


def test_paper_fills_the_square_in_the_authors_arithmetic():
    shape = (90, 133)
    geometry = slice_geometry(shape, (0.7, 0.8), 64, "paper")
    hu = np.random.default_rng(0).integers(-1024, 1500, shape).astype(np.int16)
    mask = hu > 1000
    np.testing.assert_array_equal(geometry.image_to_square(hu), paper.resize_image(hu, 64))
    np.testing.assert_array_equal(geometry.mask_to_square(mask), paper.resize_mask(mask, 64))
    logits = np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32)
    stretched = slice_geometry(shape, (0.7, 0.8), 64, "stretch")
    np.testing.assert_array_equal(geometry.logits_to_scan(logits), stretched.logits_to_scan(logits))


def test_no_such_resize():
    with pytest.raises(ValueError, match=r"fit.*stretch.*paper"):
        slice_geometry((8, 8), (1.0, 1.0), 8, "crop")
