"""Every acknowledged decision is in the log exactly once, whoever was killed: a writer at any time, the sealer at any step."""

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from policies.log_reader import find_decision, segments
from policies.sealing import examine, finished_segments, remove_leftovers, seal
from tests.chaos.log_processes import MARKERS
from tests.chaos.strace import Call, read_calls, run_under_strace
from tests.chaos.test_checkpoint_syscalls import needs_strace
from tests.logs import HEADER, encode_lines, make_batch, read_log
from tests.simulators import START_S, make_decision

pytestmark = pytest.mark.chaos

ROOT = Path(__file__).parents[2]
# One thread in Arrow, and no .pyc files written: then every run makes the same calls, and they can be counted.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
ENVIRONMENT |= {"ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1", "ARROW_IO_THREADS": "1"}
NUM_LIVES = 200


# --- the writer ---


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """A log that 200 killed writers left, and what each of them had acknowledged."""
    directory = tmp_path_factory.mktemp("lives") / "decisions"
    return directory, live(directory, NUM_LIVES)


def live(directory: Path, num_lives: int, *options: str) -> list[list[str]]:
    command = [sys.executable, "-m", "tests.chaos.log_processes", "write", str(directory), str(num_lives), "0", *options]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


def copy_of(directory: Path, target: Path) -> Path:
    return Path(shutil.copytree(directory, target / "decisions"))


def test_every_decision_that_a_killed_writer_acknowledged_is_in_the_log_once_before_and_after_sealing(
    lives: tuple[Path, list[list[str]]], tmp_path: Path
) -> None:
    directory = copy_of(lives[0], tmp_path)
    acknowledged = [name for names in lives[1] for name in names]
    assert len(lives[1]) == NUM_LIVES and len(acknowledged) > 20 * NUM_LIVES
    open_form = read_log(directory)
    for path in finished_segments(directory, now=float("inf"), min_age_s=0):
        assert seal(path) is not None, f"{path} has a killed writer, and is locked"
    remove_leftovers(directory, now=float("inf"), min_age_s=0)
    assert {path.suffix for path in directory.iterdir()} == {".parquet"}
    found = [decision.decision_id for decision in read_log(directory)]
    assert len(found) == len(set(found))
    assert set(acknowledged) <= set(found)
    assert sorted(found) == sorted(decision.decision_id for decision in open_form)
    # At most the one batch between its write and its acknowledgement: fewer than 40 decisions of each life.
    assert len(found) - len(acknowledged) < 40 * NUM_LIVES
    assert find_decision(directory, acknowledged[-1]) is not None


def test_a_writer_that_acknowledges_before_it_writes_would_lose_decisions(tmp_path: Path) -> None:
    """Negative control."""
    acknowledged = {name for names in live(tmp_path, 40, "--hasty") for name in names}
    assert acknowledged - {decision.decision_id for decision in read_log(tmp_path)}


def test_a_cut_anywhere_in_the_last_line_of_a_killed_writer_costs_only_that_line(
    lives: tuple[Path, list[list[str]]], tmp_path: Path
) -> None:
    """A write is usually seen whole or not at all; a power cut, or a full disk, cuts where it likes."""
    with_decisions = [path for path in segments(lives[0]).values() if path.read_bytes().count(b"\n") > 1]
    path = min(with_decisions, key=lambda path: path.stat().st_size)
    data = path.read_bytes()
    start = data[:-1].rfind(b"\n") + 1
    assert data.endswith(b"\n")
    places = range(start + 1, len(data), max(1, (len(data) - start) // 40))
    for place in places:
        directory = tmp_path / str(place)
        directory.mkdir()
        torn = directory / path.name
        torn.write_bytes(data[:place])
        whole, is_held = examine(torn)
        info = seal(torn)
        assert info == whole and not is_held and info.num_torn_bytes == place - start
        assert len(read_log(directory)) == info.num_rows


# --- the sealer ---


@dataclass(frozen=True)
class Recording:
    """A segment, and the calls that sealing it makes; the last call marks the end."""

    base: Path
    careless: bool
    calls: list[Call]


def sealer(segment: Path, *, careless: bool) -> list[str]:
    return [sys.executable, "-m", "tests.chaos.log_processes", "seal", str(segment), *(["--careless"] if careless else [])]


def write_segment(directory: Path) -> Path:
    """A segment with batches, a duplicate and a torn tail."""
    rows = [make_decision(f"d{number:03d}", time_s=START_S + number) for number in range(30)]
    lines = encode_lines(*rows, rows[3], make_batch("b", time_s=START_S + 50)) + b'{"decision_id":"torn'
    directory.mkdir()
    path = directory / "w-000001.jsonl"
    path.write_bytes(HEADER + lines)
    return path


def record(directory: Path, *, careless: bool) -> Recording:
    base, recorded = directory / "base", directory / "recorded"
    write_segment(base)
    shutil.copytree(base, recorded)
    log = directory / "recorded.log"
    command = sealer(recorded / "w-000001.jsonl", careless=careless)
    assert run_under_strace(command, log, cwd=ROOT, env=ENVIRONMENT) == 0
    return Recording(base, careless, calls_of_sealing(log))


def calls_of_sealing(log: Path) -> list[Call]:
    """Return the calls between the markers, or to where the process was killed."""
    calls = read_calls(log)
    begin, *_ = [place for place, call in enumerate(calls) if call.strings[:1] == [MARKERS[0]]]
    ends = [place for place, call in enumerate(calls) if call.strings[:1] == [MARKERS[1]]]
    return calls[begin + 1 : ends[0] + 1 if ends else None]


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return record(tmp_path_factory.mktemp("sealing"), careless=False)


@pytest.fixture(scope="module")
def careless_recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return record(tmp_path_factory.mktemp("careless"), careless=True)


@needs_strace
def test_a_sealer_killed_at_any_call_leaves_every_decision_once_and_the_next_one_finishes(recording: Recording) -> None:
    names = [call.name for call in recording.calls if not call.only_reads]
    assert {"write", "fsync"} <= set(names) and any(name.startswith("rename") for name in names)
    assert recording.calls[-1].strings == [MARKERS[1]]
    assert problems(recording) == []


@needs_strace
def test_a_sealer_that_unlinks_before_it_renames_would_lose_decisions(careless_recording: Recording) -> None:
    """Negative control."""
    assert any("lost" in problem for problem in problems(careless_recording))


def problems(recording: Recording) -> list[str]:
    places = [place for place, call in enumerate(recording.calls) if not call.only_reads]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        found = list(pool.map(lambda place: kill_and_seal_again(recording, place), places))
    return [problem for problem in found if problem]


def kill_and_seal_again(recording: Recording, place: int) -> str | None:
    """Kill the sealer at one call, look, let another one finish, and look again; return what is wrong, if anything is."""
    name = f"killed-{place:03d}-{recording.calls[place].name}"
    directory = recording.base.with_name(name)
    shutil.copytree(recording.base, directory)
    segment, log = directory / "w-000001.jsonl", directory.with_suffix(".log")
    command = sealer(segment, careless=recording.careless)
    status = run_under_strace(command, log, kill_at=recording.calls[place], cwd=ROOT, env=ENVIRONMENT)
    made = [call.name for call in calls_of_sealing(log)]
    intended = [call.name for call in recording.calls[: place + 1]]
    assert (status, made) == (-signal.SIGKILL, intended), f"not killed where it was meant to be; see {log}"
    if wrong := wrong_decisions(directory, recording.base):
        return f"{name}: after the kill {wrong}"
    if segment.exists():
        seal(segment)
    if wrong := wrong_decisions(directory, recording.base):
        return f"{name}: after the second sealer {wrong}"
    left = sorted(path.name for path in directory.iterdir())
    return None if left == ["w-000001.parquet"] else f"{name}: {left} are left"


def wrong_decisions(directory: Path, base: Path) -> str | None:
    expected, found = {row.decision_id for row in read_log(base)}, [row.decision_id for row in read_log(directory)]
    if expected - set(found):
        return f"{len(expected - set(found))} decisions are lost"
    num_repeated = len(found) - len(set(found))
    allowed = 1 if (directory / "w-000001.parquet").exists() is False else 0  # the lines hold one twice, as it was logged
    return f"{num_repeated} decisions are there twice" if num_repeated != allowed else None


# --- what a power cut needs and no kill can show ---


@needs_strace
def test_the_sealed_file_and_its_name_are_on_the_disk_before_the_lines_are_removed(recording: Recording) -> None:
    assert order_of(recording.calls) == ["fsync file", "rename", "fsync directory", "unlink", "fsync directory"]


@needs_strace
def test_the_careless_sealer_has_another_order(careless_recording: Recording) -> None:
    assert order_of(careless_recording.calls) == ["unlink", "rename"]


def order_of(calls: list[Call]) -> list[str]:
    steps = []
    for call in calls:
        if call.name in ("fsync", "fdatasync"):
            steps.append("fsync file" if ".parquet" in call.arguments else "fsync directory")
        elif call.name.startswith("rename"):
            steps.append("rename")
        elif call.name.startswith("unlink"):
            steps.append("unlink")
    return steps
