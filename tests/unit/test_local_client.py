"""Does a client that decides by itself decide what the endpoint would, and does the endpoint know of it?"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from policies.distributions import Propensity
from policies.errors import (
    ClusterError,
    IntegrityError,
    Overloaded,
    RequestInvalid,
    ServiceUnavailable,
    Unauthorized,
)
from policies.network import Architecture, Gaussian
from policies.observations import Box, Categories, Group
from policies.policy import Policy
from policies.records import Decision, Feedback
from policies.registry import Registry, change_release
from policies.spaces import Choices, Numbers, Spaces
from policies.storage import Storage, open_storage
from policies.traffic import Arm, TrafficPlan, assign, champion_only, with_canary, with_holdout
from tests.bundles import golden_as_trained, policy_on
from tests.direct_replica import DirectReplica, direct_replica
from tests.scripted_server import Exchange, serving
from tests.serving_helpers import NAME, logged, observations, publish, random_policy, release, spoil
from trimtab import local_client, local_log, local_plan, plan_follower
from trimtab.client import Client
from trimtab.local_client import LocalClient
from trimtab.local_log import LocalLog, Report
from trimtab.local_plan import LocalPlan, LocalVersion, draw
from trimtab.replay import replay
from trimtab.retrying import Call


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path / "storage")
    publish(storage, random_policy(1))
    return storage


@pytest.fixture
def replica(storage: Storage) -> Iterator[DirectReplica]:
    with direct_replica(storage, request_modes=("greedy", "sample")) as replica:
        yield replica


@pytest.fixture
def client(replica: DirectReplica) -> Iterator[LocalClient]:
    with Client.local(replica.url, replica.key) as client:
        yield client


def until(condition: Callable[[], Any]) -> Any:
    """Wait for what a thread of the client does; 20 s is far beyond any of its intervals."""
    for _ in range(2000):
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("it never came")


def sent(client: LocalClient) -> bool:
    return client.status().log.buffered == 0


# --- the same decisions ---


def test_the_same_request_gets_the_same_arm_version_and_distribution_as_at_the_endpoint(storage: Storage) -> None:
    """Greedily the whole answer is the same; a sample is drawn from the same distribution with its own id's number."""
    publish(storage, random_policy(2))
    release(storage, 2, weights=(0.4, 1.0))
    with direct_replica(storage) as replica:
        local, served = Client.local(replica.url, replica.key), Client(replica.url, replica.key)
        for index, observation in enumerate(observations(60)):
            options = {"unit_id": f"u{index}", "episode_id": f"e{index}", "request_id": f"r{index}"}
            ours, theirs = local.decide(observation, **options), served.decide(observation, explain=True, **options)
            assert {key: ours[key] for key in ("policy", "version", "arm", "fallback")} == {
                key: theirs[key] for key in ("policy", "version", "arm", "fallback")
            }
            assert ours["propensity"] == theirs["explanation"]["distribution"][ours["action"]]
        local.close()
        served.close()
    by_request: dict[str, list[Decision]] = {}
    for decision in logged(storage):
        by_request.setdefault(decision.decision_id.split(".")[0], []).append(decision)
    assert len(by_request) == 60 and {len(pair) for pair in by_request.values()} == {2}
    for ours, theirs in by_request.values():
        if ours.action == theirs.action:  # the same action under the same plan is equally probable over all arms
            assert ours.mixture_propensity == theirs.mixture_propensity != ours.propensity
    assert {decision.arm for decision in logged(storage)} == {"canary", "champion"}


def test_a_greedy_policy_answers_the_same_in_every_part(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "storage")
    publish(storage, random_policy(1), mode="greedy")
    with direct_replica(storage) as replica, Client.local(replica.url, replica.key) as local:
        served = Client(replica.url, replica.key)
        for observation in observations(30):
            ours, theirs = local.decide(observation, unit_id="u"), served.decide(observation, unit_id="u")
            assert {**ours, "decision_id": 0} == {**theirs, "decision_id": 0}
        served.close()


def test_every_local_decision_replays_bit_for_bit_from_the_log(storage: Storage, client: LocalClient) -> None:
    told = [client.decide(observation) for observation in observations(40)]
    until(lambda: sent(client))
    assert {decision["action"] for decision in told} == {0, 1}
    for decision in told:
        again = replay(storage, NAME, decision["decision_id"])
        assert again["equal"] and again["logged"]["action"] == decision["action"]


def test_another_version_would_not_replay_it(storage: Storage, client: LocalClient) -> None:
    """Negative control: the replay above does not hold by accident."""
    client.decide([0.1, 0.2, 0.3, 0.4])
    until(lambda: sent(client))
    [decision] = logged(storage)
    parameters_P = random_policy(9).distributions(np.array([decision.observation], np.float32))[0]
    assert parameters_P[decision.action] != decision.propensity


BOUND = np.ones(3, np.float32)
FLAT = Box(-BOUND, BOUND)
DICT = Group((Categories((3,), (0,), ()), FLAT), ("kind", "where"))
POLICIES = {
    "dict": (Spaces(DICT, Choices("discrete", (3,), (0,), ())), {"kind": 2, "where": [0.1, -0.2, 0.3]}, None),
    "mask": (Spaces(FLAT, Choices("discrete", (3,), (2,), ()), True), [0.1, 0.2, 0.3], [0, 1, 0]),
    "mask within": (Spaces(DICT, Choices("discrete", (3,), (0,), ()), True),
                    {"kind": 0, "where": [0.0, 0.0, 0.0], "action_mask": [1, 0, 0]}, None),
    "numbers": (Spaces(FLAT, Numbers(-BOUND, BOUND)), [0.1, 0.2, 0.3], None),
    "several": (Spaces(FLAT, Choices("multi_discrete", (2, 3), (0, 0), (2,))), [0.1, 0.2, 0.3], None),
}  # fmt: skip


@pytest.mark.parametrize("kind", POLICIES)
def test_policies_of_all_spaces_decide_locally_and_replay(tmp_path: Path, kind: str) -> None:
    spaces, observation, mask = POLICIES[kind]
    policy = policy_on(spaces, Architecture((8,), gaussian=Gaussian() if isinstance(spaces.action, Numbers) else None))
    storage = open_storage(tmp_path / "storage")
    publish(storage, policy, golden=golden_for(policy))
    with direct_replica(storage) as replica, Client.local(replica.url, replica.key) as local:
        told = local.decide(observation, action_mask=mask)
        until(lambda: sent(local))
        if "mask" in kind:
            assert told["action"] == (3 if kind == "mask" else 0) and told["propensity"] == 1.0
        [decision] = logged(storage)
        assert (decision.decision_id, decision.action) == (told["decision_id"], told["action"])
        if kind != "mask within":  # there the record has the mask beside the observation, as the endpoint's
            assert decision.observation == observation
        assert replay(storage, NAME, told["decision_id"])["equal"]


def golden_for(policy: Policy):
    if not policy.spaces.has_mask:
        return golden_as_trained(policy)
    return golden_as_trained(policy, np.eye(policy.spaces.mask_size, dtype=bool)[np.arange(33) % policy.spaces.mask_size])


def test_arrays_are_taken_and_what_the_caller_writes_into_them_later_is_not_logged(storage: Storage, client: LocalClient) -> None:
    array, numbers = np.array([0.5, 0.25, 0.125, 1.0], np.float32), [0.5, 0.25, 0.125, 1.0]
    for observation in (array, numbers, [np.float32(n) for n in numbers], tuple(numbers)):
        client.decide(observation)
    array[:] = numbers[:] = [9.0] * 4
    client.close()
    assert [decision.observation for decision in logged(storage)] == [[0.5, 0.25, 0.125, 1.0]] * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"observation": [0.0]}, "observation"),
        ({"observation": [0.0, 0.0, 0.0, float("nan")]}, "observation"),
        ({"observation": [9.0, 0.0, 0.0, 0.0]}, "outside"),
        ({"observation": [0.0] * 4, "action_mask": [1, 1]}, "without masks"),
        ({"observation": [0.0] * 4, "request_id": "a.b"}, "request_id"),
        ({"observation": [0.0] * 4, "request_id": "x" * 65}, "request_id"),
        ({"observation": [0.0] * 4, "unit_id": ""}, "unit_id"),
        ({"observation": [0.0] * 4, "episode_id": "e" * 257}, "episode_id"),
    ],
)
def test_what_the_endpoint_would_refuse_is_refused_here(client: LocalClient, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestInvalid, match=words):
        client.decide(**options)
    assert client.status().log == local_log.LogCounts(0, 0, 0, 0, None)


# --- the rule by itself ---


def local_version(version: int, policy: Policy, mode: str = "sample") -> LocalVersion:
    return LocalVersion.of(version, f"digest-{version}", mode, policy)


def plan_of(plan: TrafficPlan, *versions: LocalVersion) -> LocalPlan:
    by_version = {version.version: version for version in versions}
    return LocalPlan(plan, by_version, by_version[plan.arm("champion").version])


def broken_policy() -> Policy:
    """Return a policy whose logits are infinite for any positive observation."""
    policy = policy_on(random_policy(1).spaces, Architecture((4,), "relu"))
    large = {name: np.full_like(tensor, 1e30) for name, tensor in policy.tensors.items() if name.endswith("weight")}
    plain = {"normaliser.mean": np.zeros(4, np.float32), "normaliser.scale": np.ones(4, np.float32)}
    return Policy(policy.spaces, policy.architecture, {**policy.tensors, **large, **plain})


def test_the_mixture_is_the_sum_over_arms_of_weight_times_propensity() -> None:
    greedy, sampling, held = local_version(1, random_policy(1), "greedy"), local_version(2, random_policy(2)), random_policy(3)
    plan = with_holdout(with_canary(3, 1, champion=1, candidate=2, weight=0.25), 3, 0.2)
    loaded = plan_of(plan, greedy, sampling, local_version(3, held))
    seen = set()
    for index, features in enumerate(observations(200)):
        drawn = draw(loaded, f"u{index}", features, None, index << 44)
        seen.add(drawn.arm)
        assert drawn.arm == assign(f"u{index}", plan).name
        # 20 % are held out; of the rest a quarter, 20 % of all, is the canary's and 60 % the champion's.
        p = {n: random_policy(n).distributions(np.array([features], np.float32))[0] for n in (1, 2, 3)}
        greedily = float(drawn.action == p[1].argmax())
        expected = 0.2 * p[3][drawn.action] + 0.2 * p[2][drawn.action] + 0.6 * greedily
        assert drawn.mixture_propensity == pytest.approx(expected, rel=1e-12)
    assert seen == {"holdout", "canary", "champion"}


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_the_champion_answers_for_a_version_that_cannot_and_nobody_for_both() -> None:
    plan = with_canary(3, 1, champion=1, candidate=2, weight=0.5)
    loaded = plan_of(plan, local_version(1, random_policy(1)), local_version(2, broken_policy()))
    unit_id = next(f"u{i}" for i in range(99) if assign(f"u{i}", plan).name == "canary")
    drawn = draw(loaded, unit_id, [0.1] * 4, None, 1 << 50)
    assert (drawn.arm, drawn.version.version, drawn.fallback) == ("canary", 1, "version 2 gave NaN")
    assert drawn.mixture_propensity == pytest.approx(drawn.propensity)  # both arms send what the champion says
    nobody = plan_of(champion_only(4, 2), local_version(2, broken_policy()))
    with pytest.raises(ServiceUnavailable, match="no version can answer"):
        draw(nobody, "u", [0.1] * 4, None, 0)


def test_threads_share_a_client_without_getting_each_others_numbers(storage: Storage, client: LocalClient) -> None:
    rows = observations(400)
    told: list[dict[str, Any]] = [{}] * 400

    def run(start: int) -> None:
        for index in range(start, 400, 4):
            told[index] = client.decide(rows[index])

    threads = [threading.Thread(target=run, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({decision["decision_id"] for decision in told}) == 400
    p_BA = random_policy(1).distributions(np.array(rows, np.float32))
    assert [decision["propensity"] for decision in told] == [p_A[d["action"]] for p_A, d in zip(p_BA, told)]


# --- following the plan ---


def test_a_new_plan_comes_into_force_as_a_whole(storage: Storage, replica: DirectReplica, client: LocalClient) -> None:
    assert {client.decide([0.0] * 4, unit_id=f"u{n}")["version"] for n in range(50)} == {1}
    publish(storage, random_policy(2))
    release(storage, 2, weights=(0.5, 1.0))
    replica.refresh()
    plan = replica.replica._variants.snapshot.plan
    until(lambda: client.status().plan == plan.number)
    for n in range(50):
        arm = assign(f"u{n}", plan)
        assert (client.decide([0.0] * 4, unit_id=f"u{n}")["arm"], set(client.status().versions)) == (arm.name, {1, 2})
    Registry(storage.registry(NAME)).append(lambda state: change_release(state, "rollback", reason="worse"), now=2000.0)
    replica.refresh()
    until(lambda: set(client.status().versions) == {1})
    client.close()
    assert {(d.plan, d.version) for d in logged(storage)} >= {(plan.number, 1), (plan.number, 2)}
    assert all(d.digest == Registry(storage.registry(NAME)).state().version(d.version).digest for d in logged(storage))


def test_a_replica_that_lags_behind_does_not_bring_an_older_plan_back(
    storage: Storage, replica: DirectReplica, client: LocalClient
) -> None:
    publish(storage, random_policy(2))
    release(storage, 2, weights=(0.5, 1.0))
    before = replica.replica._variants.snapshot
    replica.refresh()
    newest = replica.replica._variants.snapshot
    until(lambda: client.status().plan == newest.plan.number)
    replica.replica._variants.snapshot = before  # what another replica, which has not looked yet, would tell
    until(lambda: client.status().plan_error)
    assert f"told of plan {before.plan.number}, {newest.plan.number} is in force" in client.status().plan_error
    assert client.status().plan == newest.plan.number and set(client.status().versions) == {1, 2}
    # A rollback brings the same arms back, in a plan with a higher number: that one is taken.
    Registry(storage.registry(NAME)).append(lambda state: change_release(state, "rollback", reason="worse"), now=2000.0)
    replica.refresh()
    assert replica.replica._variants.snapshot.plan.number > newest.plan.number
    until(lambda: set(client.status().versions) == {1} and client.status().plan_error is None)


def test_an_error_that_nobody_foresaw_is_told_and_does_not_end_the_following(
    storage: Storage, replica: DirectReplica, client: LocalClient, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(plan_follower.PlanFollower, "_take", lambda self, *args: {}["nobody knew"])
        until(lambda: client.status().plan_error)
    assert client.status().plan_error == "KeyError: 'nobody knew'" and "event=plan_follower_failed" in caplog.text
    assert client.decide([0.0] * 4)["version"] == 1
    publish(storage, random_policy(2))
    release(storage, 2, weights=(0.5, 1.0))
    replica.refresh()
    until(lambda: set(client.status().versions) == {1, 2} and client.status().plan_error is None)


def test_a_new_version_that_does_not_verify_leaves_the_last_plan_in_force(
    storage: Storage, replica: DirectReplica, client: LocalClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(storage, random_policy(2))
    release(storage, 2, weights=(0.5, 1.0))
    monkeypatch.setattr("serve_app.local_decisions.read_file_of", lambda path, name, digest: b"{}")
    replica.refresh()
    until(lambda: client.status().plan_error)
    assert "sha256" in client.status().plan_error and set(client.status().versions) == {1}
    assert client.decide([0.0] * 4)["version"] == 1
    monkeypatch.undo()
    until(lambda: set(client.status().versions) == {1, 2})
    assert client.status().plan_error is None


def test_bundles_are_kept_between_processes_and_a_damaged_one_is_fetched_again(
    replica: DirectReplica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, fetched = tmp_path / "cache", []
    fetch = plan_follower.PlanFollower._fetch
    monkeypatch.setattr(plan_follower.PlanFollower, "_fetch", lambda self, *args: (fetched.append(1), fetch(self, *args)))
    for _ in range(2):
        Client.local(replica.url, replica.key, cache_dir=cache).close()
    assert len(fetched) == 1
    [bundle] = cache.iterdir()
    spoil(bundle)
    with Client.local(replica.url, replica.key, cache_dir=cache) as client:
        assert client.decide([0.0] * 4)["version"] == 1
    assert len(fetched) == 2


def test_while_the_endpoint_is_away_the_last_plan_decides_and_the_status_says_so(
    storage: Storage, replica: DirectReplica, client: LocalClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica.stop_lane()
    until(lambda: client.status().plan_error)
    told = [client.decide(observation) for observation in observations(5)]
    client.feedback(told[0]["decision_id"], reward=1.0, final=True)
    status = client.status()
    assert status.silent_s > 0 and status.log.buffered == 6 and not logged(storage)
    replica.start_lane()
    until(lambda: sent(client) and client.status().plan_error is None)
    assert [d.decision_id for d in logged(storage)] == [d["decision_id"] for d in told]
    assert [f.decision_id for f in logged(storage, Feedback)] == [told[0]["decision_id"]]


def test_a_lease_that_is_over_ends_it_and_a_new_one_is_taken_when_half_is_over(
    client: LocalClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans, now = client._plans, time.time()
    first = plans.in_force.lease
    plans.refresh()
    assert plans.in_force.lease is first
    for days_left, is_kept in ((0.6, True), (0.4, False)):
        lease = replace(first, expires_at=now + days_left * 86_400)
        plans.in_force = replace(plans.in_force, lease=lease)
        plans.refresh()
        assert (plans.in_force.lease is lease) is is_kept
    assert client.decide([0.0] * 4)["decision_id"].split(".")[1] == plans.in_force.lease.id
    monkeypatch.setattr(local_client.time, "time", lambda: now + 2 * 86_400)
    with pytest.raises(ServiceUnavailable, match="lease to decide without it is over"):
        client.decide([0.0] * 4)


def test_a_key_that_is_refused_decides_no_more(replica: DirectReplica, client: LocalClient) -> None:
    with pytest.raises(Unauthorized):
        Client.local(replica.url, "wrong")
    client._http._sessions.clear()
    client._http._key = "revoked"
    client._http._threads = threading.local()
    until(lambda: client._plans.refusal)
    with pytest.raises(Unauthorized):
        client.decide([0.0] * 4)


def test_an_endpoint_that_is_away_or_none_of_ours_is_told_at_the_beginning() -> None:
    with pytest.raises(ClusterError, match="did not answer"):
        LocalClient("http://127.0.0.1:9", "key", timeout_s=0.2)
    with serving(lambda exchange: None) as server, pytest.raises(Exception, match="404"):
        LocalClient(server.url, "key")


@pytest.mark.parametrize("digest", ["../../x", "", "0" * 63, "G" * 64])
def test_a_hostile_endpoint_cannot_choose_where_bundles_are_written(tmp_path: Path, digest: str) -> None:
    def send(call: Call, timeout_s: float) -> Any:
        if call.path == "/v1/plan":
            return {
                "policy": "p",
                "plan": champion_only(1, 1).to_json(),
                "versions": {"1": {"digest": digest, "mode": "greedy"}},
                "lease": {"id": "0" * 16, "key": "k", "expires_at": 9e9},
            }
        return b'{"files": {"../../evil": {}, "/etc/evil": {}}}'

    with pytest.raises(IntegrityError, match="64 hex digits"):
        plan_follower.PlanFollower(send, tmp_path / "cache")
    digest = "0" * 64
    with pytest.raises(IntegrityError, match="sha256"):
        plan_follower.PlanFollower(send, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir()) and [path.name for path in tmp_path.iterdir()] == ["cache"]


# --- the log ---


def record(number: int) -> Decision:
    return Decision(f"r{number}.l.t", 0.0, "u", None, 1, 0, "champion", 1, "d", [0.0], 0, "greedy", 0, 1.0, 1.0, None, 0.0)


class Endpoint:
    """Takes what is sent while it is `up`; what is `wrong` it refuses with all that came with it."""

    def __init__(self) -> None:
        self.up = True
        self.wrong: set[str] = set()
        self.calls: list[tuple[str, list[str]]] = []

    def send(self, call: Call, timeout_s: float) -> None:
        body = json.loads(call.body)
        ids = [item["decision_id"] for item in (body["decisions"] if isinstance(body, dict) else body)]
        if not self.up:
            raise ClusterError("away")
        if self.wrong & set(ids):
            raise RequestInvalid("wrong")
        self.calls.append((call.path, ids))

    def arrived(self, path: str = "/v1/decisions") -> list[str]:
        return [decision_id for found, ids in self.calls if found == path for decision_id in ids]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    monkeypatch.setattr(local_log, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(local_log, "MAX_PAUSE_S", 0.02)
    return Endpoint()


def log_of(endpoint: Endpoint, **options: Any) -> LocalLog:
    return LocalLog(endpoint.send, **{"max_buffered": 100, "on_full": "drop", "timeout_s": 5.0, **options})


def test_a_full_buffer_drops_counts_and_goes_on(endpoint: Endpoint) -> None:
    endpoint.up = False
    log = log_of(endpoint, max_buffered=10)
    for number in range(25):
        log.add(record(number))
    counts = log.counts()
    assert (counts.buffered, counts.dropped) == (10, 15)
    endpoint.up = True
    log.close(10.0)
    assert endpoint.arrived() == [f"r{n}.l.t" for n in range(10)]
    assert log.counts() == local_log.LogCounts(0, 10, 15, 0, None)  # nothing is both, and nothing is neither


def test_a_full_buffer_blocks_until_there_is_room_or_time_is_over(endpoint: Endpoint) -> None:
    endpoint.up = False
    log = log_of(endpoint, max_buffered=3, on_full="block", timeout_s=0.05)
    for number in range(3):
        log.add(record(number))
    with pytest.raises(Overloaded, match="3 decisions wait"):
        log.add(record(3))
    log._timeout_s = 20.0
    waiting = threading.Thread(target=log.add, args=(record(4),))
    waiting.start()
    endpoint.up = True
    waiting.join(10)
    assert not waiting.is_alive()
    log.close(10.0)
    assert endpoint.arrived() == ["r0.l.t", "r1.l.t", "r2.l.t", "r4.l.t"] and log.counts().dropped == 0


def test_a_reward_is_sent_after_its_decision(endpoint: Endpoint) -> None:
    log = log_of(endpoint, max_buffered=5000)
    for number in range(2500):
        log.add(record(number))
        log.add(Report(f"r{number}.l.t", 1.0))
    log.close(10.0)
    known: set[str] = set()
    for path, ids in endpoint.calls:
        assert len(ids) <= local_log.MAX_ITEMS
        if path == "/v1/decisions":
            known.update(ids)
        else:
            assert known.issuperset(ids)
    assert len(known) == 2500 == len(endpoint.arrived("/v1/feedback"))


def test_wrong_records_are_refused_alone(endpoint: Endpoint) -> None:
    endpoint.wrong = {"r3.l.t", "r17.l.t"}
    log = log_of(endpoint)
    for number in range(40):
        log.add(record(number))
    log.close(10.0)
    assert endpoint.arrived() == [f"r{n}.l.t" for n in range(40) if n not in (3, 17)]
    assert (log.counts().sent, log.counts().refused) == (38, 2)


def test_what_json_cannot_say_is_refused_alone_and_what_nobody_foresaw_is_tried_again(endpoint: Endpoint, caplog) -> None:
    log, send = log_of(endpoint), endpoint.send
    calls = []

    def broken_once(call: Call, timeout_s: float) -> None:
        calls.append(call)
        if len(calls) == 1:
            raise KeyError("nobody knew")
        send(call, timeout_s)

    log._send = broken_once
    for item in (record(1), msgspec.structs.replace(record(2), unit_id="\ud800"), record(3), Report("\udfff", 1.0)):
        log.add(item)
    log.close(5.0)
    assert endpoint.arrived() == ["r1.l.t", "r3.l.t"] and "event=local_log_failed" in caplog.text
    assert (log.counts().sent, log.counts().refused, log.counts().buffered) == (2, 2, 0)
    assert caplog.text.count("event=local_record_refused") == 2


def test_a_name_that_is_no_text_is_refused_before_anything_is_decided(client: LocalClient) -> None:
    for name in ("unit_id", "episode_id"):
        with pytest.raises(RequestInvalid, match=f"{name} is .* no Unicode text"):
            client.decide([0.0] * 4, **{name: "u\ud800"})
        client.decide([0.0] * 4, **{name: "Jürgen 🙂"})
    assert until(lambda: sent(client)) and client.status().log.sent == 2


def test_requests_stay_below_what_the_endpoint_takes(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_log, "MAX_BYTES", 1000)
    sizes: list[int] = []
    send = endpoint.send
    endpoint.send = lambda call, timeout_s: (sizes.append(len(call.body)), send(call, timeout_s))
    log = log_of(endpoint)
    for number in range(50):
        log.add(record(number))
    log.close(10.0)
    assert len(endpoint.arrived()) == 50 and max(sizes) <= 1000 + len('{"decisions":[]}') and len(sizes) > 10


def test_closing_ends_in_time_though_the_endpoint_is_away_and_says_what_is_lost(endpoint: Endpoint, caplog) -> None:
    endpoint.up = False
    log = log_of(endpoint)
    log.add(record(1))
    started_s = time.monotonic()
    log.close(0.2)
    assert time.monotonic() - started_s < 5.0
    assert "num_lost=1" in caplog.text and "away" in caplog.text


def test_nothing_is_taken_over_after_closing(endpoint: Endpoint) -> None:
    """Nobody would send it: the caller would hold a decision that never gets into the log."""
    log = log_of(endpoint)
    log.add(record(1))
    log.close(10.0)
    with pytest.raises(ServiceUnavailable, match="is closed"):
        log.add(record(2))
    assert endpoint.arrived() == ["r1.l.t"] and log.counts().buffered == 0


def test_closing_ends_in_time_though_the_endpoint_never_answers(storage: Storage, replica: DirectReplica) -> None:
    client = Client.local(replica.url, replica.key)
    with serving(lambda exchange: exchange.say_nothing()) as silent:
        client._http._url = silent.url
        client.decide([0.0] * 4)
        started_s = time.monotonic()
        client.close(0.3)
        assert time.monotonic() - started_s < 15.0  # the plan's poll may be under way too


def test_answers_that_get_lost_do_not_lose_decisions(storage: Storage, replica: DirectReplica) -> None:
    """Half of the answers never arrive: what was sent is sent again, and the log has each at least once."""
    with Client.local(replica.url, replica.key) as client, serving(lambda e: flaky(e)) as proxy:
        upstream = Client(replica.url, replica.key, direct=False)

        def flaky(exchange: Exchange) -> None:
            answer = upstream.call(Call("POST", exchange.path, exchange.body))
            exchange.hang_up() if exchange.number % 2 == 0 else exchange.answer(200, answer)

        client._http._url = proxy.url
        told = [client.decide(observation)["decision_id"] for observation in observations(30)]
        until(lambda: sent(client))
        upstream.close()
    found = [decision.decision_id for decision in logged(storage)]
    assert set(found) == set(told) and client.status().log.sent == 30 and len(found) > 30


def test_arms_of_weight_nothing_and_shadows_are_not_asked() -> None:
    asked: list[int] = []

    class Row:
        def __init__(self, version: int) -> None:
            self.version = version

        def distribution(self, features, mask_A):
            asked.append(self.version)
            return [0.5, 0.5]

        def choose(self, distribution, mode, seed):
            return 0, 0.5

        def propensity(self, action, distribution, mode):
            return Propensity(0.5)

    spaces = random_policy(1).spaces
    versions = {n: LocalVersion(n, "d", "sample", spaces, Row(n)) for n in (1, 2, 3)}
    plan = TrafficPlan(1, 1, (Arm("canary", 2, 0.0), Arm("champion", 1, 1.0)), shadows=(3,))
    assert local_plan.draw(LocalPlan(plan, versions, versions[1]), "u", [0.0], None, 0).mixture_propensity == 0.5
    assert asked == [1]
