"""What was answered to this request before, by this replica or another one?

A client that lost an answer asks again, and may come to another replica. Sampling is seeded by the id, so usually that one would
answer the same; but the plan may have changed in between, and then the decision that is in the log holds. So each replica
knows where in the logs the latest decisions are: its own as it writes them, the others' by reading what they appended, just
before each batch in which a client named its request. With one replica that costs nothing.

So that this is never much, `follow` reads along in between, a slice in each turn of the event loop. Otherwise the first named
request after a pause would find all that the others wrote meanwhile, and hold up everybody while it is read.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from policies.records import BATCH_PREFIX, Decision, DecisionBatch

logger = logging.getLogger(__name__)

MAX_REMEMBERED = 100_000  # names, twice as many at most: about 25 MB each
RECENT_S = 300.0  # what a segment held when nobody had written to it for longer, no client would still ask for
FIRST_LOOK_BYTES = 16 << 20  # of the end of each segment that another replica, or a former life, has written
SLICE_BYTES = 256 << 10  # up to 2,000 decisions, a millisecond
FOLLOW_INTERVAL_S = 1.0
CLOCK_GRAIN_NS = 20_000_000  # of file times: two changes within a tick of the kernel's clock (1 to 10 ms) may bear one time

_ID_START = b'{"decision_id":"'


class _Ids(msgspec.Struct):
    batch_id: str
    decision_ids: list[str]


_ids_decoder = msgspec.json.Decoder(_Ids)
_decision_decoder = msgspec.json.Decoder(Decision)
_batch_decoder = msgspec.json.Decoder(DecisionBatch)


class Recall:
    """Finds logged decisions by what a client calls them: a decision's id, or the id of a request for many."""

    def __init__(self, directory: Path, own_writer: str) -> None:
        self._directory = directory
        self._own_writer = own_writer
        self._newer: dict[str, tuple[Path, int]] = {}
        self._older: dict[str, tuple[Path, int]] = {}
        self._kept: dict[str, bytes] = {}  # lines that were answered and are in no segment yet
        self._others: dict[Path, int] = {}  # up to where each of their segments was read; none is kept open
        self._seen_change_ns = -1

    def remember(self, names: Iterable[str], path: Path, offset: int) -> None:
        """Note where a line begins that this replica has just written."""
        for name in names:
            self._newer[name] = (path, offset)
            self._kept.pop(name, None)
        if len(self._newer) > MAX_REMEMBERED:
            self._older, self._newer = self._newer, {}

    def keep(self, names: Iterable[str], line: bytes) -> None:
        """Note a line that the disk did not take and that is kept in memory, until it is remembered or forgotten."""
        self._kept.update(dict.fromkeys(names, line))

    def forget(self, names: Iterable[str]) -> None:
        """Drop what was kept under these names."""
        for name in names:
            self._kept.pop(name, None)

    def catch_up(self) -> None:
        """Read what other replicas have appended since the last call."""
        for _ in self._steps():
            pass

    async def follow(self) -> None:
        """Read along for ever. What cannot be read now is left to `catch_up`, which says so to who needs it."""
        while True:
            await asyncio.sleep(FOLLOW_INTERVAL_S)
            with contextlib.suppress(OSError):
                for _ in self._steps():
                    await asyncio.sleep(0)

    def _steps(self) -> Iterator[None]:
        """Read everything that is new, a slice at a time. In between others may read on: where they are is looked up anew."""
        self._look_for_segments()
        for path in list(self._others):
            while self._read_slice(path):
                yield

    def find(self, names: Iterable[str]) -> dict[str, list[Decision]]:
        """Return the logged decisions by these names, without those that were not decided lately.

        Each line is read and decoded once, however many of the names it has: a request for 4,096 decisions may come again.
        """
        names_at: dict[bytes | tuple[Path, int], list[str]] = {}
        for name in names:
            where = self._kept.get(name) or self._newer.get(name) or self._older.get(name)
            if where is not None:
                names_at.setdefault(where, []).append(name)
        found: dict[str, list[Decision]] = {}
        for where, its_names in names_at.items():
            line = where if isinstance(where, bytes) else _line_at(*where)
            try:
                decisions = _decisions_by_name(line) if line else {}
            except (msgspec.DecodeError, ValueError, IndexError) as error:  # changed since; the monitor reports it too
                logger.error("event=log_line_damaged place=%.300r error=%r", where, str(error))
                continue
            found |= {name: decisions[name] for name in its_names if name in decisions}
        return found

    def others_segment(self, name: str) -> Path | None:
        """Return the segment of another replica, or of a former life, that a decision was found in; None for one of our own."""
        where = None if name in self._kept else self._newer.get(name) or self._older.get(name)
        return None if where is None or where[0].name.startswith(self._own_writer) else where[0]

    def _look_for_segments(self) -> None:
        """Take in segments that are new; each time, since a replica that dies right after its first decision has left one."""
        try:
            change_ns = os.stat(self._directory).st_mtime_ns
        except FileNotFoundError:
            return
        if change_ns == self._seen_change_ns:
            return
        is_settled = time.time_ns() - change_ns > CLOCK_GRAIN_NS
        self._seen_change_ns = change_ns if is_settled else -1
        found: set[Path] = set()
        for entry in os.scandir(self._directory):
            if entry.name.endswith(".jsonl") and not entry.name.startswith((self._own_writer, ".")):
                try:
                    self._take_in(Path(entry.path), entry.stat(), found)
                except FileNotFoundError:  # it was sealed in this moment
                    continue
        for path in set(self._others) - found:
            del self._others[path]

    def _take_in(self, path: Path, stat: os.stat_result, found: set[Path]) -> None:
        """Follow a segment from its last part on; one that was quiet for long from its end on: its writer may only be idle."""
        found.add(path)
        if path in self._others:
            return
        is_recent = time.time() - stat.st_mtime < RECENT_S
        start = max(0, stat.st_size - FIRST_LOOK_BYTES) if is_recent else stat.st_size
        if start and is_recent:
            start += _bytes_at(path, start, 1 << 20).find(b"\n") + 1
        self._others[path] = start

    def _read_slice(self, path: Path) -> bool:
        """Read on in one segment; False at its end, as far as whole lines go."""
        offset = self._others.get(path)
        if offset is None:  # it was gone when somebody looked meanwhile
            return False
        try:
            if os.stat(path).st_size == offset:
                return False
            data = more = _bytes_at(path, offset, SLICE_BYTES)
            while len(more) == SLICE_BYTES and b"\n" not in more:  # a line may be longer
                more = _bytes_at(path, offset + len(data), SLICE_BYTES)
                data += more
        except FileNotFoundError:  # sealed since: what it held is older than anybody asks for
            return False
        lines = data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]
        for line in lines:
            self.remember(_names_in(line), path, offset)
            offset += len(line) + 1
        self._others[path] = offset
        return bool(lines)


def _decisions_by_name(line: bytes) -> dict[str, list[Decision]]:
    if not line.startswith(BATCH_PREFIX):
        decision = _decision_decoder.decode(line)
        return {decision.decision_id: [decision]}
    batch = _batch_decoder.decode(line)
    decisions = list(batch.rows())
    return {decision.decision_id: [decision] for decision in decisions} | {batch.batch_id: decisions}


def _names_in(line: bytes) -> list[str]:
    """Return under which names a line may be asked for: a decision, a batch, or its decisions if each has a name of its own.

    None for a header, or for a line that was changed since: a writer leaves only whole lines. The monitor reports that too.
    """
    try:
        if line.startswith(_ID_START):
            return [line[len(_ID_START) : line.index(b'"', len(_ID_START))].decode()]
        if not line.startswith(BATCH_PREFIX):
            return []
        ids = _ids_decoder.decode(line)
        return [ids.batch_id] if ids.batch_id else ids.decision_ids
    except (msgspec.DecodeError, ValueError) as error:
        logger.error("event=log_line_damaged error=%r", str(error))
        return []


def _bytes_at(path: Path, offset: int, num_bytes: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, num_bytes, offset)
    finally:
        os.close(descriptor)


def _line_at(path: Path, offset: int) -> bytes:
    """Return the line that begins at an offset; empty when its segment is gone, sealed since."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.readline()
    except OSError:
        return b""
