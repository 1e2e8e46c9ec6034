"""Make appended lines survive a power cut: one fsync at a time, shared by everything that was appended before it began."""

import asyncio
import errno
import logging
import os
import queue
import threading
from collections.abc import Callable

from policies.errors import Overloaded
from serve_app.decision_log import SegmentWriter

MAX_WAITING = 4096  # callbacks, one per batch; far more than come within one fsync, so only a hanging disk gets there

Callback = Callable[[OSError | None], None]
logger = logging.getLogger(__name__)


class GroupCommit:
    """Flushes a writer's segments in a thread of its own and calls back on the event loop.

        writer.append(lines)
        commit.after_sync(callback)      # callback(None): the lines are on the disk; callback(error): perhaps not

    An fsync begins when the one before has ended, and all that was appended meanwhile shares it: on a slow disk groups grow by
    themselves, and a request alone waits for one fsync. A failure, or an fsync that takes longer than `timeout_s`, is reported
    to everyone who waits. Use from one event loop only.
    """

    def __init__(
        self,
        writer: SegmentWriter,
        *,
        timeout_s: float,
        max_waiting: int = MAX_WAITING,
        fsync: Callable[[int], None] = os.fsync,
    ) -> None:
        self._writer = writer
        self._timeout_s = timeout_s
        self._max_waiting = max_waiting
        self._fsync = fsync
        self._waiting: list[Callback] = []  # their lines were written after the running fsync began
        self._running: list[Callback] = []
        self._is_running = False
        self._timer: asyncio.TimerHandle | None = None
        self._idle: asyncio.Event = asyncio.Event()
        self._idle.set()
        self.is_overdue = False  # an fsync has been running for longer than the limit, and still is
        self._jobs: queue.SimpleQueue[tuple[asyncio.AbstractEventLoop, list[int]] | None] = queue.SimpleQueue()
        writer.keep_unflushed()
        # A daemon, not a pool: the interpreter would wait at its end for a thread that hangs in a dead disk.
        threading.Thread(target=self._work, name="group_commit", daemon=True).start()

    def after_sync(self, callback: Callback) -> None:
        """Call back, but not within this call, when all that was appended before it is on the disk or failed to get there.

        Raises `Overloaded`, without a callback, when too many wait already.
        """
        self.require_room()
        self._waiting.append(callback)
        if self.is_overdue:
            self._fail_all(OSError(errno.ETIMEDOUT, f"an fsync has been running for more than {self._timeout_s:g} s"))
        elif not self._is_running:
            self._begin()

    def require_room(self) -> None:
        """Raise `Overloaded` when too many wait already."""
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{len(self._waiting)} batches wait for the disk, the limit is {self._max_waiting}; try again later")

    async def close(self) -> None:
        """Wait until everybody who waits was called back, `timeout_s` for each fsync at most, then end the thread."""
        await self._idle.wait()
        self._jobs.put(None)

    def _begin(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            descriptors = self._writer.take_unflushed()
        except OSError as error:  # too many open files
            self._idle.set()
            return self._fail_all(error)
        self._running, self._waiting = self._waiting, []
        self._is_running = True
        self._idle.clear()
        self._timer = loop.call_later(self._timeout_s, self._give_up_waiting)
        self._jobs.put((loop, descriptors))

    def _ended(self, error: OSError | None) -> None:
        """Called on the event loop when the thread has flushed a group."""
        assert self._timer is not None
        self._timer.cancel()
        self._is_running = self.is_overdue = False
        if error is not None:
            self._fail_all(error)
        _call(self._running, None)
        self._running = []
        if self._waiting:
            self._begin()
        else:
            self._idle.set()

    def _give_up_waiting(self) -> None:
        self.is_overdue = True
        self._fail_all(OSError(errno.ETIMEDOUT, f"an fsync took longer than {self._timeout_s:g} s"))
        self._idle.set()

    def _fail_all(self, error: OSError) -> None:
        """Tell everyone who waits, and never flush or write to this segment again.

        After a failed fsync Linux takes the pages for clean, although they never reached the disk, and tells so once per open
        file: a second fsync of the same descriptor would say that all is well ("fsyncgate", lwn.net/Articles/752063). So those
        whose lines were written into this segment while the fsync was running must not wait for the next one. That reports some
        as failed that may be on the disk after all: logged too much is allowed, acknowledged and lost is not.
        """
        self._writer.give_up()
        callbacks = self._running + self._waiting
        self._running, self._waiting = [], []
        _call(callbacks, error)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            loop, descriptors = job
            error = _flush(descriptors, self._fsync)
            try:
                loop.call_soon_threadsafe(self._ended, error)
            except RuntimeError:  # the loop was closed without `close`: nobody is left to be told
                return


def _flush(descriptors: list[int], fsync: Callable[[int], None]) -> OSError | None:
    try:
        for descriptor in descriptors:
            fsync(descriptor)
    except OSError as error:
        logger.error("event=fsync_failed error=%r", str(error))
        return error
    finally:
        _close(descriptors)
    return None


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _call(callbacks: list[Callback], error: OSError | None) -> None:
    """Call each from the loop: one that raises does not keep the others from being called."""
    for callback in callbacks:
        asyncio.get_running_loop().call_soon(callback, error)
