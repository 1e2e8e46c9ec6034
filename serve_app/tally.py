"""How many decisions this replica made, by whom and how fast: noted once their answers have left, counted when there are many."""

from collections import Counter
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from policies.telemetry import LATENCY_BUCKETS_S
from serve_app.deciding import Answer

MAX_NOTED = 1024  # answers; counted one at a time they cost three times as much, and more of them at once hold the loop up
_WHAT_COUNTS = itemgetter(*(Answer._fields.index(name) for name in ("arm", "version", "rung", "shield")))


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
        self._answers: list[Any] = []
        self._took_s: list[float] = []
        self._decisions: Counter[tuple[str, int, str]] = Counter()
        self._num_shielded = self._num_repaired = 0
        self._num_in_bucket = np.zeros(len(LATENCY_BUCKETS_S) + 1, np.int64)
        self._sum_s = 0.0

    def add_answers(self, answers: Sequence[Any], *, num_repaired: int) -> None:
        """Count the decisions among what was answered; the others are refusals."""
        self._answers += answers
        self._num_repaired += num_repaired
        if len(self._answers) >= MAX_NOTED:
            self._count()

    def add_requests(self, started_s: Iterable[float], now_s: float) -> None:
        """Count requests that were answered now with at least one new decision, by when they came."""
        self._took_s += [now_s - began_s for began_s in started_s]

    def totals(self) -> Totals:
        """Return what was counted."""
        self._count()
        return Totals(dict(self._decisions), self._num_shielded, self._num_repaired, self._num_in_bucket.tolist(), self._sum_s)

    def _count(self) -> None:
        answers = [answer for answer in self._answers if type(answer) is Answer]
        for (arm, version, rung, shield), number in Counter(map(_WHAT_COUNTS, answers)).items():
            self._decisions[arm, version, rung] += number
            self._num_shielded += number if shield else 0  # "": it agreed
        took_s = np.array(self._took_s)
        places = np.searchsorted(LATENCY_BUCKETS_S, took_s, side="left")  # an edge belongs to the bucket below it
        self._num_in_bucket += np.bincount(places, minlength=len(self._num_in_bucket))
        self._sum_s += float(took_s.sum())
        self._answers, self._took_s = [], []
