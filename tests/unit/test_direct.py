"""The direct lane: real sockets and real HTTP clients get the same answers as through Serve, and misuse is bounded."""

import asyncio
import gzip
import http.client
import json
import socket
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from policies.storage import Storage, open_storage
from serve_app import local_decisions
from serve_app.asgi import Request, Response
from serve_app.connection import MAX_PIPELINED, PARSE_BYTES
from serve_app.decision_ids import DecisionIds
from serve_app.http_api import Route
from serve_app.replica import PolicyReplica
from tests.serving_helpers import NAME, call, logged, publish, random_policy, replica_of

OBSERVATION = [0.1, -0.2, 0.3, -0.4]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path / "storage")
    publish(storage, random_policy(1))
    return storage


@asynccontextmanager
async def lane_of(storage: Storage, **config: object) -> AsyncIterator[tuple[PolicyReplica, int]]:
    replica = replica_of(storage, **config)
    port = await replica._direct.start("127.0.0.1")
    try:
        yield replica, port
    finally:
        await replica._stop()


def run(storage: Storage, scenario: Callable[[PolicyReplica, int], Awaitable[Any]], **config: object) -> Any:
    async def within() -> Any:
        async with lane_of(storage, **config) as (replica, port), asyncio.timeout(30):
            return await scenario(replica, port)

    return asyncio.run(within())


def key_of(storage: Storage) -> str:
    return storage.api_key_file.read_text().strip()


def raw_request(storage: Storage, body: dict[str, Any] | bytes, *, path: str = "/v1/decide", extra: str = "") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key_of(storage)}\r\n{extra}"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


async def exchange(port: int, data: bytes, *, num_answers: int) -> tuple[list[tuple[int, dict[str, str], Any]], bool]:
    """Send bytes on one connection; return the answers (status, headers, document) and whether the other side closed it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    answers = [await read_answer(reader) for _ in range(num_answers)]
    try:
        closed = await asyncio.wait_for(reader.read(1), 0.2) == b""
    except TimeoutError:
        closed = False
    writer.close()
    return answers, closed


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], Any]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.strip().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return int(first.split()[1]), headers, json.loads(body) if body else None


def test_both_ways_give_the_same_decision_and_log_it_once(storage: Storage) -> None:
    body = {"observation": OBSERVATION, "request_id": "r1", "unit_id": "u1"}

    async def scenario(replica: PolicyReplica, port: int) -> tuple[Any, Any]:
        through_serve = await call(replica.api, "POST", "/v1/decide", json.dumps(body).encode(), key=key_of(storage))
        (direct_answer,), _ = await exchange(port, raw_request(storage, body), num_answers=1)
        return through_serve.json(), direct_answer

    through_serve, (status, _, document) = run(storage, scenario)
    assert status == 200 and document == through_serve
    [decision] = logged(storage)
    assert (decision.decision_id, decision.propensity) == (document["decision_id"], document["propensity"])


def test_every_path_of_the_endpoint_is_there_for_a_usual_client(storage: Storage) -> None:
    async def scenario(replica: PolicyReplica, port: int) -> None:
        replica._endpoint = f"http://127.0.0.1:{port}"
        async with aiohttp.ClientSession(
            f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {key_of(storage)}"}
        ) as http:
            decision = await (await http.post("/v1/decide", json={"observation": OBSERVATION})).json()
            feedback = await http.post("/v1/feedback", json={"decision_id": decision["decision_id"], "reward": 1.0})
            assert feedback.status == 200
            assert (await (await http.get("/v1/endpoints")).json()) == {"endpoints": [f"http://127.0.0.1:{port}"]}
            assert (await (await http.get("/v1/status")).json())["champion"] == 1
            for path, status in (
                ("/healthz", 200),
                ("/readyz", 200),
                ("/dashboard", 200),
                ("/nowhere", 404),
                ("/v1/decide", 405),
            ):
                assert (await http.get(path)).status == status
            chunked = await http.post("/v1/decide", data=_pieces(json.dumps({"observation": OBSERVATION}).encode()))
            assert chunked.status == 200
            assert (await http.head("/healthz")).status == 405
        assert replica._counters.responses == {200: 5, 405: 1}  # those of /v1

    run(storage, scenario)
    assert len(logged(storage)) == 2


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    for index in range(0, len(data), 7):
        yield data[index : index + 7]


def test_the_standard_librarys_client_keeps_its_connection(storage: Storage) -> None:
    async def scenario(replica: PolicyReplica, port: int) -> list[int]:
        def talk() -> list[int]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            statuses, sockets = [], set()
            for _ in range(3):
                connection.request("POST", "/v1/decide", json.dumps({"observation": OBSERVATION}), _auth(storage))
                response = connection.getresponse()
                response.read()
                statuses.append(response.status)
                sockets.add(connection.sock)
            connection.close()
            assert len(sockets) == 1
            return statuses

        return await asyncio.to_thread(talk)

    assert run(storage, scenario) == [200] * 3


def _auth(storage: Storage) -> dict[str, str]:
    return {"Authorization": f"Bearer {key_of(storage)}"}


def test_pipelined_requests_are_answered_in_their_order(storage: Storage) -> None:
    """Good ones, bad ones and other paths in one write: the answer to each is in its place."""
    bodies = [{"observation": OBSERVATION, "request_id": f"r{n}"} if n % 3 else {"wrong": n} for n in range(200)]
    data = b"".join(raw_request(storage, body) for body in bodies) + b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
    answers, closed = run(storage, lambda replica, port: exchange(port, data, num_answers=201))
    assert [status for status, _, _ in answers] == [200 if n % 3 else 422 for n in range(200)] + [200] and not closed
    assert [document["decision_id"].split(".")[0] for status, _, document in answers[:200] if status == 200] == [
        f"r{n}" for n in range(200) if n % 3
    ]
    assert answers[-1][2] == {"status": "alive"}
    assert len(logged(storage)) == sum(n % 3 > 0 for n in range(200))


@pytest.mark.parametrize("parse_bytes", [PARSE_BYTES, 1 << 20])
def test_one_packet_of_requests_is_taken_in_as_they_are_answered(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, parse_bytes: int
) -> None:
    """5,000 requests fit into one read. Negative control: where all that came is parsed, all of them wait in memory."""
    bounded = MAX_PIPELINED + PARSE_BYTES // len(b"GET / HTTP/1.1\r\n\r\n") + 1
    monkeypatch.setattr("serve_app.connection.PARSE_BYTES", parse_bytes)
    request, num_requests, num_waiting = b"GET /page HTTP/1.1\r\n\r\n", 5000, []

    async def scenario(replica: PolicyReplica, port: int) -> None:
        async def show(_: Any, key: Any) -> Response:
            (connection,) = replica._direct.connections
            num_waiting.append(len(connection._waiting))
            return Response(200, b"1", headers=[(b"x-number", b"%d" % len(num_waiting))])

        replica.api.routes["/page"] = Route("GET", (), show)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(num_requests * request)
        for number in range(num_requests):
            status, headers, _ = await read_answer(reader)
            assert (status, headers["x-number"]) == (200, str(number + 1))
        writer.close()

    run(storage, scenario)
    assert (max(num_waiting) > bounded) == (parse_bytes == 1 << 20)


def test_what_arrives_together_is_one_batch(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    async def scenario(replica: PolicyReplica, port: int) -> None:
        handle = replica._ingress.batcher._handle
        replica._ingress.batcher._handle = lambda asks, delivers: (sizes.append(len(asks)), handle(asks, delivers))[1]
        connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(16)]
        for _, writer in connections:
            writer.write(raw_request(storage, {"observation": OBSERVATION}))
        for reader, writer in connections:
            assert (await read_answer(reader))[0] == 200
            writer.close()

    run(storage, scenario)
    assert sum(sizes) == 16 and len(sizes) < 8


REFUSED = {
    "no key": (b"POST /v1/decide HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n", 401),
    "too large, as it says": (b"POST /v1/decide HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\n\r\n", 413),
    "not HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "a length that is no number": (b"POST /v1/decide HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", 400),
    "two lengths": (b"POST /v1/decide HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab", 400),
    "length and chunks": (
        b"POST /v1/decide HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    "too many headers": (b"GET /healthz HTTP/1.1\r\n" + b"x: " + b"y" * 40_000 + b"\r\n\r\n", 431),
    "a path without end": (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n", 431),
    "an upgrade, which is ignored": (b"GET / HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n", 404),
}


@pytest.mark.parametrize(("data", "status"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_request_is_refused_and_the_connection_closed(storage: Storage, data: bytes, status: int) -> None:
    async def scenario(replica: PolicyReplica, port: int) -> Any:
        behind = await exchange(port, b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n" + data, num_answers=2)
        return await exchange(port, data, num_answers=1), behind

    ((alone,), closed), ((before, after), closed_too) = run(storage, scenario)
    assert alone[0] == status and alone[2]["error"]["status"] == status and alone[1]["connection"] == "close"
    assert (before[0], after[0]) == (200, status)  # behind a good request, it is answered in its place
    assert closed and closed_too


def test_a_header_that_never_ends_is_refused_before_it_fills_memory(storage: Storage) -> None:
    """The parser tells of a header when it is complete: what it has collected until then is bounded too."""

    async def scenario(replica: PolicyReplica, port: int) -> tuple[int, int]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /healthz HTTP/1.1\r\nx: ")
        num_sent = 0
        while not reader.at_eof() and num_sent < 64 << 20:
            writer.write(b"y" * 65536)
            num_sent += 65536
            await asyncio.sleep(0)
            if reader._buffer:
                break
        return (await read_answer(reader))[0], num_sent

    status, num_sent = run(storage, scenario)
    assert status == 431 and num_sent < 16 << 20


def test_a_head_in_two_pieces_before_a_large_body_is_no_large_head(storage: Storage) -> None:
    body = json.dumps({"observation": OBSERVATION, "unit_id": "u"}).encode()
    body += b" " * 200_000

    async def scenario(replica: PolicyReplica, port: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        request = raw_request(storage, body)
        writer.write(request[:10])
        await asyncio.sleep(0.05)
        writer.write(request[10:])
        status = (await read_answer(reader))[0]
        writer.close()
        return status

    assert run(storage, scenario) == 200


@pytest.mark.parametrize(
    "head", ["POST /v1/decide?x=1", "POST //v1/decide", "GET /healthz", "PUT /v1/decide", "POST http://x/v1/decide"]
)
def test_no_body_is_read_without_the_key(storage: Storage, head: str) -> None:
    data = json.dumps({"observation": OBSERVATION}).encode()
    request = f"{head} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data
    ((answer,), closed) = run(storage, lambda replica, port: exchange(port, request, num_answers=1))
    assert answer[0] == 401 and closed and logged(storage) == []


@pytest.mark.parametrize("path", ["/v1/decide", "/v1/feedback"])
@pytest.mark.parametrize("revoked", [True, False])
def test_a_key_that_is_revoked_while_a_body_is_on_its_way_gets_nothing_any_more(
    storage: Storage, path: str, revoked: bool
) -> None:
    """Both doors; a key that stays in force is the control."""
    secrets = [storage.api_keys.create(name, ("decide", "feedback"), now=time.time())[1] for name in ("first", "second")]
    decision_id = DecisionIds.of(storage).name("r")
    body = {"observation": OBSERVATION} if path == "/v1/decide" else {"decision_id": decision_id, "reward": 1.0}
    data = json.dumps(body).encode()

    async def scenario(replica: PolicyReplica, port: int) -> list[int]:
        replica._keys.refresh()

        def change(name: str) -> None:
            if revoked:
                storage.api_keys.revoke(name, now=time.time())
            replica._keys.refresh()

        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {secrets[0]}\r\ncontent-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data[:5])
        while not replica._direct.connections or next(iter(replica._direct.connections))._key is None:
            await asyncio.sleep(0.01)
        change("first")
        writer.write(data[5:])
        directly, _, _ = await read_answer(reader)
        writer.close()

        pieces = iter([data[:5], data[5:]])

        async def receive() -> dict[str, Any]:
            piece = next(pieces)
            if piece != data[:5]:
                change("second")
            return {"type": "http.request", "body": piece, "more_body": piece == data[:5]}

        headers = [(b"authorization", b"Bearer " + secrets[1].encode())]
        request = Request({"type": "http", "path": path, "method": "POST", "headers": headers}, receive)
        return [directly, (await replica.api.respond(path, "POST", request)).status]

    assert run(storage, scenario) == ([401, 401] if revoked else [200, 200])
    assert len(logged(storage)) == (0 if revoked or path != "/v1/decide" else 2)


def test_requests_that_wait_behind_unread_answers_are_not_answered_once_their_key_is_revoked(storage: Storage) -> None:
    _, secret = storage.api_keys.create("shop", ("decide",), now=time.time())
    raw = raw_request(storage, {"observation": OBSERVATION}).replace(key_of(storage).encode(), secret.encode())

    async def scenario(replica: PolicyReplica, port: int) -> list[int]:
        replica._keys.refresh()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(raw)
        statuses = [(await read_answer(reader))[0]]
        [connection] = replica._direct.connections
        connection._is_unread = True  # it does not read, and had sent this before that was noticed
        writer.write(raw)
        while not connection._waiting:
            await asyncio.sleep(0.01)
        storage.api_keys.revoke("shop", now=time.time())
        replica._keys.refresh()
        connection.resume_writing()
        statuses.append((await read_answer(reader))[0])
        writer.close()
        return statuses

    assert run(storage, scenario) == [200, 401]
    assert len(logged(storage)) == 1


def test_an_answer_that_nobody_reads_does_not_keep_its_connection(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("connection.IDLE_TIMEOUT_S", "connection.CLOSE_TIMEOUT_S", "direct.SWEEP_INTERVAL_S"):
        monkeypatch.setattr(f"serve_app.{name}", 0.1)

    async def scenario(replica: PolicyReplica, port: int) -> None:
        replica.api.routes["/large"] = Route("GET", (), _large)
        unread = socket.create_connection(("127.0.0.1", port))
        unread.sendall(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n")
        deadline = asyncio.get_running_loop().time() + 10
        await asyncio.sleep(0.05)
        assert len(replica._direct.connections) == 1
        while replica._direct.connections:
            assert asyncio.get_running_loop().time() < deadline, "the connection is still there"
            await asyncio.sleep(0.05)
        unread.close()

    run(storage, scenario)


async def _large(request: Any, key: Any) -> Response:
    return Response(200, bytes(32 << 20))


def test_an_answer_that_cannot_be_written_ends_the_connection(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(answer: object) -> bytes:
        raise TypeError("no JSON")

    monkeypatch.setattr("serve_app.connection.encode", broken)

    async def scenario(replica: PolicyReplica, port: int) -> bytes:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(raw_request(storage, {"observation": OBSERVATION}))
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""

    assert run(storage, scenario) == b""


def test_a_body_that_grows_over_the_limit_is_refused(storage: Storage) -> None:
    head = f"POST /v1/decide HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key_of(storage)}\r\ntransfer-encoding: chunked\r\n\r\n"
    data = head.encode() + b"".join(b"400\r\n" + b"x" * 0x400 + b"\r\n" for _ in range(3))
    ((answer,), closed) = run(storage, lambda replica, port: exchange(port, data, num_answers=1), max_body_bytes=2048)
    assert answer[0] == 413 and closed


@pytest.mark.parametrize("path", ["/v1/decide", "/v1/feedback", f"/v2/models/{NAME}/infer"])
def test_a_compressed_body_is_refused_and_never_unpacked(storage: Storage, path: str) -> None:
    bomb = gzip.compress(b" " * 50_000_000)  # 50 kB that say 50 MB
    assert len(bomb) < 100_000

    async def scenario(replica: PolicyReplica, port: int) -> tuple[int, int, int]:
        request = raw_request(storage, bomb, path=path, extra="content-encoding: gzip\r\n")
        tracemalloc.start()
        ((over_the_lane, _, _),), closed = await exchange(port, request, num_answers=1)
        through_serve = await call(
            replica.api, "POST", path, bomb, key=key_of(storage), extra_headers=[(b"content-encoding", b"gzip")]
        )
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert closed
        return over_the_lane, through_serve.status, peak

    lane, serve, peak = run(storage, scenario)
    assert (lane, serve) == (415, 415) and peak < 5_000_000


def chunked(storage: Storage, trailers: bytes) -> bytes:
    body = json.dumps({"observation": OBSERVATION}).encode()
    head = f"POST /v1/decide HTTP/1.1\r\nauthorization: Bearer {key_of(storage)}\r\ntransfer-encoding: chunked\r\n\r\n"
    return head.encode() + b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, trailers)


def test_trailers_are_no_headers_and_bounded_like_them(storage: Storage) -> None:
    """As a header this arm, which the plan has not, would be refused with 422: that is the negative control."""
    arm = b"x-trimtab-arm: canary\r\n"
    as_header = raw_request(storage, {"observation": OBSERVATION}, extra=arm.decode())

    async def scenario(replica: PolicyReplica, port: int) -> list[int]:
        requests = [as_header, chunked(storage, arm), chunked(storage, b"x: " + b"y" * 40_000 + b"\r\n")]
        found = [await exchange(port, request, num_answers=1) for request in requests]
        return [answers[0][0] for answers, _ in found]

    assert run(storage, scenario) == [422, 200, 431]


def test_old_clients_and_those_that_ask_first_are_served(storage: Storage) -> None:
    old = raw_request(storage, {"observation": OBSERVATION}).replace(b"HTTP/1.1", b"HTTP/1.0")
    ((answer,), closed) = run(storage, lambda replica, port: exchange(port, old, num_answers=1))
    assert answer[0] == 200 and closed
    asking = raw_request(storage, {"observation": OBSERVATION}, extra="expect: 100-continue\r\n")
    ((go_on, answer), closed) = run(storage, lambda replica, port: exchange(port, asking, num_answers=2))
    assert go_on[0] == 100 and answer[0] == 200 and not closed


def test_a_request_that_never_ends_and_a_silent_connection_are_closed(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.connection.REQUEST_TIMEOUT_S", 0.3)
    monkeypatch.setattr("serve_app.connection.IDLE_TIMEOUT_S", 0.3)
    monkeypatch.setattr("serve_app.direct.SWEEP_INTERVAL_S", 0.1)

    async def scenario(replica: PolicyReplica, port: int) -> tuple[Any, bytes]:
        slow, silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        slow[1].write(raw_request(storage, {"observation": OBSERVATION})[:-1])
        answer, rest = await read_answer(slow[0]), await silent[0].read()
        for _, writer in (slow, silent):
            writer.close()
        return answer, rest

    (status, _, _), rest = run(storage, scenario)
    assert status == 408 and rest == b""


def test_a_client_that_does_not_read_stops_being_read(storage: Storage) -> None:
    """Requests without end, answers unread: what the replica holds for it is bounded, and others are served meanwhile."""

    async def scenario(replica: PolicyReplica, port: int) -> None:
        greedy = socket.create_connection(("127.0.0.1", port))
        greedy.setblocking(False)
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        requests, num_refused_in_a_row = raw_request(storage, {"observation": OBSERVATION}) * 100, 0
        unsent = requests
        while num_refused_in_a_row < 50:  # half a second in which nothing was read from it
            try:
                unsent = unsent[greedy.send(unsent) :] or requests
                num_refused_in_a_row = 0
            except BlockingIOError:
                num_refused_in_a_row += 1
            await asyncio.sleep(0.01)
        (connection,) = replica._direct.connections
        assert connection._is_paused and connection._transport.get_write_buffer_size() < 1 << 20
        (answer,), _ = await exchange(port, raw_request(storage, {"observation": OBSERVATION}), num_answers=1)
        assert answer[0] == 200
        greedy.close()

    run(storage, scenario)


@pytest.mark.parametrize("num_bytes", [50_000, 900_000])  # in one piece, in several
def test_a_connection_that_is_kept_does_not_keep_the_last_body(storage: Storage, num_bytes: int) -> None:
    async def scenario(replica: PolicyReplica, port: int) -> list[bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(raw_request(storage, json.dumps({"observation": OBSERVATION}).encode() + b" " * num_bytes))
        assert (await read_answer(reader))[0] == 200
        (connection,) = replica._direct.connections
        held = [received for received in (connection._last, connection._known and connection._known.received) if received]
        writer.close()
        return [received.body for received in held]

    assert not any(run(storage, scenario))


def test_answers_that_nobody_reads_are_not_made_without_end(storage: Storage) -> None:
    """A page is large and needs no key: what one packet of requests for it makes a replica hold is about one page."""
    page, num_requests = bytes(256 << 10), 200

    async def show(request: Any, key: Any) -> Response:
        return Response(200, page)

    request = b"GET /dashboard/page HTTP/1.1\r\n\r\n"

    async def scenario(replica: PolicyReplica, port: int) -> tuple[int, int]:
        replica.api.routes["/dashboard/page"] = Route("GET", (), show)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
        writer.write(num_requests * request)
        await asyncio.sleep(0.5)
        (connection,) = replica._direct.connections
        num_held_bytes = connection._transport.get_write_buffer_size()
        num_read = 0
        while num_read < num_requests:  # once it reads, every request has its answer
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]))
            num_read += 1
        writer.close()
        return num_held_bytes, num_read

    num_held_bytes, num_read = run(storage, scenario)
    assert num_held_bytes < 2 * len(page) and num_read == num_requests


def test_bundle_files_that_nobody_reads_are_not_collected_in_memory(tmp_path: Path) -> None:
    """Four wait for their clients; the next is asked to come again, until one was read or its client went away."""
    storage = open_storage(tmp_path / "storage")
    publish(storage, random_policy(1, hidden=(2000, 2000)))  # 16 MB: more than sockets take in

    async def scenario(replica: PolicyReplica, port: int) -> None:
        digest = replica._variants.snapshot.champion.digest
        head = f"GET /v1/bundles/{digest}/policy.safetensors HTTP/1.1\r\nauthorization: Bearer {key_of(storage)}\r\n\r\n"

        def connect() -> socket.socket:
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            client.connect(("127.0.0.1", port))
            client.sendall(head.encode())
            return client

        clients = [await asyncio.to_thread(connect) for _ in range(local_decisions.MAX_FILES)]
        while sum(connection._is_unread for connection in replica._direct.connections) < len(clients):
            await asyncio.sleep(0.01)
        ((status, headers, document),), _ = await exchange(port, head.encode(), num_answers=1)
        assert status == 429 and headers["retry-after"] == "1" and "bundle files" in document["error"]["message"]
        assert (await exchange(port, raw_request(storage, {"observation": OBSERVATION}), num_answers=1))[0][0][0] == 200
        clients[0].close()
        await files_are(replica, 3)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode())
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200")
        await reader.readexactly(int(answer.partition(b"content-length: ")[2].split(b"\r\n")[0]))
        await files_are(replica, 3)
        for client in (*clients, writer):
            client.close()
        await files_are(replica, 0)

    run(storage, scenario)


async def files_are(replica: PolicyReplica, number: int) -> None:
    async with asyncio.timeout(10):
        while replica.api._local._num_files != number:
            await asyncio.sleep(0.01)


def test_connections_beyond_the_limit_are_told_so(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.direct.MAX_CONNECTIONS", 1)

    async def scenario(replica: PolicyReplica, port: int) -> Any:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(0.05)
        found = await exchange(port, b"", num_answers=1)
        writer.close()
        return found

    ((status, headers, document),), closed = run(storage, scenario)
    assert status == 503 and closed and headers["retry-after"] == "1" and "the limit" in document["error"]["message"]


def test_stopping_answers_what_was_asked_and_takes_nothing_more(storage: Storage) -> None:
    async def scenario(replica: PolicyReplica, port: int) -> Any:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        idle_reader, idle_writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(raw_request(storage, {"observation": OBSERVATION}))
        while not any(connection._is_answering for connection in replica._direct.connections):
            await asyncio.sleep(0)
        await replica._direct.stop()
        answer, rest, silence = await read_answer(reader), await reader.read(), await idle_reader.read()
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", port)
        for used in (writer, idle_writer):
            used.close()
        return answer, rest, silence

    (status, headers, _), rest, silence = run(storage, scenario)
    assert status == 200 and headers["connection"] == "close" and rest == silence == b""


def test_a_refusal_for_a_full_queue_is_held_and_the_connection_goes_on(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    hold_s = 0.123
    held: list[float] = []

    async def scenario(replica: PolicyReplica, port: int) -> None:
        loop = asyncio.get_running_loop()
        call_later = loop.call_later

        def noted(delay_s: float, callback: Callable[..., None], *arguments: Any) -> asyncio.TimerHandle:
            held.extend([delay_s] if delay_s == hold_s else [])
            return call_later(delay_s, callback, *arguments)

        monkeypatch.setattr(loop, "call_later", noted)
        full = raw_request(storage, {"observation": OBSERVATION})
        answers = await asyncio.gather(*(exchange(port, full, num_answers=1) for _ in range(6)))
        refused = [answer for [answer], _ in answers if answer[0] == 429]
        assert refused and len(held) == len(refused) < 6, "some were decided, and only refusals were held"
        assert {headers["retry-after"] for _, headers, _ in refused} == {"1"} and not any(closed for _, closed in answers)
        [(status, _, _)], _ = await exchange(port, full, num_answers=1)
        assert status == 200 and len(held) == len(refused)

    monkeypatch.setattr("serve_app.connection.HOLD_REFUSAL_S", hold_s)
    run(storage, scenario, max_queue=1)
