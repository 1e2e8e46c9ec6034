"""Answer what has arrived as one batch: at once when idle, and all that came meanwhile when busy."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from policies.errors import Overloaded

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Collects items within one turn of the event loop and hands them to `handle`, which must not wait for anything.

    There is no timer: the first item schedules the batch for the loop's next turn, items that arrive before it join, and what
    arrives while a batch is being computed is the next one. So one request alone never waits for company. `handle` returns
    one result or exception per item; an exception it raises is every item's. Use from one event loop only.
    """

    def __init__(self, handle: Callable[[list[Item]], list[Result | Exception]], *, max_batch_size: int, max_queue: int) -> None:
        self._handle = handle
        self._max_batch_size = max_batch_size
        self._max_queue = max_queue
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._is_scheduled = False

    def __len__(self) -> int:
        return len(self._waiting)

    def submit(self, item: Item) -> "asyncio.Future[Result]":
        """Return the item's future result; raises `Overloaded` when `max_queue` items wait already."""
        if len(self._waiting) >= self._max_queue:
            raise Overloaded(f"{len(self._waiting)} requests are waiting, the limit is {self._max_queue}; try again in a moment")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((item, future))
        self._schedule(loop)
        return future

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._waiting and not self._is_scheduled:
            self._is_scheduled = True
            loop.call_soon(self._answer_batch, loop)

    def _answer_batch(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_scheduled = False
        size = min(len(self._waiting), self._max_batch_size)
        taken = [self._waiting.popleft() for _ in range(size)]
        batch = [(item, future) for item, future in taken if not future.done()]  # its caller may have gone meanwhile
        self._schedule(loop)
        if not batch:
            return
        try:
            results = self._handle([item for item, _ in batch])
            assert len(results) == len(batch), f"{len(results)} results for {len(batch)} items"
        except Exception as error:
            results = [error] * len(batch)
        for (_, future), result in zip(batch, results):
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
