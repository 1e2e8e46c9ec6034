"""Intervals for a number of episodes or decisions that is fixed beforehand (looked at once, not while it grows)."""

from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval of a mean."""

    mean: float
    low: float
    high: float


def mean_interval(values_E: np.ndarray, confidence: float) -> Interval:
    """Return Student's t interval of the mean of at least two independent values."""
    mean = float(values_E.mean())
    spread = float(values_E.std(ddof=1)) / len(values_E) ** 0.5
    half = float(stats.t.ppf(0.5 + confidence / 2, len(values_E) - 1)) * spread
    return Interval(mean, mean - half, mean + half)
