"""Is every complete line of a log read exactly once, and nothing else?"""

import base64
import math
import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest

from policies.errors import IntegrityError
from policies.log_reader import LogTail, find_decision
from policies.records import SCHEMA_VERSION, Decision, DecisionBatch, Feedback, SegmentHeader
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
    for message in ("feedback of schema version", f"schema version {SCHEMA_VERSION + 1}", "not a segment header"):
        with pytest.raises(IntegrityError, match=message):
            tail.read()
    assert [record.decision_id for record in tail.read()] == ["good"]
    assert read_all(tail) == []


@pytest.mark.parametrize("max_bytes", [100, 2000, 1 << 20])
def test_a_line_longer_than_a_chunk_is_read_whole(tmp_path: Path, max_bytes: int):
    segment, tail = Segment(tmp_path, "decisions"), LogTail(tmp_path, Decision)
    segment.append(make_decision("a"), make_decision("long", observation=[0.5] * 40_000), make_decision("c"))
    tail.look()
    ids = []
    while records := tail.read(max_bytes):
        ids += [record.decision_id for record in records]
    assert ids == ["a", "long", "c"]


def test_a_line_without_end_is_refused_at_the_limit_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("policies.log_reader.MAX_LINE_BYTES", 5000)
    segment, tail = Segment(tmp_path, "decisions"), LogTail(tmp_path, Decision)
    segment.append_bytes(line("a") + b"x" * 4999)
    assert read_all(tail) == ["a"]
    segment.append_bytes(b"x" * 5000)
    tail.look()
    with pytest.raises(IntegrityError, match=r"longer than 5000 bytes"):
        tail.read(max_bytes=2000)
    assert read_all(tail) == []  # raised once


def test_reading_a_line_without_end_takes_no_more_memory_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("policies.log_reader.MAX_LINE_BYTES", 1 << 20)
    segment, tail = Segment(tmp_path, "decisions"), LogTail(tmp_path, Decision)
    segment.append_bytes(line("a") + b"x" * (64 << 20))
    tracemalloc.start()
    with pytest.raises(IntegrityError):
        while True:
            tail.look()
            tail.read()
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 4 << 20  # the pieces, and joined: twice the limit


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


def make_batch(**changes) -> DecisionBatch:
    return DecisionBatch(
        **{
            "batch_id": "r",
            "decision_ids": ["r:0.t", "r:1.t"],
            "time_s": 5.0,
            "unit_ids": "u",
            "episode_ids": None,
            "plan": 3,
            "release": 1,
            "arms": ["canary", "champion"],
            "versions": [2, 1],
            "digests": {1: "one", 2: "two"},
            "observations": [[0.5, 1.0], [2.0, 3.0]],
            "shape": None,
            "actions": [0, 1],
            "modes": "sample",
            "seeds": [11, 12],
            "propensities": [0.25, 0.5],
            "mixture_propensities": None,
            "fallbacks": None,
            "latency_s": 0.001,
            **changes,
        }
    )


def test_a_batch_of_decisions_is_read_as_its_decisions(tmp_path: Path):
    segment = Segment(tmp_path, "decisions")
    segment.append(make_decision("alone"))
    segment.append(make_batch(mixture_propensities=[0.3, 0.4], rungs=["champion", "arm"], fallbacks=["version 2 gave NaN", None]))
    tail = LogTail(tmp_path, Decision)
    tail.look()
    alone, first, second = tail.read()
    assert alone.decision_id == "alone"
    assert (first.decision_id, first.unit_id, first.arm, first.version, first.digest) == ("r:0.t", "u", "canary", 2, "two")
    assert (first.observation, first.action, first.seed, first.propensity) == ([0.5, 1.0], 0, 11, 0.25)
    assert (first.mixture_propensity, first.rung, first.fallback) == (0.3, "champion", "version 2 gave NaN")
    assert (second.arm, second.digest, second.mixture_propensity, second.rung, second.fallback) == (
        "champion",
        "one",
        0.4,
        "arm",
        None,
    )
    assert find_decision(tmp_path, "r:1.t") == second
    assert find_decision(tmp_path, "r") is None


def test_a_binary_batch_holds_its_float32_numbers_exactly(tmp_path: Path):
    numbers = np.array([[0.1, 0.2], [0.3, np.pi]], "<f4")
    packed = base64.b64encode(numbers.tobytes()).decode()
    Segment(tmp_path, "decisions").append(make_batch(observations=packed, shape=[2]))
    tail = LogTail(tmp_path, Decision)
    tail.look()
    read = [decision.observation for decision in tail.read()]
    assert np.array_equal(np.array(read, np.float32), numbers)


@pytest.mark.parametrize("column", [{"actions": [0]}, {"actions": [0, 1, 1]}, {"latency_s": [0.1]}, {"unit_ids": ["a"] * 3}])
def test_a_batch_whose_columns_do_not_fit_is_refused_and_the_next_line_is_read(tmp_path: Path, column: dict):
    segment = Segment(tmp_path, "decisions")
    segment.append(make_batch(**column))
    segment.append(make_decision("good"))
    tail = LogTail(tmp_path, Decision)
    tail.look()
    assert [decision.decision_id for decision in tail.read()][-1] == "good"
    with pytest.raises(IntegrityError):
        tail.read()
