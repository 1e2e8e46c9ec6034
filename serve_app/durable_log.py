"""What happens to an answer whose decision is to be written down: it leaves once that is done, is refused, or leaves without."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from policies.errors import Overloaded, ServiceUnavailable, TrimtabError
from serve_app.decision_log import SegmentWriter
from serve_app.group_commit import GroupCommit

BUFFER_BYTES = 16 << 20  # some hundred thousand decisions: several seconds of a disk that is away at full load, minutes at others
RETRY_S = 0.5  # a slow write blocks all requests of this replica for its time, so it is not tried for each
CHUNK_BYTES = 1 << 20  # of the buffer at once, when the disk is back

Place = tuple[Path, int]
Then = Callable[[TrimtabError | None, Place | None], None]
Where = Place | Literal["kept", "dropped"]
Moved = Callable[[Where], None]
OnFailure = Literal["refuse", "answer"]
logger = logging.getLogger(__name__)


class DecisionLog:
    """Appends lines to segments and says when they are logged, as durably as was asked for.

        log.append(lines, num_decisions, then)

    `then(error, place)` is called exactly once: at once, or with a `commit` after its fsync. Without an error the answers may
    leave; `place` says where the lines begin, and is None when they are not in the log. What happens when it cannot be written,
    or only slowly: `refuse` passes `ServiceUnavailable`; `answer` passes none, counts the decisions as unlogged and keeps the
    lines in memory until the disk takes them, the newest being dropped and counted when `buffer_bytes` are full. `moved` is told
    where such lines are, also before `then` is called: kept, then at a place in the log, or dropped. A process that dies loses
    what it keeps. While it is failing the disk is tried once per `RETRY_S` only.

    A write is made on the caller's thread. One that hangs therefore blocks the event loop for as long, and its time can only be
    measured afterwards; what `timeout_s` bounds is how often that happens. A thread for the writes would lift that, and cost
    each batch two thread switches, some 50 to 100 µs against 10 for the write itself. An fsync does run in a thread: there
    `timeout_s` bounds how long anybody waits.
    """

    def __init__(
        self,
        writer: SegmentWriter,
        *,
        on_failure: OnFailure,
        timeout_s: float,
        commit: GroupCommit | None = None,
        buffer_bytes: int = BUFFER_BYTES,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.writer = writer
        self._on_failure = on_failure
        self._timeout_s = timeout_s
        self._commit = commit
        self._buffer_bytes = buffer_bytes
        self._monotonic = monotonic
        self._kept: deque[_Lines] = deque()
        self._num_kept_bytes = 0
        self._is_failing = False
        self._changed_s = self._tried_s = monotonic()
        self._last_error: str | None = None
        self._num_unlogged = self._num_dropped = self._num_failures = 0

    def append(self, lines: bytes, num_decisions: int, then: Then, moved: Moved = lambda where: None) -> None:
        """Write whole lines with one system call and call `then` when they are logged, refused or kept."""
        asked = _Lines(lines, num_decisions, moved)
        if self._may_try() and self._write_kept():
            self._write(lines, lambda error, place: self._answer(asked, then, error, place))
        else:
            self._answer(asked, then, self._refusal(), None)

    def tell(self, paths: Iterable[Path], then: Callable[[TrimtabError | None], None]) -> None:
        """Call `then` when what other replicas have appended to these segments is as durable as what is appended here.

        Another replica's line can be read before that one has flushed it, and must not be told before it is on the disk. While
        this replica's own disk fails, `answer` tells it all the same, as it does with its own.
        """
        if self._commit is None:
            return then(None)

        def flushed(error: OSError | None) -> None:
            if error is not None:
                self._note_failure(error)
            then(None if error is None or self._on_failure == "answer" else self._not_told(error))

        try:
            self._commit.require_room()
            for path in paths:
                self.writer.flush_too(path)
            self._commit.after_sync(flushed)
        except OSError as error:  # too many open files
            flushed(error)
        except Overloaded as error:
            then(error)

    def retry(self) -> None:
        """Write down what is kept if it is time to. Call it each second: without requests nothing else would do it."""
        if self._kept and self._may_try():
            self._write_kept()

    def status(self) -> dict[str, Any]:
        """Return how the log is: `since_s` is for how long it has been in its state, the counts are since the start.

        It was failing when it was last tried; without requests, and with nothing kept, it is not tried.
        """
        return {
            "state": "failing" if self._is_failing else "ok",
            "since_s": self._monotonic() - self._changed_s,
            "last_error": self._last_error,
            "num_failures": self._num_failures,
            "num_unlogged": self._num_unlogged,
            "num_buffered": sum(lines.num_decisions for lines in self._kept),
            "num_dropped": self._num_dropped,
        }

    async def close(self) -> None:
        """Write down what is kept if that is possible, flush, and close the segment."""
        self._write_kept()
        if self._commit is not None:
            await self._commit.close()
        if self._kept:
            num_decisions = sum(lines.num_decisions for lines in self._kept)
            logger.error("event=kept_decisions_lost num_decisions=%d error=%r", num_decisions, self._last_error)
        self.writer.close()

    def _may_try(self) -> bool:
        if not self._is_failing:
            return True
        now_s = self._monotonic()
        if is_left_alone(self._commit, since_s=self._tried_s, now_s=now_s):
            return False
        self._tried_s = now_s
        return True

    def _write(self, data: bytes, done: Callable[[TrimtabError | None, Place | None], None]) -> bool:
        """Write, and call `done` once it is as durable as was asked for, or is not; False when the disk failed or was slow."""
        started_s = self._monotonic()
        try:
            place = self.writer.append(data)
        except OSError as error:
            self._note_failure(error)
            done(self._refusal(), None)
            return False
        took_s = self._monotonic() - started_s
        is_slow = took_s > self._timeout_s
        if is_slow:  # it is logged nevertheless, and nothing is written for a while
            self._note_failure(OSError(f"a write took {took_s:.1f} s, the limit is {self._timeout_s:g} s"))
        if self._commit is None:
            self._synced(None, place, is_slow, done)
            return not is_slow
        try:
            self._commit.after_sync(lambda error: self._synced(error, place, is_slow, done))
        except Overloaded as error:  # the disk does not keep up: written, and perhaps never acknowledged
            done(error, None)
            return False
        return not is_slow

    def _synced(self, error: OSError | None, place: Place, is_slow: bool, done: Then) -> None:
        if error is not None:
            self._note_failure(error)
            return done(self._refusal(), None)
        if self._is_failing and not is_slow:
            self._is_failing, self._changed_s = False, self._monotonic()
            logger.warning("event=log_recovered num_unlogged=%d num_dropped=%d", self._num_unlogged, self._num_dropped)
        done(None, place)

    def _answer(self, lines: "_Lines", then: Then, error: TrimtabError | None, place: Place | None) -> None:
        if error is None:
            then(None, place)
        elif self._on_failure == "refuse":
            then(error, None)
        else:
            self._num_unlogged += lines.num_decisions
            self._keep(lines)
            then(None, None)

    def _keep(self, lines: "_Lines") -> None:
        """Keep lines for later. They may be in the log already, where their fsync failed: readers count an id once."""
        if self._num_kept_bytes + len(lines.data) > self._buffer_bytes:
            self._num_dropped += lines.num_decisions
            return lines.moved("dropped")
        self._kept.append(lines)
        self._num_kept_bytes += len(lines.data)
        lines.moved("kept")

    def _write_kept(self) -> bool:
        """Write what is kept, oldest first, for as long as the disk is fast; False when it is not."""
        is_fast = True
        while self._kept and is_fast:
            chunk = self._take_chunk()
            data = b"".join([lines.data for lines in chunk])
            is_fast = self._write(data, lambda _, place, chunk=chunk: self._settle(chunk, place))
        return is_fast

    def _take_chunk(self) -> list["_Lines"]:
        chunk, size = [], 0
        while self._kept and (not chunk or size + len(self._kept[0].data) <= CHUNK_BYTES):
            chunk.append(self._kept.popleft())
            size += len(chunk[-1].data)
        self._num_kept_bytes -= size
        return chunk

    def _settle(self, chunk: list["_Lines"], place: Place | None) -> None:
        """Say where what was kept is now, or keep it again."""
        if place is None:
            for lines in chunk:
                self._keep(lines)
            return
        path, offset = place
        for lines in chunk:
            lines.moved((path, offset))
            offset += len(lines.data)

    def _note_failure(self, error: OSError) -> None:
        self._last_error, self._tried_s = str(error), self._monotonic()
        self._num_failures += 1
        if not self._is_failing:
            self._is_failing, self._changed_s = True, self._tried_s
            logger.error("event=log_failing on_failure=%s error=%r", self._on_failure, self._last_error)

    @staticmethod
    def _not_told(error: OSError) -> ServiceUnavailable:
        return ServiceUnavailable(f"this was decided before, and it is not known to be on the disk: {error}")

    def _refusal(self) -> ServiceUnavailable:
        return ServiceUnavailable(f"the decision log cannot be written: {self._last_error}")


def is_left_alone(commit: GroupCommit | None, *, since_s: float, now_s: float) -> bool:
    """Say whether a disk that failed is not to be tried again yet: for `RETRY_S`, and for as long as an fsync hangs."""
    return now_s - since_s < RETRY_S or (commit is not None and commit.is_overdue)


class _Lines(NamedTuple):
    data: bytes
    num_decisions: int
    moved: Moved
