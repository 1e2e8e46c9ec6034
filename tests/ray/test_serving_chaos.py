"""Does the endpoint keep its word while replicas, HAProxy, Serve's controller and the monitor are killed under load?"""

import http.client
import itertools
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from policies.errors import TrimtabError
from policies.log_reader import LogTail
from policies.records import Decision, Feedback
from policies.registry import Registry, change_release
from policies.release import ReleaseConfig
from policies.storage import open_storage
from policies.telemetry import ACTOR_NAMESPACE, monitor_name
from serve_app.config import ServingConfig
from tests.log_audit import TOLD, broken_rules
from tests.ray.test_serving import PORT, Endpoint, wait_for  # sets Serve's environment, before ray.serve is imported
from tests.serving_helpers import NAME, publish, random_policy, read_new, release
from trimtab.client import Client

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

NUM_REPLICAS, NUM_CLIENTS, NUM_RAW = 2, 4, 4
THINK_S = 0.01  # between two requests of a client: moderate load, which leaves two cores room to start replicas
REPLICA_EVERY_S, HAPROXY_EVERY_S, CONTROLLER_EVERY_S, MONITOR_EVERY_S = 5.0, 30.0, 20.0, 15.0
FEW_MINUTES, MANY_MINUTES = 1.0, pytest.param(10.0, marks=pytest.mark.slow)
CALL_TIMEOUT_S = 30.0  # of one logical request: HAProxy is back sooner
MENDED_TIMEOUT_S = 60.0
PROXY_AWAY_LIMIT_S = 30.0
RAW_SUCCESS = 0.999
ASKED_AGAIN, ASKED_AGAIN_S = 300, 200.0  # well within what replicas remember: `serve_app.recall`


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    import ray

    from actors.monitor_process import start_monitor
    from actors.release_manager import start_release_manager
    from serve_app.app import start_serving, stop_serving

    storage = open_storage(tmp_path_factory.mktemp("chaos") / "storage")
    publish(storage, random_policy(1))
    publish(storage, random_policy(2))
    ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False)
    try:
        root = str(storage.root)
        start_monitor(NAME, root, outcome_range=(0.0, 1.0), reward_window_s=600.0, config=ReleaseConfig())
        start_release_manager(NAME, root, ReleaseConfig())
        start_serving(NAME, root, ServingConfig(port=PORT, num_replicas=NUM_REPLICAS))
        yield Endpoint(storage, PORT)
    finally:
        stop_serving()
        ray.shutdown()


# --- those who ask ---


@dataclass(frozen=True)
class Try:
    """One try of a raw client: when, and what came of it (a status, or the name of an error)."""

    began_s: float
    ended_s: float
    outcome: int | str


@dataclass
class Crowd:
    """Users of our client, to whom no request may fail, and raw connections that try each request once."""

    endpoint: Endpoint
    told: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = field(
        default_factory=dict
    )  # by request id: asked, told, when
    failed: list[str] = field(default_factory=list)
    rewarded: list[str] = field(default_factory=list)
    raw_told: list[dict[str, Any]] = field(default_factory=list)
    tries: list[Try] = field(default_factory=list)
    slowest_s: float = 0.0

    def __enter__(self) -> "Crowd":
        self._stop = threading.Event()
        works = [(self._use, index) for index in range(NUM_CLIENTS)] + [(self._try_once, index) for index in range(NUM_RAW)]
        self._threads = [threading.Thread(target=work, args=(index,)) for work, index in works]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=2 * CALL_TIMEOUT_S)
            assert not thread.is_alive()

    def _use(self, index: int) -> None:
        rng = random.Random(index)
        with Client(f"http://127.0.0.1:{self.endpoint.port}", self.endpoint.key.strip(), timeout_s=CALL_TIMEOUT_S) as client:
            for number in itertools.count():
                if self._stop.wait(THINK_S):
                    return
                request_id = f"user-{index}-{number}"
                asked = {"observation": [round(rng.uniform(-1, 1), 3) for _ in range(4)]}
                began_s = time.monotonic()
                try:
                    told = client.decide(**asked, request_id=request_id)
                    self.told[request_id] = (asked, told, time.monotonic())
                    if number % 3 == 0:
                        client.feedback(told["decision_id"], reward=rng.random(), final=True)
                        self.rewarded.append(told["decision_id"])
                except TrimtabError as error:
                    self.failed.append(f"{request_id} after {time.monotonic() - began_s:.1f} s: {error!r}")
                self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)

    def _try_once(self, index: int) -> None:
        connection = self.endpoint.connect()
        for number in itertools.count():
            if self._stop.wait(THINK_S):
                return connection.close()
            body: dict[str, Any] = {"observation": [0.1, 0.2, 0.3, 0.4], "unit_id": f"u-{index}-{number}"}
            if index % 2:
                body["request_id"] = f"raw-{index}-{number}"
            began_s = time.monotonic()
            try:
                outcome, answer = self.endpoint.post(connection, "/v1/decide", body)
                if outcome == 200:
                    self.raw_told.append(answer)
            except (OSError, http.client.HTTPException, ValueError) as error:
                outcome = type(error).__name__
                connection.close()
            self.tries.append(Try(began_s, time.monotonic(), outcome))


# --- who kills ---


@dataclass
class Killer:
    """Kills what is due, notes it, and never kills the last replica that lives."""

    endpoint: Endpoint
    rng: random.Random
    kills: Counter = field(default_factory=Counter)
    proxy_away_s: list[tuple[float, float]] = field(default_factory=list)  # from its end until its port takes connections again

    def run(self, duration_s: float) -> None:
        works: list[tuple[Callable[[], None], float]] = [
            (self.kill_a_replica, REPLICA_EVERY_S),
            (self.kill_haproxy, HAPROXY_EVERY_S),
            (self.kill_the_controller, CONTROLLER_EVERY_S),
            (self.kill_the_monitor, MONITOR_EVERY_S),
        ]
        start_s = time.monotonic()
        due_s = {work: start_s + self.rng.uniform(0.5, 1.0) * every_s for work, every_s in works}
        while time.monotonic() < start_s + duration_s:
            for work, every_s in works:
                if time.monotonic() >= due_s[work]:
                    work()
                    due_s[work] = time.monotonic() + every_s
            time.sleep(0.05)
        for watch in self._watches:
            watch.join(MENDED_TIMEOUT_S)
            assert not watch.is_alive(), "HAProxy did not come back"

    def __post_init__(self) -> None:
        self._watches: list[threading.Thread] = []

    def kill_a_replica(self) -> None:
        pids = ready_replicas()
        if len(pids) == NUM_REPLICAS:  # else the other one is not back yet: next round
            os.kill(self.rng.choice(pids), signal.SIGKILL)
            self.kills["replica"] += 1

    def kill_haproxy(self) -> None:
        from serve_app.app import _node_ids
        from serve_app.haproxy import haproxies

        for pid in haproxies(_node_ids()):
            with suppress(ProcessLookupError):  # an old one, which ended after its last connection
                os.kill(pid, signal.SIGKILL)
        self.kills["haproxy"] += 1
        self._watches.append(threading.Thread(target=self._watch_proxy, args=(time.monotonic(),), daemon=True))
        self._watches[-1].start()

    def _watch_proxy(self, killed_s: float) -> None:
        while time.monotonic() < killed_s + MENDED_TIMEOUT_S:
            with suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self.endpoint.port, timeout=2)
                connection.request("GET", "/readyz")
                if connection.getresponse().status == 200:
                    break
            time.sleep(0.02)
        self.proxy_away_s.append((killed_s, time.monotonic()))

    def kill_the_controller(self) -> None:
        import ray

        from serve_app.app import _controller

        ray.kill(_controller(), no_restart=False)
        self.kills["controller"] += 1

    def kill_the_monitor(self) -> None:
        import ray

        ray.kill(ray.get_actor(monitor_name(NAME), namespace=ACTOR_NAMESPACE), no_restart=False)
        self.kills["monitor"] += 1


def ready_replicas() -> list[int]:
    """Return the pids of the replicas that Serve counts as running and that live; none while its controller is away."""
    import ray

    from serve_app.app import _controller

    try:
        details = ray.get(_controller().get_serve_instance_details.remote(), timeout=5)
    except (ray.exceptions.RayError, AttributeError):
        return []
    application = details["applications"].get(f"trimtab-{NAME}", {"deployments": {}})
    replicas = [
        replica for deployment in application["deployments"].values() for replica in deployment["replicas"] if replica.get("pid")
    ]
    return [replica["pid"] for replica in replicas if replica["state"] == "RUNNING" and _is_alive(replica["pid"])]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("minutes", [FEW_MINUTES, MANY_MINUTES])
def test_no_logical_request_fails_and_the_log_is_right_while_everything_is_killed_in_turn(
    endpoint: Endpoint, minutes: float
) -> None:
    registry = Registry(endpoint.storage.registry(NAME))
    release(endpoint.storage, 2, weights=(0.5, 1.0), now=time.time())
    killer = Killer(endpoint, random.Random(1))
    with Crowd(endpoint) as crowd:
        killer.run(60 * minutes)
    ended_s = time.monotonic()
    wait_for(lambda: len(ready_replicas()) == NUM_REPLICAS, MENDED_TIMEOUT_S, "the return of all replicas")
    mended_s = time.monotonic() - ended_s
    outside = [one for one in crowd.tries if not any(one.ended_s >= a and one.began_s <= b for a, b in killer.proxy_away_s)]
    outcomes = Counter(one.outcome for one in outside)
    print(
        f"\nkills {dict(killer.kills)}; {len(crowd.told)} logical requests, slowest {crowd.slowest_s:.1f} s, "
        f"raw {dict(outcomes)}, "
        f"while HAProxy was away {dict(Counter(one.outcome for one in crowd.tries) - outcomes)}; "
        f"away {[round(b - a, 1) for a, b in killer.proxy_away_s]} s; all replicas back {mended_s:.1f} s after the last kill"
    )
    assert crowd.failed == []
    assert all(until_s - since_s < PROXY_AWAY_LIMIT_S for since_s, until_s in killer.proxy_away_s)

    told = {answer["decision_id"]: answer for _, answer, _ in crowd.told.values()}
    told |= {answer["decision_id"]: answer for answer in crowd.raw_told}
    decisions = read_new(LogTail(endpoint.storage.decisions(NAME), Decision))
    assert broken_rules(decisions, told, versions={1, 2}) == []
    rewarded = {feedback.decision_id for feedback in read_new(LogTail(endpoint.storage.feedback(NAME), Feedback))}
    assert set(crowd.rewarded) <= rewarded

    if (last := registry.state().release) is not None and last.is_open:  # another plan: who forgot would decide otherwise
        registry.append(lambda state: change_release(state, "abort", reason="test"), now=time.time())
    recent = [(name, *rest) for name, rest in crowd.told.items() if ended_s - rest[2] < ASKED_AGAIN_S]
    with Client(f"http://127.0.0.1:{endpoint.port}", endpoint.key.strip(), timeout_s=CALL_TIMEOUT_S) as client:
        for name, asked, before, _ in killer.rng.sample(recent, min(ASKED_AGAIN, len(recent))):
            again = client.decide(**asked, request_id=name)
            assert [again[key] for key in TOLD] == [before[key] for key in TOLD], name

    # Negative controls: kills of each kind took place, and the raw connections felt them.
    assert killer.kills["replica"] >= 3 * minutes and min(killer.kills.values()) >= 1 and len(killer.kills) == 4
    assert outcomes.total() > 1000 * minutes and outcomes.total() < len(crowd.tries)
    # One minute has some ten thousand raw tries: a dozen that fail for the machine's own reasons would be more than a thousandth.
    assert outcomes[200] / outcomes.total() >= (RAW_SUCCESS if minutes >= 10 else 0.99), outcomes
