"""What a version did lately and altogether: counts, rates, latencies and outcomes in five-second buckets."""

import math
from bisect import bisect_left
from collections import Counter
from itertools import accumulate
from typing import Any

from policies.confidence import ConfidenceSequence
from policies.joining import Outcome
from policies.records import Decision
from policies.telemetry import LATENCY_BUCKETS_S

BUCKET_S = 5
NUM_BUCKETS = 120  # ten minutes
_RATE_S = 10
_LATENCY_S = 60


class _Bucket:
    __slots__ = ("decisions", "latency_counts", "num_outcomes", "outcome_sum")

    def __init__(self) -> None:
        self.decisions = 0
        self.latency_counts = [0] * (len(LATENCY_BUCKETS_S) + 1)
        self.num_outcomes = 0
        self.outcome_sum = 0.0


class VersionTraffic:
    """Counts what one version was asked and what came of it; outcomes must be within the declared range."""

    def __init__(self, outcome_range: tuple[float, float], alpha: float) -> None:
        self.num_decisions = 0
        self.num_errors = 0
        self.num_mixed = 0
        self._actions: Counter[int] = Counter()
        self._outcomes = ConfidenceSequence(*outcome_range, alpha=alpha)
        self._buckets: dict[int, _Bucket] = {}
        self._per_second: Counter[int] = Counter()

    def decision(self, decision: Decision) -> None:
        """Count a decision of this version's arm; one that another version had to answer is an error of this one."""
        self.num_decisions += 1
        if not decision.is_stood_in_for:
            if isinstance(decision.action, int):  # lists and real numbers have no mix that a person could read
                self._actions[decision.action] += 1
        else:
            self.num_errors += 1
        bucket = self._bucket(decision.time_s)
        bucket.decisions += 1
        bucket.latency_counts[bisect_left(LATENCY_BUCKETS_S, decision.latency_s)] += 1
        self._per_second[int(decision.time_s)] += 1
        if len(self._per_second) > 4 * _RATE_S:
            del self._per_second[min(self._per_second)]

    def outcome(self, outcome: Outcome, value: float) -> None:
        """Count an episode that this version answered alone; `value` is its outcome within the declared range."""
        self._outcomes.update(value)
        bucket = self._bucket(outcome.time_s)
        bucket.num_outcomes += 1
        bucket.outcome_sum += value

    def summary(self, now: float) -> dict[str, Any]:
        """Return totals, the rate of the last ten seconds and the latency percentiles of the last minute."""
        last = self._window(now + BUCKET_S, _LATENCY_S // BUCKET_S)  # the current bucket too
        latency_counts = [sum(counts) for counts in zip(*(bucket.latency_counts for bucket in last if bucket))]
        low, high = self._outcomes.interval()
        recent = sum(self._per_second[second] for second in range(int(now) - _RATE_S, int(now)))
        return {
            "decisions": self.num_decisions,
            "errors": self.num_errors,
            "error_rate": self.num_errors / self.num_decisions if self.num_decisions else None,
            "decisions_per_s": recent / _RATE_S,
            "latency_ms": {f"p{q}": latency_quantile_ms(latency_counts, q / 100) for q in (50, 95, 99)},
            "actions": {str(action): count for action, count in sorted(self._actions.items())},
            "outcome": {
                "episodes": self._outcomes.num_observations,
                "mean": self._outcomes.mean,
                "low": low,
                "high": high,
                "mixed": self.num_mixed,
            },
        }

    def series(self, now: float) -> dict[str, list[float | None]]:
        """Return one value for each time of `series_times`; None where nothing happened."""
        buckets = self._window(now, NUM_BUCKETS)
        return {
            "decisions_per_s": [b.decisions / BUCKET_S if b and b.decisions else None for b in buckets],
            "latency_p50_ms": [latency_quantile_ms(b.latency_counts, 0.5) if b else None for b in buckets],
            "latency_p99_ms": [latency_quantile_ms(b.latency_counts, 0.99) if b else None for b in buckets],
            "outcome_mean": [b.outcome_sum / b.num_outcomes if b and b.num_outcomes else None for b in buckets],
        }

    def _window(self, now: float, num_buckets: int) -> list[_Bucket | None]:
        return [self._buckets.get(index) for index in _indices(now, num_buckets)]

    def _bucket(self, time_s: float) -> _Bucket:
        index = int(time_s // BUCKET_S)
        bucket = self._buckets.get(index)
        if bucket is None:
            bucket = self._buckets[index] = _Bucket()
            if len(self._buckets) > NUM_BUCKETS + 2:
                del self._buckets[min(self._buckets)]
        return bucket


def series_times(now: float) -> list[float]:
    """Return the start of each complete bucket of the last ten minutes."""
    return [float(index * BUCKET_S) for index in _indices(now, NUM_BUCKETS)]


def _indices(now: float, num_buckets: int) -> range:
    current = int(now // BUCKET_S)  # not complete yet
    return range(current - num_buckets, current)


def latency_quantile_ms(counts: list[int], q: float) -> float | None:
    """Return a quantile of a histogram over `LATENCY_BUCKETS_S`, None when it is empty.

    Within a bucket the logarithm is interpolated, as the edges are geometric. In the open last bucket the answer is its
    lower edge: at least that much.
    """
    cumulative = list(accumulate(counts, initial=0))
    rank = q * cumulative[-1]
    if rank == 0:
        return None
    bucket = bisect_left(cumulative, rank) - 1
    if bucket == len(LATENCY_BUCKETS_S):
        return 1000 * LATENCY_BUCKETS_S[-1]
    upper = LATENCY_BUCKETS_S[bucket]
    lower = LATENCY_BUCKETS_S[bucket - 1] if bucket else upper / 1.4
    return 1000 * lower * math.exp(math.log(upper / lower) * (rank - cumulative[bucket]) / counts[bucket])
