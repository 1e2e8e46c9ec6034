"""One replica on a fixed port, started again whenever it is killed: `python -m tests.replica_lives STORAGE PORT [BROKEN]`.

Everything is imported once, and each life is a fork: it begins within tens of milliseconds, so a test has time for hundreds of
kills. Writes `began <pid> <replica>` and `ended <pid>` to standard output; ends with its last life when standard input closes.
`BROKEN` names a mistake that the replica is to have, for tests that must notice it.
"""

import asyncio
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

from policies.storage import existing_storage
from serve_app.durable_log import DecisionLog, Moved, Then
from serve_app.recall import Recall
from tests.serving_helpers import replica_of


def main() -> None:
    storage_root, port, *broken = sys.argv[1:]
    for mistake in broken:
        MISTAKES[mistake]()
    while True:
        pid = os.fork()
        if pid == 0:
            asyncio.run(_live(Path(storage_root), int(port)))
        if not _wait_for_the_end(pid):
            return


async def _live(storage_root: Path, port: int) -> None:
    replica = replica_of(existing_storage(storage_root))
    following = asyncio.create_task(replica._variants.follow())
    await replica._direct.start("127.0.0.1", port)
    print("began", os.getpid(), replica.name, flush=True)
    await following


def _wait_for_the_end(pid: int) -> bool:
    """Return whether there is to be another life: not once standard input is closed."""
    descriptor = os.pidfd_open(pid)
    try:
        readable, _, _ = select.select([descriptor, sys.stdin], [], [])
    finally:
        os.close(descriptor)
    if sys.stdin in readable:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print("ended", pid, flush=True)
    return sys.stdin not in readable


def _answer_before_writing() -> None:
    append = DecisionLog.append

    def write_later(self: DecisionLog, lines: bytes, num_decisions: int, then: Then, moved: Moved) -> None:
        then(None, None)
        asyncio.get_running_loop().call_later(0.05, append, self, lines, num_decisions, lambda error, place: None)

    DecisionLog.append = write_later  # type: ignore[method-assign]


def _forget_former_lives() -> None:
    def catch_up(self: Recall) -> None:
        pass

    Recall.catch_up = catch_up  # type: ignore[method-assign]


def _glue_to_torn_tail() -> None:
    """Have each life write on in the segment of the one before, behind the half line that may be there."""
    from serve_app.decision_log import SegmentWriter

    open_next = SegmentWriter._open_next

    def open_last(self: Any) -> None:
        segments = sorted(self._directory.glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
        if not segments:
            return open_next(self)
        self._path = segments[-1]
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        self._size_bytes = os.fstat(self._descriptor).st_size

    SegmentWriter._open_next = open_last  # type: ignore[method-assign]


MISTAKES = {
    "answers_before_writing": _answer_before_writing,
    "forgets_former_lives": _forget_former_lives,
    "glues_to_torn_tail": _glue_to_torn_tail,
}

if __name__ == "__main__":
    main()
