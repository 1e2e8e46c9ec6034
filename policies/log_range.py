"""Which decisions were made between two times?"""

import heapq
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from policies.errors import IntegrityError
from policies.log_reader import MAX_LINE_BYTES, check_header, decode_line, segments
from policies.records import Decision
from policies.sealed_segments import SUFFIX, SealedFile


def decisions_between(
    directory: Path, since_s: float = -math.inf, until_s: float = math.inf, *, note_error: Callable[[IntegrityError], None]
) -> Iterator[Decision]:
    """Return the decisions of `since_s <= time_s < until_s` in the order of time, each id once: the first one.

    The order is that of the clocks of the machines that wrote. What cannot be read is handed to `note_error` and left out. Of a
    sealed segment without any of these times only the metadata is read.
    """
    parts = [_decisions_of(path, since_s, until_s, note_error) for path in segments(directory).values()]
    seen: set[str] = set()
    for decision in heapq.merge(*parts, key=lambda decision: decision.time_s):
        if decision.decision_id not in seen:
            seen.add(decision.decision_id)
            yield decision


def _decisions_of(path: Path, since_s: float, until_s: float, note_error: Callable[[IntegrityError], None]) -> Iterator[Decision]:
    try:
        if path.suffix == SUFFIX:
            found = _of_sealed(SealedFile(path), since_s, until_s, note_error)
        else:
            found = _of_lines(path, note_error)
        yield from (decision for decision in found if since_s <= decision.time_s < until_s)
    except FileNotFoundError:  # sealed since it was listed
        yield from _decisions_of(path.with_suffix(SUFFIX), since_s, until_s, note_error)
    except IntegrityError as error:
        note_error(error)


def _of_sealed(
    file: SealedFile, since_s: float, until_s: float, note_error: Callable[[IntegrityError], None]
) -> Iterator[Decision]:
    first_s, last_s = file.info.first_time_s, file.info.last_time_s
    if first_s is None or last_s is None or last_s < since_s or first_s >= until_s:
        return
    for index in range(file.num_groups):
        try:
            yield from file.read_group(index)
        except IntegrityError as error:
            note_error(error)


def _of_lines(path: Path, note_error: Callable[[IntegrityError], None]) -> Iterator[Decision]:
    decoder = msgspec.json.Decoder(Decision)
    with open(path, "rb") as file:
        check_header(path, file.readline(MAX_LINE_BYTES), "decisions")
        while line := file.readline(MAX_LINE_BYTES):
            if line.endswith(b"\n"):
                try:
                    yield from decode_line(line, decoder)
                except IntegrityError as error:
                    note_error(IntegrityError(f"{path} before byte {file.tell()}: {error}"))
