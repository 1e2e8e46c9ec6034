"""A process that is killed at any system call of a commit leaves a run that continues as if nothing had happened."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from policies.errors import TrimtabError
from tests.chaos.strace import Call, read_calls, run_under_strace
from tests.chaos.writer import KEEP, fingerprint, load_if_any, marker, next_generation, write_generations
from training.checkpoint import CURRENT, TENSORS, load_checkpoint

# In CI the tests fail without strace: they must not be lost unnoticed.
needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None and os.environ.get("CI") != "true", reason="no strace here: apt-get install -y strace"
)
pytestmark = [pytest.mark.chaos, needs_strace]

ROOT = Path(__file__).parents[2]
# One thread and no .pyc files written: then every run of the writer makes the same calls, and they can be counted.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
LAST_UPDATE = 6


def before_the_first(run_dir: Path) -> int:
    run_dir.mkdir()
    return 1


def in_the_middle(run_dir: Path) -> int:
    """Return the update of a commit that removes an old generation."""
    write_generations(run_dir, KEEP + 1)
    return KEEP + 2


def after_a_fallback(run_dir: Path) -> int:
    """Return the update of a commit that makes a damaged generation again, among what killed writers left behind."""
    write_generations(run_dir, KEEP + 2)
    damaged = load_checkpoint(run_dir).path
    (damaged / TENSORS).write_bytes(b"damaged")
    shutil.copytree(damaged, damaged.with_name(".tmp-directory"))
    damaged.with_name(".tmp-file").write_bytes(b"{")
    return KEEP + 2


@dataclass(frozen=True)
class Recording:
    """A run up to a commit, and the calls which that commit makes; the last call marks its end."""

    base: Path
    update: int
    careless: bool
    calls: list[Call]


def writer(run_dir: Path, last_update: int, *, careless: bool = False) -> list[str]:
    return [sys.executable, "-m", "tests.chaos.writer", str(run_dir), str(last_update), *(["--careless"] if careless else [])]


def record(beginning: Callable[[Path], int], directory: Path, *, careless: bool = False) -> Recording:
    base, run_dir, log = directory / "base", directory / "recorded", directory / "recorded.log"
    update = beginning(base)
    shutil.copytree(base, run_dir)
    assert run_under_strace(writer(run_dir, update, careless=careless), log, cwd=ROOT, env=ENVIRONMENT) == 0
    return Recording(base, update, careless, calls_of_commit(log, update))


def calls_of_commit(log: Path, update: int) -> list[Call]:
    """Return the calls from the begin of a commit to its end, or to where the process was killed."""
    calls = read_calls(log)
    begin, *_ = [place for place, call in enumerate(calls) if call.strings[:1] == [marker(update, "begins")]]
    ends = [place for place, call in enumerate(calls) if call.strings[:1] == [marker(update, "ends")]]
    return calls[begin + 1 : ends[0] + 1 if ends else None]


@pytest.fixture(scope="module", params=[before_the_first, in_the_middle, after_a_fallback])
def recording(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return record(request.param, tmp_path_factory.mktemp("recording"))


@pytest.fixture(scope="module")
def careless_recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return record(in_the_middle, tmp_path_factory.mktemp("careless"), careless=True)


# --- killed at every call ---


def test_run_killed_at_any_call_of_a_commit_ends_with_the_same_bits(recording: Recording):
    assert {"mkdir", "write", "fsync"} <= {call.name for call in recording.calls}
    assert recording.calls[-1].strings == [marker(recording.update, "ends")]
    assert problems(recording) == []


def test_without_renames_a_kill_would_cost_the_run(careless_recording: Recording):
    assert len(problems(careless_recording)) > len(careless_recording.calls) / 4


def problems(recording: Recording) -> list[str]:
    """Kill at every call but those that only open a file to read: nothing has changed since the call before."""
    places = [place for place, call in enumerate(recording.calls) if not call.only_reads]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        found = list(pool.map(lambda place: kill_and_resume(recording, place), places))
    return [problem for problem in found if problem]


def kill_and_resume(recording: Recording, place: int) -> str | None:
    """Kill the writer at one call of the commit, then let it go on; return what is wrong with the run, if anything is."""
    name = f"killed-{place:03d}-{recording.calls[place].name}"
    run_dir = recording.base.with_name(name)
    shutil.copytree(recording.base, run_dir)
    kill_at_call(recording, place, run_dir)
    try:
        survived = load_if_any(run_dir)
    except TrimtabError as error:
        return f"{name}: {error}"
    expected = (expected_fingerprint(recording.update - 1), expected_fingerprint(recording.update))
    if (fingerprint(survived) if survived else None) not in expected:
        return f"{name}: neither the generation before nor the new one"
    if len(skipped_in(run_dir)) > len(skipped_in(recording.base)):
        return f"{name}: a kill looks like damage: {skipped_in(run_dir)}"
    resume = writer(run_dir, LAST_UPDATE)
    resumed = subprocess.run(resume, capture_output=True, text=True, timeout=60, cwd=ROOT, env=ENVIRONMENT)
    if resumed.returncode != 0 or fingerprint(load_checkpoint(run_dir)) != expected_fingerprint(LAST_UPDATE):
        return f"{name}: the resumed run ends elsewhere {resumed.stderr}"
    left = {path.name for path in (run_dir / "checkpoints").iterdir()}
    kept = {CURRENT, *(f"gen-{update:06d}" for update in range(LAST_UPDATE - KEEP + 1, LAST_UPDATE + 1))}
    return None if left == kept else f"{name}: {left} are left"


def kill_at_call(recording: Recording, place: int, run_dir: Path) -> None:
    command, log = writer(run_dir, recording.update, careless=recording.careless), run_dir.with_suffix(".log")
    status = run_under_strace(command, log, kill_at=recording.calls[place], cwd=ROOT, env=ENVIRONMENT)
    made = [call.name for call in calls_of_commit(log, recording.update)]
    intended = [call.name for call in recording.calls[: place + 1]]
    assert (status, made) == (-signal.SIGKILL, intended), f"not killed where it was meant to be; see {log}"


def expected_fingerprint(update: int) -> str | None:
    """Return the fingerprint that a run which nothing happens to has after an update."""
    generation = None
    for _ in range(update):
        generation = next_generation(generation)
    return fingerprint(generation) if generation else None


def skipped_in(run_dir: Path) -> tuple[str, ...]:
    checkpoint = load_if_any(run_dir)
    return checkpoint.skipped if checkpoint else ()


# --- what a power cut needs and no kill can show, because the page cache outlives a process ---


def test_everything_is_on_the_disk_before_it_gets_its_name(recording: Recording):
    assert steps_in_the_wrong_order(recording.calls) == []


def test_without_renames_the_order_is_wrong(careless_recording: Recording):
    assert any("under its final name" in step for step in steps_in_the_wrong_order(careless_recording.calls))


@pytest.mark.parametrize("place", ["file", "directory", "parent"])
def test_without_a_flush_the_order_is_wrong(recording: Recording, place: str):
    flushes = [call for call in recording.calls if call.name == "fsync"]
    rename = next(call for call in recording.calls if call.name.startswith("rename"))
    paths = {"directory": Path(rename.strings[0]), "parent": Path(rename.strings[0]).parent}
    missing = next(call for call in flushes if path_of(call) == paths.get(place, path_of(flushes[0])))
    assert steps_in_the_wrong_order([call for call in recording.calls if call != missing]) != []


def steps_in_the_wrong_order(calls: list[Call]) -> list[str]:
    """Return the steps by which a power cut could damage or lose a checkpoint.

    - Bytes are written under temporary names only: so a torn write is never under a name that is read.
    - A name is given only to what was flushed after its last change, with all that is in it.
    - After that its directory is flushed before another name is given and before anything is removed.
    """
    wrong: list[str] = []
    unflushed: set[Path] = set()
    named: set[Path] = set()  # their directory is not flushed yet
    for call in calls:
        if call.only_reads or call.has_failed:
            continue
        path = path_of(call)
        if call.name in ("fsync", "fdatasync"):
            unflushed.discard(path)
            named -= {name for name in named if name.parent == path}
        elif call.name in ("rename", "renameat", "renameat2", "link", "linkat"):
            wrong += [f"{call}: {change} is not flushed" for change in unflushed if change.is_relative_to(path)]
            wrong += [f"{call}: {name} is not flushed yet" for name in named]
            named.add(Path(call.strings[1]))
        elif call.name in ("unlink", "unlinkat", "rmdir"):
            wrong += [f"{call}: {name} is not flushed yet" for name in named]
        elif call.name in ("mkdir", "mkdirat") and ".tmp-" not in str(path):
            named.add(path)
        else:
            wrong += [] if ".tmp-" in str(path) else [f"{call}: written under its final name"]
            unflushed |= {path, path.parent}
    return wrong + [f"{name} is not flushed at the end" for name in named]


def path_of(call: Call) -> Path:
    """Return the file that a call is about; strace shows descriptors with their paths."""
    directory_or_file = call.arguments.split(",")[0].partition("<")[2].removesuffix(">")
    takes_descriptor = call.name in ("write", "fsync", "fdatasync", "fchmod", "ftruncate")
    return Path(directory_or_file) if takes_descriptor else Path(directory_or_file, call.strings[0])
