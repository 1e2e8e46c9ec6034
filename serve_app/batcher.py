"""Answer what has arrived as one batch: at once when idle, and all that came meanwhile when busy."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from policies.errors import Overloaded

Item = TypeVar("Item")
Deliver = Callable[[Any], None]  # takes a result or an exception

# What comes when others have waited this long would wait as long: it is refused, and who is accepted has an answer in time.
# A queue of any fixed length is too long for a slow policy or a busy machine; a batch that takes long by itself is no queue,
# and neither is what the next batch takes: the machine may only have been busy elsewhere for a moment.
MAX_WAIT_S, MAX_WAIT_BATCHES = 0.03, 2.0

logger = logging.getLogger(__name__)


class Batcher(Generic[Item]):
    """Collects items within one turn of the event loop and hands them to `handle`, which must not wait for anything.

    There is no timer: the first item schedules the batch for the loop's next turn, items that arrive before it join, and what
    arrives while a batch is being computed is the next one. So one request alone never waits for company. `handle` gets the
    items and calls each one's `deliver` with its result or its exception, now or later; an exception that it raises is
    delivered to all. When items wait too long, or too many do, new ones are refused. An item may stand for many rows; a batch has
    at most `max_batch_size` rows, or one item of more. Use from one event loop only.
    """

    def __init__(
        self,
        handle: Callable[[list[Item], list[Deliver]], None],
        *,
        max_batch_size: int,
        max_queue: int,
        now_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._handle = handle
        self._now_s = now_s
        self._last_batch_s = 0.0
        self._max_batch_size = max_batch_size
        self._max_queue = max_queue
        self._waiting: deque[tuple[Item, int, Deliver, float]] = deque()
        self._num_rows = 0
        self._is_scheduled = False
        self.num_batches = 0

    def __len__(self) -> int:
        """Return how many rows wait."""
        return self._num_rows

    def submit(self, item: Item, deliver: Deliver, *, num_rows: int = 1) -> None:
        """Have an item answered; raises `Overloaded` when `max_queue` rows would wait, or the first has waited too long.

        One item of more rows than that may wait alone.
        """
        if self._num_rows >= self._max_batch_size:
            self._require_short_wait()
        if self._num_rows and self._num_rows + num_rows > self._max_queue:
            raise Overloaded(f"{self._num_rows} decisions are waiting, the limit is {self._max_queue}; try again in a moment")
        self.submit_again(item, deliver, num_rows=num_rows)

    def submit_again(self, item: Item, deliver: Deliver, *, num_rows: int = 1) -> None:
        """Have an item answered that was accepted before."""
        self._waiting.append((item, num_rows, deliver, self._now_s()))
        self._num_rows += num_rows
        if not self._is_scheduled:
            self._schedule()

    async def answer(self, item: Item, *, num_rows: int = 1) -> Any:
        """Return an item's result, or raise its exception."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.submit(item, lambda result: _settle(future, result), num_rows=num_rows)
        return await future

    def _require_short_wait(self) -> None:
        waited_s, limit_s = self._now_s() - self._waiting[0][3], max(MAX_WAIT_S, MAX_WAIT_BATCHES * self._last_batch_s)
        if waited_s > limit_s:
            raise Overloaded(
                f"{self._num_rows} decisions are waiting, the first for {1000 * waited_s:.0f} ms, the limit is "
                f"{1000 * limit_s:.0f} ms; try again in a moment"
            )

    def _schedule(self) -> None:
        self._is_scheduled = True
        asyncio.get_running_loop().call_soon(self._answer_batch)

    def _answer_batch(self) -> None:
        self._is_scheduled = False
        items, delivers = self._take()
        if self._waiting:
            self._schedule()
        began_s = self._now_s()
        self.num_batches += 1
        try:
            self._handle(items, delivers)
        except Exception as error:
            deliver_each([error] * len(delivers), delivers)
        self._last_batch_s = self._now_s() - began_s

    def _take(self) -> tuple[list[Item], list[Deliver]]:
        items, delivers, size = [], [], 0
        while self._waiting and (not items or size + self._waiting[0][1] <= self._max_batch_size):
            item, num_rows, deliver, _ = self._waiting.popleft()
            items.append(item)
            delivers.append(deliver)
            size += num_rows
        self._num_rows -= size
        return items, delivers


def deliver_each(results: Iterable[Any], delivers: Iterable[Deliver]) -> None:
    """Deliver each result; a connection that breaks in this moment takes no other with it."""
    for result, deliver in zip(results, delivers):
        try:
            deliver(result)
        except Exception:
            logger.exception("event=answer_not_delivered")


def _settle(future: "asyncio.Future[Any]", result: Any) -> None:
    if future.done():  # its caller went away
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
