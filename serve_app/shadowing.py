"""What versions that nobody hears would have answered: computed after the answer has left, and logged."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import numpy as np

from policies.records import Shadow
from policies.shadowing import failed_shadow, shadow_records
from serve_app.decision_log import SegmentWriter
from serve_app.variants import Variant

logger = logging.getLogger(__name__)

MAX_WAITING_ROWS = 4096  # beyond, batches are left out and counted: shadows may lag behind, never hold anybody up

_encode = msgspec.json.Encoder().encode


class _Batch(NamedTuple):
    variants: tuple[Variant, ...]
    decision_ids: list[str]
    seeds: list[int]
    actions: list[Any]  # what was sent
    obs_BD: np.ndarray
    mask_BA: np.ndarray | None


class Shadowing:
    """Takes batches that were decided and asks the shadows about them, one batch in each turn of the event loop.

    So answers of one turn leave before a shadow computes, and requests that came meanwhile wait for all shadows of one batch.
    """

    def __init__(self, log: SegmentWriter, *, wall_clock: Callable[[], float]) -> None:
        self._log = log
        self._wall_clock = wall_clock
        self._waiting: deque[_Batch] = deque()
        self._num_waiting_rows = 0
        self._is_scheduled = False
        self.num_answered = 0
        self.num_left_out = 0
        self.num_not_logged = 0

    def counts(self) -> dict[str, int]:
        """Return how many decisions shadows were asked about, and what was lost."""
        return {"answered": self.num_answered, "left_out": self.num_left_out, "not_logged": self.num_not_logged}

    def offer(
        self,
        variants: tuple[Variant, ...],
        decision_ids: list[str],
        seeds: list[int],
        actions: list[Any],
        obs_BD: np.ndarray,
        mask_BA: np.ndarray | None,
    ) -> None:
        """Have the shadows asked about decisions that were logged, unless too many wait already."""
        if self._num_waiting_rows + len(decision_ids) > MAX_WAITING_ROWS:
            self.num_left_out += len(decision_ids)
            return
        self._waiting.append(_Batch(variants, decision_ids, seeds, actions, obs_BD, mask_BA))
        self._num_waiting_rows += len(decision_ids)
        if not self._is_scheduled:
            self._schedule()

    def _schedule(self) -> None:
        self._is_scheduled = True
        # Twice: a callback of this turn's batch may still be writing answers in the next one.
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self._answer_next)

    def _answer_next(self) -> None:
        self._is_scheduled = False
        batch = self._waiting.popleft()
        self._num_waiting_rows -= len(batch.decision_ids)
        if self._waiting:
            self._schedule()
        now_s = self._wall_clock()
        records = [record for variant in batch.variants for record in _answers(variant, batch, now_s)]
        self.num_answered += len(batch.decision_ids)
        try:
            self._log.append(b"".join([_encode(record) + b"\n" for record in records]))
        except OSError as error:
            if not self.num_not_logged:
                logger.error("event=shadows_not_logged error=%r", str(error))
            self.num_not_logged += len(records)


def _answers(variant: Variant, batch: _Batch, now_s: float) -> list[Shadow]:
    what: dict[str, Any] = {"version": variant.version, "digest": variant.digest, "mode": variant.mode, "now": now_s}
    try:
        parameters_BP = variant.distributions(batch.obs_BD, batch.mask_BA)
    except Exception as error:  # the version's own failure, which is what a shadow is there to find
        failure = f"version {variant.version} raised {error!r:.200}"
        return [failed_shadow(name, failure=failure, **what) for name in batch.decision_ids]
    return shadow_records(
        batch.decision_ids, batch.seeds, batch.actions, parameters_BP, distribution=variant.policy.distribution, **what
    )
