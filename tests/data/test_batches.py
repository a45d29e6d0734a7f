"""Batches are a function of (seed, step)."""

import dataclasses

import numpy as np
import pytest

from sammix_jax.data.batches import Batches, prefetch
from sammix_jax.data.slices import SliceId
from sammix_jax.errors import UserError

LABELLED = tuple(SliceId("a", i) for i in range(5))
OTHERS = tuple(SliceId("b", i) for i in range(11))


class FakeStore:
    """Slices that show their own number."""

    def hu(self, s):
        return np.full((4, 4), s.position + (100 if s.scan == "b" else 0), np.int16)

    def mask(self, s):
        return np.full((4, 4), s.position % 2, np.uint8)

    def image_label(self, s):
        return {"a": 1, "b": 0, "c": -1}[s.scan]


@pytest.fixture
def batches():
    return Batches(FakeStore(), LABELLED, OTHERS, (2, 3), seed=7)


def numbers(batch):
    return batch["hu"][:, 0, 0].tolist()


def test_shapes_and_quota(batches):
    batch = batches(0)
    assert batch["hu"].shape == (5, 4, 4) and batch["hu"].dtype == np.int16
    assert batch["mask"].shape == (2, 4, 4)
    assert batch["image_label"].tolist() == [1, 1, 0, 0, 0]
    assert all(n < 100 for n in numbers(batch)[:2])
    np.testing.assert_array_equal(batch["mask"][:, 0, 0], batch["hu"][:2, 0, 0] % 2)


def test_rows_are_those_of_the_whole_batch(batches):
    """And no other slice is read."""
    whole, part = batches(2), batches(2, [1, 3, 0])
    for name in ("hu", "image_label"):
        np.testing.assert_array_equal(part[name], whole[name][[1, 3, 0]])
    np.testing.assert_array_equal(part["mask"], whole["mask"][[1, 0]])
    read = []

    class Watched(FakeStore):
        def hu(self, s):
            read.append(s)
            return super().hu(s)

    dataclasses.replace(batches, store=Watched())(2, [1, 3, 0])
    assert len(read) == 3


def test_any_step_without_those_before(batches):
    in_order = [numbers(batches(step)) for step in range(20)]
    assert numbers(dataclasses.replace(batches)(13)) == in_order[13]
    assert in_order != [numbers(dataclasses.replace(batches, seed=8)(s)) for s in range(20)]


def test_each_pass_shows_every_slice_once(batches):
    labelled = [n for step in range(5) for n in numbers(batches(step))[:2]]  # two passes of five
    assert sorted(labelled[:5]) == sorted(labelled[5:]) == list(range(5))
    others = [n for step in range(11) for n in numbers(batches(step))[2:]]  # three of eleven
    for start in (0, 11, 22):
        assert sorted(others[start : start + 11]) == list(range(100, 111))


def test_prefetch_keeps_the_order(batches):
    ahead = list(prefetch(batches, 3, 7))
    assert [step for step, _ in ahead] == [3, 4, 5, 6]
    assert [numbers(batch) for _, batch in ahead] == [numbers(batches(s)) for s in range(3, 7)]
    assert list(prefetch(batches, 3, 3)) == []


def test_prefetch_raises_what_a_batch_raises():
    def broken(step):
        raise ValueError(f"step {step}")

    with pytest.raises(ValueError, match="step 4"):
        list(prefetch(broken, 4, 6))


def test_refusals():
    with pytest.raises(UserError, match="batch_labelled"):
        Batches(FakeStore(), LABELLED, OTHERS, (0, 3), 0)
    with pytest.raises(UserError, match="batch_unlabelled"):
        Batches(FakeStore(), LABELLED, (), (1, 3), 0)
    assert Batches(FakeStore(), LABELLED, (), (2, 0), 0)(0)["hu"].shape == (2, 4, 4)


def test_an_epoch_shows_every_slice_without_a_mask(batches):
    assert batches.steps_per_epoch == pytest.approx(11 / 3)
    alone = dataclasses.replace(batches, unlabelled=(), sizes=(2, 0))
    assert alone.steps_per_epoch == pytest.approx(5 / 2)
