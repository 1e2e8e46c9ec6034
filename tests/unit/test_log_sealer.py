"""Does the monitor count the same from sealed segments as from open ones, and does its sealer leave alone what is not read?"""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from actors.log_sealer import LogSealer
from actors.monitor import Monitor
from policies.errors import IntegrityError
from policies.log_reader import LogTail
from policies.records import Decision
from policies.sealing import seal
from serve_app.decision_log import SegmentWriter
from tests.logs import HEADER, encode_lines, read_log
from tests.simulators import START_S, Segment, make_decision
from tests.unit.test_monitor import POLICY, World, numbers, population

FOR_EVER_S = 1e12


def sealer(directory: Path, monitor: Monitor) -> LogSealer:
    return LogSealer(directory, may_seal=monitor.may_seal, note_error=monitor.note_error, sleep=lambda duration_s: None)


def seal_all(directory: Path) -> None:
    for path in directory.glob("*.jsonl"):
        assert seal(path) is not None


def all_numbers(monitor: Monitor, now: float) -> dict[str, Any]:
    """The status with the monitor's counts, which must come out the same too."""
    monitor.refresh(now)
    status = monitor.status(now)["monitor"]
    return {**numbers(monitor, now), "counts": status["counts"], "rebuilt": status["rebuilt_decisions"]}


def busy_world(root: Path) -> World:
    """A release that goes on, requests that were repeated, and half a line at the end of each segment.

    Episodes take 10 s. At its end all are over, and 5 s later all outcomes were taken: before that some wait behind others, and
    behind which depends on the chunks in which the segments are read.
    """
    world = World(root, population({1: 1.0, 2: 1.5}))
    world.start_release()
    world.live(20)
    for segment in world.decisions:
        lines = segment.path.read_bytes().splitlines(keepends=True)
        segment.append_bytes(b"".join(lines[5:12]) + lines[3][:40])
    world.clock.advance(5)
    return world


def test_one_log_in_both_forms_gives_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policies.sealed_segments.MAX_GROUP_ROWS", 100)
    world = busy_world(tmp_path / "storage")
    now = world.clock.now
    lines = all_numbers(world.monitor(), now)
    directory = world.storage.decisions(POLICY)
    seal_all(directory)
    assert {path.suffix for path in directory.iterdir()} == {".parquet"}
    sealed = all_numbers(world.monitor(), now)
    assert sealed == lines
    assert lines["counts"]["duplicate_decisions"] == 14 and lines["rebuilt"] == 2014  # 7 of each segment
    assert {arm["version"]: arm["decisions"] for arm in lines["arms"]}.keys() == {1, 2}


def test_leaving_the_sealed_duplicates_out_of_the_counts_would_change_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""
    world = busy_world(tmp_path / "storage")
    lines = all_numbers(world.monitor(), world.clock.now)
    seal_all(world.storage.decisions(POLICY))
    monkeypatch.setattr(LogTail, "num_sealed_duplicates", property(lambda tail: 0, lambda tail, value: None), raising=False)
    assert all_numbers(world.monitor(), world.clock.now)["counts"] != lines["counts"]


def test_sealing_while_the_monitor_reads_on_changes_no_number(tmp_path: Path) -> None:
    world = busy_world(tmp_path / "storage")
    directory = world.storage.decisions(POLICY)
    live, now = world.monitor(), world.clock.now
    live.refresh(now)
    saved = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert sealer(directory, live).work(FOR_EVER_S) == 2
    world.decisions = [Segment(directory, "decisions", name) for name in ("a-2", "b-2")]
    world.live(10, live)
    now = world.clock.now + 5
    found = all_numbers(live, now)
    del found["rebuilt"]  # what there was when it started

    restarted = all_numbers(world.monitor(), now)
    copy = Path(shutil.copytree(tmp_path / "storage", tmp_path / "copy"))
    for path in (copy / directory.relative_to(tmp_path / "storage")).glob("*.parquet"):
        path.unlink()
        path.with_suffix(".jsonl").write_bytes(saved[f"{path.stem}.jsonl"])
    root, settings = str(copy), {"outcome_range": (0.0, 20.0), "reward_window_s": 60, "config": live._config}
    unsealed = all_numbers(Monitor(POLICY, root, now=now, **settings), now)
    assert restarted == unsealed
    del unsealed["rebuilt"]
    assert found == unsealed


# --- the sealer ---


def test_it_seals_what_rests_and_was_read_and_nothing_else(tmp_path: Path) -> None:
    directory = tmp_path / "decisions"
    writer = SegmentWriter(directory, "decisions", "open")
    writer.append(encode_lines(make_decision("o")))
    for name in ("read", "unread", "young"):
        Segment(directory, "decisions", name).append(make_decision(name))
    now = (directory / "young.jsonl").stat().st_mtime + 1
    for name in ("open-000001", "read", "unread"):
        os.utime(directory / f"{name}.jsonl", (now - 1000, now - 1000))
    errors: list[Exception] = []
    log_sealer = LogSealer(directory, may_seal=lambda path: path.stem != "unread", note_error=errors.append)
    assert log_sealer.work(now) == 1 and errors == []
    assert sorted(path.name for path in directory.iterdir()) == [
        "open-000001.jsonl",
        "read.parquet",
        "unread.jsonl",
        "young.jsonl",
    ]
    writer.close()


def test_a_monitor_lets_only_that_be_sealed_which_it_has_read(tmp_path: Path) -> None:
    world = World(tmp_path, population())
    world.live(3)
    monitor, path = world.monitor(), world.decisions[0].path
    assert not monitor.may_seal(path)  # it has not looked yet
    steps = monitor.refresh_steps(world.clock.now)
    next(steps)
    assert not monitor.may_seal(path)
    for _ in steps:
        pass
    assert monitor.may_seal(path)


def test_what_cannot_be_sealed_is_reported_once_and_keeps_nothing_else_from_being_sealed(tmp_path: Path) -> None:
    Segment(tmp_path, "decisions", "damaged").append_bytes(b"no record\n")
    Segment(tmp_path, "decisions", "good").append(make_decision("good"))
    errors: list[Exception] = []
    log_sealer = LogSealer(tmp_path, may_seal=lambda path: True, note_error=errors.append)
    assert [log_sealer.work(FOR_EVER_S) for _ in range(3)] == [1, 0, 0]
    assert [type(error) for error in errors] == [IntegrityError] and "damaged.jsonl" in str(errors[0])


def test_leftovers_of_killed_writers_are_removed_and_those_at_work_are_not(tmp_path: Path) -> None:
    (tmp_path / ".tmp-dead-000001.jsonl").write_bytes(HEADER)
    writer = SegmentWriter(tmp_path, "decisions", "w")
    writer.append(encode_lines(make_decision("a", time_s=START_S)))
    os.rename(tmp_path / "w-000001.jsonl", tmp_path / ".tmp-w-000001.jsonl")  # as it was a moment ago
    LogSealer(tmp_path, may_seal=lambda path: True, note_error=pytest.fail).work(FOR_EVER_S)
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-w-000001.jsonl"]
    os.rename(tmp_path / ".tmp-w-000001.jsonl", tmp_path / "w-000001.jsonl")
    assert [type(row) for row in read_log(tmp_path)] == [Decision]
