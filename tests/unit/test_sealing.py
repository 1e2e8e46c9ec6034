"""Is a sealed segment the same log as its lines: every decision once, nothing else, whoever had read how much of it?"""

import base64
import errno
import os
import random
import time
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet
import pytest

from policies.errors import IntegrityError, StorageError
from policies.log_range import decisions_between
from policies.log_reader import LogTail, find_decision
from policies.records import Decision
from policies.sealed_segments import SealedFile, SealedWriter
from policies.sealing import examine, finished_segments, seal
from serve_app.decision_log import SegmentWriter
from tests.logs import HEADER, chunks, encode_lines, first_of_each, make_batch, random_records, read_log, rows_of
from tests.simulators import START_S, Segment, make_decision
from tests.unit.test_decision_log import largest_file


def write_lines(directory: Path, data: bytes, name: str = "w-000001") -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / f"{name}.jsonl"
    path.write_bytes(HEADER + data)
    return path


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def repeated_ids(rows: list[Decision]) -> int:
    return len(rows) - len({row.decision_id for row in rows})


# --- what a sealed segment holds ---


@pytest.mark.parametrize("seed", range(20))
def test_a_sealed_segment_holds_each_id_once_in_the_order_of_time_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("policies.sealed_segments.MAX_GROUP_ROWS", 7)  # several row groups
    records = random_records(random.Random(seed), 60)
    path = write_lines(tmp_path, encode_lines(*records))
    logged = rows_of(*records)
    info = seal(path)
    assert info is not None and names(tmp_path) == ["w-000001.parquet"]
    found = read_log(tmp_path)
    assert found == first_of_each(logged)
    assert [msgspec.json.encode(row) for row in found] == [
        msgspec.json.encode(row) for row in first_of_each(logged)
    ]  # 1 is not 1.0
    assert (info.num_rows, info.num_duplicates, info.num_torn_bytes) == (len(found), repeated_ids(logged), 0)
    assert (info.first_time_s, info.last_time_s) == (found[0].time_s, found[-1].time_s)
    assert SealedFile(tmp_path / "w-000001.parquet").info == info


def test_anybody_can_read_a_sealed_segment_without_us(tmp_path: Path) -> None:
    path = write_lines(tmp_path, encode_lines(make_decision("a", action=[1, 2.5]), make_decision("b", action_mask=[True, False])))
    seal(path)
    table = pyarrow.parquet.read_table(path.with_suffix(".parquet"))
    assert table.column_names == ["row", *Decision.__struct_fields__]
    assert table["decision_id"].to_pylist() == ["a", "b"]
    assert table["action"].to_pylist() == ["[1,2.5]", "0"]
    assert table["action_mask"].to_pylist() == [None, "[true,false]"]
    column = pyarrow.parquet.ParquetFile(path.with_suffix(".parquet")).metadata.row_group(0).column(0)
    assert column.compression == "ZSTD"


def test_a_torn_tail_is_cut_and_counted(tmp_path: Path) -> None:
    whole, torn = encode_lines(make_decision("a")), encode_lines(make_decision("b"))[:-1]
    info = seal(write_lines(tmp_path, whole + torn))
    assert info is not None and (info.num_rows, info.num_torn_bytes) == (1, len(torn))
    assert info.jsonl_bytes == len(HEADER + whole + torn)
    assert [row.decision_id for row in read_log(tmp_path)] == ["a"]


def test_a_segment_of_nothing_but_half_a_record_is_sealed_to_no_rows(tmp_path: Path) -> None:
    info = seal(write_lines(tmp_path, b'{"decision_id":'))
    assert info is not None and (info.num_rows, info.num_torn_bytes, info.first_time_s) == (0, 15, None)
    assert read_log(tmp_path) == [] and find_decision(tmp_path, "a") is None
    assert list(decisions_between(tmp_path, note_error=pytest.fail)) == []


def test_of_two_decisions_with_an_id_the_first_in_time_stays_although_it_was_written_later(tmp_path: Path) -> None:
    later, earlier = make_decision("a", time_s=START_S + 5, seed=1), make_decision("a", time_s=START_S, seed=2)
    info = seal(write_lines(tmp_path, encode_lines(later, earlier, make_decision("b"))))
    assert info is not None and info.num_duplicates == 1
    assert [(row.decision_id, row.seed) for row in read_log(tmp_path)] == [("a", 2), ("b", 7)]


def test_the_same_id_in_two_segments_is_left_to_the_readers(tmp_path: Path) -> None:
    """As for open segments. Whether a segment had one would otherwise depend on what was sealed when."""
    for number in (1, 2):
        seal(write_lines(tmp_path, encode_lines(make_decision("a", time_s=START_S + number)), f"w-00000{number}"))
    assert [row.time_s for row in read_log(tmp_path)] == [START_S + 1, START_S + 2]
    assert [row.time_s for row in decisions_between(tmp_path, note_error=pytest.fail)] == [START_S + 1]


# --- what is not sealed ---


def test_a_segment_that_is_written_to_is_not_sealed_and_one_that_was_closed_is(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, "decisions", "w", segment_bytes=1000)
    for number in range(3):  # some 450 bytes each: two in the first segment
        writer.append(encode_lines(make_decision(f"d{number}")))
    first, second = sorted(tmp_path.iterdir())
    assert [examine(path)[1] for path in (first, second)] == [False, True]
    assert seal(first) is not None
    assert seal(second) is None and second.exists()
    writer.append(encode_lines(make_decision("d3")))
    writer.close()
    assert seal(second) is not None
    assert [row.decision_id for row in read_log(tmp_path)] == ["d0", "d1", "d2", "d3"]


def test_without_the_lock_what_is_written_after_sealing_would_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a writer that does not lock."""
    monkeypatch.setattr("serve_app.decision_log._lock", lambda descriptor: None)
    writer = SegmentWriter(tmp_path, "decisions", "w")
    writer.append(encode_lines(make_decision("a")))
    assert seal(tmp_path / "w-000001.jsonl") is not None
    writer.append(encode_lines(make_decision("b")))
    assert [row.decision_id for row in read_log(tmp_path)] == ["a"]


def test_two_sealers_at_once_seal_a_segment_once(tmp_path: Path) -> None:
    path = write_lines(tmp_path, encode_lines(*(make_decision(f"d{number}") for number in range(3000))))
    others = []
    first = seal(path, pause=lambda: others.append(seal(path)))
    assert first is not None and others and set(others) == {None}
    assert seal(path) is None  # it is gone
    assert len(read_log(tmp_path)) == 3000


@pytest.mark.parametrize("line", [b"{}\n", b"no json\n", b"\x00\n", encode_lines(make_batch("b", actions=[]))])
def test_a_segment_with_a_damaged_line_stays_as_it_is(tmp_path: Path, line: bytes) -> None:
    path = write_lines(tmp_path, encode_lines(make_decision("a")) + line + encode_lines(make_decision("b")))
    data = path.read_bytes()
    with pytest.raises(IntegrityError, match=r"w-000001\.jsonl at byte \d+"):
        seal(path)
    assert names(tmp_path) == [path.name] and path.read_bytes() == data


def test_feedback_is_not_sealed(tmp_path: Path) -> None:
    segment = Segment(tmp_path, "feedback")
    with pytest.raises(IntegrityError, match="feedback of schema version"):
        seal(segment.path)


def test_a_number_that_no_column_holds_leaves_the_segment_as_it_is(tmp_path: Path) -> None:
    path = write_lines(tmp_path, encode_lines(make_decision("a", seed=2**63)))
    with pytest.raises(IntegrityError, match="cannot hold what was logged"):
        seal(path)
    assert names(tmp_path) == [path.name]


def test_a_full_disk_leaves_the_segment_as_it_is(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = write_lines(tmp_path, encode_lines(*(make_decision(f"{rng.random()}", seed=rng.randrange(2**53)) for _ in range(500))))
    with largest_file(1000), pytest.raises(OSError):
        seal(path)
    assert names(tmp_path) == [path.name]
    assert seal(path) is not None


def test_what_was_written_wrongly_is_found_before_the_lines_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if memory, pyarrow or a disk had changed one number."""
    add = SealedWriter.add
    monkeypatch.setattr(
        SealedWriter, "add", lambda self, row, decision: add(self, row, msgspec.structs.replace(decision, seed=decision.seed ^ 1))
    )
    path = write_lines(tmp_path, encode_lines(make_decision("a")))
    with pytest.raises(IntegrityError, match="is not what was logged"):
        seal(path)
    assert names(tmp_path) == [path.name]


def test_a_number_that_json_text_cannot_hold_is_not_sealed_to_null(tmp_path: Path) -> None:
    """No request has one, but a binary batch could; JSON has no NaN, and an encoder that writes null would lose it."""
    numbers = base64.b64encode(np.array([[0.5, np.nan]], "<f4").tobytes()).decode()
    path = write_lines(tmp_path, encode_lines(make_batch("b", num_rows=1, observations=numbers)))
    with pytest.raises(IntegrityError, match=r"row 0 of .* is not what was logged"):
        seal(path)
    assert names(tmp_path) == [path.name]


def test_where_files_cannot_be_locked_logs_are_written_and_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    writer = SegmentWriter(tmp_path, "decisions", "w")
    writer.append(encode_lines(make_decision("a")))
    writer.close()
    with pytest.raises(StorageError, match="cannot be locked: No locks available"):
        seal(tmp_path / "w-000001.jsonl")
    assert [row.decision_id for row in read_log(tmp_path)] == ["a"]


def test_only_segments_that_rest_are_proposed_the_oldest_first(tmp_path: Path) -> None:
    paths = [write_lines(tmp_path, b"", name) for name in ("b", "a", "new")]
    now = time.time()
    for path, age_s in zip(paths, (700, 650, 30)):
        os.utime(path, (now - age_s, now - age_s))
    assert [path.stem for path in finished_segments(tmp_path, now=now)] == ["b", "a"]
    assert finished_segments(tmp_path / "nothing", now=now) == []


# --- both forms at once ---


def both_forms(directory: Path, data: bytes) -> Path:
    """Return the lines of a segment whose sealer was killed before it removed them."""
    path = write_lines(directory, data)
    lines = path.read_bytes()
    seal(path)
    path.write_bytes(lines)
    return path


def test_a_segment_in_both_forms_counts_once_and_is_tidied_by_the_next_sealer(tmp_path: Path) -> None:
    path = both_forms(tmp_path, encode_lines(make_decision("a"), make_decision("b")))
    assert [row.decision_id for row in read_log(tmp_path)] == ["a", "b"]
    assert find_decision(tmp_path, "a") == make_decision("a")
    assert seal(path) is not None
    assert names(tmp_path) == ["w-000001.parquet"]


def test_lines_that_are_not_those_of_the_sealed_file_are_not_removed(tmp_path: Path) -> None:
    path = both_forms(tmp_path, encode_lines(make_decision("a")))
    path.write_bytes(path.read_bytes() + encode_lines(make_decision("more")))
    with pytest.raises(IntegrityError, match="was not made of"):
        seal(path)
    assert path.exists()


def test_lines_are_not_removed_when_the_sealed_file_beside_them_is_damaged(tmp_path: Path) -> None:
    path = both_forms(tmp_path, encode_lines(*(make_decision(f"d{number}") for number in range(30))))
    sealed = path.with_suffix(".parquet")
    column = pyarrow.parquet.ParquetFile(sealed).metadata.row_group(0).column(1)
    data = bytearray(sealed.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    sealed.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"w-000001\.parquet is damaged"):
        seal(path)
    assert path.exists()


# --- readers that were at work when it was sealed ---


@pytest.mark.parametrize("seed", range(10))
def test_a_reader_goes_on_behind_what_it_had_read_wherever_that_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("policies.sealed_segments.MAX_GROUP_ROWS", 5)
    rng = random.Random(seed)
    records = random_records(rng, 40)
    path = write_lines(tmp_path, encode_lines(*records))
    logged = rows_of(*records)
    tail = LogTail(tmp_path, Decision)
    before: list[Decision] = []
    reading = chunks(tail, max_bytes=700)
    for _ in range(rng.randrange(20)):
        before += next(reading, [])
    assert before == logged[: len(before)]
    seal(path)
    rest = list(reading) if rng.random() < 0.5 else []  # in the same round of reading, or in the next one
    after = [row for chunk in [*rest, *chunks(tail)] for row in chunk]
    left_out = len(logged) - len(before) - len(after)
    assert after == [row for row in first_of_each(logged) if row not in before]
    assert tail.num_sealed_duplicates == left_out
    assert list(chunks(tail)) == []


def test_a_reader_that_begins_the_sealed_file_at_its_start_would_count_twice(tmp_path: Path) -> None:
    """Negative control for the `row` column."""
    path = write_lines(tmp_path, encode_lines(*(make_decision(f"d{number}") for number in range(10))))
    tail = LogTail(tmp_path, Decision)
    tail.look()
    before = tail.read(max_bytes=2000)
    seal(path)
    naive = before + read_log(tmp_path)
    assert 0 < len(before) < 10 and repeated_ids(naive) == len(before)


def test_a_segment_that_is_removed_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path, encode_lines(*(make_decision(f"d{number}") for number in range(10))))
    tail = LogTail(tmp_path, Decision)
    tail.look()
    tail.read(max_bytes=1000)
    path.unlink()
    with pytest.raises(IntegrityError, match="removed before it was read to its end"):
        tail.read()
    assert list(chunks(tail)) == []


# --- damage and age ---


def test_a_changed_byte_in_a_sealed_segment_is_refused_or_changes_no_decision(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [make_decision(f"d{number}", seed=rng.randrange(2**53), propensity=rng.random()) for number in range(50)]
    path = write_lines(tmp_path, encode_lines(*rows))
    seal(path)
    sealed = path.with_suffix(".parquet")
    data = sealed.read_bytes()
    num_refused = 0
    for place in rng.sample(range(len(data)), 300):
        sealed.write_bytes(data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :])
        try:
            assert read_log(tmp_path) == rows
        except IntegrityError as error:
            assert "w-000001.parquet" in str(error)
            num_refused += 1
    assert num_refused > 100


def test_a_damaged_row_group_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policies.sealed_segments.MAX_GROUP_ROWS", 10)
    path = write_lines(tmp_path, encode_lines(*(make_decision(f"d{number}") for number in range(30))))
    seal(path)
    sealed = path.with_suffix(".parquet")
    column = pyarrow.parquet.ParquetFile(sealed).metadata.row_group(1).column(1)
    data = bytearray(sealed.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    sealed.write_bytes(data)
    tail, found, errors = LogTail(tmp_path, Decision), [], 0
    tail.look()
    for _ in range(5):
        try:
            found += tail.read()
        except IntegrityError:
            errors += 1
    assert (len(found), errors) == (20, 1)
    noted: list[IntegrityError] = []
    assert len(list(decisions_between(tmp_path, note_error=noted.append))) == 20 and len(noted) == 1


def test_a_field_that_a_sealed_segment_does_not_know_has_its_default(tmp_path: Path) -> None:
    """Sealed by an older version."""
    path = write_lines(tmp_path, encode_lines(make_decision("a", assigned="request")))
    seal(path)
    sealed = path.with_suffix(".parquet")
    table = pyarrow.parquet.read_table(sealed).drop_columns(["assigned", "shield"])
    pyarrow.parquet.write_table(table, sealed)
    assert read_log(tmp_path) == [make_decision("a")]


def test_a_sealed_segment_of_a_newer_version_is_refused_and_the_others_are_read(tmp_path: Path) -> None:
    newer, known = (write_lines(tmp_path, encode_lines(make_decision(name)), name) for name in ("newer", "known"))
    for path in (newer, known):
        seal(path)
    table = pyarrow.parquet.read_table(newer.with_suffix(".parquet"))
    metadata = {**table.schema.metadata, b"schema_version": b"99"}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), newer.with_suffix(".parquet"))
    tail = LogTail(tmp_path, Decision)
    tail.look()
    with pytest.raises(IntegrityError, match="schema version 99"):
        tail.read()
    assert [row.decision_id for row in tail.read()] == ["known"]


# --- looking for some of them ---


def test_a_decision_is_found_in_sealed_and_open_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policies.sealed_segments.MAX_GROUP_ROWS", 10)
    rows = [make_decision(f"d{number}", time_s=START_S + number) for number in range(40)]
    seal(write_lines(tmp_path, encode_lines(*rows[:30]), "a"))
    write_lines(tmp_path, encode_lines(*rows[30:]), "b")
    assert [find_decision(tmp_path, f"d{number}") for number in (0, 15, 29, 30, 39)] == [rows[n] for n in (0, 15, 29, 30, 39)]
    assert find_decision(tmp_path, "d") is None
    expected = rows[25:35]
    assert list(decisions_between(tmp_path, START_S + 25, START_S + 35, note_error=pytest.fail)) == expected


def test_a_range_of_several_writers_comes_in_the_order_of_time(tmp_path: Path) -> None:
    for writer in range(3):
        rows = [make_decision(f"{writer}-{number}", time_s=START_S + number + writer / 10) for number in range(20)]
        path = write_lines(tmp_path, encode_lines(*rows), f"w{writer}")
        if writer != 1:
            seal(path)
    times = [row.time_s for row in decisions_between(tmp_path, note_error=pytest.fail)]
    assert len(times) == 60 and times == sorted(times)
