"""When may a request be told that its records are accepted? Once they are as durable as decisions are."""

import asyncio
import errno
import time
from pathlib import Path

from policies.records import SegmentKind
from serve_app.config import ServingConfig
from serve_app.decision_log import SegmentWriter
from serve_app.durable_log import is_left_alone
from serve_app.group_commit import GroupCommit


class RecordLog:
    """One replica's segments of feedback or overrides. `append` waits for an fsync where `serving.durability` asks for one."""

    def __init__(self, directory: Path, kind: SegmentKind, writer: str, *, settings: ServingConfig) -> None:
        self.writer = SegmentWriter(directory, kind, writer)
        self._is_failing, self._failure = False, OSError(errno.ETIMEDOUT, "an fsync hangs")
        self._tried_s = float("-inf")  # while it is failing
        self.commit: GroupCommit | None = None
        if settings.durability == "fsync":
            self.commit = GroupCommit(self.writer, timeout_s=settings.log_timeout_s)

    async def append(self, lines: bytes) -> None:
        """Write whole lines with one system call, and wait until they are durable.

        Raises `OSError` when they are not, or perhaps not, and `Overloaded` when too many wait for the disk already. A failure
        ends the segment, so then one request per `RETRY_S` tries the disk, and none while an fsync hangs.
        """
        now_s = time.monotonic()
        if is_left_alone(self.commit, since_s=self._tried_s, now_s=now_s):
            raise self._failure
        if self._is_failing:
            self._tried_s = now_s  # who comes while this one waits for its fsync does not try as well
        try:
            await self._append(lines)
        except OSError as error:
            self._is_failing, self._failure, self._tried_s = True, error, time.monotonic()
            raise
        self._is_failing, self._tried_s = False, float("-inf")

    async def _append(self, lines: bytes) -> None:
        self.writer.append(lines)
        if self.commit is None:
            return
        flushed: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()
        self.commit.after_sync(lambda error: None if flushed.done() else flushed.set_result(error))  # the client may be gone
        error = await flushed
        if error is not None:
            raise error

    async def close(self) -> None:
        if self.commit is not None:
            await self.commit.close()
        self.writer.close()
