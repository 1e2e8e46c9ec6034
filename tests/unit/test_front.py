"""The port of Serve's own server: our requests are read by the lane, Serve's own pages by uvicorn; both end with the server."""

import asyncio
import http.client
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import uvicorn.config

from policies.storage import Storage, open_storage
from serve_app import direct, front
from serve_app.known_heads import Received, has_head, learn_head
from serve_app.replica import PolicyReplica
from tests.serving_helpers import logged, publish, random_policy, replica_of
from tests.unit.test_direct import exchange, key_of, raw_request, read_answer

OBSERVATION = [0.1, -0.2, 0.3, -0.4]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path / "storage")
    publish(storage, random_policy(1))
    return storage


@asynccontextmanager
async def server_of(storage: Storage) -> AsyncIterator[tuple[PolicyReplica, uvicorn.Server, int, list[str]]]:
    """Start uvicorn as Serve does, around an application that notes which paths came to it."""
    replica = replica_of(storage)
    seen: list[str] = []

    async def serves_application(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    before = uvicorn.config.HTTP_PROTOCOLS["auto"]
    front.install(replica._direct)
    try:
        server = uvicorn.Server(uvicorn.Config(serves_application, port=0, lifespan="off", log_level="error", log_config=None))
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        yield replica, server, server.servers[0].sockets[0].getsockname()[1], seen
        server.should_exit = True
        await asyncio.wait_for(task, 10)
    finally:
        uvicorn.config.HTTP_PROTOCOLS["auto"] = before
        await replica._stop()


def run(storage: Storage, scenario: Callable[..., Awaitable[Any]]) -> Any:
    async def within() -> Any:
        async with asyncio.timeout(30), server_of(storage) as (replica, server, port, seen):
            return await scenario(replica, server, port, seen)

    return asyncio.run(within())


def test_our_requests_are_answered_by_the_lane_and_serves_own_pages_by_serve(storage: Storage) -> None:
    def blocking(port: int) -> tuple[int, Any, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        headers = {"Authorization": f"Bearer {key_of(storage)}"}
        connection.request("POST", "/v1/decide", json.dumps({"observation": OBSERVATION}), headers)
        response = connection.getresponse()
        answer = response.status, json.loads(response.read())
        other = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        other.request("GET", "/-/healthz")
        return *answer, other.getresponse().read()

    async def scenario(replica: PolicyReplica, server: Any, port: int, seen: list[str]) -> Any:
        return await asyncio.to_thread(blocking, port), list(seen)

    (status, document, health), seen = run(storage, scenario)
    assert status == 200 and [d.decision_id for d in logged(storage)] == [document["decision_id"]]
    assert health == b"ok" and seen == ["/-/healthz"], "no request of ours came to Serve's application"


def test_without_the_table_everything_goes_serves_usual_way(storage: Storage) -> None:
    """Negative control, and what a later uvicorn would do that does not look into its table any more."""

    async def scenario() -> list[str]:
        seen: list[str] = []

        async def application(scope: Any, receive: Any, send: Any) -> None:
            seen.append(scope["path"])
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"{}"})

        server = uvicorn.Server(uvicorn.Config(application, port=0, lifespan="off", log_level="error", log_config=None))
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        await exchange(port, raw_request(storage, {"observation": OBSERVATION}), num_answers=1)
        server.should_exit = True
        await asyncio.wait_for(task, 10)
        return seen

    assert asyncio.run(scenario()) == ["/v1/decide"]


@pytest.mark.parametrize("size", [1, 3, 6, 7])
def test_a_first_line_in_pieces_comes_to_the_right_reader(storage: Storage, size: int) -> None:
    requests = {
        b"GET /-/routes HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n": b"ok",
        b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n": b'{"status":"alive"}',
    }

    async def scenario(replica: PolicyReplica, server: Any, port: int, seen: list[str]) -> None:
        for request, expected in requests.items():
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for start in range(0, len(request), size):
                writer.write(request[start : start + size])
                await asyncio.sleep(0.001)
            assert expected in await reader.read()
            writer.close()

    run(storage, scenario)


def test_the_servers_end_answers_what_was_asked_and_closes_every_connection(storage: Storage) -> None:
    async def scenario(replica: PolicyReplica, server: Any, port: int, seen: list[str]) -> tuple[list[int], list[bytes]]:
        connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(5)]
        for _, writer in connections[:4]:
            writer.write(raw_request(storage, {"observation": OBSERVATION}))
        statuses = [(await read_answer(reader))[0] for reader, _ in connections[:4]]
        assert len(server.server_state.connections) == 5
        server.should_exit = True
        ends = [await asyncio.wait_for(reader.read(), 10) for reader, _ in connections]
        for _ in range(200):
            if not server.server_state.connections and not replica._direct.connections:
                break
            await asyncio.sleep(0.01)
        assert not server.server_state.connections and not replica._direct.connections
        return statuses, ends

    assert run(storage, scenario) == ([200] * 4, [b""] * 5)


# --- bounds ---


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    try:
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionResetError:
        return b""


def test_connections_that_say_nothing_count_and_are_closed(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was used stays open, as HAProxy needs it to; the lane's limit is 3 here, and one more is reserved."""
    for module, name, value in ((direct, "MAX_CONNECTIONS", 3), (front, "NUM_RESERVED", 1), (front, "REQUEST_TIMEOUT_S", 0.3)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(direct, "SWEEP_INTERVAL_S", 0.1)

    async def scenario(replica: PolicyReplica, server: Any, port: int, seen: list[str]) -> None:
        request = raw_request(storage, {"observation": OBSERVATION})
        used_reader, used = await asyncio.open_connection("127.0.0.1", port)
        used.write(request)
        assert (await read_answer(used_reader))[0] == 200
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        while len(replica._direct.connections) < 4:
            await asyncio.sleep(0.01)
        (refused,), closed = await exchange(port, b"", num_answers=1)
        assert refused[0] == 503 and refused[1]["retry-after"] == "1" and closed
        silent[0][1].write(request)
        assert (await read_answer(silent[0][0]))[0] == 503, "it may wait beyond the limit, and not be answered"
        silent[1][1].write(b"GET /-/healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert (await until_closed(silent[1][0])).endswith(b"ok"), "a full replica is no dead one"
        replica._direct.start_sweeping()
        assert await until_closed(silent[2][0]) == b""
        await asyncio.sleep(0.5)
        used.write(request)
        assert (await read_answer(used_reader))[0] == 200
        for _, writer in silent:
            writer.close()

    run(storage, scenario)


@pytest.mark.parametrize(
    ("first", "more"),
    [(b"GET /-/healthz HTTP/1.1\r\nx: ", b"y" * 5000), (b"GET /-/healthz HTTP/1.1\r\nhost: x\r\n\r\n" * 1000, b"")],
    ids=["headers without end", "requests without end"],
)
def test_what_is_asked_of_serves_own_pages_is_bounded(storage: Storage, first: bytes, more: bytes) -> None:
    async def scenario(replica: PolicyReplica, server: Any, port: int, seen: list[str]) -> tuple[bytes, list[str]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(first)
        for _ in range(7):  # the last one passes the limit: after it there is nothing that would break the connection
            writer.write(more)
            await asyncio.sleep(0.001)
        answer = await until_closed(reader)
        writer.close()
        return answer, seen

    answer, seen = run(storage, scenario)
    assert answer.startswith(b"HTTP/1.1 400") and b"the limit" in answer and seen == []


def test_a_request_for_serves_own_pages_that_never_ends_is_closed(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "REQUEST_TIMEOUT_S", 0.3)
    monkeypatch.setattr(direct, "SWEEP_INTERVAL_S", 0.1)

    async def scenario(replica: PolicyReplica, server: Any, port: int, seen: list[str]) -> bytes:
        replica._direct.start_sweeping()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /-/healthz HTTP/1.1\r\n")
        rest = await until_closed(reader)
        writer.close()
        return rest

    assert run(storage, scenario) == b""


# --- heads with a proxy's request id ---

IDS = "11111111-2222-3333-4444-555555555555", "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"


def test_heads_that_differ_in_the_proxys_request_id_are_known(storage: Storage) -> None:
    async def scenario(replica: PolicyReplica, server: Any, port: int, seen: list[str]) -> list[int]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        num_parsed = []
        for number in range(6):
            observation = [number / 10, 0, 0, 0]
            extra = f"X-Request-ID: {IDS[number % 2]}\r\nvia: proxy\r\n"
            writer.write(raw_request(storage, {"observation": [round(o, 1) for o in observation]}, extra=extra))
            assert (await read_answer(reader))[0] == 200
            [connection] = replica._direct.connections
            num_parsed.append(connection._num_completed)
        writer.close()
        return num_parsed

    lengths = {len(json.dumps({"observation": [n / 10, 0, 0, 0]})) for n in range(6)}
    assert len(lengths) == 1, "else the head says another content-length"
    assert run(storage, scenario) == [1] * 6, "parsed once"
    assert [d.observation[0] for d in logged(storage)] == [n / 10 for n in range(6)]


def test_a_line_end_behind_a_request_is_no_part_of_its_head() -> None:
    """Else the body of the next one would be taken from two bytes further on than its head says."""
    head, body = b"POST /v1/decide HTTP/1.1\r\ncontent-length: 4\r\n\r\n", b"\r\n\r\n"
    received = Received("POST", "/v1/decide", [(b"content-length", b"4")], body, True, 0.0, None, None)
    assert learn_head(head + body, received) is not None
    assert learn_head(head + body + b"\r\n", received) is None


def test_nothing_but_a_request_id_fits_into_the_hole(storage: Storage) -> None:
    def request(request_id: str, body: bytes = b'{"observation":1}', extra: str = "") -> bytes:
        head = f"POST /v1/decide HTTP/1.1\r\nhost: x\r\nx-request-id: {request_id}\r\n{extra}content-length: {len(body)}\r\n\r\n"
        return head.encode() + body

    first = request(IDS[0])
    headers = [(b"host", b"x"), (b"x-request-id", IDS[0].encode()), (b"content-length", b"17")]
    known = learn_head(first, Received("POST", "/v1/decide", headers, b'{"observation":1}', True, 0.0, None, None))
    assert known is not None
    assert has_head(request(IDS[1]), known) and has_head(first, known)
    smuggled = "1\r\nexpect: 100-continue\r\nx: 22222222"
    assert len(smuggled) == len(IDS[0])
    assert not has_head(request(smuggled), known)
    assert not has_head(request(IDS[1][:-1] + "\n"), known)
    assert not has_head(request(IDS[1], body=b'{"observation":22}'), known)
    assert not has_head(request(IDS[1][:-1]), known)
    without = learn_head(first.replace(b"x-request-id", b"x-other-name"), known.received._replace(body=b'{"observation":1}'))
    assert without is not None and not has_head(request(IDS[1]), without)
