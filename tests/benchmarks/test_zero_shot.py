"""Zero-shot scores: which slices are asked, and what a row of the table says."""

import numpy as np

from benchmarks.accuracy import zero_shot
from sammix_jax.data.phantom import DOMAINS, write_totalsegmentator
from sammix_jax.pretrain.score import prompted


def examples(*heights):
    """A mask in the upper part of the same box for each of `heights`, of 10 rows."""
    masks = np.zeros((len(heights), 16, 16), bool)
    for mask, height in zip(masks, heights, strict=True):
        mask[2 : 2 + height, 3:7] = True
        mask[11, 3] = True  # the box has ten rows, whatever the height
    return prompted(np.zeros(masks.shape, np.float32), masks)


def test_the_whole_box_is_what_a_model_has_to_surpass():
    found = zero_shot.whole_box_ious(examples(10, 5))
    np.testing.assert_allclose(found, [40 / 40, 21 / 40])


def test_a_row_is_the_mean_over_slices_with_the_spread_of_scans(monkeypatch):
    scans = [examples(10, 10, 10), examples(5)]
    answers = iter([np.array([0.9, 0.9, 0.9]), np.array([0.5])])
    monkeypatch.setattr(
        zero_shot, "prompt_ious", lambda *_: {"box": (iou := next(answers)), "point": iou - 0.2}
    )
    cells = [cell.strip() for cell in zero_shot.row("liver", None, {}, scans).strip("|").split("|")]
    assert cells[:3] == ["liver", "2", "4"]
    assert cells[3] == "0.800 ± 0.283" and cells[4] == "0.600 ± 0.283"
    assert cells[5].startswith(f"{(3 + 21 / 40) / 4:.3f} ± ")


def test_slices_that_show_the_organ_are_asked_as_training_sees_them(tmp_path):
    write_totalsegmentator(tmp_path, 1, 77, DOMAINS["portal"])
    (scan,) = zero_shot.organ_slices(tmp_path, "liver", 64)
    assert scan.images.shape == scan.masks.shape and scan.images.shape[1:] == (64, 64)
    assert scan.images.min() >= 0 and scan.images.max() <= 1
    assert scan.masks.sum(axis=(1, 2)).min() >= zero_shot.LEAST_PIXELS
