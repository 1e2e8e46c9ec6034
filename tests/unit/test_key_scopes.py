"""Does every route of the endpoint, on both ways to it, open for exactly the keys that were made for it?"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from policies.api_keys import SCOPES
from policies.storage import Storage, open_storage
from serve_app.app import _owner_key, _readiness
from serve_app.replica import PolicyReplica
from tests.serving_helpers import NAME, Reply, call, publish, random_policy, replica_of

GOOD = b'{"observation":[0,0,0,0]}'
OPENED_BY = {
    "/v1/decide": {"decide"},
    "/v1/feedback": {"feedback"},
    "/v1/status": {"read"},
    "/metrics": {"read"},
    "/v1/endpoints": {"decide", "read"},
    "/openapi.json": {"decide", "read"},
    "/v1/plan": {"decide"},
    "/v1/decisions": {"decide"},
    f"/v1/bundles/{'0' * 64}/manifest.json": {"decide"},
    "/v2": {"decide", "read"},
    f"/v2/models/{NAME}": {"decide", "read"},
    f"/v2/models/{NAME}/infer": {"decide"},
    "/v1/decisions/r.0123456789ab/override": {"operate"},
}
OPEN_TO_ALL = {"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/docs", "/dashboard", "/dashboard/"}
POSTED = ("/infer", "/override")  # of those paths that hold a name


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path / "storage")
    publish(storage, random_policy(1))
    return storage


def new_key(storage: Storage, *scopes: str, name: str = "shop", **limits: float) -> str:
    return storage.api_keys.create(name, scopes, now=1000.0, **limits)[1]


def send(replica: PolicyReplica, path: str, key: str | None, body: bytes | None = None) -> Reply:
    method = "POST" if path.endswith(POSTED) else replica.api.route(path, "GET").method
    return asyncio.run(call(replica.api, method, path, _body(method, body), key=key))


def _body(method: str, body: bytes | None) -> bytes:
    return (GOOD if body is None else body) if method == "POST" else b""


# --- routes and scopes ---


def test_each_route_opens_for_its_scope_and_for_no_other(storage: Storage) -> None:
    keys = {scope: new_key(storage, scope, name=scope) for scope in SCOPES}
    replica = replica_of(storage)
    refused = set()
    for path, opened_by in OPENED_BY.items():
        for scope, key in keys.items():
            reply = send(replica, path, key)
            if reply.status != 403:
                assert reply.status in (200, 400, 404, 422), "the body is another one's, but it was read"
                continue
            refused.add((path, scope))
            assert f"key '{scope}' has the scope {scope}, this needs " in reply.error
            assert all(needed in reply.error for needed in opened_by)
    assert refused == {(path, scope) for path, opened_by in OPENED_BY.items() for scope in SCOPES if scope not in opened_by}


def test_nothing_but_the_probes_and_the_dashboards_files_opens_without_a_key(storage: Storage) -> None:
    """Whoever adds a route has to say here for whom it opens."""
    replica = replica_of(storage)
    files = {path for path in replica.api.routes if path.startswith("/dashboard/")}
    with_names = {path for path in OPENED_BY if "/models/" in path or "/decisions/" in path or "/bundles/" in path}
    assert set(replica.api.routes) == set(OPENED_BY) - with_names | OPEN_TO_ALL | files
    for path in {*replica.api.routes, *with_names}:
        for key in (None, "tt-wrong"):
            assert send(replica, path, key).status == (401 if path in OPENED_BY else 200), path


def test_a_key_of_every_scope_opens_everything(storage: Storage) -> None:
    """The control of the two above: the same requests, with the owner's key."""
    replica, owner = replica_of(storage), storage.api_keys.owner_key()
    decision = send(replica, "/v1/decide", owner).json()
    feedback = json.dumps({"decision_id": decision["decision_id"], "reward": 1}).encode()
    assert send(replica, "/v1/feedback", owner, feedback).json() == {"accepted": 1}
    assert send(replica, "/v1/status", owner).json()["champion"] == 1
    assert send(replica, "/v1/endpoints", owner).json() == {"endpoints": []}


def test_why_a_replica_is_not_ready_is_told_only_to_who_may_read(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "empty")
    may, may_not = new_key(storage, "read", name="watcher"), new_key(storage, "decide")
    replica = replica_of(storage)
    for key in (None, "tt-wrong", may_not):
        reply = send(replica, "/readyz", key)
        assert (reply.status, reply.json()) == (503, {"status": "not ready"})
    for key in (may, storage.api_keys.owner_key()):
        assert "publish" in send(replica, "/readyz", key).json()["reason"]


def test_a_replica_that_cannot_read_the_keys_is_not_ready_and_sends_clients_elsewhere(storage: Storage) -> None:
    owner, good = storage.api_keys.owner_key(), storage.api_keys.path.read_bytes()
    storage.api_keys.path.write_bytes(b"{")
    replica = replica_of(storage)
    assert send(replica, "/readyz", None).status == 503 and send(replica, "/healthz", None).status == 200
    reply = send(replica, "/v1/decide", owner)
    assert reply.status == 503 and reply.headers["retry-after"] == "1"
    storage.api_keys.path.write_bytes(good)
    replica._keys.refresh()
    assert send(replica, "/readyz", None).status == 200 and send(replica, "/v1/decide", owner).status == 200


# --- changes while it runs ---


def test_the_replica_looks_for_changes_of_the_keys_by_itself(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.keys.POLL_INTERVAL_S", 0.01)
    replica, key = replica_of(storage), new_key(storage, "decide")

    async def run() -> tuple[int, int]:
        statuses = []
        follow = asyncio.create_task(replica._keys.follow())
        async with asyncio.timeout(30):
            for change in (lambda: None, lambda: storage.api_keys.revoke("shop", now=2000.0)):
                change()
                before = replica._keys._seen
                while replica._keys._seen == before:
                    await asyncio.sleep(0.01)
                statuses.append((await call(replica.api, "POST", "/v1/decide", GOOD, key=key)).status)
        follow.cancel()
        return tuple(statuses)

    assert asyncio.run(run()) == (200, 401)


@pytest.mark.parametrize("overlap_s", [60.0, 0.0])
def test_no_decision_fails_while_its_key_is_rotated(storage: Storage, overlap_s: float) -> None:
    """The client decides without a pause, and gets each new key late. An overlap of 0 is the negative control."""
    keys, statuses = [new_key(storage, "decide")], []
    replica = replica_of(storage)

    async def decide_all_the_time() -> None:
        while True:
            statuses.append((await call(replica.api, "POST", "/v1/decide", GOOD, key=keys[-1])).status)
            await asyncio.sleep(0)

    async def run() -> None:
        client = asyncio.create_task(decide_all_the_time())
        for _ in range(5):
            await asyncio.sleep(0.02)
            now = replica._keys._clock()
            _, key = await asyncio.to_thread(storage.api_keys.rotate, "shop", now=now, overlap_s=overlap_s)
            await asyncio.to_thread(replica._keys.refresh)
            await asyncio.sleep(0.02)
            keys.append(key)
        client.cancel()

    asyncio.run(run())
    assert len(statuses) > 20 and set(statuses) == ({200} if overlap_s else {200, 401})


# --- limits ---


def test_a_key_over_its_rate_is_told_when_to_come_back_and_others_are_not_held_up(storage: Storage) -> None:
    slow, owner = new_key(storage, "decide", requests_per_s=0.001), storage.api_keys.owner_key()
    replica = replica_of(storage)
    replies = [send(replica, "/v1/decide", slow) for _ in range(3)]
    assert [reply.status for reply in replies] == [200, 429, 429]
    assert 990 < int(replies[1].headers["retry-after"]) <= 1000, "one token per 1,000 s, minus the moments since the first"
    assert send(replica, "/v1/decide", owner).status == 200


@pytest.mark.parametrize(("max_concurrent", "expected"), [(2, [200, 200, 429, 429, 429]), (None, [200] * 5)])
def test_no_more_than_the_limit_are_answered_at_once(storage: Storage, max_concurrent: int | None, expected: list[int]) -> None:
    key = new_key(storage, "decide", max_concurrent=max_concurrent)
    replica = replica_of(storage)

    async def five_at_once() -> list[int]:
        replies = await asyncio.gather(*[call(replica.api, "POST", "/v1/decide", GOOD, key=key) for _ in range(5)])
        return sorted(reply.status for reply in replies)

    for _ in range(2):  # every place was given back, also those of requests that were refused
        assert asyncio.run(five_at_once()) == expected


# --- the direct lane ---


def over_the_lane(storage: Storage, scenario: Callable[[PolicyReplica, int], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        replica = replica_of(storage)
        port = await replica._direct.start("127.0.0.1")
        try:
            async with asyncio.timeout(30):
                return await scenario(replica, port)
        finally:
            await replica._stop()

    return asyncio.run(run())


def test_the_command_line_is_told_why_its_endpoint_does_not_become_ready(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "empty")

    async def scenario(replica: PolicyReplica, port: int) -> list[tuple[int | None, str]]:
        url = f"http://127.0.0.1:{port}"
        return [await asyncio.to_thread(_readiness, url, key) for key in (_owner_key(str(storage.root)), None)]

    told, not_told = over_the_lane(storage, scenario)
    assert told[0] == not_told[0] == 503
    assert "publish one" in told[1] and "publish" not in not_told[1] and "not ready" in not_told[1]
    storage.api_key_file.unlink()
    assert _owner_key(str(storage.root)) is None


async def post_over(port: int, key: str, *, path: str = "/v1/decide") -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-length: {len(GOOD)}\r\n\r\n"
    writer.write(head.encode() + GOOD)
    status = int((await reader.readuntil(b"\r\n")).split()[1])
    writer.close()
    return status


def test_the_direct_lane_decides_for_the_same_keys(storage: Storage) -> None:
    keys = {scope: new_key(storage, scope, name=scope) for scope in SCOPES} | {"none": "tt-wrong"}

    async def scenario(replica: PolicyReplica, port: int) -> dict[str, int]:
        statuses = {scope: await post_over(port, key) for scope, key in keys.items()}
        storage.api_keys.revoke("decide", now=2000.0)
        replica._keys.refresh()
        return statuses | {"revoked": await post_over(port, keys["decide"])}

    statuses = over_the_lane(storage, scenario)
    assert statuses == dict.fromkeys(SCOPES, 403) | {"decide": 200, "none": 401, "revoked": 401}


def test_the_direct_lane_takes_feedback_from_a_key_that_may_not_decide(storage: Storage) -> None:
    reporter = new_key(storage, "feedback", name="reporter")

    async def scenario(replica: PolicyReplica, port: int) -> tuple[int, int]:
        return await post_over(port, reporter, path="/v1/feedback"), await post_over(port, "tt-wrong", path="/v1/feedback")

    assert over_the_lane(storage, scenario) == (422, 401), "422: the body is none for feedback, but it was read"


# --- what a tester and a reader may ask for ---


def test_only_a_tester_chooses_the_arm_and_only_a_reader_sees_the_distribution(storage: Storage) -> None:
    keys = {
        name: new_key(storage, "decide", *more, name=name)
        for name, more in {"plain": (), "tester": ("operate",), "reader": ("read",)}.items()
    }
    replica = replica_of(storage)

    async def ask(key: str, body: bytes, arm: bytes | None = None) -> Reply:
        extra = [] if arm is None else [(b"x-trimtab-arm", arm)]
        return await call(replica.api, "POST", "/v1/decide", body, key=key, extra_headers=extra)

    explained = b'{"observation":[0,0,0,0],"explain":true}'
    expected = {"plain": (403, 403), "tester": (200, 403), "reader": (403, 200)}
    for name, statuses in expected.items():
        chosen = asyncio.run(ask(keys[name], GOOD, b"champion"))
        shown = asyncio.run(ask(keys[name], explained))
        assert (chosen.status, shown.status) == statuses, name
    unknown = asyncio.run(ask(keys["tester"], GOOD, b"canary"))
    assert unknown.status == 422 and "no arm 'canary'" in unknown.error


def test_the_direct_lane_knows_a_testers_choice_too(storage: Storage) -> None:
    """Twice on one connection: the second head is known by its bytes, and what it says has to come along."""
    plain, tester = new_key(storage, "decide"), new_key(storage, "decide", "operate", name="tester")

    async def scenario(replica: PolicyReplica, port: int) -> list[int]:
        statuses = []
        for key in (plain, tester):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = f"POST /v1/decide HTTP/1.1\r\nx-trimtab-arm: champion\r\nauthorization: Bearer {key}"
            head += f"\r\ncontent-length: {len(GOOD)}"
            for _ in range(2):
                writer.write(f"{head}\r\n\r\n".encode() + GOOD)
                answer = await reader.readuntil(b"\r\n\r\n")
                length = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                statuses.append(int(answer.split()[1]))
            writer.close()
        storage.api_keys.revoke("tester", now=2000.0)
        replica._keys.refresh()
        return statuses

    assert over_the_lane(storage, scenario) == [403, 403, 200, 200]


def test_a_key_that_is_revoked_ends_a_connection_that_is_known(storage: Storage) -> None:
    key = new_key(storage, "decide")

    async def scenario(replica: PolicyReplica, port: int) -> list[int]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        request = (
            f"POST /v1/decide HTTP/1.1\r\nauthorization: Bearer {key}\r\ncontent-length: {len(GOOD)}\r\n\r\n".encode() + GOOD
        )
        statuses = []
        for number in range(4):
            if number == 3:
                storage.api_keys.revoke("shop", now=2000.0)
                replica._keys.refresh()
            writer.write(request)
            answer = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            statuses.append(int(answer.split()[1]))
        writer.close()
        return statuses

    assert over_the_lane(storage, scenario) == [200, 200, 200, 401]
