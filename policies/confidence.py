"""How sure we are of a mean, at any moment we care to look: confidence sequences by betting."""

import math

import numpy as np

# Shares of the wealth that the gamblers stake each round, evenly spaced in log-odds: a tiny share finds a rare error rate, a
# large one a stream that hardly varies. The last one stakes everything; it decides streams whose values are all the same, so
# it gets a quarter of the start capital. Neighbours are 1.7 apart: a gambler between two loses at most 7 % of growth.
STAKES_J = np.append(1 / (1 + np.exp(-np.linspace(-11.0, 4.0, 28))), 1.0)
CAPITAL_J = np.append(np.full(28, 0.75 / 28), 0.25)

BINS = 500  # of the declared range
_POINTS, _ROUNDS = 5, 7  # bounds are found to 6^-7 of the mean; few points and many rounds cost the fewest logarithms


class ConfidenceSequence:
    """An interval for the mean of observations in [low, high] that holds at all times at once with probability 1 - alpha.

    So it may be looked at after every observation, and stopped on. For each candidate mean m gamblers play a game that is
    fair if m is the mean: they stake a share c of their wealth on a paper that returns x / m, so wealth is multiplied by
    1 - c + c x / m. The average wealth of gamblers with different shares is a non-negative martingale that starts at 1;
    the chance that it ever reaches 2 / alpha is at most alpha / 2 (Ville). Candidates where it does are excluded from below,
    and with 1 - x and 1 - m from above. (Waudby-Smith & Ramdas 2023, https://arxiv.org/abs/2010.09686; mixing constant
    shares is Cover's universal portfolio, Orabona & Jun 2021, https://arxiv.org/abs/2110.14099.)

    Shares that never change make wealth a function of a histogram: an observation costs one addition, thousands a second are
    no load, and the interval does not depend on the order, which logs of several writers do not have. Values between
    two bins are rounded down for the lower bound and up for the upper one, so rounding only widens. For rates (0 or 1) use
    `bins=1`.
    """

    def __init__(self, low: float, high: float, *, alpha: float, bins: int = BINS) -> None:
        assert low < high and 0 < alpha < 1
        self._low, self._range, self._bins = low, high - low, bins
        self._log_threshold = math.log(2 / alpha)
        self._down, self._up = [0] * (bins + 1), [0] * (bins + 1)
        self.total = 0.0
        self._interval: tuple[float, float] | None = None
        self.num_observations = 0

    def update(self, value: float, count: int = 1) -> None:
        """Take in an observation, or `count` equal ones."""
        scaled = self._bins * (value - self._low) / self._range
        assert -1e-9 <= scaled <= self._bins + 1e-9, f"{value} is outside of the declared range; clip and count it before"
        scaled = min(self._bins, max(0, scaled))  # rounding can put the end of the range a last bit outside
        self._down[math.floor(scaled)] += count
        self._up[math.ceil(scaled)] += count
        self.total += value * count
        self.num_observations += count
        self._interval = None

    @property
    def mean(self) -> float | None:
        return self.total / self.num_observations if self.num_observations else None

    def interval(self) -> tuple[float, float]:
        """Return (low, high) of the means that are not excluded; the declared range before the first observation."""
        if self._interval is None:
            lower = _lower_bound(self._down, self._log_threshold)
            upper = 1 - _lower_bound(self._up[::-1], self._log_threshold)
            self._interval = (self._low + lower * self._range, self._low + upper * self._range)
        return self._interval


def log_wealth(means_M: np.ndarray, values_V: np.ndarray, counts_V: np.ndarray) -> np.ndarray:
    """Return the log of the gamblers' average wealth at each candidate mean after these observations; falls with the mean.

    Shapes: J gamblers, M candidate means in (0, 1], V distinct values in [0, 1] with their counts (at least 1).
    """
    with np.errstate(divide="ignore"):  # who staked everything on a value of 0 has log(0): ruined, as it should be
        returns_JMV = 1 + STAKES_J[:, None, None] * (values_V[None, None, :] / means_M[None, :, None] - 1)
        logs_JM = np.log(returns_JMV) @ counts_V + np.log(CAPITAL_J)[:, None]
    peak_M = logs_JM.max(axis=0)
    return peak_M + np.log(np.exp(logs_JM - peak_M).sum(axis=0))


def _lower_bound(histogram: list[int], log_threshold: float) -> float:
    """Return the largest candidate mean in [0, 1] that is found to be excluded from below, 0 when none is."""
    counts = np.array(histogram, dtype=np.float64)
    (filled_V,) = np.nonzero(counts)
    if len(filled_V) == 0:
        return 0.0
    values_V, counts_V = filled_V / (len(histogram) - 1), counts[filled_V]
    excluded = 0.0
    possible = float(values_V @ counts_V / counts_V.sum())  # the sample mean: by Jensen nobody wins there
    for _ in range(_ROUNDS):
        means_M = np.linspace(excluded, possible, _POINTS + 2)
        if possible <= excluded or means_M[1] == 0:
            break
        num_excluded = int((log_wealth(means_M[1:-1], values_V, counts_V) >= log_threshold).sum())
        excluded, possible = float(means_M[num_excluded]), float(means_M[num_excluded + 1])
    return excluded
