"""Is every complete line of a log read exactly once, and nothing else?"""

import math
from pathlib import Path

import msgspec
import pytest

from policies.errors import IntegrityError
from policies.records import SCHEMA_VERSION, Decision, Feedback, LogTail, SegmentHeader, find_decision
from tests.simulators import START_S, Segment, make_decision


def read_all(tail: LogTail) -> list[str]:
    tail.look()
    ids = []
    while records := tail.read():
        ids += [record.decision_id for record in records]
    return ids


def line(decision_id: str) -> bytes:
    return msgspec.json.encode(make_decision(decision_id)) + b"\n"


def test_a_missing_directory_is_an_empty_log(tmp_path: Path):
    assert read_all(LogTail(tmp_path / "nothing", Decision)) == []


def test_what_was_read_is_not_read_again(tmp_path: Path):
    segment, tail = Segment(tmp_path, "decisions"), LogTail(tmp_path, Decision)
    segment.append(make_decision("a"), make_decision("b"))
    assert read_all(tail) == ["a", "b"]
    assert read_all(tail) == []
    segment.append(make_decision("c"))
    assert read_all(tail) == ["c"]


def test_a_torn_tail_is_read_once_it_is_complete(tmp_path: Path):
    segment, tail = Segment(tmp_path, "decisions"), LogTail(tmp_path, Decision)
    segment.append_bytes(line("a") + line("b")[:30])
    assert read_all(tail) == ["a"]
    assert read_all(tail) == []
    segment.append_bytes(line("b")[30:])
    assert read_all(tail) == ["b"]
    assert read_all(tail) == []


def test_a_torn_header_or_first_record_is_waited_for(tmp_path: Path):
    header = msgspec.json.encode(SegmentHeader(SCHEMA_VERSION, "decisions", "w")) + b"\n"
    whole = header + line("a")
    path, tail = tmp_path / "w.jsonl", LogTail(tmp_path, Decision)
    for size in (0, 10, len(header), len(header) + 20):
        path.write_bytes(whole[:size])
        assert read_all(tail) == []
    path.write_bytes(whole)
    assert read_all(tail) == ["a"]


@pytest.mark.parametrize("byte", [b"{", b"\xff", b"\x00"])
def test_a_changed_byte_raises_and_costs_only_its_line(tmp_path: Path, byte: bytes):
    segment, tail = Segment(tmp_path, "decisions"), LogTail(tmp_path, Decision)
    segment.append_bytes(line("a") + line("b")[:20] + byte + line("b")[21:] + line("c"))
    tail.look()
    assert [record.decision_id for record in tail.read()] == ["a", "c"]
    with pytest.raises(IntegrityError, match=r"writer\.jsonl before byte"):
        tail.read()
    assert tail.read() == []
    assert read_all(tail) == []  # raised once


def test_a_segment_of_another_kind_or_version_is_refused_and_the_others_are_read(tmp_path: Path):
    Segment(tmp_path, "feedback", "a").append(make_decision("never"))
    newer = msgspec.json.encode(SegmentHeader(SCHEMA_VERSION + 1, "decisions", "b")) + b"\n"
    (tmp_path / "b.jsonl").write_bytes(newer + line("never"))
    (tmp_path / "c.jsonl").write_bytes(b"no header\n" + line("never"))
    Segment(tmp_path, "decisions", "d").append(make_decision("good"))
    tail = LogTail(tmp_path, Decision)
    tail.look()
    for message in ("feedback of schema version 1", "schema version 2", "not a segment header"):
        with pytest.raises(IntegrityError, match=message):
            tail.read()
    assert [record.decision_id for record in tail.read()] == ["good"]
    assert read_all(tail) == []


def test_a_line_without_end_is_refused(tmp_path: Path):
    segment, tail = Segment(tmp_path, "decisions"), LogTail(tmp_path, Decision)
    segment.append_bytes(line("a") + b"x" * 5000)
    tail.look()
    assert len(tail.read(max_bytes=2000)) == 1
    with pytest.raises(IntegrityError):
        tail.look()
        tail.read(max_bytes=2000)


def test_segments_are_read_nearly_in_the_order_of_time(tmp_path: Path):
    """Two writers, 400 s each, at once: chunk by chunk neither runs ahead of the other by more than a chunk."""
    for writer in ("a", "b"):
        segment = Segment(tmp_path, "decisions", writer)
        segment.append(*(make_decision(f"{writer}{second}", time_s=START_S + second) for second in range(400)))
    tail = LogTail(tmp_path, Decision)
    tail.look()
    times, positions = [], []
    while records := tail.read(max_bytes=4000):
        times += [record.time_s for record in records]
        positions.append(tail.position_s)
    chunk_s = 4000 / len(line("a"))
    assert len(times) == 800
    assert max(earlier - later for earlier, later in zip(times, times[1:])) <= chunk_s
    assert positions == sorted(positions) and positions[-1] == math.inf


def test_a_look_does_not_return_what_is_written_after_it(tmp_path: Path):
    segment, tail = Segment(tmp_path, "decisions"), LogTail(tmp_path, Decision)
    segment.append(make_decision("a"))
    tail.look()
    segment.append(make_decision("b"))
    assert [record.decision_id for record in tail.read()] == ["a"]
    assert tail.read() == []
    assert read_all(tail) == ["b"]


def test_feedback_has_its_own_records(tmp_path: Path):
    feedback = Feedback("a", START_S, 0.1 + 0.2, True)
    Segment(tmp_path, "feedback").append(feedback)
    tail = LogTail(tmp_path, Feedback)
    tail.look()
    assert tail.read() == [feedback]  # floats come back bit for bit


def test_a_decision_is_found_by_its_id(tmp_path: Path):
    Segment(tmp_path, "decisions", "a").append(make_decision("x"), make_decision("xx"))
    segment = Segment(tmp_path, "decisions", "b")
    segment.append(make_decision("y"))
    segment.append_bytes(line("torn")[:-1])
    assert find_decision(tmp_path, "x") == make_decision("x")
    assert find_decision(tmp_path, "y") == make_decision("y")
    assert find_decision(tmp_path, "torn") is None
    assert find_decision(tmp_path, "z") is None


def test_a_decision_is_found_beside_damaged_segments_and_a_repeated_one_is_the_first(tmp_path: Path):
    Segment(tmp_path, "decisions", "a").append(make_decision("x", time_s=START_S + 5), make_decision("y"))
    Segment(tmp_path, "decisions", "b").append(make_decision("x", time_s=START_S + 1))
    (tmp_path / "c.jsonl").write_bytes(b"no header\n")
    assert find_decision(tmp_path, "x") == make_decision("x", time_s=START_S + 1)
    assert find_decision(tmp_path, "y") == make_decision("y")
    with pytest.raises(IntegrityError, match=r"c\.jsonl"):
        find_decision(tmp_path, "z")  # it may have stood in what cannot be read
