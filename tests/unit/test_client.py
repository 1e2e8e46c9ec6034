"""Does the client tell its caller's mistakes from an endpoint that is away?"""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from policies.errors import ClusterError, Forbidden, RequestInvalid, Unauthorized
from policies.storage import open_storage
from serve_app.asgi import Request, Response
from serve_app.http_api import Route
from serve_app.keys import ApiKey
from tests.serving_helpers import publish, random_policy, replica_of
from trimtab.client import Client
from trimtab.lanes import ASIDE_S, LOOK_INTERVAL_S, DirectLanes

NOBODY_LISTENS = "http://127.0.0.1:9"


@pytest.mark.parametrize(("url", "observation"), [(NOBODY_LISTENS, [float("nan")]), ("no-scheme:8000/x", [0.0])])
def test_a_request_that_cannot_be_sent_is_not_repeated(
    url: str, observation: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pause(seconds: float) -> None:
        raise AssertionError("paused to try again")

    monkeypatch.setattr(time, "sleep", pause)
    with Client(url, "key", timeout_s=30.0) as client, pytest.raises(RequestInvalid, match="cannot be sent"):
        client.decide(observation)
    with Client(NOBODY_LISTENS, "key", timeout_s=30.0) as client, pytest.raises(AssertionError, match="try again"):
        client.decide([0.0])  # the control: an endpoint that is away is tried again


def test_an_endpoint_that_is_away_is_tried_until_the_deadline() -> None:
    with Client(NOBODY_LISTENS, "key", timeout_s=0.3) as client, pytest.raises(ClusterError, match=r"within 0\.3 s"):
        client.decide([0.0])


def test_replicas_take_turns_and_one_that_failed_is_left_alone_for_a_while() -> None:
    lanes = DirectLanes()
    assert lanes.are_old(0.0) and lanes.next(0.0) is None
    lanes.replace(["http://a:1/", "http://b:2"], now_s=0.0)
    assert {lanes.next(0.0) for _ in range(2)} == {"http://a:1", "http://b:2"}
    lanes.set_aside("http://a:1", now_s=1.0)
    assert {lanes.next(2.0) for _ in range(4)} == {"http://b:2"}
    assert {lanes.next(1.0 + ASIDE_S) for _ in range(4)} == {"http://a:1", "http://b:2"}
    assert not lanes.are_old(LOOK_INTERVAL_S - 0.1) and lanes.are_old(LOOK_INTERVAL_S)
    lanes.add(["http://a:1", "http://c:3/"])  # a replica says so while the endpoint is away: what is known stays
    assert {lanes.next(100.0) for _ in range(3)} == {"http://a:1", "http://b:2", "http://c:3"}


class Replicas:
    """Two replicas of one policy, with their lanes on an event loop of their own; the first one's stands for the endpoint."""

    def __init__(self, directory: Path) -> None:
        self.storage = storage = open_storage(directory)
        publish(storage, random_policy(1))
        self.key = storage.api_key_file.read_text().strip()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.endpoint, self.other = (replica_of(storage) for _ in range(2))
        self.url, other_url = (f"http://127.0.0.1:{self.run(r._direct.start('127.0.0.1'))}" for r in (self.endpoint, self.other))
        self.endpoint._endpoint = other_url  # what GET /v1/endpoints says

    def run(self, work) -> object:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def close(self) -> None:
        for replica in (self.endpoint, self.other):
            self.run(replica._stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[Replicas]:
    replicas = Replicas(tmp_path / "storage")
    yield replicas
    replicas.close()


def test_a_replica_that_freezes_leaves_time_for_another_way(replicas: Replicas) -> None:
    frozen = socket.create_server(("127.0.0.1", 0))  # takes connections, never answers
    replicas.endpoint._endpoint = f"http://127.0.0.1:{frozen.getsockname()[1]}"
    with Client(replicas.url, replicas.key, timeout_s=3.0) as client:
        assert client.decide([0.1, 0.2, 0.3, 0.4])["version"] == 1
    frozen.close()


def test_an_endpoint_in_trouble_does_not_make_the_client_forget_the_replicas(replicas: Replicas) -> None:
    with Client(replicas.url, replicas.key) as client:
        client.decide([0.1, 0.2, 0.3, 0.4])
        replicas.endpoint.api.routes["/v1/endpoints"] = Route("GET", ("read",), _unavailable)
        client._lanes._looked_s = float("-inf")
        before = replicas.other._counters.responses[200]
        client.decide([0.1, 0.2, 0.3, 0.4])
        assert replicas.other._counters.responses[200] == before + 2  # it said where replicas are, and decided


def test_a_key_without_the_scope_is_told_apart_from_one_that_is_not_valid(replicas: Replicas) -> None:
    _, reporter = replicas.storage.api_keys.create("reporter", ["feedback"], now=0.0)
    replicas.endpoint._keys.refresh()
    for key, error in ((reporter, Forbidden), ("tt-wrong", Unauthorized)):
        with Client(replicas.url, key) as client, pytest.raises(error):
            client.decide([0.1, 0.2, 0.3, 0.4])
    with Client(replicas.url, replicas.key) as client:
        decision = client.decide([0.1, 0.2, 0.3, 0.4])
    with Client(replicas.url, reporter) as client, pytest.raises(Forbidden):
        client.status()
    assert decision["version"] == 1  # the control: the same request with a key that may


async def _unavailable(request: Request, key: ApiKey | None) -> Response:
    return Response(503, b"{}")


def test_the_client_asks_replicas_directly_and_the_endpoint_when_they_are_gone(replicas: Replicas) -> None:
    observation = [0.1, 0.2, 0.3, 0.4]
    with Client(replicas.url, replicas.key) as client, Client(replicas.url, replicas.key, direct=False) as indirect:
        first = client.decide(observation, request_id="r1")
        assert replicas.other._counters.responses == {200: 1}
        assert indirect.decide(observation, request_id="r1") == first  # the same id, by another way, is the same decision
        assert replicas.endpoint._counters.responses == {200: 2}  # that one, and where the others are
        replicas.run(replicas.other._stop())
        assert client.decide(observation, request_id="r1") == first
        client.feedback(first["decision_id"], reward=1.0)
        assert replicas.endpoint._counters.responses == {200: 4}
