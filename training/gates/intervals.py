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


def proportion_interval(num_hits: int, num_trials: int, confidence: float) -> Interval:
    """Return the exact (Clopper-Pearson 1934) interval of a probability.

    With no hit in n trials the upper end is 1 - (tail)^(1/n): "never seen" is not "never happens".
    """
    tail = (1 - confidence) / 2
    low = 0.0 if num_hits == 0 else float(stats.beta.ppf(tail, num_hits, num_trials - num_hits + 1))
    high = 1.0 if num_hits == num_trials else float(stats.beta.ppf(1 - tail, num_hits + 1, num_trials - num_hits))
    return Interval(num_hits / num_trials, low, high)
