"""How many decisions this replica made, by whom and how fast: noted once their answers have left, counted when there are many."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from policies.records import per_row
from policies.telemetry import LATENCY_BUCKETS_S
from serve_app.answers import Answers

# Answers and times: counted one at a time they cost three times as much, and more of them at once hold the loop up.
MAX_NOTED = 1024

Kind = tuple[str, int, str, str | None]  # arm, version, rung, shield


class Totals(NamedTuple):
    """Since this replica started; they only grow.

    `decisions` is by arm, version that answered, and rung. `num_in_bucket` counts requests by `LATENCY_BUCKETS_S`, the last
    bucket is open, and `sum_s` is how long all of them took.
    """

    decisions: dict[tuple[str, int, str], int]
    num_shielded: int
    num_repaired: int
    num_in_bucket: list[int]
    sum_s: float


class Tally:
    """Counts decisions that were answered. Use from one thread only."""

    def __init__(self) -> None:
        self._kinds: list[Kind] = []
        self._took_s: list[float] = []
        self._decisions: Counter[tuple[str, int, str]] = Counter()
        self._num_shielded = self._num_repaired = 0
        self._num_in_bucket = np.zeros(len(LATENCY_BUCKETS_S) + 1, np.int64)
        self._sum_s = 0.0

    def add_answers(self, answers: Answers, num_repaired: int) -> None:
        """Count decisions, and of how many of them the observation was mended."""
        self._num_repaired += num_repaired
        columns = (answers.arms, answers.versions, answers.rungs, answers.shields)
        if any([isinstance(column, list) for column in columns]):
            self._kinds += zip(*map(per_row, columns))
        else:
            self._add(columns, len(answers.seeds))

    def add_requests(self, started_s: Iterable[float], now_s: float) -> None:
        """Count requests that were answered now with at least one new decision, by when they came."""
        self._took_s += [now_s - began_s for began_s in started_s]
        if len(self._took_s) + len(self._kinds) >= MAX_NOTED:
            self._count()

    def totals(self) -> Totals:
        """Return what was counted."""
        self._count()
        return Totals(dict(self._decisions), self._num_shielded, self._num_repaired, self._num_in_bucket.tolist(), self._sum_s)

    def _count(self) -> None:
        for kind, number in Counter(self._kinds).items():
            self._add(kind, number)
        took_s = np.array(self._took_s)
        places = np.searchsorted(LATENCY_BUCKETS_S, took_s, side="left")  # an edge belongs to the bucket below it
        self._num_in_bucket += np.bincount(places, minlength=len(self._num_in_bucket))
        self._sum_s += float(took_s.sum())
        self._kinds, self._took_s = [], []

    def _add(self, kind: Any, number: int) -> None:
        arm, version, rung, shield = kind
        self._decisions[arm, version, rung] += number
        self._num_shielded += number if shield else 0  # "": it agreed
