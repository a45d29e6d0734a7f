"""What chooses a run's best checkpoint, counted by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from sammix_jax.data.slices import SliceId
from sammix_jax.evaluation.validate import validate
from sammix_jax.hosts import Terminated
from sammix_jax.systems.system import SlicePredictions

VARIABLES = {"params": jnp.zeros(1)}
TRUE = {  # of each scan's slices, the pixels of a row of four that show the organ
    "half": ["1100", "0000", "1100"],
    "none": ["0000", "0000"],
    "whole": ["0110"],
}
FOUND = {"half": ["1000", "0000", "1000"], "none": ["0000", "0000"], "whole": ["0110"]}
SURE = {"half": [0.9, 0.5, 0.2], "none": [0.1, 0.4], "whole": [0.7]}  # right, wrong, wrong; right


def row(pixels: str) -> np.ndarray:
    return np.array([[int(pixel) for pixel in pixels]], np.uint8)


class Store:
    """Slices of one row, whose HU say which scan and slice they are of."""

    names = tuple(TRUE)

    def slices(self, scan):
        return [SliceId(scan, i) for i in range(len(TRUE[scan]))]

    def hu(self, s):
        return np.full((1, 4), 10 * self.names.index(s.scan) + s.position, np.int16)

    def mask(self, s):
        return row(TRUE[s.scan][s.position])

    def image_label(self, s):
        return int(self.mask(s).any())


def scores(scans=Store.names, protocol="cam", classifies=True, stop=lambda: False):
    """What `validate` says, and the truths that the model was given."""
    given = []

    def predict(variables, hu, truth):
        given.append(truth)
        which = [divmod(int(value), 10) for value in np.asarray(hu)[:, 0, 0]]
        found = [row(FOUND[Store.names[scan]][z]) for scan, z in which]
        sure = [SURE[Store.names[scan]][z] for scan, z in which]
        logits = np.where(np.stack(found) > 0, 0.1, -3).astype(np.float32)
        other = {"gt_box": -logits}  # of a protocol that nobody asked for
        probability = np.array(sure, np.float32) if classifies else None
        return SlicePredictions({protocol: logits, **other}, probability)

    return validate(predict, VARIABLES, Store(), scans, 2, stop, protocol), given


def test_the_mean_over_volumes_and_the_share_of_slices():
    """A scan without the organ, in which none is found, has no Dice; its slices count."""
    found, given = scores()
    assert found == {"dice": pytest.approx((2 / 3 + 1) / 2), "accuracy": pytest.approx(4 / 6)}
    assert given == [None] * 4  # two batches of three slices, one of each other scan
    assert scores(["none"])[0] == {"accuracy": 1.0}
    assert scores(classifies=False)[0] == {"dice": found["dice"]}


def test_only_an_oracle_is_given_the_truth():
    found, given = scores(["half"], "gt_points")
    assert found["dice"] == pytest.approx(2 / 3)
    np.testing.assert_array_equal(given[0], [row("1100"), row("0000")])


def test_it_stops_between_scans():
    answers = iter([False, True])
    with pytest.raises(Terminated):
        scores(stop=lambda: next(answers))
