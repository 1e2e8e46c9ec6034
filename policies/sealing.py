"""How a finished segment of decisions becomes a Parquet file: a kill at any moment loses nothing and counts nothing twice.

Segments are open, finished or sealed. A writer locks its open segment (`serve_app.decision_log`), and its lock ends with it: who
gets the lock knows that nobody writes any more, and keeps every other sealer out. The order of the steps is what makes it safe:

    1. write `.tmp-<stem>.parquet`, which nobody reads, and flush it
    2. read it back and compare it with the lines: the only other copy is about to go
    3. rename it to `<stem>.parquet`, flush the directory     both forms are there; readers take the sealed one
    4. unlink `<stem>.jsonl`

Duplicates within the segment are left out, the first in time stays. Those of other segments are not looked for, which would make
a segment's content depend on what else was sealed when: readers count an id once, as they do for open segments.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from policies.errors import IntegrityError, StorageError
from policies.integrity import fsync_directory
from policies.log_reader import MAX_LINE_BYTES, check_header, decode_line
from policies.records import SCHEMA_VERSION, Decision
from policies.sealed_segments import SUFFIX, SealedFile, SealedInfo, SealedWriter

# After its last write. Longer than replicas look into the lines for a request that is asked again (5 minutes), and than a monitor
# needs to have read them; both go on without, so a shorter time breaks nothing.
SEAL_AFTER_S = 600.0

PIECE_BYTES = 256 << 10  # of lines between two pauses: some five milliseconds
_decoder = msgspec.json.Decoder(Decision)


def finished_segments(directory: Path, *, now: float, min_age_s: float = SEAL_AFTER_S) -> list[Path]:
    """Return the segments that nobody wrote to for this long, oldest first; `seal` finds out whether they are finished."""
    return [path for path in _resting(directory, now, min_age_s) if not path.name.startswith(".")]


def remove_leftovers(directory: Path, *, now: float, min_age_s: float = SEAL_AFTER_S) -> None:
    """Remove segments that never got their name: their writer was killed before it could write a decision."""
    for path in _resting(directory, now, min_age_s):
        if path.name.startswith(".tmp-"):
            with _locked(path) as file:
                if file is not None:
                    path.unlink()


def _resting(directory: Path, now: float, min_age_s: float) -> list[Path]:
    found = []
    for path in directory.glob("*.jsonl") if directory.is_dir() else []:
        with contextlib.suppress(FileNotFoundError):  # sealed by somebody else in this moment
            modified_s = path.stat().st_mtime
            if now - modified_s >= min_age_s:
                found.append((modified_s, path))
    return [path for _, path in sorted(found)]


def seal(path: Path, *, pause: Callable[[], None] = lambda: None) -> SealedInfo | None:
    """Seal one segment; None when somebody still writes to it, or seals it, or has sealed it.

    `pause` is called every some ten milliseconds. Memory is bounded by the segment's ids and one line. Raises `IntegrityError`,
    and changes nothing, for a segment that holds anything but decisions and half a line at its end; `StorageError` where files
    cannot be locked.
    """
    with _locked(path) as file:
        return None if file is None else _seal_locked(path, file, pause)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BinaryIO | None]:
    """Hold the lock of a segment for the time of the block; None where there is none to be had."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "r+b"))  # for writing: NFS gives no exclusive lock to who only reads
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back when the file is closed
            is_ours = _is_still(path, file)
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        except OSError as error:
            raise StorageError(
                f"{path} cannot be locked: {error.strerror}; who writes to it is not known, so it stays"
            ) from error
        yield file if is_ours else None


def _is_still(path: Path, file: BinaryIO) -> bool:
    """Say whether the name is that of the open file: another sealer may have been faster than our lock."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _seal_locked(path: Path, file: BinaryIO, pause: Callable[[], None]) -> SealedInfo:
    sealed, contents = path.with_suffix(SUFFIX), _scan(path, file, pause)
    if sealed.exists():  # its sealer was killed before it could remove the lines
        _require_same(sealed, contents, path.name)
        _verify(sealed, contents, file, pause)
    else:
        temporary = sealed.with_name(f".tmp-{sealed.name}")  # one that a killed sealer left is written over
        try:
            _write(temporary, contents, file, pause)
            _verify(temporary, contents, file, pause)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        os.rename(temporary, sealed)
    fsync_directory(path.parent)
    os.unlink(path)
    fsync_directory(path.parent)
    return contents.info


def _require_same(sealed: Path, contents: "_Contents", name: str) -> None:
    if SealedFile(sealed).info.jsonl_sha256 != contents.info.jsonl_sha256:
        raise IntegrityError(
            f"{sealed} was not made of {name} as it is now: somebody wrote to that afterwards, or it is another log's file; "
            "readers use the sealed one, and both stay until a person has looked"
        )


def examine(path: Path) -> tuple[SealedInfo, bool]:
    """Return what is in a segment of lines, as sealing would count it, and whether somebody holds its lock now."""
    with open(path, "rb") as file:
        info = _scan(path, file, lambda: None).info
    with _locked(path) as held:
        return info, held is None


class _Line(NamedTuple):
    """Where a line is, and which rows it holds: a line's decisions are all of one time."""

    time_s: float
    first_row: int
    offset: int
    num_bytes: int


class _Contents(NamedTuple):
    info: SealedInfo
    lines: list[_Line]  # in the order of time
    duplicates: set[int]  # rows that are left out


def _scan(path: Path, file: BinaryIO, pause: Callable[[], None]) -> _Contents:
    """Read a segment once, to know its order and its duplicates."""
    file.seek(0)
    header_line = file.readline(MAX_LINE_BYTES)
    header, digest = check_header(path, header_line, "decisions"), hashlib.sha256(header_line)
    lines: list[_Line] = []
    duplicates: set[int] = set()
    first_rows: dict[str, tuple[float, int]] = {}
    offset, num_rows, torn_bytes = len(header_line), 0, 0
    while data := file.readline(MAX_LINE_BYTES):
        digest.update(data)
        if not data.endswith(b"\n"):
            if len(data) == MAX_LINE_BYTES:
                raise IntegrityError(f"{path} at byte {offset}: a line longer than {MAX_LINE_BYTES} bytes is not a record")
            torn_bytes = len(data)
            break
        decisions = _decode(path, offset, data)
        if decisions:
            lines.append(_Line(decisions[0].time_s, num_rows, offset, len(data)))
        for row, decision in enumerate(decisions, num_rows):
            _note(decision, row, first_rows, duplicates)
        num_rows += len(decisions)
        if (offset + len(data)) // PIECE_BYTES > offset // PIECE_BYTES:
            pause()
        offset += len(data)
    lines.sort()
    kept = [first for first, _ in first_rows.values()]
    info = SealedInfo(
        schema_version=SCHEMA_VERSION,
        kind="decisions",
        writer=header.writer,
        jsonl_sha256=digest.hexdigest(),
        jsonl_bytes=offset + torn_bytes,
        num_rows=len(first_rows),
        num_duplicates=len(duplicates),
        num_torn_bytes=torn_bytes,
        first_time_s=min(kept, default=None),
        last_time_s=max(kept, default=None),
    )
    return _Contents(info, lines, duplicates)


def _note(decision: Decision, row: int, first_rows: dict[str, tuple[float, int]], duplicates: set[int]) -> None:
    """Of two decisions with an id the later one is a duplicate, of equal times the one that was written later."""
    this, other = (decision.time_s, row), first_rows.get(decision.decision_id)
    if other is None or this < other:
        first_rows[decision.decision_id] = this
    if other is not None:
        duplicates.add(max(this, other)[1])


def _decode(path: Path, offset: int, line: bytes) -> list[Decision]:
    try:
        return decode_line(line, _decoder)
    except IntegrityError as error:
        raise IntegrityError(f"{path} at byte {offset}: {error}; the segment stays as it is") from error


def _rows(contents: _Contents, file: BinaryIO, path: Path) -> Iterator[tuple[int, Decision]]:
    """Return the rows that are kept in their order, read a second time."""
    for line in contents.lines:
        file.seek(line.offset)
        for row, decision in enumerate(_decode(path, line.offset, file.read(line.num_bytes)), line.first_row):
            if row not in contents.duplicates:
                yield row, decision


def _write(temporary: Path, contents: _Contents, file: BinaryIO, pause: Callable[[], None]) -> None:
    with open(temporary, "wb") as target:
        writer = SealedWriter(target, contents.info)
        try:
            for row, decision in _rows(contents, file, temporary):
                if writer.add(row, decision):
                    pause()
            writer.close()
        except (ValueError, OverflowError) as error:  # what JSON can hold and a column cannot: no number of ours
            writer.abandon()
            raise IntegrityError(f"{temporary} cannot hold what was logged, the segment stays as it is: {error}") from error
        except OSError:
            writer.abandon()
            raise
        target.flush()
        os.fsync(target.fileno())


def _verify(path: Path, contents: _Contents, file: BinaryIO, pause: Callable[[], None]) -> None:
    """Raise `IntegrityError` unless the sealed file holds what the lines hold, number by number."""
    sealed, expected = SealedFile(path), _rows(contents, file, path)
    for index in range(sealed.num_groups):
        for found in sealed.read_rows(index):
            if found != next(expected, None):
                raise IntegrityError(f"row {found[0]} of {path} is not what was logged; the lines stay as they are")
        pause()
    if next(expected, None) is not None:
        raise IntegrityError(f"{path} has not all that was logged; the lines stay as they are")
