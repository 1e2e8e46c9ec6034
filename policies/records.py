"""What is written down of each decision and each feedback, and how it is read back.

A log is a directory of append-only segments, one per writer, `<name>.jsonl`: a header line, then one JSON object per line.
A segment that a killed writer left may end in half a line: readers stop before it.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from policies.errors import IntegrityError

SCHEMA_VERSION = 1


class SegmentHeader(msgspec.Struct, frozen=True):
    """First line of every segment."""

    schema_version: int
    kind: Literal["decisions", "feedback"]
    writer: str


class Decision(msgspec.Struct, frozen=True):
    """One answered request: enough to recompute the action bit for bit and to learn from it off-policy.

    `observation` and `action_mask` are those of the request; a mask that was a part of the observation is only in the latter.
    `action` is the environment's own value (an integer, a number, or
    lists of them), as it was answered. `propensity` is its probability under the arm that answered, of real numbers its
    density; `mixture_propensity` is that under the traffic plan as a whole (the sum over arms of weight times propensity).
    `seed` (53 bits) is the sampling seed. `fallback` says why another version than the arm's own answered, null when it did.
    `latency_s` is receipt to just before this line was written.
    """

    decision_id: str
    time_s: float
    unit_id: str
    episode_id: str | None
    plan: int
    release: int
    arm: str
    version: int
    digest: str
    observation: Any
    action: Any
    mode: Literal["greedy", "sample"]
    seed: int
    propensity: float
    mixture_propensity: float
    fallback: str | None
    latency_s: float
    action_mask: list[bool] | None = None


class Feedback(msgspec.Struct, frozen=True):
    """What a client reports of one decision. `final` closes the decision's episode; without an episode it is always final."""

    decision_id: str
    time_s: float
    reward: float
    final: bool


class LogTail:
    """Follows a log directory: what was appended to any of its segments since the last look, nearly in the order of time.

        tail.look()                      # from here on, only bytes that are there now
        while records := tail.read():    # a chunk of the segment that is furthest behind
            ...

    `read` raises `IntegrityError` for a complete line that is not a record (a writer never leaves one: the file was changed)
    and for a segment of another kind. That line or segment is never used; the next call goes on behind it.
    """

    def __init__(self, directory: Path, record_type: type[Decision] | type[Feedback]) -> None:
        self._directory = directory
        self._decoder = msgspec.json.Decoder(record_type)
        self._kind = "decisions" if record_type is Decision else "feedback"
        self._offsets: dict[Path, int] = {}  # of segments whose header and first record were seen
        self._times_s: dict[Path, float] = {}  # of the record before the offset, or the first one
        self._targets: dict[Path, int] = {}  # sizes at the last look, of segments with something left to read
        self._refused: set[Path] = set()
        self._errors: list[IntegrityError] = []

    def look(self) -> None:
        """Note which bytes are there now: `read` returns the records in them and none that come later."""
        paths = sorted(self._directory.glob("*.jsonl")) if self._directory.is_dir() else []
        sizes = {path: path.stat().st_size for path in paths if path not in self._refused}
        self._targets = {path: size for path, size in sizes.items() if size > self._offset(path)}

    @property
    def position_s(self) -> float:
        """Every noted record of before this time was returned: infinite at the end, minus infinite while an error is due."""
        if self._errors:
            return -math.inf
        return min((self._times_s[path] for path in self._targets), default=math.inf)

    def read(self, max_bytes: int = 1 << 20) -> list:
        """Return the next noted records, from about `max_bytes` of one segment; empty when there are none left."""
        while self._targets and not self._errors:
            path = min(self._targets, key=self._times_s.__getitem__)
            records = self._read_chunk(path, max_bytes)
            if records:
                self._times_s[path] = records[-1].time_s
                return records
        if self._errors:
            raise self._errors.pop(0)
        return []

    def _offset(self, path: Path) -> float:
        """Return where to read on in a segment; infinite while its header and first record are not complete."""
        if path not in self._offsets:
            with open(path, "rb") as file:
                header, first = file.readline(), file.readline()
            if not first.endswith(b"\n"):
                return math.inf
            try:
                check_header(path, header, self._kind)
            except IntegrityError as error:
                self._errors.append(error)
                self._refused.add(path)
                return math.inf
            self._offsets[path], self._times_s[path] = len(header), _time_s(first)
        return self._offsets[path]

    def _read_chunk(self, path: Path, max_bytes: int) -> list:
        offset, target = self._offsets[path], self._targets[path]
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(min(max_bytes, target - offset))
        records: list = []
        complete = data.rfind(b"\n") + 1
        if complete == 0 or offset + len(data) >= target:
            del self._targets[path]  # what is left is half a line
        if complete == 0 and len(data) == max_bytes:
            self._refused.add(path)
            self._errors.append(IntegrityError(f"{path} at byte {offset}: a line longer than {max_bytes} bytes is not a record"))
        for line in data[:complete].split(b"\n")[:-1]:
            self._offsets[path] += len(line) + 1
            try:
                records.append(self._decoder.decode(line))
            except msgspec.DecodeError as error:
                self._errors.append(IntegrityError(f"{path} before byte {self._offsets[path]}: {error}"))
        return records


def _time_s(line: bytes) -> float:
    """Return a record's time; minus infinity for what is none, so that it is read, and refused, at once."""
    try:
        return msgspec.json.decode(line, type=_Timed).time_s
    except msgspec.DecodeError:
        return -math.inf


class _Timed(msgspec.Struct):
    time_s: float


def check_header(path: Path, line: bytes, kind: str) -> None:
    """Raise `IntegrityError` unless the segment is of this kind and of a schema version we read."""
    try:
        header = msgspec.json.decode(line, type=SegmentHeader)
    except msgspec.DecodeError as error:
        raise IntegrityError(f"{path}: the first line is not a segment header: {error}") from error
    if header.kind != kind or header.schema_version != SCHEMA_VERSION:
        raise IntegrityError(
            f"{path}: {header.kind} of schema version {header.schema_version}, expected {kind} of version {SCHEMA_VERSION}"
        )


def find_decision(directory: Path, decision_id: str) -> Decision | None:
    """Return the logged decision with this id, the first if a request was repeated, or None.

    Parses only lines that hold the id. Raises `IntegrityError` when the id is nowhere but in what cannot be read.
    """
    found: list[Decision] = []
    problem: IntegrityError | None = None
    for path in directory.glob("*.jsonl"):
        try:
            found.extend(_decisions_named(path, decision_id))
        except IntegrityError as error:
            problem = error
    if not found and problem is not None:
        raise problem
    return min(found, key=lambda decision: decision.time_s, default=None)


def _decisions_named(path: Path, decision_id: str) -> Iterator[Decision]:
    needle = decision_id.encode()
    with open(path, "rb") as file:
        check_header(path, file.readline(), "decisions")
        for line in file:
            if needle in line and line.endswith(b"\n"):
                try:
                    decision = msgspec.json.decode(line, type=Decision)
                except msgspec.DecodeError as error:
                    raise IntegrityError(f"{path}: the line with decision {decision_id} is damaged: {error}") from error
                if decision.decision_id == decision_id:
                    yield decision
