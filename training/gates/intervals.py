"""Intervals for a number of episodes or decisions that is fixed beforehand (looked at once, not while it grows)."""

from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, stdtrit  # what `scipy.stats` calls; importing that takes every command most of a second

from policies.verdicts import Verdict


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval of a mean."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"

    def at_least(self, threshold: float) -> Verdict:
        """Judge a mean that must reach a threshold."""
        if self.high < threshold:
            return Verdict.FAIL
        return Verdict.PASS if self.low >= threshold else Verdict.INCONCLUSIVE  # NaN decides nothing

    def at_most(self, limit: float) -> Verdict:
        """Judge a mean that must not exceed a limit."""
        return Interval(-self.mean, -self.high, -self.low).at_least(-limit)

    def to_json(self, name: str) -> dict[str, float]:
        return {f"{name}_mean": self.mean, f"{name}_low": self.low, f"{name}_high": self.high}


def mean_interval(values_E: np.ndarray, confidence: float) -> Interval:
    """Return Student's t interval of the mean of at least two independent values."""
    mean = float(values_E.mean())
    spread = float(values_E.std(ddof=1)) / len(values_E) ** 0.5
    half = float(stdtrit(len(values_E) - 1, 0.5 + confidence / 2)) * spread
    return Interval(mean, mean - half, mean + half)


def share_interval(num_hits: int, num_trials: int, confidence: float) -> Interval:
    """Return Clopper and Pearson's exact interval of a probability: it covers at least as often as it says."""
    tail = (1 - confidence) / 2
    low = float(betaincinv(num_hits, num_trials - num_hits + 1, tail)) if num_hits > 0 else 0.0
    high = float(betaincinv(num_hits + 1, num_trials - num_hits, 1 - tail)) if num_hits < num_trials else 1.0
    return Interval(num_hits / num_trials, low, high)


def worst_mean(values_E: np.ndarray, share: float) -> float:
    """Return the mean of the smallest `share` of values, at least one of them: the conditional value at risk (CVaR)."""
    return float(np.sort(values_E)[: max(1, round(share * len(values_E)))].mean())


def difference_interval(values_E: np.ndarray, others_E: np.ndarray, confidence: float) -> Interval:
    """Return Welch's interval of a difference of two means, of at least two independent values each."""
    mean = float(values_E.mean() - others_E.mean())
    parts = [float(array_E.var(ddof=1)) / len(array_E) for array_E in (values_E, others_E)]
    variance = sum(parts)
    if variance == 0:
        return Interval(mean, mean, mean)
    degrees = variance**2 / sum(part**2 / (len(array_E) - 1) for part, array_E in zip(parts, (values_E, others_E)))
    half = float(stdtrit(degrees, 0.5 + confidence / 2)) * variance**0.5
    return Interval(mean, mean - half, mean + half)
