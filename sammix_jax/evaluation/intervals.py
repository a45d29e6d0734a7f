"""Means over patients, with their spread and a confidence interval."""

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import stats

# Fixed, so that the same values give the same interval.
_SEED = 0
_RESAMPLES = 2000
# Resamples of one patient have a single mean, of two three: nothing to take percentiles of.
_FEWEST = 3


@dataclasses.dataclass(frozen=True)
class Moments:
    """A mean over patients, in the unit of the values; `dataclasses.asdict` makes JSON of it.

    Attributes:
      mean: arithmetic mean.
      std: standard deviation of the sample (divided by count - 1); 0 of a single value.
      count: values that the rest is about.
      low, high: 95% confidence interval of the mean; None of fewer than 3 patients, too few to
        resample.
    """

    mean: float
    std: float
    count: int
    low: float | None
    high: float | None


def summarise(
    values: Sequence[float | None], patients: Sequence[Hashable] | None = None
) -> Moments | None:
    """Summarises one value a scan, or a patient.

    The interval is the percentile bootstrap over patients (Efron 1979; SciPy's), of 2000 resamples
    with a fixed seed: scans of one patient are drawn together, for they are no independent ones. It
    says how the mean would vary over other such patients under the same trained model; of few
    patients it is too narrow: of normal values it holds the true mean in 93% of cases with 30
    patients, 90% with 10, 85% with 5, and 74% with 3, of which it is the range.

    Args:
      values: None where there is none, which is left out.
      patients: whose each value is; left out, each is another patient's.

    Returns:
      None where no value is left.

    Raises:
      ValueError: a value that is not finite.
    """
    owners = range(len(values)) if patients is None else patients
    of_patient: dict[Hashable, list[float]] = {}
    for value, owner in zip(values, owners, strict=True):
        if value is not None:
            of_patient.setdefault(owner, []).append(value)
    known = np.array([value for some in of_patient.values() for value in some], float)
    if not np.isfinite(known).all():
        raise ValueError(f"values={known}: expected finite numbers, or None for a patient without.")
    count = len(known)
    if not count:
        return None
    low = high = None
    if len(of_patient) >= _FEWEST:
        sums, counts = np.array([(sum(some), len(some)) for some in of_patient.values()]).T
        interval = stats.bootstrap(
            (sums, counts),
            lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
            paired=True,
            n_resamples=_RESAMPLES,
            confidence_level=0.95,
            method="percentile",
            vectorized=True,
            # `rng` in SciPy 1.15 and later, which still take this name.
            random_state=np.random.default_rng(_SEED),
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    std = float(known.std(ddof=1)) if count > 1 else 0.0
    return Moments(float(known.mean()), std, count, low, high)
