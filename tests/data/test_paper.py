"""The authors' preprocessing, against their sentence written out again with Pillow and NumPy."""

import numpy as np
import pytest
from PIL import Image

from sammix_jax.data import paper


def authors_slice(hu):
    """Clip to [-160, 240]; int16; Pillow's bilinear to 256²; float16; (x + 3055) / 8866."""
    clipped = np.clip(hu, -160, 240).astype(np.int16)
    resized = Image.fromarray(clipped).resize((256, 256), resample=Image.BILINEAR)
    return (np.array(resized).astype(np.float16) + 3055) / 8866


def bits(values):
    assert values.dtype == np.float16
    return values.view(np.uint16)


@pytest.mark.parametrize("shape", [(512, 512), (37, 61), (301, 400), (513, 127), (256, 256)])
def test_slices_are_the_authors_to_the_bit(shape):
    volume = np.random.default_rng(shape[0]).integers(-2000, 3000, (3, *shape)).astype(np.int16)
    for hu in volume:
        resized = paper.resize_image(hu)
        assert resized.shape == (256, 256) and resized.dtype == np.int16
        np.testing.assert_array_equal(bits(paper.scale(resized)), bits(authors_slice(hu)))


def test_hu_are_clipped_before_they_are_resized():
    """A pixel of metal among soft tissue counts as 240 HU, not as 30,000 that are clipped after."""
    hu = np.zeros((512, 512), np.int16)
    hu[101, 201] = 30000
    assert paper.resize_image(hu).max() == round(240 * 9 / 64)


@pytest.mark.parametrize("shape", [(512, 512), (37, 61), (301, 400)])
def test_masks_take_the_nearest_pixel(shape):
    labels = np.random.default_rng(1).integers(0, 3, shape).astype(np.uint8)
    expected = np.array(Image.fromarray(labels).resize((256, 256), resample=Image.NEAREST)) > 0
    resized = paper.resize_mask(labels > 0)
    assert resized.dtype == bool
    np.testing.assert_array_equal(resized, expected)


def test_levels_are_those_measured_in_the_authors_arithmetic():
    assert len(np.unique(paper.LEVELS)) == 186
    assert paper.LEVELS.min() == np.float16(0.3267) and paper.LEVELS.max() == np.float16(0.3718)
    assert (np.diff(paper.LEVELS) >= 0).all()
    # Each operation rounded once from float64, with the constants that float16 has.
    hu = np.arange(-160, 241).astype(np.float64)
    shifted = (hu + 3056).astype(np.float16)
    expected = (shifted.astype(np.float64) / 8864).astype(np.float16)
    np.testing.assert_array_equal(bits(paper.LEVELS), bits(expected))


def test_unscaling_gives_the_lowest_hu_of_the_same_bits():
    hu = np.arange(-160, 241, dtype=np.int16)
    back = paper.unscale(paper.scale(hu))
    assert back.dtype == np.int16 and back.min() == -160
    np.testing.assert_array_equal(bits(paper.scale(back)), bits(paper.scale(hu)))
    for value in np.unique(paper.LEVELS):
        assert paper.unscale(np.array([[value]])) == hu[value == paper.LEVELS].min()


@pytest.mark.parametrize("value", [0.0, 0.3264, 0.372, 1.0, np.nan, np.inf])
def test_values_that_no_hu_gives(value):
    scaled = paper.scale(np.full((2, 2), 40, np.int16))
    scaled[1, 0] = value
    with pytest.raises(ValueError, match="no HU gives"):
        paper.unscale(scaled)


@pytest.mark.parametrize("hu", [-161, 241, -1024])
def test_hu_beyond_the_window_have_no_scale(hu):
    with pytest.raises(ValueError, match="clip first"):
        paper.scale(np.array([0, hu], np.int16))


@pytest.mark.parametrize(
    ("depth", "kept"),
    [(100, range(35, 64)), (101, range(35, 65)), (75, range(26, 48)), (1, range(0, 0))],
)
def test_central_slices(depth, kept):
    """m = 49.5: ceil(34.65) = 35 to floor(64.35) = 64, the end left out."""
    assert paper.central_slices(depth) == kept
