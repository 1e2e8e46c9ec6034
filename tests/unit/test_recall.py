"""Where a decision is in the logs of all replicas: found while they write, not found when it is not there, in bounded memory."""

import asyncio
import os
from pathlib import Path

import msgspec
import pytest

from serve_app import recall as recall_module
from serve_app.decision_log import SegmentWriter
from serve_app.recall import Recall
from tests.logs import make_batch
from tests.simulators import make_decision


def line(name: str) -> bytes:
    return msgspec.json.encode(make_decision(name)) + b"\n"


def names(recall: Recall, name: str) -> list[str]:
    return [decision.decision_id for decision in recall.find([name]).get(name, [])]


def test_what_another_replica_appends_is_found_once_it_is_whole(tmp_path: Path) -> None:
    recall, other = Recall(tmp_path, "me"), SegmentWriter(tmp_path, "decisions", "other")
    recall.catch_up()
    assert names(recall, "a") == []
    other.append(line("a") + line("b"))
    recall.catch_up()
    assert names(recall, "a") == ["a"] and names(recall, "b") == ["b"] and names(recall, "c") == []
    [path] = tmp_path.glob("*.jsonl")
    whole = line("c")
    with open(path, "ab") as file:
        file.write(whole[:40])
    recall.catch_up()
    assert names(recall, "c") == []
    with open(path, "ab") as file:
        file.write(whole[40:])
    recall.catch_up()
    assert names(recall, "c") == ["c"]


def test_our_own_are_found_where_we_wrote_them(tmp_path: Path) -> None:
    recall, log = Recall(tmp_path, "me"), SegmentWriter(tmp_path, "decisions", "me", segment_bytes=2000)
    for number in range(20):  # through several segments
        recall.remember([f"d{number}"], *log.append(line(f"d{number}")))
    assert len(list(tmp_path.glob("*.jsonl"))) > 2
    assert [names(recall, f"d{number}") for number in range(20)] == [[f"d{number}"] for number in range(20)]


def test_a_line_of_many_is_decoded_once_however_many_of_it_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recall, log = Recall(tmp_path, "me"), SegmentWriter(tmp_path, "decisions", "me")
    many = [f"d{number}" for number in range(100)]
    batch = make_batch("", num_rows=100, decision_ids=many)
    recall.remember(many, *log.append(msgspec.json.encode(batch) + b"\n"))
    read: list[tuple[Path, int]] = []
    line_at = recall_module._line_at
    monkeypatch.setattr(recall_module, "_line_at", lambda *where: read.append(where) or line_at(*where))
    found = recall.find([*many, "nobody's"])
    assert {name: [decision.decision_id for decision in decisions] for name, decisions in found.items()} == {
        name: [name] for name in many
    }
    assert len(read) == 1


def test_new_segments_and_those_of_replicas_that_ended_are_read(tmp_path: Path) -> None:
    ended = SegmentWriter(tmp_path, "decisions", "ended")
    ended.append(line("old"))
    ended.close()
    recall = Recall(tmp_path, "me")
    recall.catch_up()
    assert names(recall, "old") == ["old"]
    SegmentWriter(tmp_path, "decisions", "later").append(line("new"))
    recall.catch_up()
    assert names(recall, "new") == ["new"]


def test_the_first_decision_of_another_replica_is_found_at_once(tmp_path: Path) -> None:
    """It may have died before it answered: its client asks the next one within milliseconds."""
    recall = Recall(tmp_path, "me")
    for number in range(50):  # several within one tick of the clock that file times are taken from
        SegmentWriter(tmp_path, "decisions", f"other-{number}").append(line(f"d{number}"))
        recall.catch_up()
        assert names(recall, f"d{number}") == [f"d{number}"]


def test_a_replica_that_was_idle_for_long_is_followed_when_it_decides_again(tmp_path: Path) -> None:
    other = SegmentWriter(tmp_path, "decisions", "other")
    other.append(line("old"))
    [path] = tmp_path.glob("*.jsonl")
    os.utime(path, (1.0, 1.0))
    recall = Recall(tmp_path, "me")
    recall.catch_up()
    other.append(line("new"))  # changes the segment, not the directory
    recall.catch_up()
    assert names(recall, "old") == [] and names(recall, "new") == ["new"]


def test_what_nobody_has_added_to_for_long_is_not_read(tmp_path: Path) -> None:
    SegmentWriter(tmp_path, "decisions", "ended").append(line("old"))
    [path] = tmp_path.glob("*.jsonl")
    os.utime(path, (1.0, 1.0))
    recall = Recall(tmp_path, "me")
    recall.catch_up()
    assert names(recall, "old") == []


def test_only_the_end_of_a_large_segment_is_read_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = SegmentWriter(tmp_path, "decisions", "other")
    other.append(b"".join(line(f"d{number:03d}") for number in range(200)))
    monkeypatch.setattr(recall_module, "FIRST_LOOK_BYTES", 10 * len(line("d000")) + 7)
    recall = Recall(tmp_path, "me")
    recall.catch_up()
    assert names(recall, "d000") == [] and [names(recall, f"d{n}") for n in range(190, 200)] == [
        [f"d{n}"] for n in range(190, 200)
    ]


def test_memory_is_bounded_and_the_newest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall_module, "MAX_REMEMBERED", 10)
    recall, log = Recall(tmp_path, "me"), SegmentWriter(tmp_path, "decisions", "me")
    for number in range(100):
        recall.remember([f"d{number}"], *log.append(line(f"d{number}")))
        assert len(recall._newer) + len(recall._older) <= 21
    assert names(recall, "d99") == ["d99"] and names(recall, "d89") == ["d89"] and names(recall, "d5") == []


def test_a_segment_that_is_gone_is_no_error(tmp_path: Path) -> None:
    """It was sealed: what is older than that nobody asks for again."""
    recall, other = Recall(tmp_path, "me"), SegmentWriter(tmp_path, "decisions", "other")
    other.append(line("a"))
    recall.catch_up()
    [path] = tmp_path.glob("*.jsonl")
    path.unlink()
    recall.catch_up()
    assert names(recall, "a") == []
    assert len(recall._others) == 0, "it is forgotten"


@pytest.mark.parametrize("damaged", [b'{"decision_id":"abc\n', b'{"decision_id":"\xff\xfe"}\n', b'{"batch_id":"b"\n'])
def test_a_damaged_line_hides_no_other_one(tmp_path: Path, damaged: bytes) -> None:
    """Else every later batch with a named request would fail, and the task that reads along would end."""
    recall, other = Recall(tmp_path, "me"), SegmentWriter(tmp_path, "decisions", "other")
    other.append(line("a") + damaged + line("b"))
    recall.catch_up()
    assert names(recall, "a") == ["a"] and names(recall, "b") == ["b"]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_however_many_segments_there_are_none_is_kept_open(tmp_path: Path) -> None:
    writers = [SegmentWriter(tmp_path, "decisions", f"other-{number}") for number in range(100)]
    for number, writer in enumerate(writers):
        writer.append(line(f"d{number}"))
    recall, before = Recall(tmp_path, "me"), open_files()
    recall.catch_up()
    assert [names(recall, f"d{number}") for number in range(100)] == [[f"d{number}"] for number in range(100)]
    assert open_files() == before
    for writer in writers:
        writer.close()
    assert open_files() == before - 100, "negative control: an open file is counted"


@pytest.mark.parametrize("slice_bytes", [1, 100, 1000, 1 << 20])
def test_slices_of_any_size_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slice_bytes: int) -> None:
    """Also one that is smaller than a line, and where the last line is half written."""
    monkeypatch.setattr(recall_module, "SLICE_BYTES", slice_bytes)
    other = SegmentWriter(tmp_path, "decisions", "other")
    other.append(b"".join(line(f"d{number}") for number in range(20)))
    half, rest = line("half")[:50], line("half")[50:]
    recall = Recall(tmp_path, "me")
    other.append(half)
    recall.catch_up()
    assert [names(recall, f"d{number}") for number in range(20)] == [[f"d{number}"] for number in range(20)]
    assert names(recall, "half") == []
    other.append(rest)
    recall.catch_up()
    assert names(recall, "half") == ["half"]


def test_after_a_pause_others_come_to_their_turn_while_it_reads_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a named request in the middle of it sees everything, as always."""
    monkeypatch.setattr(recall_module, "SLICE_BYTES", 4096)
    monkeypatch.setattr(recall_module, "FOLLOW_INTERVAL_S", 0.0)
    other = SegmentWriter(tmp_path, "decisions", "other")
    recall, num_decisions = Recall(tmp_path, "me"), 1000
    recall.catch_up()
    other.append(b"".join(line(f"d{number}") for number in range(num_decisions)))

    async def run() -> list[int]:
        follow, seen = asyncio.create_task(recall.follow()), []
        async with asyncio.timeout(20):
            while len(recall._newer) < num_decisions // 2:
                seen.append(len(recall._newer))
                await asyncio.sleep(0)
        recall.catch_up()
        assert names(recall, f"d{num_decisions - 1}") == [f"d{num_decisions - 1}"]
        other.append(line("late"))
        async with asyncio.timeout(20):
            while not names(recall, "late"):
                await asyncio.sleep(0)
        follow.cancel()
        return seen

    seen = asyncio.run(run())
    most_per_slice = 4096 // len(line("d0")) + 1
    assert max(after - before for before, after in zip(seen, seen[1:])) <= most_per_slice


@pytest.mark.parametrize("damage", [b"\xff\xff", b"\x00", b'"'])
def test_a_line_that_was_changed_is_taken_for_none(tmp_path: Path, damage: bytes) -> None:
    recall, log = Recall(tmp_path, "me"), SegmentWriter(tmp_path, "decisions", "me")
    path, offset = log.append(line("a"))
    recall.remember(["a"], path, offset)
    assert names(recall, "a") == ["a"]
    data = bytearray(path.read_bytes())
    data[offset + 20 : offset + 20 + len(damage)] = damage
    path.write_bytes(data)
    assert names(recall, "a") == []
