"""A run that is killed again and again, at random moments, ends with the parameters of one that nothing happens to."""

import functools
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray

from policies.storage import Storage, open_storage
from tests.training_runs import SHORT, STEP_TIMEOUT_S, Driver, changed
from training.checkpoint import load_checkpoint
from training.config import TrainingConfig
from training.runs import LOCK, METRICS

pytestmark = pytest.mark.chaos

FEW, MANY = 8, pytest.param(100, marks=pytest.mark.slow)
MAX_UPDATES_PER_KILL = 8
MAX_DELAY_S = 0.1  # a few updates, each with all its phases; every third one ends with a checkpoint
CLUSTER_START_S = 4.0  # measured on two cores


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster that outlives the drivers: so a killed one is followed by the next in 4 s instead of 7."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "storage")


@dataclass(frozen=True)
class Undisturbed:
    """What a run came to that nothing happened to, and how long it took to its first update."""

    training: TrainingConfig
    parameters_sha256: str
    start_s: float


@pytest.fixture(scope="module")
def undisturbed(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Undisturbed]:
    """A function that returns the undisturbed run for a number of kills: one that is not over before the last of them."""

    @functools.cache
    def run(num_kills: int) -> Undisturbed:
        training = changed(max_env_steps=512 * (MAX_UPDATES_PER_KILL + 2) * num_kills, keep_checkpoints=2)
        began_s = time.monotonic()
        with Driver(cluster, open_storage(tmp_path_factory.mktemp("storage")), "undisturbed", training) as driver:
            driver.wait_for_updates(1)
            start_s = time.monotonic() - began_s
            return Undisturbed(training, driver.result(), start_s)

    return run


@pytest.mark.parametrize("num_kills", [FEW, MANY])
def test_run_whose_driver_is_killed_at_random_moments_ends_with_the_same_parameters(
    cluster: str, undisturbed: Callable[[int], Undisturbed], storage: Storage, num_kills: int
):
    same = undisturbed(num_kills)
    assert_survives_kills_of_its_drivers(cluster, storage, same, num_kills=num_kills, start_s=same.start_s)


def test_run_whose_whole_cluster_is_killed_at_random_moments_ends_with_the_same_parameters(
    undisturbed: Callable[[int], Undisturbed], storage: Storage
):
    same = undisturbed(FEW)
    assert_survives_kills_of_its_drivers("local", storage, same, num_kills=2, start_s=same.start_s + CLUSTER_START_S)


def assert_survives_kills_of_its_drivers(
    address: str, storage: Storage, same: Undisturbed, *, num_kills: int, start_s: float
) -> None:
    rng = random.Random(num_kills)
    for _ in range(num_kills):
        training = same.training.model_copy(update={"num_env_runners": rng.choice([1, 2])})
        with Driver(address, storage, "killed", training) as driver:
            wait_for_a_random_moment(driver, rng, start_s)
            driver.assert_runs()
            learners = learners_of(storage.run("killed")) if rng.random() < 0.5 else []
            driver.kill()
            for pid in learners:  # otherwise Ray ends it when it notices the driver's death, often after its checkpoint
                kill_if_alive(pid)
    with Driver(address, storage, "killed", same.training) as driver:
        assert driver.result() == same.parameters_sha256
    assert_nothing_is_left_of_the_kills(storage.run("killed"))


@pytest.mark.parametrize("num_kills", [3, MANY])
def test_run_whose_learner_is_killed_at_random_moments_continues_by_itself(
    cluster: str, undisturbed: Callable[[int], Undisturbed], storage: Storage, num_kills: int
):
    rng = random.Random(num_kills)
    same = undisturbed(max(num_kills, FEW))
    with Driver(cluster, storage, "killed", same.training) as driver:
        for _ in range(num_kills):
            wait_for_random_updates(driver, rng)
            os.kill(wait_for_learner(storage.run("killed")), signal.SIGKILL)
        assert driver.result() == same.parameters_sha256
    assert_nothing_is_left_of_the_kills(storage.run("killed"))


def wait_for_a_random_moment(driver: Driver, rng: random.Random, start_s: float) -> None:
    """Wait for a moment of the start, in which a new run is created and an old one is read, or for one of the training."""
    if rng.random() < 0.5:
        deadline = time.monotonic() + rng.uniform(0, start_s)
        while time.monotonic() < deadline and not driver.has_begun:
            time.sleep(0.005)
    else:
        wait_for_random_updates(driver, rng)


def wait_for_random_updates(driver: Driver, rng: random.Random) -> None:
    driver.wait_for_updates(rng.randint(1, MAX_UPDATES_PER_KILL))
    time.sleep(rng.uniform(0, MAX_DELAY_S))


def learners_of(run_dir: Path) -> list[int]:
    """Return the learners that hold the run's lock or wait for it; there are others' learners on this machine."""
    lock, found = str(run_dir / LOCK), []
    for process in psutil.process_iter(["cmdline"]):
        if "Learner" in " ".join(process.info["cmdline"] or []):
            with suppress(psutil.NoSuchProcess):  # it ended meanwhile
                found += [process.pid] if any(file.path == lock for file in process.open_files()) else []
    return found


def wait_for_learner(run_dir: Path) -> int:
    deadline = time.monotonic() + STEP_TIMEOUT_S
    while not (learners := learners_of(run_dir)):
        assert time.monotonic() < deadline, "the run has no learner"
        time.sleep(0.02)
    return learners[0]


def kill_if_alive(pid: int) -> None:
    with suppress(ProcessLookupError):  # Ray was faster
        os.kill(pid, signal.SIGKILL)


def assert_nothing_is_left_of_the_kills(run_dir: Path) -> None:
    assert load_checkpoint(run_dir).skipped == ()
    updates = [json.loads(line)["update"] for line in (run_dir / METRICS).read_text().splitlines()]
    # The row of an update is written after its checkpoint: a kill in between costs it.
    lost = set(range(1, updates[-1] + 1)) - set(updates)
    assert updates == sorted(set(updates)) and all(update % SHORT.checkpoint_every_updates == 0 for update in lost)
    assert [path for path in run_dir.rglob("*") if path.name.startswith(".tmp-")] == []
    assert len(list((run_dir / "checkpoints").iterdir())) == 3  # CURRENT and the two that are kept
