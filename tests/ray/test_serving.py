"""The endpoint on a real Ray Serve behind a real HAProxy: kills, swaps under load, oversized bodies, a clean end."""

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from policies.errors import ClusterError
from policies.log_reader import LogTail
from policies.records import Decision
from policies.registry import Registry, change_release
from policies.storage import Storage, open_storage
from policies.telemetry import ACTOR_NAMESPACE, monitor_name
from serve_app.config import ServingConfig
from serve_app.profile import serve_profile_environment
from tests.serving_helpers import NAME, publish, random_policy, read_new, release
from trimtab.client import Client

pytestmark = pytest.mark.ray

# Before ray.serve is imported anywhere in this process. The draining period is the time a replica waits for load balancers
# that we do not have here.
PORT = 18000
os.environ.update(
    serve_profile_environment()
    | {
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_SERVE_HAPROXY_METRICS_PORT": "19101",  # beside a session that somebody runs on this machine
        "RAY_SERVE_HAPROXY_STATS_PORT": "18404",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": "18500",
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": "19500",
    }
)


@dataclass(frozen=True)
class Endpoint:
    storage: Storage
    port: int

    @property
    def key(self) -> str:
        return self.storage.api_key_file.read_text()

    def post(self, connection: http.client.HTTPConnection, path: str, body: Any) -> tuple[int, dict]:
        connection.request("POST", path, json.dumps(body), {"Authorization": f"Bearer {self.key}"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)

    def status(self) -> dict:
        connection = self.connect()
        connection.request("GET", "/v1/status", headers={"Authorization": f"Bearer {self.key}"})
        return json.loads(connection.getresponse().read())

    def change(self, action: str) -> None:
        Registry(self.storage.registry(NAME)).append(lambda state: change_release(state, action, reason="test"), now=1.0)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    import ray

    from serve_app.app import _node_ids, start_serving, stop_serving
    from serve_app.haproxy import haproxies

    storage = open_storage(tmp_path_factory.mktemp("serving") / "storage")
    publish(storage, random_policy(1))
    publish(storage, random_policy(2))
    ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False)
    try:
        start_serving(NAME, str(storage.root), ServingConfig(port=PORT))
        node_ids = _node_ids()
        assert haproxies(node_ids), "the test means to run behind HAProxy"
        yield Endpoint(storage, PORT)
    finally:
        stop_serving()
        ray.shutdown()
    assert not haproxies(node_ids), "HAProxy outlived the session"


@dataclass
class Load:
    """Clients that ask as fast as they are answered, each with its own connection, and note what happened."""

    endpoint: Endpoint
    num_clients: int
    answers: list[dict] = field(default_factory=list)
    refusals: list[tuple[int, dict]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def __enter__(self) -> "Load":
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(index,)) for index in range(self.num_clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=20)
            assert not thread.is_alive()

    def _run(self, index: int) -> None:
        connection, number = self.endpoint.connect(), 0
        while not self._stop.is_set():
            number += 1
            body = {"observation": [0.1, 0.2, 0.3, 0.4], "unit_id": f"u-{index}-{number}"}
            try:
                status, answer = self.endpoint.post(connection, "/v1/decide", body)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.lost.append(repr(error))
                connection.close()
                connection = self.endpoint.connect()
                time.sleep(0.01)
                continue
            if status == 200:
                self.answers.append(answer)
            else:
                self.refusals.append((status, answer))


def wait_for(condition, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.02)


def logged_ids(endpoint: Endpoint) -> list[str]:
    return [decision.decision_id for decision in read_new(LogTail(endpoint.storage.decisions(NAME), Decision))]


def replica_pid() -> int:
    from ray.serve.context import _get_global_client

    details = _get_global_client().get_serve_details()
    [replica] = details["applications"][f"trimtab-{NAME}"]["deployments"]["policy"]["replicas"]
    return replica["pid"]


def test_the_endpoint_listens_on_this_machine_only(endpoint: Endpoint) -> None:
    import ray

    [node] = ray.nodes()
    if node["NodeManagerAddress"] == "127.0.0.1":
        pytest.skip("this machine has no other address")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((node["NodeManagerAddress"], endpoint.port), timeout=2)


def test_a_decision_and_its_feedback_over_http(endpoint: Endpoint) -> None:
    connection = endpoint.connect()
    status, answer = endpoint.post(connection, "/v1/decide", {"observation": [0, 0, 0, 0], "request_id": "first"})
    assert status == 200 and answer["decision_id"] in logged_ids(endpoint)
    item = {"decision_id": answer["decision_id"], "reward": 1.0, "final": True}
    assert endpoint.post(connection, "/v1/feedback", item) == (200, {"accepted": 1})


def test_an_oversized_chunked_body_is_answered_413_through_haproxy(endpoint: Endpoint) -> None:
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=10) as connection:
        head = (
            f"POST /v1/decide HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {endpoint.key}\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        connection.sendall(head.encode())
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        num_sent = 0
        try:
            while num_sent < 64:  # 4 MiB without an end; the limit is 1 MiB
                connection.sendall(chunk)
                num_sent += 1
                time.sleep(0.005)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the other side has answered and closed, which is what we want to see
        assert connection.recv(12) == b"HTTP/1.1 413"
    assert endpoint.post(endpoint.connect(), "/v1/decide", {"observation": [0, 0, 0, 0]})[0] == 200


def test_a_replicas_events_are_in_the_log_file_that_serve_keeps_for_it(endpoint: Endpoint) -> None:
    import ray

    keys = endpoint.storage.api_keys.path
    good = keys.read_bytes()
    logs = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"

    def events() -> str:
        return "".join(path.read_text() for path in logs.glob(f"replica_trimtab-{NAME}_*.log"))

    keys.write_bytes(b"{")
    try:
        wait_for(lambda: "event=keys_unreadable" in events(), 10, "the event")
        assert endpoint.post(endpoint.connect(), "/v1/decide", {"observation": [0, 0, 0, 0]})[0] == 200, "the last good keys"
    finally:
        keys.write_bytes(good)
    wait_for(lambda: "event=keys_readable_again" in events(), 10, "the event")


def test_plan_changes_under_load_fail_no_request(endpoint: Endpoint) -> None:
    with Load(endpoint, num_clients=4) as load:
        wait_for(lambda: len(load.answers) > 50, 20, "traffic")
        for number in range(5):
            release(endpoint.storage, 2, weights=(0.5, 1.0))
            wait_for(lambda: load.answers[-1]["arm"] == "canary", 5, "a canary answer")
            endpoint.change("rollback" if number % 2 else "abort")
            changed_at = len(load.answers)
            wait_for(lambda: {a["arm"] for a in load.answers[changed_at:][-50:]} == {"champion"}, 5, "the champion alone")  # noqa: B023
    assert load.refusals == [] and load.lost == []
    canaries = [answer for answer in load.answers if answer["arm"] == "canary"]
    assert canaries and {answer["version"] for answer in canaries} == {2}
    assert {answer["fallback"] for answer in load.answers} == {None}


def test_killing_the_replica_under_load_loses_no_acknowledged_decision(endpoint: Endpoint) -> None:
    with Load(endpoint, num_clients=8) as load:
        for _ in range(3):
            num_before = len(load.answers)
            wait_for(lambda: len(load.answers) > num_before + 200, 60, "traffic before the kill")  # noqa: B023
            pid = replica_pid()
            os.kill(pid, signal.SIGKILL)
            num_killed = len(load.answers)
            wait_for(lambda: len(load.answers) > num_killed + 200, 60, "traffic after the kill")  # noqa: B023
    acknowledged = [answer["decision_id"] for answer in load.answers]
    logged = logged_ids(endpoint)
    assert len(set(acknowledged)) == len(acknowledged)
    assert set(acknowledged) <= set(logged)
    assert len(set(logged)) == len(logged), "each is in the log exactly once: these clients do not repeat a request"
    # Negative control: the kills did hit traffic, so a log written after the answer would have had something to lose.
    assert load.lost or load.refusals


class FakeMonitor:
    """Implements the two methods of the monitor's interface that a replica uses."""

    def __init__(self) -> None:
        self.reports: list[dict] = []

    def report(self, report: dict) -> None:
        self.reports.append(report)

    def status(self) -> dict:
        return {"num_reports": len(self.reports), "last": self.reports[-1] if self.reports else None}


def test_the_client_finds_the_direct_lane_and_survives_its_replica(endpoint: Endpoint) -> None:
    def directs() -> list[str]:
        connection = endpoint.connect()
        connection.request("GET", "/v1/endpoints", headers={"Authorization": f"Bearer {endpoint.key}"})
        response = connection.getresponse()
        return json.loads(response.read())["endpoints"] if response.status == 200 else []

    (direct,) = directs()
    assert direct.startswith("http://127.0.0.1:") and direct != f"http://127.0.0.1:{endpoint.port}"
    with Client(f"http://127.0.0.1:{endpoint.port}", endpoint.key.strip(), timeout_s=30.0) as client:
        before = client.decide([0.1, 0.2, 0.3, 0.4], request_id="direct-1")
        os.kill(replica_pid(), signal.SIGKILL)
        assert client.decide([0.1, 0.2, 0.3, 0.4], request_id="direct-1") == before  # by the new replica, which makes it again
        wait_for(lambda: directs() not in ([], [direct]), 30, "the new replica's own port")
    assert before["decision_id"] in logged_ids(endpoint)


def test_status_comes_from_the_monitor_and_survives_its_absence(endpoint: Endpoint) -> None:
    import ray

    away = endpoint.status()
    assert away["monitor"] is None and "monitor" in away["reason"]
    assert away["plan"]["arms"] and away["champion"] == 1
    for _ in range(2):  # the second one is another actor under the same name: the replica must find it again
        monitor = ray.remote(FakeMonitor).options(name=monitor_name(NAME), namespace=ACTOR_NAMESPACE, num_cpus=0).remote()
        wait_for(lambda: endpoint.status().get("num_reports", 0) >= 2, 20, "reports to the monitor")
        last = endpoint.status()["last"]
        assert last["versions"] == [1] and last["load_failures"] == {}
        assert set(last) >= {"replica", "responses", "plan", "queue_depth"}
        ray.kill(monitor)
        wait_for(lambda: "reason" in endpoint.status(), 20, "the absence to be noticed")
    assert endpoint.post(endpoint.connect(), "/v1/decide", {"observation": [0, 0, 0, 0]})[0] == 200


def test_a_taken_port_is_named_with_a_remedy(endpoint: Endpoint) -> None:
    from serve_app.app import require_free_ports

    with pytest.raises(
        ClusterError, match=rf"port {endpoint.port} \(the endpoint\).*HAProxy is running here as process \d+.*kill"
    ):
        require_free_ports(ServingConfig(port=endpoint.port))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ClusterError, match=f"port {port}"):
            require_free_ports(ServingConfig(port=port))


def test_a_bundle_spoiled_on_disk_is_never_served(endpoint: Endpoint) -> None:
    number = publish(endpoint.storage, random_policy(3))
    registry = Registry(endpoint.storage.registry(NAME))
    path: Path = registry.bundles / registry.state().version(number).digest / "policy.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    release(endpoint.storage, number, weights=(0.5,))
    wait_for(lambda: endpoint.status().get("load_failures"), 10, "the failure in the status")
    assert "sha256" in endpoint.status()["load_failures"][str(number)]
    connection = endpoint.connect()
    answers = [endpoint.post(connection, "/v1/decide", {"observation": [0, 0, 0, 0]})[1] for _ in range(20)]
    assert {answer["version"] for answer in answers} == {1}
    endpoint.change("abort")


def test_applications_of_others_survive_our_stop_and_we_can_come_back(endpoint: Endpoint) -> None:
    import urllib.request

    from ray import serve

    from serve_app.app import start_serving, stop_serving

    @serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0})
    class Foreign:
        def __call__(self) -> str:
            return "still here"

    serve.run(Foreign.bind(), name="foreign", route_prefix="/foreign")
    stop_serving()
    with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/foreign", timeout=10) as response:
        assert response.read() == b"still here"
    assert set(serve.status().applications) == {"foreign"}
    with pytest.raises(ClusterError, match=rf"already, at 127.0.0.1:{endpoint.port}, not 127.0.0.1:{endpoint.port + 1}"):
        start_serving(NAME, str(endpoint.storage.root), ServingConfig(port=endpoint.port + 1))
    start_serving(NAME, str(endpoint.storage.root), ServingConfig(port=endpoint.port))
    assert endpoint.post(endpoint.connect(), "/v1/decide", {"observation": [0, 0, 0, 0]})[0] == 200
    serve.delete("foreign")
