"""Does a server in the background say where it is, take releases, and leave nothing behind when it is told to end?"""

import time
from pathlib import Path

import psutil
import pytest

from policies.storage import open_storage
from tests.bundles import make_registry
from tests.command_line import SERVING, free_port, serving_processes, trimtab_json

pytestmark = pytest.mark.ray


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """A storage root with two versions of a CartPole policy, random but with passing reports; version 1 is champion."""
    storage = open_storage(tmp_path / "data")
    make_registry(storage.registry("cartpole"), num_versions=2)
    return storage.root


def test_a_detached_server_takes_a_release_and_ends_without_a_trace(storage: Path) -> None:
    before = serving_processes()
    served = trimtab_json("serve", "--detach", "--address", "local", "--set", f"serving.port={free_port()}", storage=storage)
    assert {"url", "api_key_file", "policy", "version"} <= set(served) and (served["policy"], served["version"]) == (
        "cartpole",
        1,
    )
    try:
        assert trimtab_json("decide", "[0, 0, 0, 0]", storage=storage)["version"] == 1
        started = trimtab_json("release", "start", "--version", "2", "--set", "release.weights=[0.5, 1.0]", storage=storage)
        assert {"state", "version", "step", "weights", "verdict", "reason"} <= set(started)
        assert (started["state"], started["version"], started["step"], started["weights"]) == ("running", 2, 0, [0.5, 1.0])
        assert _versions_that_answer(storage, wanted={1, 2}) == {1, 2}
        assert trimtab_json("release", "status", storage=storage)["verdict"] == "inconclusive"  # nobody sent feedback
        assert trimtab_json("release", "abort", storage=storage)["state"] == "aborted"
        assert trimtab_json("release", "status", "--wait", "1", storage=storage, expected_code=1)["state"] == "aborted"
    finally:
        trimtab_json("down", storage=storage)
    _assert_all_gone(before)


def test_a_server_that_is_ended_in_the_second_it_is_ready_leaves_nothing_either(storage: Path) -> None:
    """HAProxy is being reloaded for the new replica in that second."""
    before = serving_processes()
    trimtab_json("serve", "--detach", "--address", "local", "--set", f"serving.port={free_port()}", storage=storage)
    started = {psutil.Process(pid).name() for pid in serving_processes() - before}
    assert all(any(part in name for name in started) for part in SERVING), started  # else what is gone below could not stay
    trimtab_json("down", storage=storage)
    assert (storage / "serve.log").read_text().rstrip().endswith("stopped")  # the clean way out, not Ray's own exit
    _assert_all_gone(before)


def test_training_that_misses_its_target_ends_with_code_1_and_all_its_numbers(tmp_path: Path) -> None:
    arguments = ["train", "--address", "local", "--set", "training.max_env_steps=4000"]
    result = trimtab_json(*arguments, storage=tmp_path / "data", expected_code=1)
    assert {
        "run_id",
        "env_steps",
        "wall_s",
        "env_steps_per_s",
        "time_to_target_s",
        "evaluation_return_mean",
        "parameters_sha256",
        "checkpoint",
    } <= set(result)
    assert result["reached_target"] is False and result["time_to_target_s"] is None and result["env_steps"] >= 4000


def _assert_all_gone(before: set[int]) -> None:
    deadline = time.monotonic() + 20
    while serving_processes() - before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert serving_processes() <= before


def _versions_that_answer(storage: Path, *, wanted: set[int]) -> set[int]:
    """Ask as different units until all wanted versions have answered: the plan reaches the replica within two seconds."""
    seen: set[int] = set()
    for unit in range(40):
        seen.add(trimtab_json("decide", "[0, 0, 0, 0]", "--unit-id", f"u{unit}", storage=storage)["version"])
        if seen >= wanted:
            break
    return seen
