"""Processes of a run are killed, hang, or lose their machine: it goes on by itself, and says what happened."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from actors import controller
from actors.controller import Progress, train
from policies.errors import EnvironmentFailed, TrainingFailed
from policies.storage import Storage, open_storage
from tests.training_runs import CARTPOLE, SHORT, changed
from training.checkpoint import load_checkpoint
from training.config import EnvironmentConfig

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "storage")


def processes(actor: str) -> list[psutil.Process]:
    """Return the processes of one kind of actor that belong to this test's cluster: Ray names them in their title."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith(f"ray::{actor}") and _is_ours(process):
            found.append(process)
    return found


def _is_ours(process: psutil.Process) -> bool:
    session = ray._private.worker._global_node.get_session_dir_path()
    try:
        return any(session in part for parent in process.parents() for part in parent.cmdline())
    except psutil.Error:
        return False


class Killer(threading.Thread):
    """Kills one process of a kind every `interval_s`, until it is stopped."""

    def __init__(self, actor: str, *, interval_s: float) -> None:
        super().__init__(daemon=True)
        self._actor, self._interval_s = actor, interval_s
        self._stop_event = threading.Event()
        self.num_kills = 0

    def run(self) -> None:
        while not self._stop_event.wait(self._interval_s):
            for process in processes(self._actor)[:1]:
                process.send_signal(signal.SIGKILL)
                self.num_kills += 1

    def stop(self) -> None:
        self._stop_event.set()
        self.join(timeout=10)


class Over(Exception):
    """Raised by a progress callback to end a run from within."""


def end_after(seconds: float, then: Callable[[Progress], None] = lambda progress: None) -> Callable[[Progress], None]:
    deadline = time.monotonic() + seconds

    def on_progress(progress: Progress) -> None:
        then(progress)
        if time.monotonic() > deadline:
            raise Over

    return on_progress


def test_workers_killed_every_two_seconds_for_a_minute(cluster: None, storage: Storage):
    rows: list[Progress] = []
    killer = Killer("RolloutWorker", interval_s=2)
    killer.start()
    try:
        with pytest.raises(Over):
            train(CARTPOLE, changed(max_env_steps=10**9), storage, run_id="hunted", on_progress=end_after(60, rows.append))
    finally:
        killer.stop()
    assert killer.num_kills >= 20
    # Every kill was seen, but for the last ones perhaps; all of them were mended, and learning went on in between.
    assert killer.num_kills - 2 <= rows[-1].worker_restarts <= killer.num_kills
    assert len({row.update for row in rows if row.worker_restarts == rows[-1].worker_restarts - 1}) > 1
    assert load_checkpoint(storage.run("hunted")).state["update"] >= rows[-1].update - SHORT.checkpoint_every_updates


def test_killed_learner_is_restarted_and_the_run_ends_with_the_same_parameters(cluster: None, storage: Storage):
    undisturbed = train(CARTPOLE, SHORT, storage, run_id="undisturbed")
    messages: list[str] = []

    def kill_learner(row: Progress) -> None:
        if (row.update, row.learner_restarts) in ((1, 0), (8, 1)):
            for process in processes("Learner"):
                process.send_signal(signal.SIGKILL)

    killed = train(CARTPOLE, SHORT, storage, run_id="killed", on_progress=kill_learner, on_message=messages.append)
    assert len(messages) == 2 and all("learner died" in message and "going on from update " in message for message in messages)
    assert killed.parameters_sha256 == undisturbed.parameters_sha256
    assert (killed.env_steps, killed.evaluation_return_mean) == (undisturbed.env_steps, undisturbed.evaluation_return_mean)
    lines = (storage.run("killed") / "metrics.jsonl").read_bytes().count(b"\n")
    assert lines == killed.updates  # updates that were made again stand there once


def test_learner_that_always_dies_ends_the_run_resumably(cluster: None, storage: Storage, monkeypatch: pytest.MonkeyPatch):
    class Mortal(controller.Learner):
        def update(self, *fragments: Any) -> Any:
            os._exit(1)

    monkeypatch.setattr(controller, "Learner", Mortal)
    with pytest.raises(TrainingFailed, match="learner died 3 times without a new checkpoint"):
        train(CARTPOLE, SHORT, storage, run_id="mortal")
    monkeypatch.undo()
    assert train(CARTPOLE, SHORT, storage, run_id="mortal", resume=True).env_steps >= SHORT.max_env_steps


def test_environment_that_hangs_once_is_replaced(cluster: None, storage: Storage, tmp_path: Path):
    environment = EnvironmentConfig(id="tests.chaos.environments:hanging", kwargs={"once": str(tmp_path / "hung")})
    rows: list[Progress] = []
    result = train(environment, changed(worker_timeout_s=8, max_env_steps=2_000), storage, on_progress=rows.append)
    assert result.env_steps >= 2_000 and rows[-1].worker_restarts == 1


def test_environment_that_always_hangs_ends_the_run_and_says_for_how_long_it_waited(cluster: None, storage: Storage):
    environment = EnvironmentConfig(id="tests.chaos.environments:hanging")
    with pytest.raises(EnvironmentFailed, match=r"no answer .* within 4 s each time; raise training\.worker_timeout_s"):
        train(environment, changed(worker_timeout_s=4), storage, run_id="hanging")
    assert load_checkpoint(storage.run("hanging")).state["update"] == 0


def memory_bytes() -> dict[str, int]:
    """Return the unique memory of each process that trains."""
    kinds = {"driver": [psutil.Process()], "worker": processes("RolloutWorker"), "learner": processes("Learner")}
    return {kind: sum(process.memory_full_info().uss for process in found) for kind, found in kinds.items()}


def growth_over(seconds: float, storage: Storage, *, every_s: float) -> dict[str, float]:
    """Train for a time and return by how much each kind of process grew from the first third to the last, as a share."""
    samples: list[dict[str, int]] = []
    next_s = time.monotonic()

    def sample(row: Progress) -> None:
        nonlocal next_s
        if time.monotonic() >= next_s:
            next_s = time.monotonic() + every_s
            samples.append(memory_bytes())

    with pytest.raises(Over):
        train(CARTPOLE, changed(max_env_steps=10**9), storage, on_progress=end_after(seconds, sample))
    third = len(samples) // 3
    mean = lambda part, kind: sum(sample[kind] for sample in part) / len(part)  # noqa: E731
    return {kind: mean(samples[-third:], kind) / mean(samples[third : 2 * third], kind) - 1 for kind in samples[0]}


def test_memory_stays_flat(cluster: None, storage: Storage):
    growth = growth_over(45, storage, every_s=0.5)
    assert max(growth.values()) < 0.05, growth


@pytest.mark.slow
def test_memory_stays_flat_for_half_an_hour(cluster: None, storage: Storage):
    growth = growth_over(1800, storage, every_s=5)
    assert max(growth.values()) < 0.05, growth


def test_shards_of_a_removed_node_move(storage: Storage):
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        lost = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        rows: list[Progress] = []

        def remove_node(row: Progress) -> None:
            rows.append(row)
            if row.update == 4 and lost in cluster.worker_nodes:  # if the learner was there too, update 4 comes again
                cluster.remove_node(lost, allow_graceful=False)
                cluster.add_node(num_cpus=1)

        # Half a CPU each: two workers fit on every node, so two of four are on the node that goes; they move to the new one.
        result = train(CARTPOLE, changed(num_env_runners=4, num_cpus_per_env_runner=0.5), storage, on_progress=remove_node)
        assert result.env_steps >= SHORT.max_env_steps
        assert rows[3].worker_restarts == 0 and rows[-1].worker_restarts >= 1
    finally:
        ray.shutdown()
        cluster.shutdown()
