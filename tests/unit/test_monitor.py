"""Does the monitor count what happened, the same live and after a restart, and does the release manager act on it?"""

import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest

from actors.arms import arm_version
from actors.monitor import Monitor
from actors.release_manager import MAX_EVIDENCE_AGE_S, ReleaseManager
from actors.version_traffic import latency_quantile_ms
from policies.errors import StorageError
from policies.integrity import canonical_json
from policies.records import Feedback, Override, Shadow
from policies.registry import Registry, RegistryState, apply, change_release, set_champion, start_release
from policies.registry_entries import set_holdout, set_shadows, switch_arm
from policies.registry_store import DirectoryStore
from policies.release import ReleaseConfig
from policies.storage import Storage, open_storage
from policies.telemetry import LATENCY_BUCKETS_S, ReplicaReport
from policies.verdicts import Verdict
from tests.simulators import START_S, Clock, Population, Segment, make_decision, register_entries, registry_with

POLICY = "cartpole"
CONFIG = ReleaseConfig(min_step_s=5, min_episodes=3, max_error_rate_increase=0.03)


class World:
    """A storage root with a registry of two versions, a population that writes to two replicas' logs, and a clock."""

    def __init__(self, root: Path, population: Population, gate_verdict: Verdict = Verdict.PASS) -> None:
        self.storage: Storage = open_storage(root)
        self.registry = Registry(self.storage.registry(POLICY))
        self.clock = Clock()
        self.population = population
        for body in register_entries(gate_verdict):
            self.append(lambda state, body=body: body)
        self.append(lambda state: set_champion(state, 1, "first"))
        self.decisions = [Segment(self.storage.decisions(POLICY), "decisions", name) for name in "ab"]
        self.feedback = [Segment(self.storage.feedback(POLICY), "feedback", name) for name in "ab"]

    def append(self, decide) -> RegistryState:
        return self.registry.append(decide, now=self.clock.now)

    def start_release(self, override_gates: str | None = None) -> None:
        self.append(lambda s: start_release(s, 2, weights=CONFIG.weights, override_gates=override_gates, reason="test"))

    def live(self, seconds: int, *monitors: Monitor, manager: ReleaseManager | None = None) -> None:
        for _ in range(seconds):
            plan = self.registry.state().plan
            assert plan is not None
            decisions, rewards = self.population.tick(self.clock.now, plan)
            for replica in (0, 1):
                self.decisions[replica].append(*decisions[replica::2])
                self.feedback[1 - replica].append(*rewards[replica::2])  # what one replica answered, another hears of
            self.clock.advance(1.0)
            for monitor in monitors:
                monitor.refresh(self.clock.now)
            if manager is not None:
                manager.tick(self.clock.now, monitors[0].release_evidence())

    def monitor(self, outcome_range: tuple[float, float] = (0.0, 20.0)) -> Monitor:
        root = str(self.storage.root)
        return Monitor(POLICY, root, outcome_range=outcome_range, reward_window_s=60, config=CONFIG, now=self.clock.now)

    def manager(self) -> ReleaseManager:
        return ReleaseManager(POLICY, str(self.storage.root), CONFIG)


def population(
    rewards: dict[int, float] | None = None, *, num_units: int = 100, broken: frozenset[int] = frozenset()
) -> Population:
    """Units whose episodes are 10 decisions: an outcome is ten times the version's reward, 1 unless given."""
    mean = rewards or {}
    return Population(100, 10, lambda version, rng: mean.get(version, 1.0), np.random.default_rng(0), broken=broken)


def numbers(monitor: Monitor, now: float) -> dict:
    """The status without what a restart may change."""
    status = monitor.status(now)
    del status["monitor"]
    return status


def test_counts_outcomes_and_rates_of_the_champion(tmp_path: Path):
    world = World(tmp_path, population())
    monitor = world.monitor()
    world.live(25, monitor)
    status = monitor.status(world.clock.now)
    (arm,) = status["arms"]
    assert (arm["version"], arm["arm"], arm["weight"]) == (1, "champion", 1.0)
    assert (arm["decisions"], arm["errors"], arm["error_rate"]) == (2500, 0, 0.0)
    assert arm["decisions_per_s"] == 100
    assert arm["actions"] == {"1": 2500}
    # 100 units finished 2 episodes of 10 rewards of 1; the third is open.
    assert (arm["outcome"]["episodes"], arm["outcome"]["mean"], arm["outcome"]["mixed"]) == (200, 10.0, 0)
    assert arm["outcome"]["low"] < 10 < arm["outcome"]["high"]
    # Every latency is 2 ms: the percentiles are within its bucket.
    index = next(i for i, edge in enumerate(LATENCY_BUCKETS_S) if edge >= 0.002)
    for quantile in arm["latency_ms"].values():
        assert 1000 * LATENCY_BUCKETS_S[index - 1] <= quantile <= 1000 * LATENCY_BUCKETS_S[index]
    assert status["feedback"] == {"joined": 2500, "duplicate": 0, "unknown": 0, "late": 0, "waiting": 0}


def test_status_has_the_promised_shape_and_is_json(tmp_path: Path):
    world = World(tmp_path, population())
    monitor = world.monitor()
    world.start_release()
    world.live(15, monitor)
    status = json.loads(canonical_json(monitor.status(world.clock.now)))
    assert status.keys() == {
        *("policy", "time_s", "champion", "plan", "release", "releases", "versions", "arms", "series"),
        *("feedback", "overrides", "replicas", "responses", "monitor"),
        *("holdout", "shadows", "switched_off", "requested_decisions"),
    }
    assert status["release"].keys() == {
        *("number", "candidate", "incumbent", "state", "step", "weights", "canary_weight", "override_gates"),
        *("started_at", "verdict", "reason", "evidence", "history"),
    }
    assert status["release"]["evidence"].keys() == {"candidate", "incumbent"}
    assert status["release"]["history"][0].keys() == {"time_s", "action", "step", "reason"}
    assert status["versions"][0].keys() == {
        *("version", "digest", "policy_sha256", "gate_verdict", "override_gates", "registered_at"),
    }
    assert status["arms"][0].keys() == {
        *("version", "arm", "weight", "decisions", "errors", "error_rate", "decisions_per_s"),
        *("latency_ms", "actions", "outcome"),
    }
    series = status["series"]
    assert len(series["time_s"]) == 120
    assert all(len(values) == 120 for version in series["versions"].values() for values in version.values())
    assert series["versions"]["1"]["decisions_per_s"][0] is None
    assert series["versions"]["1"]["decisions_per_s"][-1] + series["versions"]["2"]["decisions_per_s"][-1] == 100
    assert status["release"]["verdict"] == "inconclusive" and "within" in status["release"]["reason"]


def test_an_empty_storage_root_has_a_status(tmp_path: Path):
    open_storage(tmp_path)
    monitor = Monitor(POLICY, str(tmp_path), outcome_range=(0, 1), reward_window_s=60, config=CONFIG, now=START_S)
    monitor.refresh(START_S)
    status = monitor.status(START_S)
    assert (status["champion"], status["plan"], status["release"], status["arms"]) == (None, None, None, [])
    assert monitor.release_evidence()["release"] is None


def test_a_restarted_monitor_has_the_same_numbers(tmp_path: Path):
    world = World(tmp_path, population({2: 1.25}))  # exact in binary: the order of addition does not show
    monitor, manager = world.monitor(), world.manager()
    world.live(20, monitor)
    world.start_release()
    world.live(60, monitor, manager=manager)
    restarted = world.monitor()
    restarted.refresh(world.clock.now)
    assert numbers(restarted, world.clock.now) == numbers(monitor, world.clock.now)
    assert restarted.release_evidence() == monitor.release_evidence()
    assert restarted.status(world.clock.now)["monitor"]["rebuilt_decisions"] == 8000
    world.live(10, monitor, restarted)
    assert numbers(restarted, world.clock.now) == numbers(monitor, world.clock.now)


def test_a_monitor_that_forgets_a_segment_has_other_numbers(tmp_path: Path):
    """The negative control of the test above: it would notice."""
    world = World(tmp_path, population())
    monitor = world.monitor()
    world.live(20, monitor)
    world.decisions[1].path.unlink()
    restarted = world.monitor()
    restarted.refresh(world.clock.now)
    assert numbers(restarted, world.clock.now) != numbers(monitor, world.clock.now)


def test_evidence_counts_only_episodes_of_one_version_within_the_release(tmp_path: Path):
    world = World(tmp_path, population())
    monitor = world.monitor()
    world.live(5, monitor)  # every unit is in the middle of its first episode
    world.start_release()
    world.live(18, monitor)  # ... finishes it, and one more
    release = monitor.status(world.clock.now)["release"]
    arms = {arm["version"]: arm for arm in monitor.status(world.clock.now)["arms"]}
    assert release["evidence"]["candidate"]["decisions"] == arms[2]["decisions"]
    num_canary = arms[2]["decisions"] // 18
    assert release["evidence"]["candidate"]["episodes"] == num_canary
    assert release["evidence"]["incumbent"]["episodes"] == 100 - num_canary  # the first episodes belong to no release
    assert arms[1]["outcome"]["mixed"] == num_canary


def test_a_version_that_cannot_answer_gets_the_error_not_the_one_that_stood_in(tmp_path: Path):
    world = World(tmp_path, population(broken=frozenset({2})))
    monitor = world.monitor()
    world.start_release()
    world.live(10, monitor)
    evidence = monitor.release_evidence()["evidence"]
    assert evidence["candidate"]["errors"] == evidence["candidate"]["decisions"] > 0
    assert evidence["incumbent"]["errors"] == 0 < evidence["incumbent"]["decisions"]
    arms = {arm["version"]: arm for arm in monitor.status(world.clock.now)["arms"]}
    assert arms[2]["error_rate"] == 1.0 and arms[2]["actions"] == {}
    assert arms[2]["outcome"]["episodes"] == 0


def test_the_arm_of_a_fallback_is_known_from_the_plan_it_was_assigned_by():
    """Entry 3 crowned version 1, 4 began the release of 2, 5 held version 1 out, 6 promoted, 7 switched the champion off."""
    state = registry_with(Verdict.PASS, Verdict.PASS)
    state = follow(state, start_release(state, 2, weights=(0.5,), override_gates=None, reason="r"), 4)
    state = follow(state, set_holdout(state, 1, weight=0.1, override_gates=None, reason="r"), 5)
    state = follow(state, change_release(state, "promote", reason="r"), 6)
    state = follow(state, switch_arm(state, "champion", enabled=False, reason="r"), 7)
    asked = [(3, "champion"), (4, "canary"), (4, "champion"), (5, "holdout"), (6, "champion"), (6, "holdout"), (7, "champion")]
    decisions = [make_decision("a", plan=plan, arm=arm, version=0, rung="rule", fallback="slow") for plan, arm in asked]
    assert [arm_version(decision, state) for decision in decisions] == [1, 2, 1, 1, 2, 1, 1]
    unread = make_decision("b", plan=9, arm="champion", version=0, rung="rule", fallback="slow")
    assert arm_version(unread, state) == 1  # of the last plan there is


def follow(state: RegistryState, body: dict, number: int) -> RegistryState:
    return apply(state, {"number": number, "time_s": START_S + number, **body})


def test_outcomes_outside_of_the_range_are_clipped_and_counted(tmp_path: Path):
    world = World(tmp_path, population())
    monitor = world.monitor(outcome_range=(0.0, 8.0))
    world.live(13, monitor)
    status = monitor.status(world.clock.now)
    assert status["arms"][0]["outcome"]["mean"] == 8.0
    assert status["monitor"]["counts"]["clipped"] == 100


def test_a_changed_line_is_shown_and_the_rest_is_counted(tmp_path: Path):
    world = World(tmp_path, population())
    monitor = world.monitor()
    world.live(3, monitor)
    world.decisions[0].append_bytes(b'{"decision_id": broken}\n')
    world.live(3, monitor)
    status = monitor.status(world.clock.now)
    assert status["arms"][0]["decisions"] == 600
    assert len(status["monitor"]["integrity_errors"]) == 1
    assert "a.jsonl" in status["monitor"]["integrity_errors"][0]


def test_a_changed_journal_is_shown_and_the_last_good_state_stays(tmp_path: Path):
    world = World(tmp_path, population())
    monitor = world.monitor()
    world.live(2, monitor)
    journal = world.storage.registry(POLICY) / "journal"
    (journal / "00000004.json").write_bytes(b"{}")
    monitor.refresh(world.clock.now)
    status = monitor.status(world.clock.now)
    assert status["champion"] == 1
    assert "00000004.json" in status["monitor"]["integrity_errors"][0]


def test_a_registry_elsewhere_that_does_not_answer_is_shown_and_the_last_good_state_stays(tmp_path: Path):
    world = World(tmp_path, population())
    monitor = world.monitor()
    world.live(2, monitor)
    monitor._registry.store = AwayStore(tmp_path)
    monitor.refresh(world.clock.now)
    status = monitor.status(world.clock.now)
    assert status["champion"] == 1
    assert "cannot read journal" in status["monitor"]["integrity_errors"][0]


class AwayStore(DirectoryStore):
    """What an object store is while the network is down."""

    def read(self, name: str) -> bytes | None:
        raise StorageError(f"registry {self}: cannot read {name}: timed out")


def report(replica: str, started_at_s: float, num_answers: int) -> dict:
    return msgspec.to_builtins(
        ReplicaReport(replica, 0.0, started_at_s, 4, [1, 2], {200: num_answers, 429: 1}, 3, {2: "hash differs"})
    )


def test_the_status_shows_whether_each_replica_can_write_its_log(tmp_path: Path):
    monitor, now = World(tmp_path, population()).monitor(), START_S
    failing = {"state": "failing", "since_s": 3.5, "last_error": "No space left", "num_unlogged": 7}
    monitor.report({**report("a", 1.0, 1), "log": failing}, now)
    earlier = report("b", 1.0, 1)
    del earlier["log"]  # a replica of an earlier version
    monitor.report(earlier, now)
    assert [row["log"] for row in monitor.status(now)["replicas"]] == [failing, {}]


def test_replica_reports_add_up_and_never_go_backwards(tmp_path: Path):
    world = World(tmp_path, population())
    monitor, now = world.monitor(), START_S
    monitor.report(report("a", 1.0, 100), now)
    monitor.report(report("a", 1.0, 100), now)  # repeated: the same
    monitor.report(report("b", 2.0, 10), now + 20)
    status = monitor.status(now + 25)
    assert status["responses"] == {"200": 110, "429": 2}
    assert [row["replica"] for row in status["replicas"]] == ["a", "b"]
    assert status["replicas"][0]["load_failures"] == {"2": "hash differs"}
    status = monitor.status(now + 31)  # a is silent for more than 30 s
    assert [row["replica"] for row in status["replicas"]] == ["b"]
    assert status["responses"] == {"200": 110, "429": 2}
    monitor.report(report("a", 32.0, 5), now + 32)  # restarted: counts from zero
    assert monitor.status(now + 32)["responses"] == {"200": 115, "429": 3}
    monitor.report(json.loads(json.dumps(report("a", 32.0, 6))), now + 33)  # keys as JSON has them
    assert monitor.status(now + 33)["responses"] == {"200": 116, "429": 3}


def test_totals_of_many_gone_replicas_are_kept_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("actors.monitor.MAX_REPLICA_TOTALS", 3)
    monitor = World(tmp_path, population()).monitor()
    for number in range(10):
        monitor.report(report(f"replica-{number}", float(number), 1), START_S)
    assert monitor.status(START_S)["responses"] == {"200": 10, "429": 10}
    assert len(monitor._responses) == 3


def test_latency_quantiles_by_hand():
    # Ten latencies in bucket 4 (edges e3, e4): the median is half-way in logarithm, the geometric mean of the edges.
    counts = [0] * 33
    assert latency_quantile_ms(counts, 0.5) is None
    counts[4] = 10
    assert latency_quantile_ms(counts, 0.5) == pytest.approx(1000 * math.sqrt(LATENCY_BUCKETS_S[3] * LATENCY_BUCKETS_S[4]))
    counts[32] = 10  # the open bucket: the 99th percentile is at least the last edge
    assert latency_quantile_ms(counts, 0.99) == 1000 * LATENCY_BUCKETS_S[31]
    assert latency_quantile_ms(counts, 0.25) == pytest.approx(1000 * math.sqrt(LATENCY_BUCKETS_S[3] * LATENCY_BUCKETS_S[4]))


# --- release manager ---


def test_a_good_candidate_is_promoted_through_every_share(tmp_path: Path):
    world = World(tmp_path, population())
    monitor, manager = world.monitor(), world.manager()
    world.start_release()
    world.live(150, monitor, manager=manager)
    state = world.registry.state()
    assert [entry.action for entry in state.release.history] == ["start", "advance", "advance", "promote"]
    assert state.champion == 2
    assert state.release.history[1].numbers["candidate"]["episodes"] >= CONFIG.min_episodes


def test_a_bad_candidate_is_rolled_back_at_its_first_share(tmp_path: Path):
    world = World(tmp_path, population({2: 0.1}))
    monitor, manager = world.monitor(), world.manager()
    world.start_release()
    world.live(60, monitor, manager=manager)
    state = world.registry.state()
    assert [entry.action for entry in state.release.history] == ["start", "rollback"]
    assert (state.champion, state.plan.arm("canary")) == (1, None)


def test_an_overridden_candidate_is_never_promoted(tmp_path: Path):
    world = World(tmp_path, population(), gate_verdict=Verdict.FAIL)
    monitor, manager = world.monitor(), world.manager()
    world.start_release(override_gates="a demonstration")
    world.live(150, monitor, manager=manager)
    release = world.registry.state().release
    assert [entry.action for entry in release.history] == ["start", "advance"]
    assert "never promoted" in monitor.status(world.clock.now)["release"]["reason"]


def test_without_current_evidence_the_manager_holds(tmp_path: Path):
    world = World(tmp_path, population())
    monitor, manager = world.monitor(), world.manager()
    world.start_release()
    world.live(60, monitor)
    evidence, now = monitor.release_evidence(), world.clock.now
    other_release = {**evidence, "release": 7}
    for missing in (None, other_release, {**evidence, "refreshed_at": None}):
        assert manager.tick(now, missing).action == "hold"
    assert manager.tick(now + MAX_EVIDENCE_AGE_S + 1, evidence).action == "hold"
    assert manager.tick(now + MAX_EVIDENCE_AGE_S, evidence).action == "advance"


def test_an_abort_in_between_wins_and_is_counted(tmp_path: Path):
    world = World(tmp_path, population())
    monitor, manager = world.monitor(), world.manager()
    world.start_release()
    world.live(60, monitor)
    evidence = monitor.release_evidence()
    append = manager._registry.append

    def abort_first(decide, *, now: float):
        world.append(lambda state: change_release(state, "abort", reason="a human"))
        world.start_release()  # and starts another one, which the old decision must not move
        return append(decide, now=now)

    manager._registry.append = abort_first
    assert manager.tick(world.clock.now, evidence).action == "advance"
    state = world.registry.state()
    assert manager.num_refused == 1
    assert [release.state for release in state.releases] == ["aborted", "running"]
    assert state.release.step == 0


def test_the_same_evidence_twice_moves_once(tmp_path: Path):
    world = World(tmp_path, population())
    monitor, manager = world.monitor(), world.manager()
    world.start_release()
    world.live(60, monitor)
    evidence = monitor.release_evidence()
    assert manager.tick(world.clock.now, evidence).action == "advance"
    assert world.manager().tick(world.clock.now, evidence).action == "hold"  # restarted from the journal alone
    assert world.registry.state().release.step == 1


def test_no_release_needs_no_decision(tmp_path: Path):
    world = World(tmp_path, population())
    assert world.manager().tick(world.clock.now, None) is None
    assert not world.manager().has_open_release()


def test_feedback_for_strangers_is_kept_aside(tmp_path: Path):
    world = World(tmp_path, population())
    monitor = world.monitor()
    world.feedback[0].append(Feedback("nobody", world.clock.now, 1.0, True))
    world.live(2, monitor)
    assert monitor.status(world.clock.now)["feedback"]["waiting"] == 1
    world.live(20, monitor)
    feedback = monitor.status(world.clock.now)["feedback"]
    assert (feedback["waiting"], feedback["unknown"]) == (0, 1)


# --- holdout, testers, stand-ins, overrides, shadows, switches ---


def test_a_holdout_is_no_evidence_for_the_release_although_it_is_the_incumbents_version(tmp_path: Path):
    """Version 1 is both: of 100 units about 30 are held out, and what they do is theirs alone."""
    world = World(tmp_path, population())
    monitor = world.monitor()
    world.append(lambda s: set_holdout(s, 1, weight=0.3, override_gates=None, reason="test"))
    world.start_release()
    world.live(20, monitor)
    world.clock.advance(3)  # until the last episode has settled
    monitor.refresh(world.clock.now)
    status = monitor.status(world.clock.now)
    rows = {row["arm"]: row for row in status["arms"]}
    evidence = status["release"]["evidence"]
    assert (rows["holdout"]["version"], rows["champion"]["version"]) == (1, 1)
    num_held_out = rows["holdout"]["decisions"] // 20
    assert 15 < num_held_out < 45 and rows["holdout"]["outcome"]["episodes"] == 2 * num_held_out
    assert evidence["incumbent"]["decisions"] == rows["champion"]["decisions"]
    assert evidence["incumbent"]["episodes"] == rows["champion"]["outcome"]["episodes"]
    assert sum(row["decisions"] for row in rows.values()) == 2000  # the control: nobody else's were left out
    assert status["holdout"] == {"version": 1, "weight": 0.3, "reason": "test", "since_s": START_S}
    restarted = world.monitor()
    restarted.refresh(world.clock.now)
    assert numbers(restarted, world.clock.now) == numbers(monitor, world.clock.now)


def test_a_holdout_that_does_badly_does_not_promote_the_candidate(tmp_path: Path):
    """The holdout's version 1 earns nothing while it is held out; the champion's version 1 earns as much as the candidate."""
    world = World(tmp_path, HeldOutEarnsNothing(100, 10, lambda version, rng: 1.0, np.random.default_rng(0)))
    monitor, manager = world.monitor(), world.manager()
    world.append(lambda s: set_holdout(s, 1, weight=0.3, override_gates=None, reason="test"))
    world.start_release()
    world.live(40, monitor, manager=manager)
    evidence = monitor.status(world.clock.now)["release"]["evidence"]
    assert (evidence["incumbent"]["outcome_mean"], evidence["candidate"]["outcome_mean"]) == (10.0, 10.0)
    rows = {row["arm"]: row for row in monitor.status(world.clock.now)["arms"]}
    assert rows["holdout"]["outcome"]["mean"] == 0.0
    world.live(150, monitor, manager=manager)
    state = world.registry.state()
    assert [entry.action for entry in state.release.history] == ["start", "advance", "advance", "promote"]
    assert [(arm.name, arm.version) for arm in state.plan.arms] == [("holdout", 1), ("champion", 2)]


class HeldOutEarnsNothing(Population):
    def _decide(self, unit, now, plan):
        decision, feedback = super()._decide(unit, now, plan)
        return decision, msgspec.structs.replace(feedback, reward=0.0) if decision.arm == "holdout" else feedback


def test_a_release_with_its_canary_switched_off_goes_on_only_when_it_is_enabled(tmp_path: Path):
    world = World(tmp_path, population())
    monitor, manager = world.monitor(), world.manager()
    world.start_release()
    world.live(30, monitor, manager=manager)
    world.append(lambda s: switch_arm(s, "canary", enabled=False, reason="an incident"))
    before = world.registry.state().release
    world.live(100, monitor, manager=manager)
    assert world.registry.state().release == before and before.is_open
    status = monitor.status(world.clock.now)
    assert "canary switched off" in status["release"]["reason"]
    assert status["switched_off"] == [{"arm": "canary", "reason": "an incident", "since_s": START_S + 30}]
    assert [(row["version"], row["arm"]) for row in status["arms"]] == [(1, "champion"), (2, None)]
    world.append(lambda s: switch_arm(s, "canary", enabled=True, reason="over"))
    world.live(150, monitor, manager=manager)
    assert world.registry.state().champion == 2  # the control


def test_a_move_that_was_decided_before_the_switch_is_refused(tmp_path: Path):
    world = World(tmp_path, population())
    monitor, manager = world.monitor(), world.manager()
    world.start_release()
    world.live(60, monitor)
    evidence, append = monitor.release_evidence(), manager._registry.append

    def switch_first(decide, *, now: float):
        world.append(lambda s: switch_arm(s, "canary", enabled=False, reason="an incident"))
        return append(decide, now=now)

    manager._registry.append = switch_first
    assert manager.tick(world.clock.now, evidence).action == "advance"
    assert (manager.num_refused, world.registry.state().release.step) == (1, 0)


def test_decisions_of_testers_are_counted_and_are_nobodys_evidence(tmp_path: Path):
    world = World(tmp_path, population())
    monitor = world.monitor()
    world.start_release()
    tester = {"arm": "canary", "version": 2, "release": 1, "plan": 4, "unit_id": "tester"}
    for number in range(20):
        world.decisions[0].append(make_decision(f"plan-{number}", **tester))
        world.decisions[0].append(make_decision(f"test-{number}", assigned="request", fallback="slow", rung="rule", **tester))
        world.feedback[0].append(*(Feedback(f"{kind}-{number}", START_S + 1, 1.0, True) for kind in ("plan", "test")))
    monitor.refresh(START_S + 30)
    status = monitor.status(START_S + 30)
    candidate = status["release"]["evidence"]["candidate"]
    assert (candidate["decisions"], candidate["errors"], candidate["episodes"]) == (20, 0, 20)  # those of the plan: the control
    rows = {row["version"]: row for row in status["arms"]}
    assert (rows[2]["decisions"], rows[2]["errors"], rows[2]["outcome"]["episodes"]) == (20, 0, 20)
    assert status["requested_decisions"] == 20
    assert (status["feedback"]["joined"], status["feedback"]["unknown"]) == (40, 0)


@pytest.mark.parametrize("rung", ["rule", "fixed"])
def test_an_answer_of_no_version_is_the_error_of_the_arm_that_should_have_answered(tmp_path: Path, rung: str):
    world = World(tmp_path, population())
    monitor = world.monitor()
    world.start_release()
    stand_in = {"version": 0, "digest": "", "fallback": "version 2 raised", "rung": rung, "release": 1, "plan": 4}
    world.decisions[0].append(*(make_decision(f"{number}", arm="canary", **stand_in) for number in range(7)))
    monitor.refresh(START_S + 1)
    status = monitor.status(START_S + 1)
    assert status["release"]["evidence"]["candidate"]["errors"] == 7
    assert status["release"]["evidence"]["incumbent"]["decisions"] == 0
    assert [row["version"] for row in status["arms"]] == [1, 2]  # and none of a version 0


def test_an_overridden_episode_says_nothing_of_its_version(tmp_path: Path):
    world = World(tmp_path, population())
    monitor = world.monitor()
    overrides = Segment(world.storage.overrides(POLICY), "overrides")
    decisions = [make_decision(name, time_s=START_S) for name in "abc"]
    world.decisions[0].append(*decisions)
    overrides.append(Override("b", START_S + 0.5, 1, "the nurse knew better", "ward"))
    world.feedback[0].append(*(Feedback(name, START_S + 1, 1.0, True) for name in "abc"))
    monitor.refresh(START_S + 2)
    status = monitor.status(START_S + 2)
    (row,) = status["arms"]
    assert (row["decisions"], row["outcome"]["episodes"], row["outcome"]["mixed"]) == (3, 2, 1)
    assert status["overrides"] == {"overridden": 1, "override_late": 0, "override_unknown": 0}


def test_shadows_are_shown_with_what_they_would_have_done(tmp_path: Path):
    """Of 8 answers 2 failed; of the 6 others 3 agreed; the sent action had probability 0.9 in three, 0.3 in three: mean 0.6."""
    world = World(tmp_path, population())
    monitor = world.monitor()
    world.append(lambda s: set_shadows(s, (2,), override_gates=None, reason="test"))
    log = Segment(world.storage.shadows(POLICY), "shadows")
    what = {"time_s": START_S, "version": 2, "digest": "d", "mode": "sample"}
    for number in range(6):
        agrees = number < 3
        said = {"distribution": [0.9, 0.1], "action": int(not agrees), "propensity": 0.5, "agrees": agrees}
        log.append(Shadow(f"{number}", **what, **said, sent_propensity=0.9 if agrees else 0.3))
    for number in (6, 7):
        log.append(Shadow(f"{number}", **what, distribution=None, action=None, propensity=None, failure="raised"))
    monitor.refresh(START_S + 1)
    (row,) = monitor.status(START_S + 1)["shadows"]
    assert row.pop("sent_propensity") == pytest.approx(0.6)
    assert row == {"version": 2, "is_asked": True, "decisions": 8, "failures": 2, "agreement": 0.5}
    assert monitor.release_evidence()["release"] is None and monitor.status(START_S + 1)["arms"][0]["decisions"] == 0
    world.append(lambda s: switch_arm(s, "shadow", enabled=False, reason="test"))
    monitor.refresh(START_S + 2)
    assert monitor.status(START_S + 2)["shadows"][0]["is_asked"] is False
