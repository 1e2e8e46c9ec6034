"""Shadows answer behind the answer: logged apart, never heard, never waited for, bounded."""

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies.distributions import seed_of
from policies.log_reader import LogTail
from policies.records import Decision, Override, Shadow
from policies.storage import Storage, open_storage
from serve_app import shadowing as shadowing_module
from serve_app.replica import PolicyReplica
from tests.serving_helpers import NAME, Reply, call, publish, random_policy, read_new, replica_of, variant_of


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path / "storage")
    publish(storage, random_policy(1))
    return storage


def shadowed(storage: Storage, *versions: int) -> PolicyReplica:
    replica = replica_of(storage)
    variants = tuple(variant_of(version, random_policy(version)) for version in versions)
    assert replica._variants.snapshot is not None
    replica._variants.snapshot = dataclasses.replace(replica._variants.snapshot, shadows=variants)
    return replica


def ask(storage: Storage, replica: PolicyReplica, *bodies: dict[str, Any], turns: int = 20) -> list[Reply]:
    key = storage.api_key_file.read_text()

    async def run() -> list[Reply]:
        calls = [call(replica.api, "POST", "/v1/decide", json.dumps(body).encode(), key=key) for body in bodies]
        replies = await asyncio.gather(*calls)
        for _ in range(turns):
            await asyncio.sleep(0)
        return replies

    return asyncio.run(run())


def shadows(storage: Storage) -> list[Shadow]:
    return read_new(LogTail(storage.shadows(NAME), Shadow))


def decisions(storage: Storage) -> list[Decision]:
    return read_new(LogTail(storage.decisions(NAME), Decision))


def test_a_shadow_says_what_it_would_have_sent_with_the_decisions_own_seed(storage: Storage) -> None:
    replica, obs = shadowed(storage, 2, 3), np.random.default_rng(0).normal(size=(9, 4)).tolist()
    replies = ask(storage, replica, *[{"observation": o} for o in obs[:5]], {"observations": obs[5:]})
    told = [reply.json() for reply in replies[:5]] + replies[5].json()["decisions"]
    assert {item["version"] for item in told} == {1}, "nobody hears a shadow"
    by_version = {version: [s for s in shadows(storage) if s.version == version] for version in (2, 3)}
    for version, records in by_version.items():
        policy = random_policy(version)
        assert sorted(s.decision_id for s in records) == sorted(item["decision_id"] for item in told)
        observation_of = {d.decision_id: d.observation for d in decisions(storage)}
        for s in records:
            parameters_P = policy.distributions(np.array([observation_of[s.decision_id]], np.float32))[0]
            assert s.distribution == parameters_P.tolist()
            assert (s.action, s.propensity) == policy.distribution.choose(parameters_P, "sample", seed_of(s.decision_id))


def test_answers_leave_before_a_shadow_is_asked(storage: Storage) -> None:
    replica, order = shadowed(storage, 2), []
    [variant] = replica._variants.snapshot.shadows  # type: ignore[union-attr]
    asked = variant.policy.distributions
    object.__setattr__(variant.policy, "distributions", lambda *a: (order.append("shadow"), asked(*a))[1])
    key = storage.api_key_file.read_text()

    async def run() -> None:
        async def one() -> None:
            await call(replica.api, "POST", "/v1/decide", b'{"observation":[0,0,0,0]}', key=key)
            order.append("answer")

        await asyncio.gather(*[one() for _ in range(5)])
        for _ in range(10):
            await asyncio.sleep(0)

    asyncio.run(run())
    assert order == ["answer"] * 5 + ["shadow"]


def test_a_shadow_that_fails_harms_nobody_and_its_failure_is_logged(storage: Storage) -> None:
    replica = shadowed(storage, 2, 3)
    broken, nan = replica._variants.snapshot.shadows  # type: ignore[union-attr]

    def raises(*_: Any) -> None:
        raise RuntimeError("broken")

    object.__setattr__(broken.policy, "distributions", raises)
    object.__setattr__(nan.policy, "distributions", lambda obs_BD, mask_BA: np.full((len(obs_BD), 2), np.nan))
    [reply] = ask(storage, replica, {"observation": [0, 0, 0, 0]})
    assert reply.status == 200
    first, second = shadows(storage)
    assert "RuntimeError('broken')" in str(first.failure) and second.failure == "version 3 gave NaN"
    assert first.action is first.distribution is second.propensity is None


def test_what_is_too_much_is_left_out_and_counted(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadowing_module, "MAX_WAITING_ROWS", 10)
    replica = shadowed(storage, 2)
    bodies = [{"observations": [[0, 0, 0, 0]] * 6} for _ in range(4)]  # four requests, all before a shadow's first turn
    assert [reply.status for reply in ask(storage, replica, *bodies)] == [200] * 4
    counts = replica._shadowing.num_answered, replica._shadowing.num_left_out
    assert sum(counts) == 24 and counts[1] > 0 and len(shadows(storage)) == counts[0]


def test_a_log_that_cannot_be_written_is_counted_and_answers_go_on(storage: Storage) -> None:
    replica = shadowed(storage, 2)

    def full(lines: bytes) -> None:
        raise OSError("no space left")

    replica._shadowing._log.append = full  # type: ignore[method-assign, assignment]
    [reply] = ask(storage, replica, {"observation": [0, 0, 0, 0]})
    assert reply.status == 200 and replica._shadowing.num_not_logged == 1


# --- overrides ---


def override(storage: Storage, replica: PolicyReplica, decision_id: str, body: bytes) -> Reply:
    path = f"/v1/decisions/{decision_id}/override"
    return asyncio.run(call(replica.api, "POST", path, body, key=storage.api_key_file.read_text()))


def test_an_override_is_recorded_and_the_decision_stays(storage: Storage) -> None:
    replica = replica_of(storage)
    [one, many] = ask(storage, replica, {"observation": [0, 0, 0, 0]}, {"observations": [[0, 0, 0, 0]]})
    ids = [one.json()["decision_id"], many.json()["decisions"][0]["decision_id"]]
    before = decisions(storage)
    for decision_id in ids:
        reply = override(storage, replica, decision_id, b'{"action": 1, "reason": "the road was closed"}')
        assert (reply.status, reply.json()) == (200, {"accepted": 1})
    records = read_new(LogTail(storage.overrides(NAME), Override))
    assert [(r.decision_id, r.action, r.reason, r.key) for r in records] == [
        (decision_id, 1, "the road was closed", "owner") for decision_id in ids
    ]
    assert decisions(storage) == before


# A replica reads it; who reads the log may have less of the stack left.
DEEP = b'{"action": ' + b"[" * 900 + b"]" * 900 + b', "reason": "x"}'


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b'{"action": 1}', 422), (b'{"action": 1, "reason": ""}', 422), (b'{"reason": "x"}', 422), (DEEP, 422)],
)
def test_an_override_without_action_or_reason_is_refused(storage: Storage, body: bytes, status: int) -> None:
    replica = replica_of(storage)
    [reply] = ask(storage, replica, {"observation": [0, 0, 0, 0]})
    assert override(storage, replica, reply.json()["decision_id"], body).status == status
    assert not storage.overrides(NAME).exists()


def test_an_override_of_what_was_never_decided_is_refused(storage: Storage) -> None:
    reply = override(storage, replica_of(storage), "r-1.0123456789ab", b'{"action": 1, "reason": "x"}')
    assert reply.status == 404 and "was not made by this deployment" in reply.error
