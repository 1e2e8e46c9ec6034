"""How a log is read back: following what is appended, or looking for one decision, in open and in sealed segments alike."""

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec

from policies.errors import IntegrityError
from policies.records import (
    BATCH_PREFIX,
    KINDS,
    SCHEMA_VERSION,
    Decision,
    DecisionBatch,
    Record,
    SegmentHeader,
    SegmentKind,
)
from policies.sealed_segments import SUFFIX as SEALED_SUFFIX
from policies.sealed_segments import SealedFile

MAX_LINE_BYTES = 64 << 20  # of a batch; far above what is written in one, and a bound for what a damaged file costs

_batch_decoder = msgspec.json.Decoder(DecisionBatch)


def segments(directory: Path) -> dict[str, Path]:
    """Return the segments by stem; of one that is there in both forms the sealed one, since its sealer was killed in between.

    The lines are listed first: a segment that is sealed in this moment is then in the second list at the latest.
    """
    if not directory.is_dir():
        return {}
    found = {path.stem: path for path in directory.glob("*.jsonl") if not path.name.startswith(".")}
    sealed = {path.stem: path for path in directory.glob(f"*{SEALED_SUFFIX}") if not path.name.startswith(".")}
    return dict(sorted((found | sealed).items()))


def decode_line(line: bytes, decoder: msgspec.json.Decoder) -> list:
    """Return the records of one line, all or none; raises `IntegrityError` for what is no line of ours."""
    try:
        return list(_batch_decoder.decode(line).rows()) if line.startswith(BATCH_PREFIX) else [decoder.decode(line)]
    except (msgspec.DecodeError, ValueError, IndexError) as error:
        raise IntegrityError(str(error)) from error


def check_header(path: Path, line: bytes, kind: str) -> SegmentHeader:
    """Return a segment's header; raises `IntegrityError` unless it is of this kind and of a schema version we read."""
    try:
        header = msgspec.json.decode(line, type=SegmentHeader)
    except msgspec.DecodeError as error:
        raise IntegrityError(f"{path}: the first line is not a segment header: {error}") from error
    if header.kind != kind or not 1 <= header.schema_version <= SCHEMA_VERSION:
        raise IntegrityError(
            f"{path}: {header.kind} of schema version {header.schema_version}, expected {kind} of version 1 to {SCHEMA_VERSION}"
        )
    return header


class LogTail:
    """Follows a log directory: what was appended to any of its segments since the last look, nearly in the order of time.

        tail.look()                      # from here on, only what is there now
        while records := tail.read():    # a chunk of the segment that is furthest behind
            ...

    A segment that is sealed while it is being read is read on behind the same record. `read` raises `IntegrityError` for a
    complete line that is not a record (a writer never leaves one: the file was changed) and for a segment of another kind.
    That line or segment is never used; the next call goes on behind it.
    """

    def __init__(self, directory: Path, record_type: type[Record]) -> None:
        self._directory = directory
        self._kind = KINDS[record_type]
        self._decoder = msgspec.json.Decoder(record_type)
        self._segments: dict[str, _Lines | _Sealed] = {}  # whose header and first record were seen
        self._targets: dict[str, int] = {}  # ends at the last look, of segments with something left to read
        self._refused: set[str] = set()
        self._errors: list[IntegrityError] = []
        self.num_sealed_duplicates = 0  # decisions that were logged again, and that sealing left out of what we read

    def look(self) -> None:
        """Note what is there now: `read` returns the records in it."""
        self._targets = {}
        for stem, path in segments(self._directory).items():
            if stem not in self._refused:
                self._look_at(stem, path)

    @property
    def position_s(self) -> float:
        """Every noted record of before this time was returned: infinite at the end, minus infinite while an error is due."""
        if self._errors:
            return -math.inf
        return min((self._segments[stem].time_s for stem in self._targets), default=math.inf)

    def read(self, max_bytes: int = 1 << 20) -> list:
        """Return the next noted records, from one segment; empty when there are none left.

        They are those of about `max_bytes`, of one line that is longer, or of a sealed segment's row group.
        """
        while self._targets and not self._errors:
            stem = min(self._targets, key=lambda stem: self._segments[stem].time_s)
            records = self._read_from(stem, max_bytes)
            if records:
                self._segments[stem].time_s = records[-1].time_s
                return records
        if self._errors:
            raise self._errors.pop(0)
        return []

    def has_read(self, stem: str) -> bool:
        """Say whether everything that the last look found in this segment was returned, and nothing in it is refused."""
        return stem not in self._targets and stem not in self._refused

    def _look_at(self, stem: str, path: Path) -> None:
        try:
            segment = self._segment(stem, path)
            end = 0 if segment is None else segment.end()
        except FileNotFoundError:  # sealed since it was listed, or removed
            if path.suffix != SEALED_SUFFIX:
                self._look_at(stem, path.with_suffix(SEALED_SUFFIX))
            return
        except IntegrityError as error:
            self._refuse(stem, error)
            return
        if segment is not None and end > segment.position:
            self._targets[stem] = end

    def _segment(self, stem: str, path: Path) -> "_Lines | _Sealed | None":
        """Return a segment in the form it has now; None while its header and first record are not complete."""
        segment = self._segments.get(stem)
        if path.suffix == SEALED_SUFFIX and not isinstance(segment, _Sealed):
            segment = _Sealed(path, self._kind, num_read=segment.num_read if segment else 0)
            self.num_sealed_duplicates += segment.num_duplicates
        elif segment is None:
            segment = _open_lines(path, self._kind, self._decoder)
        if segment is not None:
            self._segments[stem] = segment
        return segment

    def _read_from(self, stem: str, max_bytes: int) -> list:
        segment = self._segments[stem]
        try:
            records, errors = segment.read(self._targets[stem], max_bytes)
        except FileNotFoundError:
            self._find_again(stem, segment)
            return []
        except IntegrityError as error:
            self._refuse(stem, error)
            return []
        self._errors += errors
        if segment.is_done(self._targets[stem]):
            del self._targets[stem]
        return records

    def _find_again(self, stem: str, segment: "_Lines | _Sealed") -> None:
        """Go on in the sealed form of a segment that went away within a round of reading."""
        del self._targets[stem]
        if isinstance(segment, _Lines):
            self._look_at(stem, segment.path.with_suffix(SEALED_SUFFIX))
        if self._segments[stem] is segment and stem not in self._refused:
            self._errors.append(IntegrityError(f"{segment.path} was removed before it was read to its end"))

    def _refuse(self, stem: str, error: IntegrityError) -> None:
        self._errors.append(error)
        self._refused.add(stem)
        self._targets.pop(stem, None)


class _Lines:
    """A segment as it was written. Positions are bytes."""

    def __init__(self, path: Path, decoder: msgspec.json.Decoder, *, position: int, time_s: float) -> None:
        self.path = path
        self.position = position
        self.time_s = time_s  # of the record before the position, or the first one
        self.num_read = 0
        self._decoder = decoder
        self._is_torn = False  # what is left until the target is half a line

    def end(self) -> int:
        self._is_torn = False
        return self.path.stat().st_size

    def is_done(self, target: int) -> bool:
        return self._is_torn or self.position >= target

    def read(self, target: int, max_bytes: int) -> tuple[list, list[IntegrityError]]:
        """Return the records of the next complete lines, and what is wrong with others of them."""
        with open(self.path, "rb") as file:
            file.seek(self.position)
            data = _read_lines(file, min(max_bytes, target - self.position), target - self.position)
        complete = data.rfind(b"\n") + 1
        if complete == 0 and len(data) >= MAX_LINE_BYTES:
            raise IntegrityError(
                f"{self.path} at byte {self.position}: a line longer than {MAX_LINE_BYTES} bytes is not a record"
            )
        self._is_torn = self.position + len(data) >= target
        records: list = []
        errors: list[IntegrityError] = []
        for line in data[:complete].split(b"\n")[:-1]:
            self.position += len(line) + 1
            try:
                records.extend(decode_line(line, self._decoder))
            except IntegrityError as error:
                errors.append(IntegrityError(f"{self.path} before byte {self.position}: {error}"))
        self.num_read += len(records)
        return records, errors


class _Sealed:
    """A sealed segment, of which `num_read` records were read already when it was lines. Positions are row groups."""

    def __init__(self, path: Path, kind: SegmentKind, *, num_read: int) -> None:
        self.path = path
        self._file = SealedFile(path)
        info = self._file.info
        if info.kind != kind:
            raise IntegrityError(f"{path}: {info.kind}, expected {kind}")
        self.num_read = num_read
        num_left = self._file.num_rows_from(num_read)
        self.num_duplicates = info.num_rows + info.num_duplicates - num_read - num_left  # among what is left
        self.position = 0 if num_left else self._file.num_groups
        self.time_s = math.inf if info.first_time_s is None else info.first_time_s

    def end(self) -> int:
        return self._file.num_groups

    def is_done(self, target: int) -> bool:
        return self.position >= target

    def read(self, target: int, max_bytes: int) -> tuple[list, list[IntegrityError]]:
        """Return the records of the next row group that has some which were not read before."""
        index, self.position = self.position, self.position + 1  # a damaged group is refused once, and the next one is read
        try:
            return self._file.read_group(index, first_row=self.num_read), []
        except IntegrityError as error:
            return [], [error]


def _open_lines(path: Path, kind: SegmentKind, decoder: msgspec.json.Decoder) -> _Lines | None:
    with open(path, "rb") as file:
        header, first = file.readline(MAX_LINE_BYTES), file.readline(MAX_LINE_BYTES)
    if not first.endswith(b"\n") and len(first) < MAX_LINE_BYTES:
        return None
    check_header(path, header, kind)
    return _Lines(path, decoder, position=len(header), time_s=_time_s(first))


def _read_lines(file, num_bytes: int, max_bytes: int) -> bytes:
    """Read this many bytes; where they hold no end of a line, as many more as it takes, up to both limits."""
    parts = [file.read(num_bytes)]
    size, limit = len(parts[0]), min(max_bytes, MAX_LINE_BYTES)
    while b"\n" not in parts[-1] and size < limit:
        more = file.read(min(size, limit - size))  # twice as much each time
        if not more:
            break
        parts.append(more)
        size += len(more)
    return b"".join(parts)


def _time_s(line: bytes) -> float:
    """Return a record's time; minus infinity for what is none, so that it is read, and refused, at once."""
    try:
        return msgspec.json.decode(line, type=_Timed).time_s
    except msgspec.DecodeError:
        return -math.inf


class _Timed(msgspec.Struct):
    time_s: float


def find_decision(directory: Path, decision_id: str) -> Decision | None:
    """Return the logged decision with this id, the first if a request was repeated, or None.

    Parses only lines that hold the id. Raises `IntegrityError` when the id is nowhere but in what cannot be read.
    """
    found: list[Decision] = []
    problem: IntegrityError | None = None
    for path in segments(directory).values():
        try:
            found.extend(_decisions_named(path, decision_id))
        except IntegrityError as error:
            problem = error
    if not found and problem is not None:
        raise problem
    return min(found, key=lambda decision: decision.time_s, default=None)


def _decisions_named(path: Path, decision_id: str) -> list[Decision]:
    if path.suffix == SEALED_SUFFIX:
        decision = SealedFile(path).find(decision_id)
        return [] if decision is None else [decision]
    try:
        return list(_decisions_in_lines(path, decision_id))
    except FileNotFoundError:  # sealed since it was listed
        return _decisions_named(path.with_suffix(SEALED_SUFFIX), decision_id)


def _decisions_in_lines(path: Path, decision_id: str) -> Iterator[Decision]:
    needle, decoder = decision_id.encode(), msgspec.json.Decoder(Decision)
    with open(path, "rb") as file:
        check_header(path, file.readline(MAX_LINE_BYTES), "decisions")
        while line := file.readline(MAX_LINE_BYTES):
            if needle in line and line.endswith(b"\n"):
                try:
                    decisions = decode_line(line, decoder)
                except IntegrityError as error:
                    raise IntegrityError(f"{path}: the line with decision {decision_id} is damaged: {error}") from error
                yield from (decision for decision in decisions if decision.decision_id == decision_id)
