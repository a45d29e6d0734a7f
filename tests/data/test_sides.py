"""Scans whose organ lies on the other side than in the rest."""

import types

import pytest

from sammix_jax.data.sides import seem_mirrored


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ([-0.1] * 10 + [0.1], [10]),  # one of many
        ([-0.1] * 4 + [0.1], []),  # of few that may be chance
        ([-0.1, 0.1] * 6, []),  # an organ of the middle
        ([-0.1] * 10 + [0.0], []),  # without a mask
    ],
)
def test_one_among_many_is_told(sides, expected):
    records = [types.SimpleNamespace(organ_side=side, oriented=True) for side in sides]
    assert seem_mirrored(records) == [records[i] for i in expected]
