"""Does the program do what its user types: the whole loop in `up`, each step alone, and clear errors?"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from policies.log_reader import find_decision
from policies.storage import open_storage
from tests.browser.test_dashboard import assert_dashboard_shows, driver, needs_chromium  # noqa: F401
from tests.command_line import ROOT, TRIMTAB, free_port, run_trimtab, serving_processes, trimtab_json
from tests.simulators import Segment
from trimtab.client import Client

pytestmark = pytest.mark.ray

LOOP_FILE = ROOT / "examples" / "cartpole.yaml"
START_TIMEOUT_S = 240.0  # of a whole `up`, training included, on a machine that does other things as well
STOP_TIMEOUT_S = 90.0


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


def _start_up(storage: Path, port: int) -> subprocess.Popen[str]:
    command = [*TRIMTAB, "up", str(LOOP_FILE), "--storage", str(storage), "--address", "local", "--set", f"serving.port={port}"]
    with open(storage.parent / "up.log", "w") as log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=_listen_to_interrupts,
        )


def _listen_to_interrupts() -> None:
    """Undo what a shell does to its background jobs, if these tests are one: it lets them ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _log(storage: Path) -> str:
    return (storage.parent / "up.log").read_text()


def _wait_for(storage: Path, process: subprocess.Popen[str], text: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while text not in _log(storage):
        assert process.poll() is None, _log(storage)
        assert time.monotonic() < deadline, _log(storage)
        time.sleep(0.1)


def _descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def _interrupt(process: subprocess.Popen[str]) -> int:
    """Press Ctrl-C as a terminal does: the signal goes to the whole foreground group."""
    os.killpg(process.pid, signal.SIGINT)
    return process.wait(timeout=STOP_TIMEOUT_S)


def _assert_all_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive, [(p.pid, p.name()) for p in alive]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[tuple[Path, str]]:
    """A storage root whose first `up` was interrupted in the middle of training, and the run it left."""
    storage = tmp_path_factory.mktemp("up") / "data"
    process = _start_up(storage, port)
    try:
        _wait_for(storage, process, "update 1 ")  # the first line; later ones may be skipped when they come fast
        children = _descendants(process)
        code = _interrupt(process)
        assert code == 130 and "stopped" in _log(storage), _log(storage)
        _assert_all_gone(children)
    finally:
        process.kill()
    (run,) = (storage / "runs").iterdir()
    yield storage, run.name


@pytest.fixture(scope="module")
def served(interrupted: tuple[Path, str], port: int) -> Iterator[Path]:
    """The same storage after a second `up` went on with the interrupted run and serves its policy."""
    storage, run = interrupted
    before = serving_processes()
    process = _start_up(storage, port)
    try:
        _wait_for(storage, process, "try: curl")
        assert [path.name for path in (storage / "runs").iterdir()] == [run]  # continued, not started again
        yield storage
        children = _descendants(process)
        assert any("raylet" in child.name() for child in children)  # else the next line could not fail
        assert _interrupt(process) == 130
        _assert_all_gone(children)
        assert serving_processes() <= before
    finally:
        process.kill()


def test_up_after_an_interruption_serves_and_its_curl_line_works(served: Path) -> None:
    (line,) = [line for line in _log(served).splitlines() if line.startswith("try: ")]
    answer = subprocess.run(["bash", "-c", line.removeprefix("try: ")], capture_output=True, text=True, timeout=30)
    decision = json.loads(answer.stdout)
    assert decision["action"] in (0, 1) and (decision["version"], decision["arm"]) == (1, "champion")
    assert open_storage(served).api_key_file.read_text() not in _log(served)  # the place of the key is printed, not the key


def test_a_second_server_on_the_same_storage_is_refused(served: Path) -> None:
    result = run_trimtab("serve", storage=served)
    assert result.returncode == 2 and "already serves" in result.stderr


def test_decide_replay_and_status_agree(served: Path) -> None:
    decision = trimtab_json("decide", "[0.01, 0.02, 0.03, 0.04]", "--unit-id", "u", storage=served)
    replayed = trimtab_json("replay", decision["decision_id"], storage=served)
    assert replayed["equal"] is True and replayed["recomputed"]["action"] == decision["action"]
    time.sleep(2.5)  # the monitor reads the log once a second, a replica asks it once a second
    status = trimtab_json("status", storage=served)
    assert status["champion"] == 1 and status["arms"][0]["decisions"] >= 1
    assert (status["training"]["state"], status["training"]["stop_reason"]) == ("finished", "target")


def test_a_changed_log_line_does_not_replay(served: Path) -> None:
    """The negative control of replay: the same record with another observation."""
    decision = trimtab_json("decide", "[0.01, 0.02, 0.03, 0.04]", storage=served)
    directory = served / "log" / "cartpole" / "decisions"
    logged = find_decision(directory, decision["decision_id"])
    assert logged is not None
    forged = msgspec.structs.replace(logged, decision_id=f"{logged.decision_id}x", action=1 - logged.action)
    copy = Segment(directory, "decisions", "zz-forged")
    copy.append(forged)
    try:
        result = run_trimtab("replay", forged.decision_id, storage=served)
        assert result.returncode == 1 and "DIFFERENT" in result.stdout
    finally:
        copy.path.unlink()


def test_drive_returns_over_http_what_evaluate_says(served: Path) -> None:
    driven = trimtab_json("drive", "--episodes", "30", "--concurrency", "16", storage=served)
    assert driven["episodes"] == 30 and driven["failed_requests"] == 0 and driven["feedback"] == driven["decisions"]
    evaluated = trimtab_json("evaluate", "--version", "1", "--episodes", "30", storage=served)
    # Different initial states: the two means differ by chance. The intervals must overlap, and CartPole ends at 500.
    low, high = driven["return_low"], driven["return_high"]
    assert low <= evaluated["return_high"] and evaluated["return_low"] <= high and 475 <= driven["return_mean"] <= 500


@needs_chromium
@pytest.mark.browser
def test_the_dashboard_shows_the_real_endpoint(served: Path, driver: Any) -> None:  # noqa: F811
    status = trimtab_json("status", storage=served)
    url = json.loads((served / "session.json").read_text())["url"]
    assert_dashboard_shows(driver, url, open_storage(served).api_key_file.read_text(), status)


def test_wrong_questions_get_a_clear_answer(served: Path) -> None:
    result = run_trimtab("decide", "[1, 2]", storage=served)
    assert result.returncode == 2 and "observation has 2 items; expected a list of 4 finite numbers" in result.stderr
    assert run_trimtab("decide", "not json", storage=served).returncode == 2
    result = run_trimtab("release", "start", "--version", "7", storage=served)
    assert result.returncode == 2 and "version 7 does not exist; registered: [1]" in result.stderr
    result = run_trimtab("release", "status", storage=served)
    assert result.returncode == 2 and "there has been no release" in result.stderr
    with Client("http://127.0.0.1:9", "key", timeout_s=0.5) as client, pytest.raises(Exception, match="did not answer within"):
        client.decide([0.0])


def test_a_bundle_with_a_changed_byte_is_refused_with_both_hashes(served: Path) -> None:
    (bundle,) = [path for path in (served / "registry" / "cartpole" / "bundles").iterdir() if path.is_dir()]
    path = bundle / "policy.safetensors"
    original = path.read_bytes()
    path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    try:
        result = run_trimtab("evaluate", "--version", "1", storage=served)
        assert result.returncode == 2 and "policy.safetensors: sha256 is" in result.stderr and "manifest says" in result.stderr
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--set", "environment.id=CartPoel-v1"], "did you mean CartPole"),
        (["train", "--set", "training.lr=fast"], "training.lr.float: Input should be a valid number"),
        (["train", "--set", "training.minibatch_size=100000"], "set minibatch_size <= 1024"),
        (["train", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["train", "--address", "127.0.0.1:9"], "does not answer within"),
        (["resume", "--run", "nope"], "'nope'"),
        (["serve"], "has no champion"),
        (["status"], "nothing is serving"),
        (["frobnicate"], "No such command"),
    ],
)
def test_usage_and_environment_errors_end_with_code_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run_trimtab(*arguments, storage=None if arguments == ["frobnicate"] else tmp_path / "data")
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr


def test_a_taken_port_is_named(served: Path, tmp_path: Path, port: int) -> None:
    """The first server's champion is published into a second storage, which then asks for the same port."""
    registry = tmp_path / "data" / "registry"
    open_storage(tmp_path / "data")
    subprocess.run(["cp", "-r", str(served / "registry"), str(registry)], check=True)
    result = run_trimtab("serve", "--address", "local", "--set", f"serving.port={port}", storage=tmp_path / "data")
    assert result.returncode == 2 and f"{port}" in result.stderr and "Traceback" not in result.stderr
