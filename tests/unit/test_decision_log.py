"""The log writer against real files: kills, short writes and rotation never spoil what was acknowledged."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from policies.errors import IntegrityError
from policies.log_reader import LogTail
from policies.records import SCHEMA_VERSION, Feedback, SegmentHeader
from serve_app.decision_log import SegmentWriter
from tests.serving_helpers import read_new


def line(number: int) -> bytes:
    return msgspec.json.encode(Feedback(f"d{number:03d}", 0.0, float(number), True)) + b"\n"


def rewards(directory: Path, tail: LogTail | None = None) -> list[float]:
    """What a reader finds: all of it, or what is new to a reader that follows."""
    return [record.reward for record in read_new(tail or LogTail(directory, Feedback))]


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Let the kernel cut writes off at this file size, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_segment_starts_with_its_header_and_reads_back(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, "feedback", "w")
    writer.append(line(1) + line(2))
    first = (tmp_path / "w-000001.jsonl").read_bytes().splitlines()[0]
    assert msgspec.json.decode(first, type=SegmentHeader) == SegmentHeader(SCHEMA_VERSION, "feedback", "w")
    assert rewards(tmp_path) == [1.0, 2.0]


def test_nothing_is_created_before_the_first_record(tmp_path: Path) -> None:
    SegmentWriter(tmp_path / "log", "feedback", "w")
    assert not (tmp_path / "log").exists()


def test_segments_rotate_by_size_and_no_batch_is_split(tmp_path: Path) -> None:
    size = len(line(1))
    writer = SegmentWriter(tmp_path, "feedback", "w", segment_bytes=100 + 3 * size)  # the header takes less than 100
    for number in range(4):
        writer.append(line(2 * number) + line(2 * number + 1))
    # 2 + 2 lines do not fit in 100 - header + 3 lines: one batch per segment
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"w-00000{n}.jsonl" for n in (1, 2, 3, 4)]
    assert rewards(tmp_path) == [float(n) for n in range(8)]


def test_two_writers_share_a_directory(tmp_path: Path) -> None:
    one, two = SegmentWriter(tmp_path, "feedback", "one"), SegmentWriter(tmp_path, "feedback", "two")
    one.append(line(1))
    two.append(line(2))
    one.append(line(3))
    assert sorted(rewards(tmp_path)) == [1.0, 2.0, 3.0]


def test_a_short_write_is_reported_and_spoils_nothing_before_or_after(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, "feedback", "w")
    writer.append(line(1))
    tail = LogTail(tmp_path, Feedback)
    assert rewards(tmp_path, tail) == [1.0]
    size = (tmp_path / "w-000001.jsonl").stat().st_size
    with largest_file(size + len(line(2)) + 10), pytest.raises(OSError, match=r"only 7\d of 1\d\d bytes"):
        writer.append(line(2) + line(3))  # all of line 2 and 10 bytes of line 3 reach the file
    writer.append(line(4))
    # Line 2 is complete, so a reader that follows may have it; it was not acknowledged, and logged too much is allowed.
    assert rewards(tmp_path, tail) == [2.0, 4.0]
    assert rewards(tmp_path) == [1.0, 2.0, 4.0]


def test_writing_on_behind_half_a_line_would_corrupt_the_log(tmp_path: Path) -> None:
    """Negative control: the naive writer keeps its segment after the same short write."""
    writer = SegmentWriter(tmp_path, "feedback", "w")
    writer.append(line(1))
    path = tmp_path / "w-000001.jsonl"
    with open(path, "ab", buffering=0) as naive, largest_file(path.stat().st_size + 10):
        naive.write(line(2))
    with open(path, "ab", buffering=0) as naive:
        naive.write(line(3))
    with pytest.raises(IntegrityError):
        rewards(tmp_path)


def test_when_not_even_a_header_fits_no_file_stays_and_writing_resumes_later(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, "feedback", "w")
    with largest_file(10):
        for _ in range(3):
            with pytest.raises(OSError):
                writer.append(line(1))
        assert list(tmp_path.iterdir()) == []
    writer.append(line(2))
    assert rewards(tmp_path) == [2.0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only directories")
def test_a_read_only_directory_is_an_os_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OSError):
        SegmentWriter(tmp_path, "feedback", "w").append(line(1))


def test_a_killed_process_keeps_every_line_it_acknowledged(tmp_path: Path) -> None:
    program = f"""
import msgspec, pathlib
from policies.records import Feedback
from serve_app.decision_log import SegmentWriter
writer = SegmentWriter(pathlib.Path({str(tmp_path)!r}), "feedback", "w", segment_bytes=2000)
number = 0
while True:
    writer.append(msgspec.json.encode(Feedback(f"d{{number}}", 0.0, float(number), True)) + b"\\n")
    print(number, flush=True)
    number += 1
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        acknowledged = [int(process.stdout.readline()) for _ in range(200)]
    finally:
        process.send_signal(signal.SIGKILL)
    acknowledged += [int(number) for number in process.stdout.read().split("\n")[:-1]]
    process.wait(timeout=10)
    found = rewards(tmp_path)
    assert found[: len(acknowledged)] == [float(number) for number in acknowledged]
    assert len(found) - len(acknowledged) in (0, 1)  # at most the one between its write and its acknowledgement


def test_a_torn_tail_is_not_read_until_it_is_a_line(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, "feedback", "w")
    writer.append(line(1))
    tail = LogTail(tmp_path, Feedback)
    with open(tmp_path / "w-000001.jsonl", "ab", buffering=0) as file:
        file.write(line(2)[:20])
        assert rewards(tmp_path, tail) == [1.0]
        file.write(line(2)[20:])
    assert rewards(tmp_path, tail) == [2.0]


def test_another_writers_segment_is_opened_once_for_one_flush_however_often_it_is_asked_for(tmp_path: Path) -> None:
    other, mine = (SegmentWriter(tmp_path, "decisions", name) for name in ("other", "mine"))
    path, _ = other.append(b"{}\n")
    for _ in range(100):
        mine.flush_too(path)
    descriptors = mine.take_unflushed()
    assert len(descriptors) == 1
    mine.flush_too(path)  # for the next flush it is opened anew: more may have been appended
    descriptors += mine.take_unflushed()
    assert len(descriptors) == 2
    for descriptor in descriptors:
        os.close(descriptor)
