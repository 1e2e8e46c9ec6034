"""Is everything that was acknowledged on the disk, whatever the disk does, and does nobody wait for ever?"""

import asyncio
import errno
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from policies.errors import Overloaded
from serve_app.decision_log import SegmentWriter
from serve_app.group_commit import GroupCommit
from tests.disks import Disk


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(limited())


class Log:
    """A writer with a group commit on a simulated disk; `write` appends one line and notes what it is told of it."""

    def __init__(
        self, directory: Path, disk: Disk, *, timeout_s: float = 10.0, max_waiting: int = 100, segment_bytes: int = 1 << 20
    ):
        self.directory = directory
        self.writer = SegmentWriter(directory, "decisions", "w", segment_bytes=segment_bytes)
        self.commit = GroupCommit(self.writer, timeout_s=timeout_s, max_waiting=max_waiting, fsync=disk.fsync)
        self.disk = disk
        self.told: dict[bytes, OSError | None] = {}

    def write(self, line: bytes) -> None:
        self.writer.append(line + b"\n")
        self.commit.after_sync(lambda error: self.note(line, error))

    def note(self, line: bytes, error: OSError | None) -> None:
        assert line not in self.told, "called back twice"
        self.told[line] = error
        if error is None:
            assert line + b"\n" in self.disk.after_power_cut(self.directory), "acknowledged and not on the disk"

    @property
    def acknowledged(self) -> list[bytes]:
        return [line for line, error in self.told.items() if error is None]


def test_it_calls_back_after_the_line_and_its_file_are_on_the_disk(tmp_path: Path) -> None:
    async def scenario() -> None:
        log = Log(tmp_path / "new" / "directory", Disk())
        log.write(b"a")
        assert log.told == {}  # not within the call
        await log.commit.close()
        assert log.told == {b"a": None}
        assert log.disk.num_syncs == 2  # the segment and, because it is new, its directory

    run(scenario)


def test_what_is_appended_during_an_fsync_shares_the_next_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        log = Log(tmp_path, Disk())
        log.write(b"first")
        await asyncio.sleep(0.05)  # the directory's fsync is over too
        num_syncs = log.disk.num_syncs
        log.disk.can_go_on.clear()
        for number in range(50):
            log.write(b"%d" % number)
        await asyncio.sleep(0.05)
        assert len(log.told) == 1
        log.disk.can_go_on.set()
        await log.commit.close()
        assert len(log.acknowledged) == 51
        assert log.disk.num_syncs == num_syncs + 2  # that of the first of them, and one for the other 49

    run(scenario)


def test_an_fsync_that_began_before_the_write_would_acknowledge_too_early(tmp_path: Path) -> None:
    """Negative control: a commit that calls those back too who came while the fsync was running."""

    class Hasty(GroupCommit):
        def _ended(self, error: OSError | None) -> None:
            self._running, self._waiting = self._running + self._waiting, []
            super()._ended(error)

    async def scenario() -> None:
        log = Log(tmp_path, Disk(duration_s=0.2))  # long enough for the second line to come while it runs, on any machine
        log.commit = Hasty(log.writer, timeout_s=10, fsync=log.disk.fsync)
        problems: list[dict] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
        for number in range(2):
            log.write(b"%d" % number)
            await asyncio.sleep(0.02)
        await log.commit.close()
        assert any("not on the disk" in str(problem["exception"]) for problem in problems)

    run(scenario)


@pytest.mark.parametrize("seed", range(10))
def test_whatever_fails_each_is_called_back_once_and_what_is_acknowledged_is_on_the_disk(tmp_path: Path, seed: int) -> None:
    async def scenario() -> None:
        rng = random.Random(seed)
        log = Log(tmp_path, Disk(duration_s=0.001), segment_bytes=400)  # segments of a few dozen lines
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: pytest.fail(str(context)))
        for number in range(300):
            if rng.random() < 0.05:
                log.disk.fails_next = True
            log.write(b"line-%03d" % number)
            if rng.random() < 0.3:
                await asyncio.sleep(rng.random() * 0.003)
        await log.commit.close()
        assert len(log.told) == 300
        assert 0 < len(log.acknowledged) < 300

    run(scenario)


def test_after_a_failure_an_fsync_of_the_same_segment_is_never_trusted(tmp_path: Path) -> None:
    """Those whose lines were written while the failing fsync ran are told too: the next one would say that all is well."""

    async def scenario() -> None:
        log = Log(tmp_path, Disk())
        log.disk.can_go_on.clear()
        log.disk.fails_next = True
        log.write(b"a")
        await asyncio.sleep(0.05)
        log.write(b"b")
        log.disk.can_go_on.set()
        while len(log.told) < 2:
            await asyncio.sleep(0.001)
        assert [error.errno for error in log.told.values() if error] == [errno.EIO, errno.EIO]
        log.write(b"c")  # into the next segment
        await log.commit.close()
        assert log.told[b"c"] is None
        assert sorted(path.name for path in tmp_path.iterdir()) == ["w-000001.jsonl", "w-000002.jsonl"]

    run(scenario)


def test_a_second_fsync_of_the_same_descriptor_would_acknowledge_what_is_lost(tmp_path: Path) -> None:
    """Negative control of the simulated disk, which is what Linux does: the retry succeeds, and the line is not there."""
    disk = Disk()
    writer = SegmentWriter(tmp_path, "decisions", "w")
    writer.keep_unflushed()
    writer.append(b"line\n")
    file, directory = writer.take_unflushed()
    disk.fails_next = True
    with pytest.raises(OSError):
        disk.fsync(file)
    disk.fsync(file)
    disk.fsync(directory)
    assert (tmp_path / "w-000001.jsonl").read_bytes().endswith(b"line\n")  # the page cache still has it
    assert b"line" not in disk.after_power_cut(tmp_path)


def test_a_commit_that_goes_on_with_the_segment_would_acknowledge_what_is_lost(tmp_path: Path) -> None:
    """Negative control: one that tells only those whose fsync failed."""

    class Trusting(GroupCommit):
        def _fail_all(self, error: OSError) -> None:
            callbacks, self._running = self._running, []
            for callback in callbacks:
                callback(error)

    async def scenario() -> None:
        log = Log(tmp_path, Disk())
        log.commit = Trusting(log.writer, timeout_s=10, fsync=log.disk.fsync)
        problems: list[dict] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
        log.disk.can_go_on.clear()
        log.disk.fails_next = True
        log.write(b"a")
        await asyncio.sleep(0.05)
        log.write(b"b")
        log.disk.can_go_on.set()
        await log.commit.close()
        assert any("not on the disk" in str(problem["exception"]) for problem in problems)

    run(scenario)


def test_an_fsync_that_hangs_is_reported_in_time_to_all_who_wait_and_to_all_who_come(tmp_path: Path) -> None:
    async def scenario() -> None:
        log = Log(tmp_path, Disk(), timeout_s=0.1)
        log.disk.can_go_on.clear()
        log.write(b"a")
        await asyncio.sleep(0.02)
        log.write(b"b")
        while len(log.told) < 2:
            await asyncio.sleep(0.005)
        assert log.commit.is_overdue
        log.write(b"c")
        await asyncio.sleep(0)
        assert [error.errno for error in log.told.values() if error] == [errno.ETIMEDOUT] * 3
        log.disk.can_go_on.set()
        while log.commit.is_overdue:
            await asyncio.sleep(0.005)
        log.write(b"d")
        await log.commit.close()
        assert log.acknowledged == [b"d"]

    run(scenario)


def test_closing_does_not_wait_for_a_disk_that_hangs(tmp_path: Path) -> None:
    async def scenario() -> None:
        log = Log(tmp_path, Disk(), timeout_s=0.1)
        log.disk.can_go_on.clear()
        log.write(b"a")
        await log.commit.close()
        assert log.told[b"a"] is not None
        log.disk.can_go_on.set()

    run(scenario)


def test_more_than_the_limit_do_not_wait(tmp_path: Path) -> None:
    async def scenario() -> None:
        log = Log(tmp_path, Disk(), max_waiting=3)
        log.disk.can_go_on.clear()
        for number in range(4):  # the first one's fsync is running
            log.write(b"%d" % number)
        with pytest.raises(Overloaded, match="the limit is 3"):
            log.write(b"more")
        log.disk.can_go_on.set()
        await log.commit.close()
        assert len(log.acknowledged) == 4

    run(scenario)


def test_a_callback_that_raises_keeps_nobody_from_being_called(tmp_path: Path) -> None:
    async def scenario() -> None:
        log = Log(tmp_path, Disk())
        problems: list[dict] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
        log.writer.append(b"x\n")
        log.commit.after_sync(lambda error: 1 / 0)
        log.write(b"a")
        await log.commit.close()
        assert log.acknowledged == [b"a"] and len(problems) == 1

    run(scenario)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    async def scenario() -> None:
        num_before = len(list(Path("/proc/self/fd").iterdir()))
        log = Log(tmp_path, Disk(duration_s=0.001), segment_bytes=200)
        for number in range(60):
            log.disk.fails_next = number % 10 == 5
            log.write(b"line-%03d" % number)
            await asyncio.sleep(0.001)
        await log.commit.close()
        log.writer.close()
        assert len(list(Path("/proc/self/fd").iterdir())) == num_before

    run(scenario)


def test_a_real_fsync_on_a_real_file(tmp_path: Path) -> None:
    async def scenario() -> None:
        writer = SegmentWriter(tmp_path, "decisions", "w")
        commit, told = GroupCommit(writer, timeout_s=10), []
        for _ in range(5):
            writer.append(b"line\n")
            commit.after_sync(told.append)
        await commit.close()
        assert told == [None] * 5

    run(scenario)


def test_too_many_open_files_do_not_become_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SegmentWriter(tmp_path, "decisions", "w", segment_bytes=200)
    writer.keep_unflushed()
    for _ in range(2):
        writer.append(b"x" * 150 + b"\n")  # a finished segment, and an open one
    before = len(os.listdir("/proc/self/fd"))

    def refuse(*_: object) -> int:
        raise OSError(24, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(OSError, match="too many"):
            writer.take_unflushed()
    assert len(os.listdir("/proc/self/fd")) == before
    with monkeypatch.context() as patch:
        patch.setattr(os, "dup", refuse)
        with pytest.raises(OSError, match="too many"):
            writer.take_unflushed()
    taken = writer.take_unflushed()
    assert len(taken) == 3, "nothing that is to be flushed was lost"
    for descriptor in taken:
        os.close(descriptor)
    writer.close()
