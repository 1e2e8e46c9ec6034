"""Do the monitor and the release manager do their work as processes, and come back when they are killed?"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from actors.monitor_process import start_monitor
from actors.release_manager import start_release_manager
from policies.errors import ClusterError
from policies.registry import Registry, RegistryState, set_champion, start_release
from policies.release import ReleaseConfig
from policies.storage import open_storage
from policies.telemetry import ACTOR_NAMESPACE, monitor_name
from policies.verdicts import Verdict
from tests.simulators import Population, Segment, register_entries

pytestmark = pytest.mark.ray

CONFIG = ReleaseConfig(min_step_s=0, min_episodes=3, max_error_rate_increase=0.05)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False, namespace="test")
    yield
    ray.shutdown()


class World:
    """One policy with versions 1 and 2, whose past and present are written by the test itself."""

    def __init__(self, root: Path, policy: str, rewards: dict[int, float]) -> None:
        self.root, self.policy = str(root), policy
        storage = open_storage(root)
        self.registry = Registry(storage.registry(policy))
        self.decisions = Segment(storage.decisions(policy), "decisions")
        self.feedback = Segment(storage.feedback(policy), "feedback")
        self.population = Population(100, 10, lambda version, rng: rewards[version], np.random.default_rng(0))
        for body in register_entries(Verdict.PASS):
            self.append(lambda state, body=body: body)
        self.append(lambda state: set_champion(state, 1, "first"))

    def append(self, decide: Callable[[RegistryState], dict[str, Any]]) -> RegistryState:
        return self.registry.append(decide, now=time.time())

    def start_release(self) -> None:
        self.append(lambda s: start_release(s, 2, weights=CONFIG.weights, override_gates=None, reason="test"))

    def live(self, ticks: int) -> None:
        """Write so many ticks' records now, all with the present time: each unit makes one decision per tick."""
        for _ in range(ticks):
            plan = self.registry.state().plan
            assert plan is not None
            decisions, feedback = self.population.tick(time.time(), plan)
            self.decisions.append(*decisions)
            self.feedback.append(*feedback)

    def start_monitor(self) -> Any:
        return start_monitor(self.policy, self.root, outcome_range=(0.0, 10.0), reward_window_s=600.0, config=CONFIG)


def wait_for(condition: Callable[[], Any], *, timeout_s: float = 60.0) -> Any:
    """Return the first true answer; fail with the last one otherwise."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = condition()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"no success within {timeout_s} s; last answer {answer!r}"
        time.sleep(0.3)


def status_of(policy: str) -> dict[str, Any] | None:
    """Ask the monitor by its name, as every other process does; None while it is away."""
    try:
        monitor = ray.get_actor(monitor_name(policy), namespace=ACTOR_NAMESPACE)
        return ray.get(monitor.status.remote(), timeout=10)
    except (ValueError, ray.exceptions.RayError):
        return None


def process_id(monitor: Any) -> int:
    return ray.get(monitor.__ray_call__.remote(lambda self: os.getpid()), timeout=30)


def stop(*handles: Any) -> None:
    for handle in handles:
        ray.kill(handle, no_restart=True)


def test_a_killed_monitor_comes_back_by_itself_with_the_same_numbers(cluster: None, tmp_path: Path):
    world = World(tmp_path, "killed", {1: 1.0, 2: 1.0})
    world.start_release()
    world.live(30)
    monitor = world.start_monitor()

    def settled() -> dict[str, Any] | None:
        status = status_of("killed")
        complete = status and sum(arm["outcome"]["episodes"] for arm in status["arms"]) == 300
        return status if complete else None

    before = wait_for(settled)
    old_process = process_id(monitor)
    os.kill(old_process, signal.SIGKILL)
    after = wait_for(settled)
    assert after["monitor"]["started_at"] > before["monitor"]["started_at"]
    assert after["monitor"]["rebuilt_decisions"] == 3000
    for key in ("release", "versions", "champion", "plan", "feedback"):
        assert after[key] == before[key]
    counts = [[(a["decisions"], a["errors"], a["actions"], a["outcome"]) for a in s["arms"]] for s in (before, after)]
    assert counts[0] == counts[1]
    assert process_id(world.start_monitor()) != old_process  # found, not started twice
    stop(monitor)


def test_a_release_is_promoted_by_the_two_processes_while_the_monitor_is_killed_once(cluster: None, tmp_path: Path):
    world = World(tmp_path, "good", {1: 1.0, 2: 1.0})
    monitor = world.start_monitor()
    manager = start_release_manager("good", world.root, CONFIG)
    world.start_release()

    def advance_to(step: int) -> bool:
        world.live(10)
        release = world.registry.state().release
        return release is not None and (release.step >= step or not release.is_open)

    wait_for(lambda: advance_to(1))
    os.kill(process_id(monitor), signal.SIGKILL)
    wait_for(lambda: advance_to(2))
    wait_for(lambda: advance_to(9))
    state = world.registry.state()
    assert state.release is not None
    assert [entry.action for entry in state.release.history] == ["start", "advance", "advance", "promote"]
    assert state.champion == 2
    status = wait_for(lambda: (s := status_of("good")) and s["champion"] == 2 and s)
    assert (status["release"], status["releases"][0]["state"]) == (None, "promoted")
    stop(monitor, manager)


def test_a_bad_release_is_rolled_back_by_the_two_processes(cluster: None, tmp_path: Path):
    world = World(tmp_path, "bad", {1: 1.0, 2: 0.0})
    monitor = world.start_monitor()
    world.start_release()
    world.live(30)
    manager = start_release_manager("bad", world.root, CONFIG)  # started late: the journal and the log tell it everything
    state = wait_for(lambda: (s := world.registry.state()).release.state != "running" and s)
    assert [entry.action for entry in state.release.history] == ["start", "rollback"]
    assert state.champion == 1
    stop(monitor, manager)


def test_without_a_monitor_the_release_holds(cluster: None, tmp_path: Path):
    world = World(tmp_path, "lonely", {1: 1.0, 2: 0.0})
    world.start_release()
    world.live(30)
    manager = start_release_manager("lonely", world.root, CONFIG)
    time.sleep(3)  # three ticks
    assert world.registry.state().release.state == "running"
    monitor = world.start_monitor()  # the negative control: the same world with a monitor does move
    wait_for(lambda: world.registry.state().release.state == "rolled_back")
    stop(monitor, manager)


def test_other_settings_replace_a_left_over_process_and_another_storage_is_refused(cluster: None, tmp_path: Path):
    world = World(tmp_path / "one", "twice", {1: 1.0, 2: 1.0})
    first = process_id(world.start_monitor())
    assert process_id(world.start_monitor()) == first
    changed = start_monitor("twice", world.root, outcome_range=(0.0, 20.0), reward_window_s=600.0, config=CONFIG)
    assert process_id(changed) != first
    with pytest.raises(ClusterError, match="already works on this cluster for the storage"):
        World(tmp_path / "two", "twice", {1: 1.0, 2: 1.0}).start_monitor()
    stop(changed)
