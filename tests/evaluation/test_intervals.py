"""Means and bootstrap intervals against the standard library and a bootstrap spelt out."""

import dataclasses
import json
import math
import statistics

import numpy as np
import pytest

from sammix_jax.evaluation.intervals import Moments, summarise


def test_moments():
    values = np.random.default_rng(0).normal(0.8, 0.1, 27).tolist()
    moments = summarise(values)
    assert moments.mean == pytest.approx(statistics.mean(values))
    assert moments.std == pytest.approx(statistics.stdev(values))
    assert moments.count == 27
    assert min(values) < moments.low < moments.mean < moments.high < max(values)


def test_values_that_are_missing_are_left_out():
    values = [0.3, 0.0, 0.9, 0.7]  # 0 is a value
    assert summarise([None, *values[:2], None, *values[2:]]) == summarise(values)
    assert summarise(values).count == 4
    assert summarise([]) is summarise([None, None]) is None


def test_few_patients_have_no_interval():
    assert summarise([2.5]) == Moments(2.5, 0.0, 1, None, None)
    two = summarise([2.0, 4.0])
    assert (two.mean, two.count, two.low, two.high) == (3, 2, None, None)
    assert two.std == pytest.approx(math.sqrt(2))
    # The chance that a resample of three holds one patient alone is 1/27, more than 2.5%.
    three = summarise([1.0, 2.0, 6.0])
    assert (three.low, three.high) == (1, 6)


def test_equal_values():
    assert summarise([0.5] * 6) == Moments(0.5, 0.0, 6, 0.5, 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_interval_is_the_percentile_bootstrap(seed):
    rng = np.random.default_rng(seed)
    values = rng.exponential(size=20)  # skewed: the interval must not be symmetric
    means = [rng.choice(values, 20).mean() for _ in range(20_000)]
    moments = summarise(values)
    # Percentiles of 2000 resamples vary by 0.06 standard errors; four times that.
    noise = 0.25 * values.std() / math.sqrt(20)
    low, high = np.percentile(means, [2.5, 97.5])
    assert moments.low == pytest.approx(low, abs=noise)
    assert moments.high == pytest.approx(high, abs=noise)


def test_interval_holds_the_true_mean_as_often_as_said():
    held = 0
    for seed in range(300):
        moments = summarise(np.random.default_rng(seed).normal(5, 2, 30))
        held += moments.low <= 5 <= moments.high
    assert 0.89 <= held / 300 <= 0.97


def test_interval_repeats_and_leaves_the_global_generator_alone():
    values = [0.2, 0.9, 0.4, 0.7, 0.6]
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()
    assert summarise(values) == summarise(values)
    assert np.random.get_state()[1].tolist() == before


def test_moments_go_into_json():
    moments = summarise([0.2, 0.9, 0.4, 0.7])
    assert Moments(**json.loads(json.dumps(dataclasses.asdict(moments)))) == moments
    assert set(dataclasses.asdict(moments)) == {"mean", "std", "count", "low", "high"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_must_be_finite(bad):
    with pytest.raises(ValueError, match="expected finite"):
        summarise([0.5, bad, None])
