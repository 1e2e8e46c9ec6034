"""The request path without Ray: what is answered is logged first, and what is logged can be computed again."""

import asyncio
import dataclasses
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from policies.distributions import seed_of
from policies.errors import IntegrityError
from policies.golden import Golden
from policies.network import Architecture, Gaussian, tensor_shapes
from policies.observations import Box
from policies.policy import Policy
from policies.registry import Registry
from policies.spaces import Numbers, Spaces
from policies.storage import Storage, open_storage
from policies.traffic import Arm, TrafficPlan, assign, champion_only, with_canary
from serve_app.decision_ids import DecisionIds
from serve_app.replica import PolicyReplica
from serve_app.variants import Variant
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
    snapshot_of,
    variant_of,
)
from trimtab.replay import replay


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path / "storage")
    publish(storage, random_policy(1))
    return storage


def put_in_force(replica: PolicyReplica, plan: TrafficPlan, *variants: Variant) -> None:
    replica._variants.snapshot = snapshot_of(plan, *variants)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 8, 9, 64])
def test_a_logged_decision_replays_bit_for_bit_from_any_batch(storage: Storage, batch_size: int) -> None:
    replies = decide_all(storage, replica_of(storage), *[{"observation": obs} for obs in observations(batch_size)])
    assert [reply.status for reply in replies] == [200] * batch_size
    policy = Registry(storage.registry(NAME)).bundle(1).policy
    decisions = logged(storage)
    assert len(decisions) == batch_size
    for decision in decisions:
        obs_1D = np.array([decision.observation]).astype(np.float32)
        again = policy.distribution.choose(policy.distributions(obs_1D)[0], decision.mode, decision.seed)
        assert again == (decision.action, decision.propensity)  # equal floats, not close ones


@pytest.mark.parametrize(("deviation", "propensity"), [(1e-6, "inf"), (1e6, "0")])
def test_what_has_no_propensity_that_can_be_written_down_is_not_answered(tmp_path: Path, deviation: float, propensity: str):
    numbers = Numbers(np.full(60, -np.inf, np.float32), np.full(60, np.inf, np.float32))
    spaces = Spaces(Box(np.full(2, -1, np.float32), np.ones(2, np.float32)), numbers)
    architecture = Architecture((4,), gaussian=Gaussian())
    tensors = {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(architecture, spaces).items()}
    tensors |= {"normaliser.scale": np.ones(2, np.float32), "policy.log_std": np.full(60, np.log(deviation), np.float32)}
    if propensity == "0":
        architecture = Architecture((4,), gaussian=Gaussian(log_std_range=(-20, 20)))
    policy, obs_ND = Policy(spaces, architecture, tensors), np.random.default_rng(0).random((32, 2), np.float32)
    storage, golden = open_storage(tmp_path / "storage"), Golden(obs_ND, policy.distributions(obs_ND))
    with pytest.raises(IntegrityError, match=f"propensity {propensity}: .*set serving.mode to greedy"):
        publish(storage, policy, golden=golden, mode="sample")
    publish(storage, policy, golden=golden, mode="greedy")
    replica = replica_of(storage)
    [reply] = decide_all(storage, replica, {"observation": [0, 0]})
    assert reply.status == 200 and logged(storage)[0].propensity == 1
    # One that came into a replica all the same, from a publisher that did not check:
    put_in_force(replica, champion_only(9, 1), variant_of(1, policy))
    [reply] = decide_all(storage, replica, {"observation": [0, 0]})
    assert (reply.status, len(logged(storage))) == (503, 1)
    assert f"propensity is {propensity}, and {propensity} over all arms" in reply.error


def test_another_version_would_not_reproduce_the_log(storage: Storage) -> None:
    """Negative control: the replay above does not hold by accident."""
    decide_all(storage, replica_of(storage), *[{"observation": obs} for obs in observations(32)])
    other = random_policy(99)
    obs_BD = np.array([decision.observation for decision in logged(storage)]).astype(np.float32)
    again = [other.distribution.choose(p_A, "sample", d.seed) for p_A, d in zip(other.distributions(obs_BD), logged(storage))]
    assert not any(propensity == decision.propensity for (_, propensity), decision in zip(again, logged(storage)))


def test_the_answer_is_what_the_log_says(storage: Storage) -> None:
    body = {"observation": [0.1, 2, -0.3, 0.4], "unit_id": "u", "episode_id": "e", "request_id": "r-1"}
    [reply] = decide_all(storage, replica_of(storage), *[body])
    [decision] = logged(storage)
    assert reply.json() == {
        "decision_id": decision.decision_id,
        "action": decision.action,
        "policy": NAME,
        "version": 1,
        "arm": "champion",
        "propensity": decision.propensity,
        "fallback": None,
    }
    assert decision.decision_id.startswith("r-1.") and len(decision.decision_id) == len("r-1.") + 12
    assert (decision.unit_id, decision.episode_id, decision.observation) == ("u", "e", [0.1, 2.0, -0.3, 0.4])
    assert decision.seed == seed_of(decision.decision_id)
    assert decision.mixture_propensity == decision.propensity, "with one arm the mixture is the arm"


def test_the_unit_is_the_request_when_none_is_named(storage: Storage) -> None:
    decide_all(storage, replica_of(storage), {"observation": [0, 0, 0, 0], "request_id": "r-1"})
    assert logged(storage)[0].unit_id == "r-1"


def test_the_line_is_in_the_file_before_the_answer_is_sent(storage: Storage) -> None:
    replica, key = replica_of(storage), storage.api_key_file.read_text()
    ids_in_log_at_answer: list[bool] = []

    async def run() -> None:
        async def receive() -> dict:
            return {"type": "http.request", "body": b'{"observation":[0,0,0,0],"request_id":"r-1"}', "more_body": False}

        async def send(message: dict) -> None:
            ids_in_log_at_answer.append(any(decision.decision_id.startswith("r-1.") for decision in logged(storage)))

        headers = [(b"authorization", b"Bearer " + key.encode())]
        await replica.api({"type": "http", "method": "POST", "path": "/v1/decide", "headers": headers}, receive, send)

    asyncio.run(run())
    assert ids_in_log_at_answer == [True, True]


def no_space(lines: bytes) -> None:
    raise OSError(28, "No space left on device")


def test_what_cannot_be_logged_is_not_answered_and_service_resumes(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.durable_log.RETRY_S", 0.0)
    replica = replica_of(storage)
    writer = replica._decisions.writer
    append = writer.append
    writer.append = no_space  # type: ignore[method-assign, assignment]
    replies = decide_all(storage, replica, *[{"observation": [0, 0, 0, 0]}] * 3)
    assert [reply.status for reply in replies] == [503] * 3
    assert "No space left" in replies[0].error and replies[0].headers["retry-after"] == "1"
    assert replica.report().log["state"] == "failing" and "No space" in replica.report().log["last_error"]
    writer.append = append  # type: ignore[method-assign]
    assert decide_all(storage, replica, {"observation": [0, 0, 0, 0]})[0].status == 200
    assert replica.report().log["state"] == "ok" and len(logged(storage)) == 1


def test_where_it_is_so_configured_serving_goes_on_without_a_log_and_catches_up(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.durable_log.RETRY_S", 0.0)
    replica = replica_of(storage, on_log_failure="answer")
    writer = replica._decisions.writer
    append = writer.append
    writer.append = no_space  # type: ignore[method-assign, assignment]
    replies = decide_all(storage, replica, *[{"observation": [0, 0, 0, 0], "request_id": f"r{i}"} for i in range(3)])
    assert [reply.status for reply in replies] == [200] * 3 and logged(storage) == []
    assert (replica.report().log["num_unlogged"], replica.report().log["num_buffered"]) == (3, 3)
    writer.append = append  # type: ignore[method-assign]
    replica._decisions.retry()
    assert [d.decision_id for d in logged(storage)] == [reply.json()["decision_id"] for reply in replies]


def test_with_fsync_no_answer_leaves_before_the_disk_has_its_decision(storage: Storage) -> None:
    """The disk is held up: meanwhile nothing is answered, and then everything that waited, after one more flush."""
    replica, gate, num_flushes = replica_of(storage, durability="fsync"), threading.Event(), 0
    commit = replica._decisions._commit
    assert commit is not None

    def slow(descriptor: int) -> None:
        nonlocal num_flushes
        num_flushes += 1
        assert gate.wait(10)
        os.fsync(descriptor)

    commit._fsync = slow

    async def run() -> list[int]:
        async with asyncio.timeout(20):
            calls = []
            for _ in range(10):
                calls.append(asyncio.create_task(decide_one(storage, replica, {"observation": [0, 0, 0, 0]})))
                await asyncio.sleep(0.01)
            assert not any(task.done() for task in calls) and len(logged(storage)) == 10, "written, and not answered"
            gate.set()
            statuses = [(await task).status for task in calls]
            await replica._stop()
            return statuses

    assert asyncio.run(run()) == [200] * 10
    assert 2 <= num_flushes <= 6, "what waited for the first flush shared the next ones"


@pytest.mark.parametrize("durability", ["write", "fsync"])
def test_repetitions_that_come_while_the_first_is_being_flushed_are_one_decision(storage: Storage, durability: str) -> None:
    replica, gate = replica_of(storage, durability=durability), threading.Event()
    commit = replica._decisions._commit
    if commit is not None:
        commit._fsync = lambda descriptor: (gate.wait(10), os.fsync(descriptor))[1]

    async def run() -> list[Reply]:
        async with asyncio.timeout(20):
            calls = []
            for number in range(6):  # some in one batch, some in later ones; the last one has another body
                body = {"observation": [0.1 if number < 5 else 0.2, 0, 0, 0], "request_id": "r"}
                calls.append(asyncio.create_task(decide_one(storage, replica, body)))
                await asyncio.sleep(0.01 * (number % 2))
            gate.set()
            replies = [await task for task in calls]
            await replica._stop()
            return replies

    replies = asyncio.run(run())
    assert [reply.status for reply in replies] == [200] * 5 + [409]
    assert len({reply.body for reply in replies[:5]}) == 1 and len(logged(storage)) == 1
    assert replica._ingress.repetitions._being_logged == {}


@pytest.mark.parametrize("durability", ["write", "fsync"])
def test_however_many_repeat_a_request_its_logged_line_answers_them_all_at_once(storage: Storage, durability: str) -> None:
    """The first one's batch, and one for all others; each round for one of them would be 50."""
    replica, sizes = replica_of(storage, durability=durability), []
    handle = replica._ingress.batcher._handle
    replica._ingress.batcher._handle = lambda asks, delivers: (sizes.append(len(asks)), handle(asks, delivers))[1]
    replies = decide_all(storage, replica, *[{"observation": [0.1, 0, 0, 0], "request_id": "r"}] * 50)
    assert [reply.status for reply in replies] == [200] * 50 and len({reply.body for reply in replies}) == 1
    assert len(logged(storage)) == 1 and sizes == [50, 49]


def test_who_repeats_a_request_that_is_being_flushed_is_sent_elsewhere_when_the_replica_stops(storage: Storage) -> None:
    replica, gate = replica_of(storage, durability="fsync", log_timeout_s=60), threading.Event()
    commit = replica._decisions._commit
    assert commit is not None
    commit._fsync = lambda descriptor: (gate.wait(30), os.fsync(descriptor))[1]
    body = {"observation": [0.1, 0, 0, 0], "request_id": "r"}

    async def run() -> tuple[list[int], int, Reply, Reply]:
        async with asyncio.timeout(20):
            calls = [asyncio.create_task(decide_one(storage, replica, body)) for _ in range(3)]
            await asyncio.sleep(0.05)
            stop = asyncio.create_task(replica._stop())
            repeats = [(await asyncio.wait_for(repeat, 5)).status for repeat in calls[1:]]
            late = await asyncio.wait_for(decide_one(storage, replica, body), 5)
            num_logged = len(logged(storage))
            gate.set()
            await stop
            return repeats, num_logged, late, await calls[0]

    repeats, num_logged, late, first = asyncio.run(run())
    assert repeats == [503, 503] and num_logged == 1
    assert (late.status, late.headers["retry-after"]) == (503, "1") and "ask again" in late.error
    assert first.status == 200, "it was on the disk before the replica had ended"


def test_the_same_request_id_gets_the_same_decision_from_every_replica(storage: Storage) -> None:
    bodies = [{"observation": obs, "request_id": f"r-{index}"} for index, obs in enumerate(observations(100))]
    first = [reply.json() for reply in decide_all(storage, replica_of(storage), *bodies)]
    second = [reply.json() for reply in decide_all(storage, replica_of(storage), *bodies[::-1])]
    assert first == second[::-1]
    fresh = [
        reply.json() for reply in decide_all(storage, replica_of(storage), *[{"observation": b["observation"]} for b in bodies])
    ]
    # Negative control: without the id another number is drawn, so some of 100 sampled actions differ:
    # of 20 all are the same in 2 % of all runs, of 100 in one of 10^8.
    assert [answer["action"] for answer in first] != [answer["action"] for answer in fresh]


def test_the_split_and_the_mixture_propensity_are_what_the_plan_says(storage: Storage) -> None:
    publish(storage, random_policy(2))
    release(storage, 2, weights=(0.25,))
    decide_all(
        storage, replica_of(storage), *[{"observation": obs, "unit_id": f"u{n}"} for n, obs in enumerate(observations(40))]
    )
    plan = with_canary(4, 1, champion=1, candidate=2, weight=0.25)
    policies = {1: random_policy(1), 2: random_policy(2)}
    decisions = logged(storage)
    assert {decision.arm for decision in decisions} == {"champion", "canary"}
    for decision in decisions:
        assert (decision.plan, decision.release) == (4, 1)
        assert (decision.arm, decision.version) == (assign(decision.unit_id, plan).name, 2 if decision.arm == "canary" else 1)
        obs_1D = np.array([decision.observation]).astype(np.float32)
        p = {version: policy.distributions(obs_1D)[0][decision.action] for version, policy in policies.items()}
        assert decision.propensity == p[decision.version]
        assert decision.mixture_propensity == pytest.approx(0.25 * p[2] + 0.75 * p[1], abs=1e-15)


class NanForPositive(Variant):
    """A version whose network overflows on some observations."""

    def distributions(self, obs_BD: np.ndarray, mask_BA: np.ndarray | None) -> np.ndarray:
        parameters_BP = super().distributions(obs_BD, mask_BA).copy()
        parameters_BP[obs_BD[:, 1] > 0] = np.nan
        return parameters_BP


class Raising(Variant):
    """A version whose code fails."""

    def distributions(self, obs_BD: np.ndarray, mask_BA: np.ndarray | None) -> np.ndarray:
        raise FloatingPointError("matrix is tired")


EVERYBODY = TrafficPlan(9, 1, (Arm("canary", 2, 1.0), Arm("champion", 1, 0.0)))


def test_a_canary_that_raises_is_answered_for_by_the_champion(storage: Storage) -> None:
    replica = replica_of(storage)
    put_in_force(replica, EVERYBODY, variant_of(1, random_policy(1)), Raising(2, "d2", random_policy(2), "sample"))
    [reply] = decide_all(storage, replica, {"observation": [0.1, 0.2, 0.3, 0.4]})
    [decision] = logged(storage)
    assert reply.status == 200
    assert (decision.arm, decision.version, decision.digest) == ("canary", 1, "digest-1")
    assert reply.json()["fallback"] == decision.fallback
    assert decision.fallback is not None and "matrix is tired" in decision.fallback
    champions = random_policy(1).distributions(np.array([[0.1, 0.2, 0.3, 0.4]], np.float32))[0][decision.action]
    # The canary's share is answered by the champion as well, so the mixture is the champion: 1.0 * p + 0.0 * p.
    assert decision.propensity == decision.mixture_propensity == champions


def test_a_canary_with_narrower_bounds_answers_what_the_champion_takes_and_replays_it(storage: Storage) -> None:
    wide = random_policy(2)
    narrow = Policy(
        dataclasses.replace(wide.spaces, observation=Box(-np.ones(4, np.float32), np.ones(4, np.float32))),
        wide.architecture,
        wide.tensors,
    )
    publish(storage, narrow)
    canary = Registry(storage.registry(NAME)).bundle(2)
    replica = replica_of(storage)
    put_in_force(replica, EVERYBODY, variant_of(1, random_policy(1)), Variant(2, canary.digest, canary.policy, "sample"))
    [reply] = decide_all(storage, replica, {"observation": [4.0, 3.0, 0.3, 0.4]})
    [decision] = logged(storage)
    assert (reply.status, decision.version) == (200, 2)
    assert replay(storage, NAME, decision.decision_id)["equal"]


def test_a_row_that_gives_nan_falls_back_alone(storage: Storage) -> None:
    replica = replica_of(storage)
    put_in_force(replica, EVERYBODY, variant_of(1, random_policy(1)), NanForPositive(2, "d2", random_policy(2), "sample"))
    bodies = [{"observation": [0, sign, 0, 0], "request_id": f"r{n}"} for n, sign in enumerate((-1, 1, -1))]
    assert [reply.json()["version"] for reply in decide_all(storage, replica, *bodies)] == [2, 1, 2]
    assert [decision.fallback for decision in logged(storage)] == [None, "version 2 gave NaN", None]


def test_a_row_that_nobody_can_answer_fails_alone(storage: Storage) -> None:
    replica = replica_of(storage)
    put_in_force(replica, champion_only(9, 1), NanForPositive(1, "d1", random_policy(1), "sample"))
    replies = decide_all(storage, replica, *[{"observation": [0, sign, 0, 0]} for sign in (-1, 1, -1)])
    assert [reply.status for reply in replies] == [200, 503, 200]
    assert "version 1 gave NaN" in replies[1].error
    assert len(logged(storage)) == 2


def test_greedy_sends_the_most_probable_action_with_certainty(storage: Storage) -> None:
    replica = replica_of(storage)
    put_in_force(replica, champion_only(9, 1), variant_of(1, random_policy(1), mode="greedy"))
    decide_all(storage, replica, *[{"observation": obs} for obs in observations(20)])
    for decision in logged(storage):
        p_A = random_policy(1).distributions(np.array([decision.observation]).astype(np.float32))[0]
        assert (decision.action, decision.propensity) == (int(p_A.argmax()), 1.0)


def test_the_action_sent_counts_from_the_spaces_first_action(storage: Storage) -> None:
    replica, policy = replica_of(storage), random_policy(1, start=5)
    put_in_force(replica, champion_only(9, 1), variant_of(1, policy, mode="greedy"))
    [reply] = decide_all(storage, replica, {"observation": [0, 0, 0, 0]})
    index = int(policy.distributions(np.zeros((1, 4), np.float32))[0].argmax())
    assert reply.json()["action"] == logged(storage)[0].action == 5 + index


def test_only_our_own_decision_ids_are_recognised() -> None:
    ours, others = DecisionIds(b"secret"), DecisionIds(b"another")
    name = ours.name("r-1")
    assert ours.is_ours(name)
    assert not others.is_ours(name)
    assert not any(
        ours.is_ours(forged) for forged in ("", ".", "r-1", "r-1.", "r-2." + name[-12:], name[:-1] + "g", name + "\n", "é.é")
    )


def test_an_episode_without_a_unit_stays_on_one_arm(storage: Storage) -> None:
    """Else the arm is drawn anew for each request, and nearly every episode of a release is answered by two versions."""
    replica = replica_of(storage)
    plan = with_canary(4, 1, champion=1, candidate=2, weight=0.5)
    put_in_force(replica, plan, variant_of(1, random_policy(1)), variant_of(2, random_policy(2)))
    decide_all(storage, replica, *[{"observation": obs, "episode_id": "e"} for obs in observations(40)])
    assert len({decision.arm for decision in logged(storage)}) == 1
    decide_all(storage, replica, *[{"observation": obs} for obs in observations(40)])
    assert {decision.arm for decision in logged(storage)} == {"canary", "champion"}  # the control: without an episode
