"""The HTTP surface without Ray: every bad input has its status and a message that says what was expected."""

import asyncio
import json
from pathlib import Path

import pytest

from policies.log_reader import LogTail
from policies.records import Feedback
from policies.storage import Storage, open_storage
from serve_app.breaker import Breaker
from serve_app.replica import PolicyReplica
from tests.serving_helpers import NAME, Reply, call, publish, random_policy, read_new, replica_of

GOOD = b'{"observation":[0,0,0,0],"request_id":"r-1"}'


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path / "storage")
    publish(storage, random_policy(1))
    return storage


@pytest.fixture
def replica(storage: Storage) -> PolicyReplica:
    return replica_of(storage, max_body_bytes=4096)


def send(
    storage: Storage, replica: PolicyReplica, path: str, body: bytes | list[bytes] = b"", method: str = "POST", **kw
) -> Reply:
    kw.setdefault("key", storage.api_key_file.read_text())
    return asyncio.run(call(replica.api, method, path, body, **kw))


BAD_BODIES = [
    (b"", 400, "not JSON"),
    (b"{", 400, "not JSON"),
    (b"\xff\xfe", 400, "not JSON"),
    (b'{"observation":[0,0,0,0]} x', 400, "not JSON"),
    (b'{"observation":[NaN,0,0,0]}', 400, "not JSON"),
    (b'{"observation":[Infinity,0,0,0]}', 400, "not JSON"),
    (b'{"observation":[-Infinity,0,0,0]}', 400, "not JSON"),
    (b'{"observation":[0,0,0,0],"unit_id":"\xff"}', 400, "not JSON"),
    (b'{"observation":[0,0,0,0],"unit_id":"\\ud800"}', 400, "not JSON"),
    (b"[]", 422, "Expected `object`"),
    (b"{}", 422, "observation"),
    (b'{"observation":"no"}', 422, "observation is str; expected a list of 4 finite numbers"),
    (b'{"observation":{"0":1}}', 422, "observation is dict; expected a list of 4 finite numbers"),
    (b'{"observation":[0,0,0]}', 422, "observation has 3 items; expected a list of 4 finite numbers"),
    (b'{"observation":[0,0,0,0,0]}', 422, "observation has 5 items; expected a list of 4 finite numbers"),
    (b'{"observation":[[0,0,0,0]]}', 422, "observation has 1 items; expected a list of 4 finite numbers"),
    (b'{"observation":[0,[0],0,0]}', 422, "observation[1] is list"),
    (b'{"observation":[0,"1",0,0]}', 422, "observation[1] is str"),
    (b'{"observation":[0,true,0,0]}', 422, "observation[1] is bool"),
    (b'{"observation":[0,null,0,0]}', 422, "observation[1] is NoneType"),
    (b'{"observation":[0,1e999,0,0]}', 422, "out of range"),
    (b'{"observation":[0,1e39,0,0]}', 422, "observation[1] = 1e+39 is outside"),  # finite in float64, infinite in float32
    (b'{"observation":[5,0,0,0]}', 422, "observation[0] = 5.0 is outside [-4.8, 4.8]"),
    (b'{"observation":[0,1' + b"0" * 3000 + b",0,0]}", 422, "observation[1] = 1000"),  # an integer of any length is JSON
    (b'{"observation":[0,0,0,0],"action_mask":[1,1]}', 422, "trained without masks"),
    (b'{"observation":[0,0,0,0],"unit":"u"}', 422, "unknown field `unit`"),
    (b'{"observation":[0,0,0,0],"unit_id":""}', 422, "unit_id"),
    (b'{"observation":[0,0,0,0],"unit_id":7}', 422, "unit_id"),
    (b'{"observation":[0,0,0,0],"request_id":"a.b"}', 422, "request_id"),
    (b'{"observation":[0,0,0,0],"request_id":"a\\n"}', 422, "request_id"),
    (b'{"observation":[0,0,0,0],"request_id":"' + b"a" * 65 + b'"}', 422, "request_id"),
    (b'{"observation":' + b"[" * 4000 + b"}", 400, "not JSON"),
    (b'{"observation":' + b"[" * 500 + b"]" * 500 + b"}", 422, "observation has 1 items"),
]


@pytest.mark.parametrize(("body", "status", "message"), BAD_BODIES)
def test_a_bad_decide_body_is_refused_and_nothing_is_logged(
    storage: Storage, replica: PolicyReplica, body: bytes, status: int, message: str
) -> None:
    reply = send(storage, replica, "/v1/decide", body)
    assert reply.status == status == reply.json()["error"]["status"]
    assert message in reply.error
    assert not storage.decisions(NAME).exists()
    assert send(storage, replica, "/v1/decide", GOOD).status == 200, "the next request is answered"


def test_an_unknown_key_is_answered_with_the_allowed_ones(storage: Storage, replica: PolicyReplica) -> None:
    reply = send(storage, replica, "/v1/decide", b'{"obs":[1]}')
    assert all(name in reply.error for name in ("observation", "unit_id", "episode_id", "request_id"))


@pytest.mark.parametrize("path", ["/v1/decide", "/v1/feedback", "/v1/status"])
@pytest.mark.parametrize("key", [None, "", "tt-wrong", "é"])
def test_without_the_key_nothing_is_read_or_told(storage: Storage, replica: PolicyReplica, path: str, key: str | None) -> None:
    method = "GET" if path == "/v1/status" else "POST"
    reply = send(storage, replica, path, GOOD, method, key=key)
    assert reply.status == 401
    assert "Authorization: Bearer" in reply.error and reply.headers["www-authenticate"] == "Bearer"
    assert storage.api_key_file.read_text() not in reply.body.decode()
    assert not storage.decisions(NAME).exists()


def test_probes_and_the_dashboard_need_no_key(storage: Storage, replica: PolicyReplica) -> None:
    for path in ("/healthz", "/readyz", "/dashboard"):
        assert send(storage, replica, path, method="GET", key=None).status == 200


def test_the_dashboard_serves_its_files_and_no_others(storage: Storage, replica: PolicyReplica) -> None:
    page = send(storage, replica, "/dashboard", method="GET", key=None)
    assert page.headers["content-type"].startswith("text/html") and page.headers["x-content-type-options"] == "nosniff"
    for path in ("/dashboard/../app.py", "/dashboard/%2e%2e/app.py", "/dashboard/vendor", "/dashboard//etc/passwd"):
        assert send(storage, replica, path, method="GET", key=None).status == 404


def test_unknown_paths_and_methods(storage: Storage, replica: PolicyReplica) -> None:
    assert send(storage, replica, "/v2/decide", GOOD).status == 404
    reply = send(storage, replica, "/v1/decide", method="GET")
    assert (reply.status, reply.headers["allow"]) == (405, "POST")


def test_a_declared_oversized_body_is_refused_before_it_is_read(storage: Storage, replica: PolicyReplica) -> None:
    async def run() -> list[dict]:
        sent: list[dict] = []

        async def receive() -> dict:
            raise AssertionError("not a byte should be read")

        async def collect(message: dict) -> None:
            sent.append(message)

        headers = [(b"authorization", b"Bearer " + storage.api_key_file.read_bytes()), (b"content-length", b"4097")]
        await replica.api({"type": "http", "method": "POST", "path": "/v1/decide", "headers": headers}, receive, collect)
        return sent

    assert asyncio.run(run())[0]["status"] == 413


def test_a_chunked_oversized_body_is_refused_when_the_limit_is_passed(storage: Storage, replica: PolicyReplica) -> None:
    remaining = [b"x" * 1000] * 1_000_000

    async def run() -> list[dict]:
        sent: list[dict] = []

        async def receive() -> dict:
            return {"type": "http.request", "body": remaining.pop(), "more_body": True}

        async def collect(message: dict) -> None:
            sent.append(message)

        headers = [(b"authorization", b"Bearer " + storage.api_key_file.read_bytes())]
        await replica.api({"type": "http", "method": "POST", "path": "/v1/decide", "headers": headers}, receive, collect)
        return sent

    sent = asyncio.run(run())
    assert sent[0]["status"] == 413 and (b"connection", b"close") in sent[0]["headers"]
    assert len(remaining) == 1_000_000 - 5, "the fifth chunk passes 4096 bytes; no more are read"


def test_a_body_of_exactly_the_limit_is_read(storage: Storage, replica: PolicyReplica) -> None:
    """Negative control of the two above."""
    assert send(storage, replica, "/v1/decide", GOOD + b" " * (4096 - len(GOOD))).status == 200
    assert send(storage, replica, "/v1/decide", [GOOD[:10], GOOD[10:]]).status == 200


def test_a_full_queue_answers_429_with_retry_after(storage: Storage) -> None:
    replica = replica_of(storage, max_queue=2)
    key = storage.api_key_file.read_text()

    async def run() -> list[Reply]:  # five in one turn of the loop: three more than may wait
        return await asyncio.gather(
            *[call(replica.api, "POST", "/v1/decide", b'{"observation":[0,0,0,0]}', key=key) for _ in range(5)]
        )

    replies = asyncio.run(run())
    assert sorted(reply.status for reply in replies) == [200, 200, 429, 429, 429]
    assert next(reply for reply in replies if reply.status == 429).headers["retry-after"] == "1"


def test_without_a_champion_it_is_alive_but_not_ready(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "empty")
    replica = replica_of(storage)
    assert send(storage, replica, "/healthz", method="GET").status == 200
    assert send(storage, replica, "/readyz", method="GET").status == 503
    reply = send(storage, replica, "/v1/decide", GOOD)
    assert reply.status == 503 and "publish" in reply.error


def feedbacks(storage: Storage) -> list[tuple[str, float, bool]]:
    return [(f.decision_id, f.reward, f.final) for f in read_new(LogTail(storage.feedback(NAME), Feedback))]


def test_feedback_is_logged_one_by_one_and_in_lists(storage: Storage, replica: PolicyReplica) -> None:
    one = send(storage, replica, "/v1/decide", GOOD).json()["decision_id"]
    two = send(storage, replica, "/v1/decide", GOOD.replace(b"r-1", b"r-2")).json()["decision_id"]
    reply = send(storage, replica, "/v1/feedback", json.dumps({"decision_id": one, "reward": 1}).encode())
    assert (reply.status, reply.json()) == (200, {"accepted": 1})
    items = [{"decision_id": one, "reward": -0.5, "final": True}, {"decision_id": two, "reward": 2}]
    assert send(storage, replica, "/v1/feedback", json.dumps(items).encode()).json() == {"accepted": 2}
    assert feedbacks(storage) == [(one, 1.0, False), (one, -0.5, True), (two, 2.0, False)]


BAD_FEEDBACKS = [
    ([], 422, "length >= 1"),
    ([{"decision_id": "ID", "reward": 1}] * 1001, 413, "4096"),
    ([{"decision_id": "ID", "reward": 1}, {"decision_id": "ID", "reward": "x"}], 422, "$[1].reward"),
    ([{"decision_id": "ID", "reward": 1}, {"decision_id": "ID"}], 422, "`reward` - at `$[1]`"),
    (
        [{"decision_id": "ID", "reward": 1}, {"decision_id": "r-9.000000000000", "reward": 1}],
        404,
        "item 1: decision 'r-9.000000000000'",
    ),
    ({"decision_id": "r-1", "reward": 1}, 404, "decision 'r-1' was not made by this deployment"),
    ({"decision_id": "ID", "reward": 1, "value": 2}, 422, "unknown field `value`"),
    ({"decision_id": "ID", "reward": 1, "final": 1}, 422, "final"),
    ("text", 422, "Expected `object | array`"),
]


@pytest.mark.parametrize(("value", "status", "message"), BAD_FEEDBACKS)
def test_bad_feedback_is_refused_as_a_whole(
    storage: Storage, replica: PolicyReplica, value: object, status: int, message: str
) -> None:
    name = send(storage, replica, "/v1/decide", GOOD).json()["decision_id"]
    reply = send(storage, replica, "/v1/feedback", json.dumps(value).replace("ID", name).encode())
    assert reply.status == status and message in reply.error
    assert not storage.feedback(NAME).exists()


def test_no_more_than_a_thousand_feedbacks_at_once(storage: Storage) -> None:
    replica = replica_of(storage)
    name = send(storage, replica, "/v1/decide", GOOD).json()["decision_id"]
    items = [{"decision_id": name, "reward": 1}] * 1001
    reply = send(storage, replica, "/v1/feedback", json.dumps(items).encode())
    assert reply.status == 422 and "<= 1000" in reply.error
    assert send(storage, replica, "/v1/feedback", json.dumps(items[:1000]).encode()).json() == {"accepted": 1000}


def test_infinite_and_nan_rewards_are_not_json(storage: Storage, replica: PolicyReplica) -> None:
    name = send(storage, replica, "/v1/decide", GOOD).json()["decision_id"].encode()
    for reward, status in ((b"NaN", 400), (b"Infinity", 400), (b"1e999", 422)):
        reply = send(storage, replica, "/v1/feedback", b'{"decision_id":"' + name + b'","reward":' + reward + b"}")
        assert reply.status == status


def test_answers_are_counted_by_status_and_latency(storage: Storage, replica: PolicyReplica) -> None:
    send(storage, replica, "/v1/decide", GOOD)
    send(storage, replica, "/v1/decide", b"{")
    send(storage, replica, "/readyz", method="GET")
    report = replica.report()
    assert report.responses == {200: 1, 400: 1}, "probes are not answers"
    assert (report.plan, report.versions) == (2, [1])


def test_a_failure_of_our_own_is_a_500_that_tells_no_secrets(storage: Storage, replica: PolicyReplica) -> None:
    def broken(lines: bytes) -> None:
        raise RuntimeError("secret detail")

    replica._decisions.append = broken  # type: ignore[method-assign]
    reply = send(storage, replica, "/v1/decide", GOOD)
    assert reply.status == 500 and "secret detail" not in reply.body.decode()


def test_without_the_monitor_a_replica_tells_what_is_wrong_with_itself(
    storage: Storage, replica: PolicyReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys' file is damaged, its log's disk fails, and its version's breaker is open: nobody else could tell now."""
    key = storage.api_key_file.read_text()
    storage.api_keys.path.write_bytes(b"{")
    replica._keys.refresh()

    def fails(lines: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(replica._decisions.writer, "append", fails)
    assert send(storage, replica, "/v1/decide", GOOD, key=key).status == 503
    replica._ingress.decider.breakers.setdefault(1, Breaker()).note(0, 5, 0.0, "version 1 raised")
    document = send(storage, replica, "/v1/status", method="GET", key=key).json()
    [row] = document["replicas"]
    assert document["monitor"] is None and row["replica"] == replica.name and row["responses"] == {"503": 1}
    assert "IntegrityError" in row["keys_error"] and row["breakers"] == {"1": "version 1 raised"}
    assert row["log"]["state"] == "failing" and "No space left" in row["log"]["last_error"]
    assert row["shadows"] == {"answered": 0, "left_out": 0, "not_logged": 0}
