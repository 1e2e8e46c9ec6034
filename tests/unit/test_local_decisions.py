"""What does a replica give to clients that decide by themselves, and which of their decisions does it take?"""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from policies.bundle_reader import FILES, MANIFEST, read_bundle
from policies.distributions import seed_of
from policies.integrity import sha256_hex
from policies.records import Decision
from policies.registry import Registry, change_release
from policies.sealing import seal
from policies.storage import Storage, open_storage
from policies.traffic import TrafficPlan
from serve_app.decision_ids import LEASE_S, DecisionIds, Lease
from serve_app.local_decisions import MAX_CLOCK_SKEW_S, MAX_DECISIONS
from serve_app.replica import PolicyReplica
from tests.serving_helpers import NAME, Reply, call, logged, publish, random_policy, release, replica_of, spoil


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path / "storage")
    publish(storage, random_policy(1))
    return storage


def ask(storage: Storage, replica: PolicyReplica, method: str, path: str, body: Any = None) -> Reply:
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    return asyncio.run(call(replica.api, method, path, data, key=storage.api_key_file.read_text()))


def digest_of(storage: Storage, version: int = 1) -> str:
    return Registry(storage.registry(NAME)).state().version(version).digest


def lease_of(storage: Storage, *, now: float | None = None) -> Lease:
    return DecisionIds.of(storage).lease(now=time.time() if now is None else now)


def decision(storage: Storage, *, lease: Lease | None = None, request_id: str = "r1", **changes: Any) -> dict[str, Any]:
    """Return a record as an honest client makes it, but for the changes."""
    decision_id = changes.pop("decision_id", None) or (lease or lease_of(storage)).name(request_id)
    record = Decision(
        decision_id=decision_id,
        time_s=time.time(),
        unit_id="u",
        episode_id=None,
        plan=2,
        release=0,
        arm="champion",
        version=1,
        digest=digest_of(storage),
        observation=[0.0, 0.0, 0.0, 0.0],
        action=0,
        mode="sample",
        seed=seed_of(decision_id),
        propensity=0.5,
        mixture_propensity=0.5,
        fallback=None,
        latency_s=1e-5,
    )
    return {**msgspec.to_builtins(record), **changes}


# --- the plan ---


def test_the_plan_is_the_one_in_force_with_its_versions_and_a_lease_that_we_recognise(storage: Storage) -> None:
    publish(storage, random_policy(2), mode="greedy")
    release(storage, 2, weights=(0.2, 1.0))
    replica = replica_of(storage)
    said = ask(storage, replica, "GET", "/v1/plan").json()
    assert TrafficPlan.from_json(said["plan"]) == replica._variants.snapshot.plan
    assert said["versions"] == {
        "1": {"digest": digest_of(storage, 1), "mode": "sample"},
        "2": {"digest": digest_of(storage, 2), "mode": "greedy"},
    }
    lease = Lease(**said["lease"])
    assert DecisionIds.of(storage).is_ours(lease.name("r")) and lease.expires_at == pytest.approx(time.time() + LEASE_S, abs=60)
    assert said["policy"] == NAME


def test_behind_a_shield_nobody_decides_alone(storage: Storage) -> None:
    reply = ask(storage, replica_of(storage, shield={"high": 0}), "GET", "/v1/plan")
    assert reply.status == 422 and "behind a shield" in reply.error


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/plan"), ("GET", f"/v1/bundles/{'0' * 64}/{MANIFEST}"), ("POST", "/v1/decisions")]
)
def test_nothing_is_told_or_taken_without_the_key(storage: Storage, method: str, path: str) -> None:
    assert asyncio.run(call(replica_of(storage).api, method, path, key="wrong")).status == 401


# --- bundles ---


def test_a_bundle_comes_whole_and_verifies(storage: Storage, tmp_path: Path) -> None:
    replica, digest, copy = replica_of(storage), digest_of(storage), tmp_path / "copy"
    copy.mkdir()
    manifest = ask(storage, replica, "GET", f"/v1/bundles/{digest}/{MANIFEST}").body
    assert sha256_hex(manifest) == digest
    for name in (MANIFEST, *json.loads(manifest)["files"]):
        reply = ask(storage, replica, "GET", f"/v1/bundles/{digest}/{name}")
        assert reply.headers["content-type"] == "application/octet-stream"
        (copy / name).write_bytes(reply.body)
    assert read_bundle(copy, expected_digest=digest).digest == digest


HOSTILE = ["", ".", "..", "../../../trimtab-storage.json", "..%2f..%2fsecrets", "../../../../../../etc/passwd", "/etc/passwd",
           "%2fetc%2fpasswd", "manifest.json/", "./manifest.json", "manifest.json\0", "MANIFEST.JSON", "policy.safetensors.tmp",
           "../manifest.json", "card.html", "C:\\x", "a" * 10_000]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_leads_out_of_the_bundle(storage: Storage, name: str) -> None:
    replica, digest = replica_of(storage), digest_of(storage)
    beside = Registry(storage.registry(NAME)).bundles / digest / ".." / "manifest.json"
    beside.write_text("not for you")  # what `../manifest.json` would be
    reply = ask(storage, replica, "GET", f"/v1/bundles/{digest}/{name}")
    assert reply.status == 404 and b"not for you" not in reply.body


@pytest.mark.parametrize("digest", ["..", "../../secrets", "0" * 64, "", "."])
def test_only_bundles_of_the_plan_are_given_away(storage: Storage, digest: str) -> None:
    for name in (MANIFEST, "api_key", ""):
        assert ask(storage, replica_of(storage), "GET", f"/v1/bundles/{digest}/{name}").status == 404


def test_a_registered_version_that_answers_nobody_is_not_given_away(storage: Storage) -> None:
    publish(storage, random_policy(2))
    assert ask(storage, replica_of(storage), "GET", f"/v1/bundles/{digest_of(storage, 2)}/{MANIFEST}").status == 404


def test_a_bundle_that_was_damaged_since_it_was_loaded_is_not_sent(storage: Storage) -> None:
    replica, digest = replica_of(storage), digest_of(storage)
    spoil(Registry(storage.registry(NAME)).bundles / digest)
    assert ask(storage, replica, "GET", f"/v1/bundles/{digest}/policy.safetensors").status == 500
    assert ask(storage, replica, "GET", f"/v1/bundles/{digest}/{FILES[0]}").status == 200


# --- decisions ---


def test_honest_decisions_are_logged_as_they_came_and_feedback_on_them_is_ours(storage: Storage) -> None:
    replica = replica_of(storage)
    records = [decision(storage, request_id=f"r{n}", unit_id=f"u{n}") for n in range(5)]
    assert ask(storage, replica, "POST", "/v1/decisions", {"decisions": records}).json() == {"accepted": 5}
    assert [msgspec.to_builtins(found) for found in logged(storage)] == records
    body = {"decision_id": records[0]["decision_id"], "reward": 1.0}
    assert ask(storage, replica, "POST", "/v1/feedback", body).json() == {"accepted": 1}


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [0.0, value]
    return value


def test_what_is_accepted_can_be_sealed(storage: Storage) -> None:
    """The largest that is taken; one more is among the lies below, and made the whole segment unreadable."""
    replica = replica_of(storage)
    largest = decision(storage, observation=nested(64), action={"a": nested(63)})
    assert ask(storage, replica, "POST", "/v1/decisions", {"decisions": [largest]}).status == 200
    asyncio.run(replica._stop())
    [segment] = storage.decisions(NAME).glob("*.jsonl")
    info = seal(segment)
    assert info is not None and info.num_rows == 1
    assert [msgspec.to_builtins(found) for found in logged(storage)] == [largest]


LIES = {
    "an id without a lease": (lambda s: {"decision_id": DecisionIds.of(s).name("r1")}, 404, "not named under a lease"),
    "an id of another deployment": (
        lambda s: {"lease": DecisionIds(b"x").lease(now=time.time())},
        404,
        "not named under a lease",
    ),
    "an id that is a path": (lambda s: {"request_id": "../x"}, 404, "not named under a lease"),
    "a name with a line break": (lambda s: {"request_id": "a\nb"}, 404, "not named under a lease"),
    "a draw of its own": (lambda s: {"seed": 1}, 422, "seed is 1"),
    "an unknown version": (lambda s: {"version": 7}, 422, "version 7 is None"),
    "another digest": (lambda s: {"digest": "0" * 64}, 422, "version 1 is"),
    "an impossible action": (lambda s: {"propensity": 0.0}, 422, "propensities are 0.0"),
    "a negative mixture": (lambda s: {"mixture_propensity": -0.1}, 422, "propensities are"),
    "a time to come": (lambda s: {"time_s": time.time() + MAX_CLOCK_SKEW_S + 60}, 422, "set the client's clock"),
    "a time before its lease": (lambda s: {"time_s": time.time() - MAX_CLOCK_SKEW_S - 60}, 422, "set the client's clock"),
    "a lease that is over": (lambda s: {"lease": lease_of(s, now=time.time() - LEASE_S - 2 * MAX_CLOCK_SKEW_S)}, 422, "in force"),
    "no unit": (lambda s: {"unit_id": ""}, 422, "unit_id"),
    "a long episode": (lambda s: {"episode_id": "e" * 257}, 422, "257 characters"),
    "a shield": (lambda s: {"shield": ""}, 422, "rung, shield"),
    "an arm of the client's choice": (lambda s: {"assigned": "request"}, 422, "rung, shield"),
    "a fallback without a reason": (lambda s: {"rung": "champion"}, 422, "rung, shield"),
    "an engine that local clients have not": (lambda s: {"engines": {"1": "onnxruntime==1.32.0"}}, 422, "repair and engines"),
    "a plan to come": (lambda s: {"plan": 99}, 503, "this replica is at plan 2"),
    "a plan before all": (lambda s: {"plan": -(10**30)}, 422, "plan -1000000"),
    "a release that no column holds": (lambda s: {"release": 2**63}, 422, "plan 2 is of release 0"),
    "an arm that no plan has": (lambda s: {"arm": "x" * 300}, 422, "is not that of arm 'xxx"),
    "an arm of another plan": (lambda s: {"arm": "canary"}, 422, "version 1 is not that of arm 'canary' in plan 2"),
    "a number that is no plan's": (lambda s: {"plan": 1}, 422, "plan 1 is no plan"),
    "a release that was never begun": (lambda s: {"release": 1}, 422, "plan 2 is of release 0"),
    "an observation nested too deeply to be read again": (lambda s: {"observation": nested(900)}, 422, "more than 64 levels"),
    "an action nested too deeply": (lambda s: {"action": {"a": nested(64)}}, 422, "more than 64 levels"),
    "an unknown key": (lambda s: {"seeds": [1], "seed": "x"}, 422, "Expected `int`"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_cannot_be_is_not_logged_nor_what_came_with_it(storage: Storage, lie: str) -> None:
    change, status, words = LIES[lie]
    wrong = decision(storage, **change(storage))
    honest = decision(storage, request_id="honest")
    replica = replica_of(storage)
    reply = ask(storage, replica, "POST", "/v1/decisions", {"decisions": [honest, wrong]})
    assert reply.status == status and words in reply.error
    assert not logged(storage)
    assert ask(storage, replica, "POST", "/v1/decisions", {"decisions": [honest]}).status == 200  # the control


def test_a_decision_made_before_the_endpoint_went_away_is_taken_later(storage: Storage) -> None:
    lease = lease_of(storage, now=time.time() - LEASE_S - 7200)  # two hours after its lease ended
    record = decision(storage, lease=lease, time_s=time.time() - 7300)
    assert ask(storage, replica_of(storage), "POST", "/v1/decisions", {"decisions": [record]}).status == 200


def test_a_replica_takes_decisions_of_versions_that_it_never_answered_with(storage: Storage) -> None:
    replica = replica_of(storage)
    past = replica._variants.snapshot.plan.number  # of the plans that were in force before this replica began
    publish(storage, random_policy(2))
    release(storage, 2, weights=(0.5, 1.0))
    plan = Registry(storage.registry(NAME)).state().plan
    assert plan.number > past
    Registry(storage.registry(NAME)).append(lambda state: change_release(state, "rollback", reason="worse"), now=2000.0)
    replica._variants.refresh(now=1e9)
    assert set(replica._variants.snapshot.variants) == {1}
    canarys = {"arm": "canary", "version": 2, "digest": digest_of(storage, 2), "plan": plan.number, "release": 1}
    assert ask(storage, replica, "POST", "/v1/decisions", {"decisions": [decision(storage, **canarys)]}).status == 200
    # A canary that failed was answered for by the champion, and by nobody else.
    stood_in = {**canarys, "rung": "champion", "fallback": "version 2 gave NaN"}
    champions = {"version": 1, "digest": digest_of(storage, 1)}
    assert (
        ask(storage, replica, "POST", "/v1/decisions", {"decisions": [decision(storage, **stood_in | champions)]}).status == 200
    )
    for wrong in (stood_in, canarys | champions, canarys | {"arm": "champion"}, canarys | {"plan": past, "release": 0}):
        reply = ask(storage, replica, "POST", "/v1/decisions", {"decisions": [decision(storage, **wrong)]})
        assert reply.status == 422 and "is not that of arm" in reply.error


def test_while_the_registry_cannot_be_read_nothing_is_judged(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = replica_of(storage)

    def unreadable() -> None:
        raise OSError("stale file handle")

    monkeypatch.setattr(replica.api._local._registry, "state", unreadable)
    reply = ask(storage, replica, "POST", "/v1/decisions", {"decisions": [decision(storage)]})
    assert reply.status == 503 and "stale file handle" in reply.error and not logged(storage)


def test_the_number_of_decisions_in_a_request_is_bounded(storage: Storage) -> None:
    record, replica = decision(storage), replica_of(storage)
    assert ask(storage, replica, "POST", "/v1/decisions", {"decisions": [record] * (MAX_DECISIONS + 1)}).status == 422
    assert ask(storage, replica, "POST", "/v1/decisions", {"decisions": []}).status == 422


def test_a_log_that_cannot_be_written_accepts_nothing(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = replica_of(storage)

    def full(lines: bytes) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(replica._decisions.writer, "append", full)
    reply = ask(storage, replica, "POST", "/v1/decisions", {"decisions": [decision(storage)]})
    assert reply.status == 503 and "no space left" in reply.error
