"""What becomes of an answer when its decision cannot be written down, or only slowly?"""

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest

from policies.errors import Overloaded, ServiceUnavailable, TrimtabError
from serve_app.config import ServingConfig
from serve_app.decision_log import SegmentWriter
from serve_app.durable_log import RETRY_S, DecisionLog, OnFailure
from serve_app.group_commit import GroupCommit
from tests.disks import Disk
from tests.logs import encode_lines, read_log
from tests.simulators import Clock, make_decision
from tests.unit.test_decision_log import largest_file


class SlowDirectory(SegmentWriter):
    """A writer whose disk takes `duration_s` of the clock for each write."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        super().__init__(directory, "decisions", "w")
        self.clock = clock
        self.duration_s = 0.0
        self.num_writes = 0

    def append(self, lines: bytes) -> tuple[Path, int]:
        self.num_writes += 1
        self.clock.advance(self.duration_s)
        return super().append(lines)


class Server:
    """Decides, has each decision logged, and notes what became of its answer."""

    def __init__(self, directory: Path, on_failure: OnFailure, *, buffer_bytes: int = 1 << 20) -> None:
        self.directory = directory
        self.clock = Clock()
        self.writer = SlowDirectory(directory, self.clock)
        self.log = DecisionLog(
            self.writer, on_failure=on_failure, timeout_s=2.0, buffer_bytes=buffer_bytes, monotonic=lambda: self.clock.now
        )
        self.ids = 0
        self.answers: list[tuple[TrimtabError | None, tuple[Path, int] | None]] = []

    def decide(self, number: int = 1) -> None:
        for _ in range(number):
            self.log.append(line(self.ids), 1, lambda error, place: self.answers.append((error, place)))
            self.ids += 1

    @property
    def status(self) -> dict[str, Any]:
        return self.log.status()

    def logged(self) -> list[str]:
        return sorted({decision.decision_id for decision in read_log(self.directory)})


def line(number: int) -> bytes:
    return encode_lines(make_decision(f"d{number:04d}"))


def ids(*numbers: int) -> list[str]:
    return [f"d{number:04d}" for number in numbers]


def test_while_all_is_well_each_answer_knows_where_its_line_is(tmp_path: Path) -> None:
    server = Server(tmp_path, "refuse")
    server.decide(3)
    for number, (error, place) in enumerate(server.answers):
        assert error is None and place is not None
        path, offset = place
        assert path.read_bytes()[offset:].startswith(line(number))
    assert server.status == {
        **{"state": "ok", "since_s": 0.0, "last_error": None},
        **{"num_failures": 0, "num_unlogged": 0, "num_buffered": 0, "num_dropped": 0},
    }


# --- a full disk ---


def test_refuse_answers_503_while_the_disk_is_full_and_goes_on_when_it_is_not(tmp_path: Path) -> None:
    server = Server(tmp_path, "refuse")
    server.decide()
    with largest_file((tmp_path / "w-000001.jsonl").stat().st_size + 10):
        server.decide(2)
    with largest_file(10):  # nor does the next segment's header fit
        server.clock.advance(RETRY_S)
        server.decide()
    assert [type(error) for error, _ in server.answers] == [type(None), *[ServiceUnavailable] * 3]
    assert "only 10 of" in str(server.answers[1][0]) and server.status["state"] == "failing"
    server.clock.advance(RETRY_S)
    server.decide()
    assert server.answers[-1][0] is None
    assert (server.status["state"], server.status["num_unlogged"], server.status["since_s"]) == ("ok", 0, 0.0)
    assert server.logged() == ids(0, 4)


def test_answer_goes_on_and_writes_down_later_what_it_kept(tmp_path: Path) -> None:
    server = Server(tmp_path, "answer")
    server.decide()
    with largest_file(10):
        server.writer.close()
        server.decide(5)
    assert [error for error, _ in server.answers] == [None] * 6
    assert [place is None for _, place in server.answers] == [False, *[True] * 5]
    assert (server.status["state"], server.status["num_unlogged"], server.status["num_buffered"]) == ("failing", 5, 5)
    server.clock.advance(RETRY_S)
    server.log.retry()  # no request comes, and yet
    assert server.logged() == ids(0, 1, 2, 3, 4, 5)
    assert (server.status["state"], server.status["num_unlogged"], server.status["num_buffered"]) == ("ok", 5, 0)


def test_what_does_not_fit_in_memory_is_dropped_and_counted(tmp_path: Path) -> None:
    room = 3 * len(line(0)) + 10
    server = Server(tmp_path, "answer", buffer_bytes=room)
    with largest_file(10):
        server.decide(5)
    assert (server.status["num_unlogged"], server.status["num_buffered"], server.status["num_dropped"]) == (5, 3, 2)
    server.clock.advance(RETRY_S)
    server.decide()
    assert server.logged() == ids(0, 1, 2, 5)
    assert (server.status["num_buffered"], server.status["num_dropped"]) == (0, 2)


def test_a_disk_that_is_full_again_before_all_was_written_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.durable_log.CHUNK_BYTES", 2 * len(line(0)))
    server = Server(tmp_path, "answer")
    with largest_file(10):
        server.decide(9)
    for limit_bytes in (1000, 1600, 2200, 1 << 20):  # each lets a little more through, and cuts a line somewhere
        server.clock.advance(RETRY_S)
        with largest_file(limit_bytes):
            server.log.retry()
    assert server.logged() == ids(*range(9))
    assert (server.status["num_buffered"], server.status["num_unlogged"], server.status["num_dropped"]) == (0, 9, 0)


def test_a_failing_disk_is_not_tried_for_every_request(tmp_path: Path) -> None:
    server = Server(tmp_path, "refuse")
    with largest_file(10):
        for _ in range(100):
            server.decide()
            server.clock.advance(RETRY_S / 10)
    assert server.writer.num_writes <= 11
    assert list(tmp_path.iterdir()) == []


# --- a slow disk ---


def test_a_slow_write_is_an_answer_and_the_last_write_for_a_while(tmp_path: Path) -> None:
    server = Server(tmp_path, "refuse")
    server.writer.duration_s = 2.1
    server.decide(3)
    assert [type(error) for error, _ in server.answers] == [type(None), ServiceUnavailable, ServiceUnavailable]
    assert server.status["last_error"] == "a write took 2.1 s, the limit is 2 s"
    assert server.writer.num_writes == 1  # each would have blocked the loop for as long
    server.clock.advance(RETRY_S)
    server.writer.duration_s = 0.0
    server.decide()
    assert server.status["state"] == "ok" and server.logged() == ids(0, 3)


def test_without_the_limit_every_request_would_wait_for_the_slow_disk(tmp_path: Path) -> None:
    """Negative control."""
    server = Server(tmp_path, "refuse")
    server.log = DecisionLog(server.writer, on_failure="refuse", timeout_s=math.inf, monotonic=lambda: server.clock.now)
    server.writer.duration_s = 2.1
    server.decide(3)
    assert server.writer.num_writes == 3 and server.status["state"] == "ok"


def test_a_disk_that_stays_slow_takes_what_is_kept_a_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.durable_log.CHUNK_BYTES", 2 * len(line(0)))
    server = Server(tmp_path, "answer")
    server.writer.duration_s = 3.0
    server.decide(6)
    assert (server.status["num_buffered"], server.status["num_unlogged"]) == (5, 5)  # the first one was written, slowly
    for num_left in (3, 1, 0):
        server.clock.advance(RETRY_S)
        server.log.retry()
        assert (server.status["num_buffered"], server.status["state"]) == (num_left, "failing")
    assert server.logged() == ids(*range(6))


# --- with fsync ---


def run_with_commit(directory: Path, on_failure: OnFailure, scenario, *, timeout_s: float = 10.0, max_waiting: int = 100) -> None:
    async def main() -> None:
        disk, server = Disk(), Server(directory, on_failure)
        server.commit = commit = GroupCommit(server.writer, timeout_s=timeout_s, max_waiting=max_waiting, fsync=disk.fsync)
        server.log = DecisionLog(
            server.writer, on_failure=on_failure, timeout_s=timeout_s, commit=commit, monotonic=lambda: server.clock.now
        )
        async with asyncio.timeout(20):
            await scenario(server, disk)
            await server.log.close()

    asyncio.run(main())


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_an_answer_waits_for_its_fsync(tmp_path: Path) -> None:
    async def scenario(server: Server, disk: Disk) -> None:
        disk.can_go_on.clear()
        server.decide(3)
        await asyncio.sleep(0.02)
        assert server.answers == []
        disk.can_go_on.set()
        await until(lambda: len(server.answers) == 3)
        assert all(error is None and place is not None for error, place in server.answers)
        assert disk.after_power_cut(tmp_path).endswith(line(2))

    run_with_commit(tmp_path, "refuse", scenario)


def test_a_failed_fsync_is_a_503_and_the_next_one_is_in_the_next_segment(tmp_path: Path) -> None:
    async def scenario(server: Server, disk: Disk) -> None:
        disk.fails_next = True
        server.decide()
        await until(lambda: len(server.answers) == 1)
        assert isinstance(server.answers[0][0], ServiceUnavailable) and server.status["state"] == "failing"
        server.clock.advance(RETRY_S)
        server.decide()
        assert server.status["state"] == "failing"  # it was written; whether it is on the disk is not known yet
        await until(lambda: len(server.answers) == 2)
        assert server.answers[1][0] is None and server.status["state"] == "ok"
        assert line(1) in disk.after_power_cut(tmp_path)

    run_with_commit(tmp_path, "refuse", scenario)


def test_answer_writes_again_what_a_failed_fsync_may_have_lost(tmp_path: Path) -> None:
    async def scenario(server: Server, disk: Disk) -> None:
        disk.fails_next = True
        server.decide(3)
        await until(lambda: len(server.answers) == 3)
        assert [error for error, _ in server.answers] == [None] * 3
        assert (server.status["num_unlogged"], server.status["num_buffered"]) == (3, 3)
        disk.fails_next = True
        server.clock.advance(RETRY_S)
        server.log.retry()
        await until(lambda: server.status["num_buffered"] == 3)  # failed again, and kept again
        server.clock.advance(RETRY_S)
        server.log.retry()
        await until(lambda: server.status["state"] == "ok")
        assert (server.status["num_unlogged"], server.status["num_buffered"], server.status["num_dropped"]) == (3, 0, 0)
        durable = disk.after_power_cut(tmp_path)
        assert all(line(number) in durable for number in range(3))
        assert server.logged() == ids(0, 1, 2)

    run_with_commit(tmp_path, "answer", scenario)


def test_an_fsync_that_hangs_costs_one_timeout_and_then_nobody_waits(tmp_path: Path) -> None:
    async def scenario(server: Server, disk: Disk) -> None:
        disk.can_go_on.clear()
        server.decide(2)
        await until(lambda: len(server.answers) == 2)
        server.clock.advance(100)
        server.decide(5)  # at once: the fsync is still running
        assert len(server.answers) == 7 and server.status["num_unlogged"] == 7
        disk.can_go_on.set()
        await until(lambda: not server.commit.is_overdue)
        server.decide()
        await until(lambda: server.status["state"] == "ok")
        assert server.logged() == ids(*range(8))

    run_with_commit(tmp_path, "answer", scenario, timeout_s=0.05)


def test_a_disk_that_does_not_keep_up_refuses_with_429(tmp_path: Path) -> None:
    async def scenario(server: Server, disk: Disk) -> None:
        disk.can_go_on.clear()
        server.decide(4)
        assert [type(error) for error, _ in server.answers] == [Overloaded]
        disk.can_go_on.set()
        await until(lambda: len(server.answers) == 4)

    run_with_commit(tmp_path, "refuse", scenario, max_waiting=2)


def test_closing_writes_down_what_is_kept_and_flushes_it(tmp_path: Path) -> None:
    disks: list[Disk] = []

    async def scenario(server: Server, disk: Disk) -> None:
        disks.append(disk)
        with largest_file(10):
            server.decide(3)
        assert server.status["num_buffered"] == 3

    run_with_commit(tmp_path, "answer", scenario)
    durable = disks[0].after_power_cut(tmp_path)
    assert all(line(number) in durable for number in range(3))


def test_the_defaults_survive_a_killed_process_and_never_answer_what_is_not_logged() -> None:
    config = ServingConfig()
    assert (config.durability, config.on_log_failure) == ("write", "refuse")


def test_the_status_is_json_and_decisions_are_what_it_counts(tmp_path: Path) -> None:
    server = Server(tmp_path, "answer")
    with largest_file(10):
        server.log.append(line(0) + line(1), 2, lambda error, place: None)
    assert json.loads(json.dumps(server.status))["num_unlogged"] == 2
