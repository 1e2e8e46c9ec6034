"""Many observations in one request, and the same request twice: one answer each, logged once."""

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from policies.distributions import seed_of
from policies.errors import NotFound
from policies.records import BATCH_PREFIX, Decision
from policies.registry import Registry, change_release
from policies.storage import Storage, open_storage
from policies.traffic import assign
from serve_app.decision_ids import DecisionIds
from serve_app.wire import encode
from tests.disks import Disk
from tests.serving_helpers import (
    NAME,
    Reply,
    decide_all,
    decide_one,
    logged,
    observations,
    publish,
    random_policy,
    release,
    replica_of,
)
from trimtab.replay import replay


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path / "storage")
    publish(storage, random_policy(1))
    return storage


# --- many in one ---


def test_many_observations_are_many_decisions_in_one_line(storage: Storage) -> None:
    obs = observations(20)
    [reply] = decide_all(storage, replica_of(storage), {"observations": obs, "request_id": "r"})
    told = reply.json()["decisions"]
    decisions = logged(storage)
    assert [d.decision_id for d in decisions] == [item["decision_id"] for item in told]
    assert [(d.action, d.propensity, d.version, d.arm) for d in decisions] == [
        (item["action"], item["propensity"], item["version"], item["arm"]) for item in told
    ]
    assert [d.observation for d in decisions] == obs and len({d.decision_id for d in decisions}) == 20
    assert all(item["decision_id"].startswith(f"r:{index}.") for index, item in enumerate(told))
    assert reply.json()["policy"] == NAME and "policy" not in told[0]
    [path] = storage.decisions(NAME).glob("*.jsonl")
    assert path.read_bytes().count(BATCH_PREFIX) == 1


def test_each_of_many_replays_and_is_recognised(storage: Storage) -> None:
    decide_all(storage, replica_of(storage), {"observations": observations(30)})
    policy, ids = Registry(storage.registry(NAME)).bundle(1).policy, DecisionIds.of(storage)
    for decision in logged(storage):
        assert decision.seed == seed_of(decision.decision_id) and ids.is_ours(decision.decision_id)
        parameters_P = policy.distributions(np.array([decision.observation], np.float32))[0]
        assert policy.distribution.choose(parameters_P, "sample", decision.seed) == (decision.action, decision.propensity)


def test_a_name_of_one_of_many_cannot_be_made_up(storage: Storage) -> None:
    ids = DecisionIds.of(storage)
    [first, second], _ = ids.names_within("batch", 2)
    assert ids.is_ours(first) and ids.is_ours(second)
    tag = first.rpartition(".")[2]
    assert not ids.is_ours(f"other:0.{tag}") and not ids.is_ours(f"batch:0.{tag[:-1]}0{'1' if tag[-1] == '0' else ''}")


def test_no_client_can_ask_for_what_was_named_for_somebody_else(storage: Storage) -> None:
    """Else it could have the next unnamed requests of others logged first, for an observation of its own."""
    replica = replica_of(storage)
    [first] = decide_all(storage, replica, {"observation": [0, 0, 0, 0]})
    prefix = first.json()["decision_id"].partition(":")[0]
    body = {"observations": [[1, 0, 0, 0]] * 3, "request_id": prefix}
    stolen, second = decide_all(storage, replica, body, {"observation": [0, 0, 0, 0]})
    assert (stolen.status, second.status) == (422, 200)
    names = [decision.decision_id for decision in logged(storage)]
    assert len(set(names)) == len(names) == 2


def test_alone_or_among_many_a_named_request_gets_the_same_decision(storage: Storage) -> None:
    obs, names = observations(8), [f"n{i}" for i in range(8)]
    together = decide_all(storage, replica_of(storage), {"observations": obs, "request_ids": names, "unit_id": "u"})[0].json()[
        "decisions"
    ]
    other = open_storage(storage.root)  # another replica, which looks into the log
    alone = decide_all(
        other, replica_of(other), *[{"observation": o, "request_id": n, "unit_id": "u"} for o, n in zip(obs, names)]
    )
    assert [reply.json()["action"] for reply in alone] == [item["action"] for item in together]
    assert [reply.json()["decision_id"] for reply in alone] == [item["decision_id"] for item in together]
    assert len(logged(storage)) == 8, "counted once"


def test_what_is_wrong_with_one_is_its_own_answer(storage: Storage) -> None:
    obs: list[Any] = observations(6)
    obs[1], obs[4] = [100, 0, 0, 0], ["x", 0, 0, 0]
    [reply] = decide_all(storage, replica_of(storage), {"observations": obs, "unit_ids": [f"u{i}" for i in range(6)]})
    told = reply.json()["decisions"]
    assert reply.status == 200
    assert [i for i, item in enumerate(told) if "error" in item] == [1, 4]
    assert told[1]["error"]["status"] == 422 and "100" in told[1]["error"]["message"] and "str" in told[4]["error"]["message"]
    assert [d.unit_id for d in logged(storage)] == ["u0", "u2", "u3", "u5"]
    assert [d.observation for d in logged(storage)] == [o for i, o in enumerate(obs) if i not in (1, 4)]


def test_each_unit_of_many_gets_its_own_arm(storage: Storage) -> None:
    publish(storage, random_policy(2))
    release(storage, 2, weights=(0.5, 1.0))
    units = [f"unit-{i}" for i in range(64)]
    decide_all(storage, replica_of(storage), {"observations": observations(64), "unit_ids": units})
    plan = Registry(storage.registry(NAME)).state().plan
    assert plan is not None
    assert [d.arm for d in logged(storage)] == [assign(unit, plan).name for unit in units]
    assert {d.version for d in logged(storage)} == {1, 2}
    policies = {version: Registry(storage.registry(NAME)).bundle(version).policy for version in (1, 2)}
    for d in logged(storage):
        p = {v: policy.distributions(np.array([d.observation], np.float32))[0][d.action] for v, policy in policies.items()}
        assert d.propensity == p[d.version] and d.mixture_propensity == pytest.approx(0.5 * p[1] + 0.5 * p[2], rel=1e-12)


WRONG = [
    ({}, "neither `observation` nor `observations`"),
    ({"observation": [0, 0, 0, 0], "observations": [[0, 0, 0, 0]]}, "belong to one observation"),
    ({"observation": [0, 0, 0, 0], "unit_ids": ["u"]}, "belong to `observations`"),
    ({"observations": [[0, 0, 0, 0]], "unit_ids": ["u", "v"]}, "unit_ids has 2 items for 1 observations"),
    ({"observations": [[0, 0, 0, 0]] * 2, "request_ids": ["a", "a"]}, "holds an id twice"),
    ({"observations": [[0, 0, 0, 0]], "request_ids": ["a"], "request_id": "b"}, "leave one of them away"),
    ({"observations": []}, "observations"),
    ({"observations": [[0, 0, 0, 0]] * 4097}, "length <= 4096"),
    ({"observations": [[0, 0, 0, 0]], "episode_id": "e"}, "belong to one observation"),
    ({"observation": [0, 0, 0, 0], "deadline_ms": 0}, "deadline_ms"),
    ({"observation": [0, 0, 0, 0], "mode": "greedy"}, "serving.request_modes allows none"),
    ({"observation": [0, 0, 0, 0], "mode": "best"}, "mode"),
]


@pytest.mark.parametrize(("body", "message"), WRONG)
def test_what_does_not_go_together_is_refused(storage: Storage, body: dict[str, Any], message: str) -> None:
    [reply] = decide_all(storage, replica_of(storage), body)
    assert reply.status == 422 and message in reply.error
    assert logged(storage) == []


# --- deadline, mode, explanation ---


def test_a_request_whose_time_is_over_is_not_decided(storage: Storage) -> None:
    replica = replica_of(storage)
    late, in_time = decide_all(
        storage,
        replica,
        {"observation": [0, 0, 0, 0], "deadline_ms": 1e-9, "request_id": "late"},
        {"observation": [0, 0, 0, 0], "deadline_ms": 60_000, "request_id": "good"},
    )
    assert (late.status, in_time.status) == (504, 200) and "deadline was over" in late.error
    assert [d.decision_id.partition(".")[0] for d in logged(storage)] == ["good"]


def test_a_request_may_choose_a_mode_that_the_loop_file_allows(storage: Storage) -> None:
    replica = replica_of(storage, request_modes=("greedy",))
    obs = observations(1)[0]
    bodies = [{"observation": obs, "mode": "greedy", "request_id": f"g{i}"} for i in range(20)]
    replies = decide_all(storage, replica, *bodies, {"observation": obs, "request_id": "s"})
    policy = Registry(storage.registry(NAME)).bundle(1).policy
    best = int(policy.distributions(np.array([obs], np.float32))[0].argmax())
    assert {reply.json()["action"] for reply in replies[:20]} == {best}
    assert {reply.json()["propensity"] for reply in replies[:20]} == {1.0}
    greedy, sampled = logged(storage)[:20], logged(storage)[20]
    assert {(d.mode, d.mixture_propensity) for d in greedy} == {("greedy", 1.0)}
    assert sampled.mode == "sample" and 0 < sampled.propensity < 1
    [refused] = decide_all(storage, replica, {"observation": obs, "mode": "sample"})
    assert refused.status == 422 and "allows greedy" in refused.error


def test_an_explanation_is_what_was_drawn_from(storage: Storage) -> None:
    obs = observations(3)
    replies = decide_all(
        storage,
        replica_of(storage),
        {"observation": obs[0], "explain": True},
        {"observation": obs[1]},
        {"observations": obs[1:], "explain": True},
    )
    policy = Registry(storage.registry(NAME)).bundle(1).policy
    told = [replies[0].json(), *replies[2].json()["decisions"]]
    for item, o in zip(told, obs):
        distribution = item["explanation"]["distribution"]
        assert distribution == policy.distributions(np.array([o], np.float32))[0].tolist()
        assert item["propensity"] == distribution[item["action"]]
        assert item["explanation"]["seed"] == seed_of(item["decision_id"])
    assert "explanation" not in replies[1].json()


# --- the same request twice ---


def change(storage: Storage, action: str) -> None:
    Registry(storage.registry(NAME)).append(lambda state: change_release(state, action, reason="test"), now=1.0)


@pytest.mark.parametrize("many", [False, True])
def test_a_plan_change_between_two_tries_leaves_the_logged_decision_in_force(storage: Storage, many: bool) -> None:
    """The first try is answered by the canary on one replica; then the release is rolled back, and a second replica is asked."""
    publish(storage, random_policy(2))
    release(storage, 2, weights=(0.5, 1.0))
    plan = Registry(storage.registry(NAME)).state().plan
    assert plan is not None
    unit = next(u for u in (f"u{i}" for i in range(100)) if assign(u, plan).name == "canary")
    body: dict[str, Any] = {"unit_id": unit, "request_id": "r"}
    body |= {"observations": observations(5)} if many else {"observation": observations(1)[0]}
    [first] = decide_all(storage, replica_of(storage), body)
    change(storage, "rollback")
    second_replica = replica_of(storage)
    [again] = decide_all(storage, second_replica, body)
    assert again.json() == first.json()
    versions = {item["version"] for item in first.json()["decisions"]} if many else {first.json()["version"]}
    assert versions == {2} and len(logged(storage)) == (5 if many else 1)
    # Negative control: without a look into the log the new plan's champion would have answered.
    second_replica._ingress.repetitions._recall.find = lambda names: {}
    [without] = decide_all(storage, second_replica, body)
    versions = {item["version"] for item in without.json()["decisions"]} if many else {without.json()["version"]}
    assert versions == {1}


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"observation": [0.5, 0, 0, 0]}, "observation"),
    ({"unit_id": "other"}, "unit_id"),
    ({"episode_id": "other"}, "episode_id"),
]


@pytest.mark.parametrize(("other", "named"), CHANGES)
@pytest.mark.parametrize("same_replica", [True, False])
def test_the_same_id_with_another_body_is_a_conflict(
    storage: Storage, other: dict[str, Any], named: str, same_replica: bool
) -> None:
    body = {"observation": [0.1, 0, 0, 0], "unit_id": "u", "episode_id": "e", "request_id": "r"}
    replica = replica_of(storage)
    [first] = decide_all(storage, replica, body)
    second = replica if same_replica else replica_of(storage)
    conflict, again = decide_all(storage, second, {**body, **other}, body)
    assert conflict.status == 409 and f"for another {named}" in conflict.error
    assert again.json() == first.json() and len(logged(storage)) == 1


def test_repetitions_that_arrive_together_are_one_decision(storage: Storage) -> None:
    body = {"observation": [0.1, 0, 0, 0], "request_id": "r"}
    *same, conflict = decide_all(storage, replica_of(storage), body, body, body, {**body, "observation": [0.2, 0, 0, 0]})
    assert len({reply.body for reply in same}) == 1 and same[0].status == 200
    assert conflict.status == 409 and len(logged(storage)) == 1


@pytest.mark.parametrize("durability", ["write", "fsync"])
def test_repetitions_are_found_by_each_name_however_it_is_asked_for(storage: Storage, durability: str) -> None:
    obs = observations(3)
    replica = replica_of(storage, durability=durability)
    pair, other, alone = decide_all(
        storage,
        replica,
        {"observations": obs[:2], "request_ids": ["a", "b"]},
        {"observations": [obs[0], obs[2]], "request_ids": ["b", "c"]},
        {"observation": obs[0], "request_id": "a"},
    )
    assert other.json()["decisions"][0]["error"]["status"] == 409 and other.json()["decisions"][1]["action"] in (0, 1)
    assert alone.json()["action"] == pair.json()["decisions"][0]["action"] and alone.status == 200
    assert sorted(d.decision_id.partition(".")[0] for d in logged(storage)) == ["a", "b", "c"]


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("durability", ["write", "fsync"])
def test_what_the_disk_did_not_take_is_told_again_from_memory_and_then_from_the_log(
    storage: Storage, durability: str, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(storage, random_policy(2))
    release(storage, 2, weights=(1.0,))
    replica = replica_of(storage, durability=durability, on_log_failure="answer")
    log = replica._decisions
    ours = {"observations": observations(3)} if many else {"observation": [0.1, 0, 0, 0]}
    body, other = {**ours, "request_id": "r"}, {"observation": [0.3, 0, 0, 0], "request_id": "other"}

    def full(lines: bytes) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(log.writer, "append", full)
        [first, _] = decide_all(storage, replica, body, other)
        assert first.status == 200 and log.status()["num_buffered"] == (4 if many else 2)
        change(storage, "rollback")  # the new plan's champion would answer something else
        replica._variants.refresh(now=3.0)
        again, conflict = decide_all(storage, replica, body, {**body, "unit_id": "x"})
        assert again.json() == first.json() and log.status()["num_unlogged"] == (4 if many else 2)
        assert conflict.status == 409 if not many else conflict.json()["decisions"][0]["error"]["status"] == 409
        # Negative control: without a look at what is kept it is decided again.
        patched.setattr(replica._ingress.repetitions._recall, "_kept", {})
        assert decide_all(storage, replica, body)[0].json() != first.json()
        log._kept.pop()

    async def back() -> None:
        log.retry()
        await asyncio.sleep(0.1 if durability == "fsync" else 0)

    log._tried_s -= 10
    asyncio.run(back())
    [later] = decide_all(storage, replica, body)
    assert later.json() == first.json() and replica._ingress.repetitions._recall._kept == {}
    assert len(logged(storage)) == (4 if many else 2)


def test_what_was_dropped_is_not_remembered(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = replica_of(storage, on_log_failure="answer")
    monkeypatch.setattr(replica._decisions, "_buffer_bytes", 700)  # of one line and a half

    def full(lines: bytes) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(replica._decisions.writer, "append", full)
    for name in ("kept", "dropped"):
        decide_all(storage, replica, {"observation": [0.1, 0, 0, 0], "request_id": name})
    status = replica._decisions.status()
    assert (status["num_buffered"], status["num_dropped"]) == (1, 1)
    assert [name.partition(".")[0] for name in replica._ingress.repetitions._recall._kept] == ["kept"]


def test_what_is_being_flushed_is_waited_for_and_decided_anew_only_if_that_fails(storage: Storage) -> None:
    """A repetition comes while the first try waits for its fsync, and the plan has changed in between."""
    publish(storage, random_policy(2))
    release(storage, 2, weights=(1.0,))
    replica = replica_of(storage, durability="fsync")
    commit = replica._decisions._commit
    assert commit is not None
    gate, fails = threading.Event(), True

    def slow(descriptor: int) -> None:
        assert gate.wait(10)
        if fails:
            raise OSError("no disk")
        os.fsync(descriptor)

    commit._fsync = slow

    async def thrice(name: str, action: str) -> list[Reply]:
        body = {"observation": [0.1, 0, 0, 0], "request_id": name}
        bodies = [body, body, {**body, "observation": [0.2, 0, 0, 0]}]
        calls = []
        for each in bodies:  # one batch after the other
            calls.append(asyncio.create_task(decide_one(storage, replica, each)))
            await asyncio.sleep(0.01)
        change(storage, action)
        replica._variants.refresh(now=3.0)
        gate.set()
        async with asyncio.timeout(10):
            return await asyncio.gather(*calls)

    assert [reply.status for reply in asyncio.run(thrice("lost", "pause"))] == [503, 503, 503]
    assert replica._ingress.repetitions._being_logged == {}
    gate.clear()
    fails = False
    replica._decisions._tried_s -= 10  # as if it had been failing for long
    first, again, conflict = asyncio.run(thrice("kept", "rollback"))
    assert (first.status, again.json(), conflict.status) == (200, first.json(), 409) and first.json()["version"] == 2
    assert [d.decision_id.partition(".")[0] for d in logged(storage)].count("kept") == 1
    assert replica._ingress.repetitions._being_logged == {}


@pytest.mark.parametrize("names", ["request_id", "request_ids", "some of them"])
def test_what_another_replica_has_not_flushed_is_told_once_it_is_on_the_disk(storage: Storage, names: str) -> None:
    """The first replica's fsync hangs; the second finds the line, and must not tell it before a power cut would leave it."""
    body: dict[str, Any] = {"observations": observations(2), "request_ids": ["a", "b"]}
    if names == "request_id":
        body = {"observation": [0.1, 0, 0, 0], "request_id": "a"}
    again = {"observations": observations(3), "request_ids": ["a", "b", "c"]} if names == "some of them" else body
    slow, fast = Disk(), Disk()
    first, second = (replica_of(storage, durability="fsync") for _ in range(2))
    for replica, disk in ((first, slow), (second, fast)):
        replica._decisions._commit._fsync = disk.fsync
    decision_id = DecisionIds.of(storage).name("a").encode()

    async def scenario() -> None:
        slow.can_go_on.clear()
        fast.can_go_on.clear()
        posts = [(first, body), (second, again)]
        calls = []
        for replica, asked in posts:
            calls.append(asyncio.create_task(decide_one(storage, replica, asked)))
            await asyncio.sleep(0.05)
        assert not calls[1].done() and decision_id not in fast.after_power_cut(storage.decisions(NAME))
        fast.can_go_on.set()
        told = await asyncio.wait_for(calls[1], 10)
        assert told.status == 200 and not calls[0].done()
        flushed = [path for path in storage.decisions(NAME).iterdir() if path.name.startswith(first.name)]
        assert [fast.is_flushed(path) for path in flushed] == [True]
        fast.fails_next = True
        lost = await decide_one(storage, second, body)
        assert lost.status == 503 and "not known to be on the disk" in lost.error
        status = second._decisions.status()
        assert (status["state"], status["num_failures"]) == ("failing", 1)
        slow.can_go_on.set()
        mine = await asyncio.wait_for(calls[0], 10)
        told_rows = told.json()["decisions"][:2] if "decisions" in told.json() else told.json()
        assert told_rows == (mine.json()["decisions"] if "decisions" in mine.json() else mine.json())

    asyncio.run(scenario())


def test_when_the_other_replicas_logs_cannot_be_read_only_named_requests_fail(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = replica_of(storage)

    def refuse() -> None:
        raise PermissionError(13, "not yours")

    monkeypatch.setattr(replica._ingress.repetitions._recall, "catch_up", refuse)
    named, unnamed = decide_all(storage, replica, {"observation": [0, 0, 0, 0], "request_id": "r"}, {"observation": [0, 0, 0, 0]})
    assert (named.status, unnamed.status) == (503, 200) and "not yours" in named.error


def test_a_batch_that_fails_is_told_to_each_request_once(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answered twice, the second answer would be taken for that of the next request of its connection."""
    replica, told = replica_of(storage), []
    monkeypatch.setattr(replica._ingress.decider, "decide", lambda rows, snapshot: 1 / 0)

    async def run() -> None:
        for number in range(2):
            body = b'{"observation":[0,0,0,0],"request_id":"r"}'
            key = replica._keys.check(f"Bearer {storage.api_key_file.read_text()}".encode(), "decide")
            one = replica._ingress.ask(body, key, started_s=0.0)
            replica._ingress.batcher.submit(one, lambda result, number=number: told.append(number))
        for _ in range(10):
            await asyncio.sleep(0)

    asyncio.run(run())
    assert sorted(told) == [0, 1]


def test_a_later_life_of_a_replica_remembers_what_the_earlier_one_logged(storage: Storage) -> None:
    body = {"observation": [0.1, 0, 0, 0], "request_id": "r"}
    [first] = decide_all(storage, replica_of(storage), body)
    [again] = decide_all(storage, replica_of(storage), body)
    [conflict] = decide_all(storage, replica_of(storage), {**body, "unit_id": "x"})
    assert again.json() == first.json() and conflict.status == 409 and len(logged(storage)) == 1


# --- replay ---


def test_what_was_answered_under_a_shield_or_among_many_replays(storage: Storage) -> None:
    config: dict[str, Any] = {"shield": {"low": 1}, "fallback": {"action": 1}}
    publish(storage, random_policy(2))
    release(storage, 2, weights=(0.5, 1.0))
    replica = replica_of(storage, **config)
    decide_all(storage, replica, {"observations": observations(1000), "unit_ids": [f"u{i}" for i in range(1000)]})
    by_rung: dict[str, list[Decision]] = {}
    for decision in logged(storage):
        by_rung.setdefault(decision.rung, []).append(decision)
    assert set(by_rung) == {"arm", "champion", "fixed"}
    for decision in [*by_rung["arm"][:5], *by_rung["champion"][:5]]:
        assert replay(storage, NAME, decision.decision_id)["equal"], decision
    with pytest.raises(NotFound, match="answered by the fixed step"):
        replay(storage, NAME, by_rung["fixed"][0].decision_id)


@pytest.mark.parametrize("changed", ["action", "seed", "propensity"])
def test_a_changed_line_does_not_replay(storage: Storage, changed: str) -> None:
    decide_all(storage, replica_of(storage), {"observation": [0.1, 0.2, 0.3, 0.4], "request_id": "r"})
    [path] = storage.decisions(NAME).glob("*.jsonl")
    [decision] = logged(storage)
    other = {"action": 1 - decision.action, "seed": decision.seed + 1, "propensity": decision.propensity / 2}[changed]
    header, _ = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(header + encode(msgspec.structs.replace(decision, **{changed: other})) + b"\n")
    assert not replay(storage, NAME, decision.decision_id)["equal"]
