"""What is written down of each decision and each feedback, and how it is read back.

A log is a directory of append-only segments, one per writer, `<name>.jsonl`: a header line, then one JSON object per line.
A segment that a killed writer left may end in half a line: readers stop before it.
"""

import base64
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from policies.errors import IntegrityError

SCHEMA_VERSION = 2  # 1: without `rung`, `shield`, `assigned` and without batches; still read
BATCH_PREFIX = b'{"batch_id":'  # how a line begins that holds many decisions


SegmentKind = Literal["decisions", "feedback", "shadows", "overrides"]
Rung = Literal["arm", "champion", "previous", "rule", "fixed"]


class SegmentHeader(msgspec.Struct, frozen=True):
    """First line of every segment."""

    schema_version: int
    kind: SegmentKind
    writer: str


class Decision(msgspec.Struct, frozen=True):
    """One answered request: enough to recompute the action bit for bit and to learn from it off-policy.

    `observation` and `action_mask` are those of the request; a mask that was a part of the observation is only in the latter.
    `action` is the environment's own value (an integer, a number, or
    lists of them), as it was answered. `propensity` is its probability under the arm that answered, of real numbers its
    density; `mixture_propensity` is that under the traffic plan as a whole (the sum over arms of weight times propensity).
    `seed` (53 bits) is the sampling seed of the draw that was sent. `rung` says who answered: the arm's own version, or which
    step of the fallback ladder; `fallback` why, null for the arm's own. A rule or a fixed action is no version: then `version` is
    0 and `digest` empty. `shield` names what the arm's own action would have violated, is "" when it was in force and nothing was
    violated, and null without a shield. `assigned` says who chose the arm: the plan by the unit, or the request (a tester's
    header), whose mixture propensity is that of its arm alone. `repair` says what was mended in the observation before anybody
    saw it; `observation` is the mended one.
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
    rung: Rung = "arm"
    shield: str | None = None
    assigned: Literal["plan", "request"] = "plan"
    repair: str | None = None

    @property
    def is_stood_in_for(self) -> bool:
        """Whether somebody else than the arm's own version answered: an error of that version."""
        return self.fallback is not None or self.rung != "arm"


class DecisionBatch(msgspec.Struct, frozen=True):
    """The decisions of one request with many observations, in one line; `rows` are they, each a `Decision` of its own.

    A list has an item per decision; what is not a list is the same for all. `observations` is what the request held, a list of
    JSON values, or of a binary request the float32 numbers as base64 text, with `shape` for one of them.
    """

    batch_id: str  # first: see BATCH_PREFIX
    decision_ids: list[str]
    time_s: float
    unit_ids: str | list[str]
    episode_ids: list[str | None] | None
    plan: int
    release: int
    arms: str | list[str]
    versions: int | list[int]
    digests: dict[int, str]
    observations: list[Any] | str
    shape: list[int] | None
    actions: list[Any]
    modes: str | list[str]
    seeds: list[int]
    propensities: list[float]
    mixture_propensities: list[float] | None
    fallbacks: list[str | None] | None
    latency_s: float
    action_masks: list[list[bool]] | None = None
    rungs: list[Rung] | None = None
    shields: list[str | None] | None = None
    assigned: Literal["plan", "request"] = "plan"
    repairs: list[str | None] | None = None

    def rows(self) -> Iterator[Decision]:
        """Return the decisions one by one."""
        for index, (decision_id, observation) in enumerate(zip(self.decision_ids, self._observations())):
            version = _item(self.versions, index)
            yield Decision(
                decision_id=decision_id,
                time_s=self.time_s,
                unit_id=_item(self.unit_ids, index),
                episode_id=_item(self.episode_ids, index),
                plan=self.plan,
                release=self.release,
                arm=_item(self.arms, index),
                version=version,
                digest=self.digests.get(version, ""),
                observation=observation,
                action=self.actions[index],
                mode=_item(self.modes, index),
                seed=self.seeds[index],
                propensity=self.propensities[index],
                mixture_propensity=(self.mixture_propensities or self.propensities)[index],
                fallback=_item(self.fallbacks, index),
                latency_s=self.latency_s,
                action_mask=_item(self.action_masks, index),
                rung=_item(self.rungs, index) or "arm",
                shield=_item(self.shields, index),
                assigned=self.assigned,
                repair=_item(self.repairs, index),
            )

    def _observations(self) -> list[Any]:
        if isinstance(self.observations, list):
            return self.observations
        array = np.frombuffer(base64.b64decode(self.observations), "<f4")
        return array.reshape(-1, *(self.shape or ())).tolist()


def _item(values: Any, index: int) -> Any:
    return values[index] if isinstance(values, list) else values


class Shadow(msgspec.Struct, frozen=True):
    """What a version that answers in the background would have answered to a decision's observation.

    `distribution` is that of its actions (see `policies.distributions`), `action` what it would have sent with the decision's
    seed in its own mode, and `propensity` that action's; all three are null where it failed, and `failure` says how. `agrees`
    says whether that is the action that was sent, and `sent_propensity` with which probability the shadow would have sent that
    one, null for real-valued actions.
    """

    decision_id: str
    time_s: float
    version: int
    digest: str
    mode: Literal["greedy", "sample"]
    distribution: list[float] | None
    action: Any
    propensity: float | None
    failure: str | None = None
    agrees: bool | None = None
    sent_propensity: float | None = None


class Override(msgspec.Struct, frozen=True):
    """That somebody did something else than what was decided. `key` names the API key that said so."""

    decision_id: str
    time_s: float
    action: Any
    reason: str
    key: str


class Feedback(msgspec.Struct, frozen=True):
    """What a client reports of one decision. `final` closes the decision's episode; without an episode it is always final."""

    decision_id: str
    time_s: float
    reward: float
    final: bool


Record = Decision | Shadow | Override | Feedback
KINDS: dict[type, SegmentKind] = {Decision: "decisions", Feedback: "feedback", Shadow: "shadows", Override: "overrides"}
_batch_decoder = msgspec.json.Decoder(DecisionBatch)


class LogTail:
    """Follows a log directory: what was appended to any of its segments since the last look, nearly in the order of time.

        tail.look()                      # from here on, only bytes that are there now
        while records := tail.read():    # a chunk of the segment that is furthest behind
            ...

    `read` raises `IntegrityError` for a complete line that is not a record (a writer never leaves one: the file was changed)
    and for a segment of another kind. That line or segment is never used; the next call goes on behind it.
    """

    def __init__(self, directory: Path, record_type: type[Record]) -> None:
        self._directory = directory
        self._decoder = msgspec.json.Decoder(record_type)
        self._kind = KINDS[record_type]
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
                if line.startswith(BATCH_PREFIX):
                    records.extend(list(_batch_decoder.decode(line).rows()))  # all of it or nothing
                else:
                    records.append(self._decoder.decode(line))
            except (msgspec.DecodeError, ValueError, IndexError) as error:
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
    if header.kind != kind or not 1 <= header.schema_version <= SCHEMA_VERSION:
        raise IntegrityError(
            f"{path}: {header.kind} of schema version {header.schema_version}, expected {kind} of version 1 to {SCHEMA_VERSION}"
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
                    is_batch = line.startswith(BATCH_PREFIX)
                    decisions = _batch_decoder.decode(line).rows() if is_batch else [msgspec.json.decode(line, type=Decision)]
                    yield from (decision for decision in decisions if decision.decision_id == decision_id)
                except (msgspec.DecodeError, ValueError, IndexError) as error:
                    raise IntegrityError(f"{path}: the line with decision {decision_id} is damaged: {error}") from error
