"""Answer what has arrived as one batch: at once when idle, and all that came meanwhile when busy."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from policies.errors import Overloaded

Item = TypeVar("Item")
Deliver = Callable[[Any], None]  # takes a result or an exception


class Batcher(Generic[Item]):
    """Collects items within one turn of the event loop and hands them to `handle`, which must not wait for anything.

    There is no timer: the first item schedules the batch for the loop's next turn, items that arrive before it join, and what
    arrives while a batch is being computed is the next one. So one request alone never waits for company. `handle` gets the
    items and calls each one's `deliver` with its result or its exception, now or later; an exception that it raises is
    delivered to all. An item may stand for many rows; a batch has at most `max_batch_size` rows, or one item of more. Use
    from one event loop only.
    """

    def __init__(self, handle: Callable[[list[Item], list[Deliver]], None], *, max_batch_size: int, max_queue: int) -> None:
        self._handle = handle
        self._max_batch_size = max_batch_size
        self._max_queue = max_queue
        self._waiting: deque[tuple[Item, int, Deliver]] = deque()
        self._num_rows = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_scheduled = False

    def __len__(self) -> int:
        """Return how many rows wait."""
        return self._num_rows

    def submit(self, item: Item, deliver: Deliver, *, num_rows: int = 1) -> None:
        """Have an item answered; raises `Overloaded` when `max_queue` rows would wait. One item of more rows may wait alone."""
        if self._num_rows and self._num_rows + num_rows > self._max_queue:
            raise Overloaded(f"{self._num_rows} decisions are waiting, the limit is {self._max_queue}; try again in a moment")
        self.submit_again(item, deliver, num_rows=num_rows)

    def submit_again(self, item: Item, deliver: Deliver, *, num_rows: int = 1) -> None:
        """Have an item answered that was accepted before."""
        self._waiting.append((item, num_rows, deliver))
        self._num_rows += num_rows
        if not self._is_scheduled:
            self._schedule()

    async def answer(self, item: Item, *, num_rows: int = 1) -> Any:
        """Return an item's result, or raise its exception."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.submit(item, lambda result: _settle(future, result), num_rows=num_rows)
        return await future

    def _schedule(self) -> None:
        self._is_scheduled = True
        self._loop = asyncio.get_running_loop()
        self._loop.call_soon(self._answer_batch)

    def _answer_batch(self) -> None:
        self._is_scheduled = False
        items, delivers = self._take()
        if self._waiting:
            self._schedule()
        try:
            self._handle(items, delivers)
        except Exception as error:
            for deliver in delivers:
                deliver(error)

    def _take(self) -> tuple[list[Item], list[Deliver]]:
        items, delivers, size = [], [], 0
        while self._waiting and (not items or size + self._waiting[0][1] <= self._max_batch_size):
            item, num_rows, deliver = self._waiting.popleft()
            items.append(item)
            delivers.append(deliver)
            size += num_rows
        self._num_rows -= size
        return items, delivers


def _settle(future: "asyncio.Future[Any]", result: Any) -> None:
    if future.done():  # its caller went away
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
