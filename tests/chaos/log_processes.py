"""Writes and seals logs in processes of its own, to be killed.

    python -m tests.chaos.log_processes write DIR NUM_LIVES SEED [--hasty]   lives of a writer, each ended by kill -9 at random
    python -m tests.chaos.log_processes seal PATH [--careless]               seal one segment between two markers

`write` prints a JSON document per life: the ids that it acknowledged on its pipe.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from policies.sealed_segments import SealedWriter
from policies.sealing import _locked, _rows, _scan, seal
from serve_app.decision_log import SegmentWriter
from tests.logs import HEADER, encode_lines, make_batch
from tests.simulators import make_decision

LONGEST_LIFE_S = 0.03
SEGMENT_BYTES = 60_000
MARKERS = ("/sealing-begins", "/sealing-ends")


def write_for_ever(directory: Path, life: int, pipe: int, *, is_hasty: bool) -> None:
    """Append batches, and acknowledge each with a line on the pipe, as a replica does with its answers.

    A hasty writer acknowledges before it writes.
    """
    writer = SegmentWriter(directory, "decisions", f"life-{life:04d}", segment_bytes=SEGMENT_BYTES)
    rng, number = random.Random(life), 0
    while True:
        names = [f"{life}-{number + row}" for row in range(rng.randrange(1, 40))]
        if is_hasty:
            os.write(pipe, json.dumps(names).encode() + b"\n")
        if rng.random() < 0.5:  # large enough for a kill to come between
            lines = encode_lines(*(make_decision(name, observation=[0.5] * 200) for name in names))
        else:
            lines = encode_lines(make_batch(f"{life}-{number}", num_rows=len(names), decision_ids=names))
        writer.append(lines)
        if not is_hasty:
            os.write(pipe, json.dumps(names).encode() + b"\n")
        number += len(names)


def run_lives(directory: Path, num_lives: int, seed: int, *, is_hasty: bool) -> None:
    rng = random.Random(seed)
    for life in range(num_lives):
        print(json.dumps(_live(directory, life, rng.random() * LONGEST_LIFE_S, is_hasty)), flush=True)


def _live(directory: Path, life: int, duration_s: float, is_hasty: bool) -> list[str]:
    ours, theirs = os.pipe()
    child = os.fork()  # this process has one thread and has imported everything: a life begins at once
    if child == 0:
        os.close(ours)
        write_for_ever(directory, life, theirs, is_hasty=is_hasty)
    os.close(theirs)
    os.set_blocking(ours, False)
    deadline, data = time.monotonic() + duration_s, b""
    while time.monotonic() < deadline:  # read, so that the writer never waits for room in the pipe
        data += _read(ours)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := _read(ours):
        data += more
    os.close(ours)
    return [name for line in data.split(b"\n")[:-1] for name in json.loads(line)]


def _read(pipe: int) -> bytes:
    try:
        return os.read(pipe, 1 << 20)
    except BlockingIOError:
        time.sleep(0.0005)
        return b""


def seal_carelessly(path: Path) -> None:
    """Remove the lines before the sealed file has its name."""
    with _locked(path) as file:
        assert file is not None
        contents, temporary = _scan(path, file, lambda: None), path.with_name(f".tmp-{path.stem}.parquet")
        with open(temporary, "wb") as target:
            writer = SealedWriter(target, contents.info)
            for row, decision in _rows(contents, file, temporary):
                writer.add(row, decision)
            writer.close()
        path.unlink()
        os.rename(temporary, path.with_suffix(".parquet"))


def warm_up() -> None:
    """Seal another segment first: what Python and Arrow load when they are used for the first time comes before the markers."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "w-000001.jsonl")
        path.write_bytes(HEADER + encode_lines(make_decision("a"), make_batch("b")))
        seal(path)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        run_lives(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), is_hasty="--hasty" in sys.argv)
    else:
        warm_up()
        os.access(MARKERS[0], os.F_OK)
        (seal_carelessly if "--careless" in sys.argv else seal)(Path(sys.argv[2]))
        os.access(MARKERS[1], os.F_OK)
