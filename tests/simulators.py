"""A world to test against: units with a known reward function, a clock, log writers and whole simulated releases."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from policies.confidence import ConfidenceSequence
from policies.records import SCHEMA_VERSION, Decision, Feedback, SegmentHeader
from policies.registry import RegistryState, Version, apply, change_release, start_release
from policies.registry_entries import switch_arm
from policies.release import (
    ArmEvidence,
    ReleaseConfig,
    ReleaseDecision,
    ReleaseEvidence,
    alpha_per_sequence,
    judge,
)
from policies.traffic import TrafficPlan, assign
from policies.verdicts import Verdict

START_S = 1_700_000_000.0


@dataclass
class Clock:
    """Time that passes when told to."""

    now: float = START_S

    def advance(self, seconds: float) -> float:
        self.now += seconds
        return self.now


class Segment:
    """Appends records to one writer's segment file, in the format of `policies.records`."""

    def __init__(self, directory: Path, kind: str, writer: str = "writer") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{writer}.jsonl"
        self.path.write_bytes(msgspec.json.encode(SegmentHeader(SCHEMA_VERSION, kind, writer)) + b"\n")

    def append(self, *records: Decision | Feedback) -> None:
        self.append_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in records))

    def append_bytes(self, data: bytes) -> None:
        with open(self.path, "ab") as file:
            file.write(data)


def make_decision(decision_id: str, *, time_s: float = START_S, **changes: object) -> Decision:
    """Return an unremarkable decision of the champion, version 1, with some fields changed."""
    decision = Decision(
        decision_id=decision_id,
        time_s=time_s,
        unit_id="unit",
        episode_id=None,
        plan=1,
        release=0,
        arm="champion",
        version=1,
        digest="d" * 64,
        observation=[0.1, -0.2, 0.3, -0.4],
        action=0,
        mode="greedy",
        seed=7,
        propensity=1.0,
        mixture_propensity=1.0,
        fallback=None,
        latency_s=0.002,
    )
    return msgspec.structs.replace(decision, **changes)


@dataclass
class Population:
    """Units that play episodes of `episode_length` decisions; each reward is drawn by `reward(version, rng)`.

    `tick` makes one decision per unit and its feedback. `broken` versions answer nothing: the champion answers for them.
    """

    num_units: int
    episode_length: int
    reward: Callable[[int, np.random.Generator], float]
    rng: np.random.Generator
    broken: frozenset[int] = frozenset()
    _serial: itertools.count = field(default_factory=itertools.count)
    _steps: dict[int, int] = field(default_factory=dict)

    def tick(self, now: float, plan: TrafficPlan) -> tuple[list[Decision], list[Feedback]]:
        pairs = [self._decide(unit, now, plan) for unit in range(self.num_units)]
        return [decision for decision, _ in pairs], [feedback for _, feedback in pairs]

    def _decide(self, unit: int, now: float, plan: TrafficPlan) -> tuple[Decision, Feedback]:
        step = self._steps.get(unit, 0)
        self._steps[unit] = step + 1
        arm = assign(f"unit-{unit}", plan)
        fails = arm.version in self.broken
        version = plan.arms[-1].version if fails else arm.version
        decision = make_decision(
            f"decision-{next(self._serial)}",
            time_s=now,
            unit_id=f"unit-{unit}",
            episode_id=f"episode-{unit}-{step // self.episode_length}",
            plan=plan.number,
            release=plan.release,
            arm=arm.name,
            version=version,
            action=version % 2,
            fallback="not loaded" if fails else None,
        )
        is_final = step % self.episode_length == self.episode_length - 1
        return decision, Feedback(decision.decision_id, now + 0.01, self.reward(version, self.rng), is_final)


# --- whole releases without processes, files or waiting ---


@dataclass(frozen=True)
class ArmBehaviour:
    """Outcomes are 1 with this chance, else 0; each of the episode's decisions fails with `error_rate`."""

    outcome_mean: float
    error_rate: float = 0.0


@dataclass(frozen=True)
class SimulatedRelease:
    """How a release ended: `promoted`, `rolled_back` or still `running`."""

    state: str
    seconds: int
    candidate_episodes: int
    actions: tuple[str, ...]


Interval = Callable[[int, int, float], tuple[float, float]]


@lru_cache(maxsize=1_000_000)
def betting_interval(num: int, num_ones: int, alpha: float) -> tuple[float, float]:
    """The confidence sequence after `num` observations of which `num_ones` are 1; its order does not matter."""
    sequence = ConfidenceSequence(0.0, 1.0, alpha=alpha, bins=1)
    sequence.update(1.0, num_ones)
    sequence.update(0.0, num - num_ones)
    return sequence.interval()


def normal_interval(num: int, num_ones: int, alpha: float) -> tuple[float, float]:
    """The usual z-interval, right for one look at many observations: the negative control for looking all the time."""
    if num < 2:
        return 0.0, 1.0
    mean = num_ones / num
    half = 1.96 * (mean * (1 - mean) / num) ** 0.5
    return mean - half, mean + half


def simulate_release(
    candidate: ArmBehaviour,
    incumbent: ArmBehaviour,
    *,
    rng: np.random.Generator,
    config: ReleaseConfig,
    episodes_per_s: int = 20,
    decisions_per_episode: int = 20,
    max_seconds: int = 300,
    interval: Interval = betting_interval,
    gate_verdict: Verdict = Verdict.PASS,
    override_gates: str | None = None,
    switch_off_at_s: int | None = None,
) -> SimulatedRelease:
    """Run one release to its end or to `max_seconds`, looking every second, on the real journal fold and the real rule.

    From `switch_off_at_s` on the canary is switched off: the champion answers for it.
    """
    state = _released(config.weights, gate_verdict, override_gates)
    behaviours = (candidate, incumbent)
    totals = np.zeros((2, 4), dtype=np.int64)  # candidate, incumbent × episodes, ones, decisions, errors
    actions: list[str] = []
    for second in range(1, max_seconds + 1):
        release = state.release
        assert release is not None
        if second == switch_off_at_s:
            body = switch_arm(state, "canary", enabled=False, reason="test")
            state = apply(state, {"number": 5, "time_s": START_S + second, **body})
        canary = state.plan.arm("canary") if state.plan else None
        num_canary = round(canary.weight * episodes_per_s) if canary else 0
        for row, behaviour, num in zip(totals, behaviours, (num_canary, episodes_per_s - num_canary)):
            decisions = num * decisions_per_episode
            errors = rng.binomial(decisions, behaviour.error_rate) if behaviour.error_rate else 0
            row += (num, rng.binomial(num, behaviour.outcome_mean), decisions, errors)
        arms = [_arm_evidence(*map(int, row), interval, alpha_per_sequence(config.alpha)) for row in totals]
        evidence = ReleaseEvidence((0.0, 1.0), *arms)
        now, off = START_S + second, state.switched_off
        decision = judge(release, evidence, gate_verdict=gate_verdict, config=config, now=now, switched_off=off)
        if decision.action != "hold":
            actions.append(decision.action)
            state = _changed(state, decision, START_S + second)
            assert state.release is not None
            if not state.release.is_open:
                break
    assert state.release is not None
    return SimulatedRelease(state.release.state, second, int(totals[0][0]), tuple(actions))


def _arm_evidence(num: int, ones: int, decisions: int, errors: int, interval: Interval, alpha: float) -> ArmEvidence:
    error_interval = betting_interval(decisions, errors, alpha)
    return ArmEvidence(decisions, errors, num, ones / num if num else None, *interval(num, ones, alpha), *error_interval)


def register_entries(gate_verdict: Verdict) -> list[dict[str, Any]]:
    """Return the journal entries that register version 1, whose gates passed, and version 2."""
    return [
        {
            "kind": "register",
            "version": number,
            "digest": f"{number:064d}",
            "policy_sha256": f"{number:064d}",
            "gate_verdict": str(verdict),
            "override_gates": None,
        }
        for number, verdict in ((1, Verdict.PASS), (2, gate_verdict))
    ]


def registry_with(*gate_verdicts: Verdict) -> RegistryState:
    """Return a registry of versions 1, 2, … with these gate verdicts; version 1 is the champion."""
    versions = {
        number: Version(number, f"{number:064d}", f"{number:064d}", verdict, None, START_S)
        for number, verdict in enumerate(gate_verdicts, start=1)
    }
    entry = {"kind": "champion", "number": len(versions) + 1, "time_s": START_S, "version": 1, "reason": "first"}
    return apply(replace(RegistryState(), versions=versions), entry)


def _released(weights: tuple[float, ...], gate_verdict: Verdict, override_gates: str | None) -> RegistryState:
    state = registry_with(Verdict.PASS, gate_verdict)
    body = start_release(state, 2, weights=weights, override_gates=override_gates, reason="test")
    return apply(state, {"number": 4, "time_s": START_S, **body})


def _changed(state: RegistryState, decision: ReleaseDecision, now: float) -> RegistryState:
    assert decision.action != "hold"
    body = change_release(state, decision.action, reason=decision.reason, numbers=decision.numbers)
    return apply(state, {"number": 5, "time_s": now, **body})
