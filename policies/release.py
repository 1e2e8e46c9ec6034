"""What the next step of a release is: a pure rule over the evidence of two arms and a clock.

Four intervals are compared: outcome and error rate, of candidate and incumbent. Each is a confidence sequence, so the rule may
look every second. Each sequence gets alpha / 2, that is alpha / 4 for each of its ends:
- a wrong rollback needs one of four ends to be wrong: at most alpha for the whole release, however long it runs;
- a candidate that is too bad in one of the two is promoted only if one of two ends is wrong: at most alpha / 2.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from policies.registry import Release, ReleaseStep
from policies.traffic import BUCKETS
from policies.verdicts import Verdict

Action = Literal["hold", "advance", "promote", "rollback"]


class ReleaseConfig(BaseModel):
    """How a candidate gets its traffic and what it must prove for more."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: tuple[float, ...] = Field(
        (0.05, 0.25, 1.0), description="the canary's shares of units; a bigger first one finds harm sooner, and on more users"
    )
    alpha: float = Field(0.05, gt=0, lt=1, description="bigger: decides sooner, more often rolls back a good candidate")
    max_regression: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="share of the outcome range; bigger: decides sooner, promotes candidates that are worse by more",
    )
    max_error_rate_increase: float = Field(0.01, gt=0, lt=1, description="bigger: decides sooner, accepts more errors")
    min_step_s: float = Field(10.0, ge=0, description="bigger: each share is watched over more of the day")
    min_episodes: int = Field(10, ge=1, description="bigger: the candidate finishes more episodes at each share before the next")

    @field_validator("weights")
    @classmethod
    def _increasing_to_one(cls, weights: tuple[float, ...]) -> tuple[float, ...]:
        rising = all(a < b for a, b in zip(weights, weights[1:]))
        if not weights or not rising or weights[0] < 1 / BUCKETS or weights[-1] != 1:
            raise ValueError(
                f"weights {weights} must rise from at least {1 / BUCKETS:g} to exactly 1, for example (0.05, 0.25, 1.0)"
            )
        return weights


@dataclass(frozen=True)
class ArmEvidence:
    """What one version did in one release. Without evidence an interval is the whole range and `outcome_mean` is None."""

    decisions: int
    errors: int
    episodes: int
    outcome_mean: float | None
    outcome_low: float
    outcome_high: float
    error_low: float
    error_high: float


@dataclass(frozen=True)
class ReleaseEvidence:
    """Both arms side by side, with the declared range of outcomes that the margin is a share of."""

    outcome_range: tuple[float, float]
    candidate: ArmEvidence
    incumbent: ArmEvidence

    def to_json(self) -> dict[str, Any]:
        low, high = self.outcome_range
        return {"outcome_range": [low, high], "candidate": dict(vars(self.candidate)), "incumbent": dict(vars(self.incumbent))}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "ReleaseEvidence":
        low, high = value["outcome_range"]
        return cls((low, high), ArmEvidence(**value["candidate"]), ArmEvidence(**value["incumbent"]))


@dataclass(frozen=True)
class ReleaseDecision:
    """What to do now, what the evidence says (`verdict`) and why, with the numbers for the journal."""

    action: Action
    verdict: Verdict
    reason: str
    numbers: dict[str, Any]


def alpha_per_sequence(alpha: float) -> float:
    """Return the error chance each of the four confidence sequences is built with."""
    return alpha / 2


def judge(
    release: Release,
    evidence: ReleaseEvidence,
    *,
    gate_verdict: Verdict,
    config: ReleaseConfig,
    now: float,
    switched_off: Collection[str] = (),
) -> ReleaseDecision:
    """Return the next action of an open release; `switched_off` are the arms that somebody took out of the traffic.

    Proven harm rolls back at any step, paused or not. Missing evidence holds: it neither promotes nor rolls back. So does an
    arm that is switched off: what was collected before could still pass, and the clock of the step runs on.
    """
    assert release.is_open
    outcome_verdict, outcome_reason = judge_outcomes(evidence, config.max_regression)
    error_verdict, error_reason = judge_errors(evidence, config.max_error_rate_increase)
    verdicts, reason = (outcome_verdict, error_verdict), f"{outcome_reason}; {error_reason}"
    numbers = {**evidence.to_json(), "config": config.model_dump(mode="json")}
    if Verdict.FAIL in verdicts:
        return ReleaseDecision("rollback", Verdict.FAIL, reason, numbers)
    verdict = Verdict.INCONCLUSIVE if Verdict.INCONCLUSIVE in verdicts else Verdict.PASS
    off = " and ".join(arm for arm in ("canary", "champion") if arm in switched_off)
    if off:
        return ReleaseDecision("hold", verdict, f"{off} switched off: the release stands still; {reason}", numbers)
    if verdict is Verdict.INCONCLUSIVE:
        return ReleaseDecision("hold", verdict, reason, numbers)
    obstacle = _obstacle(release, evidence.candidate, gate_verdict, config, now)
    if obstacle:
        return ReleaseDecision("hold", Verdict.PASS, f"{obstacle}; {reason}", numbers)
    at_last_step = release.step + 1 == len(release.weights)
    return ReleaseDecision("promote" if at_last_step else "advance", Verdict.PASS, reason, numbers)


def judge_outcomes(evidence: ReleaseEvidence, max_regression: float) -> tuple[Verdict, str]:
    """Fail when the candidate is proven worse, pass when it is proven not to be worse by the margin."""
    candidate, incumbent = evidence.candidate, evidence.incumbent
    low, high = evidence.outcome_range
    margin = max_regression * (high - low)
    text = (
        f"candidate {_interval(candidate.outcome_low, candidate.outcome_high)} of {candidate.episodes} episodes, "
        f"incumbent {_interval(incumbent.outcome_low, incumbent.outcome_high)} of {incumbent.episodes}"
    )
    if not candidate.episodes or not incumbent.episodes:
        return Verdict.INCONCLUSIVE, f"outcome: no comparison yet, {text}"
    if candidate.outcome_high < incumbent.outcome_low:
        return Verdict.FAIL, f"outcome: proven worse, {text}"
    if candidate.outcome_low >= incumbent.outcome_high - margin:
        return Verdict.PASS, f"outcome: less than {margin:.4g} worse, {text}"
    return Verdict.INCONCLUSIVE, f"outcome: not yet within {margin:.4g}, {text}"


def judge_errors(evidence: ReleaseEvidence, max_increase: float) -> tuple[Verdict, str]:
    """Fail when the candidate's error rate is proven higher by more than the margin, pass when proven not to be."""
    candidate, incumbent = evidence.candidate, evidence.incumbent
    text = (
        f"candidate {_interval(candidate.error_low, candidate.error_high)} of {candidate.decisions} decisions, "
        f"incumbent {_interval(incumbent.error_low, incumbent.error_high)} of {incumbent.decisions}"
    )
    if not candidate.decisions or not incumbent.decisions:
        return Verdict.INCONCLUSIVE, f"error rate: no comparison yet, {text}"
    if candidate.error_low > incumbent.error_high + max_increase:
        return Verdict.FAIL, f"error rate: proven more than {max_increase:.4g} higher, {text}"
    if candidate.error_high <= incumbent.error_low + max_increase:
        return Verdict.PASS, f"error rate: less than {max_increase:.4g} higher, {text}"
    return Verdict.INCONCLUSIVE, f"error rate: not yet within {max_increase:.4g}, {text}"


def _obstacle(release: Release, candidate: ArmEvidence, gate_verdict: Verdict, config: ReleaseConfig, now: float) -> str | None:
    """Return why a candidate with good evidence still does not get more traffic, None when it does."""
    if release.state == "paused":
        return "paused"
    started = _step_start(release)
    if now - started.time_s < config.min_step_s:
        return f"{now - started.time_s:.0f} s of {config.min_step_s:.0f} s at this share"
    episodes = candidate.episodes - _episodes_before(started)
    if episodes < config.min_episodes:
        return f"{episodes} of {config.min_episodes} episodes at this share"
    next_weight = release.weights[min(release.step + 1, len(release.weights) - 1)]
    if next_weight < 1:
        return None
    if release.override_gates:
        return f"canaried with --override-gates ({release.override_gates}): never given all traffic, never promoted"
    if gate_verdict is not Verdict.PASS:
        return f"gates said {gate_verdict}: never given all traffic, never promoted"
    return None


def _step_start(release: Release) -> ReleaseStep:
    return next(entry for entry in reversed(release.history) if entry.action in ("start", "advance"))


def _episodes_before(started: ReleaseStep) -> int:
    """Return the candidate's episodes when the step began: the decision to advance left them in the journal."""
    return int(started.numbers.get("candidate", {}).get("episodes", 0))


def _interval(low: float, high: float) -> str:
    return f"[{low:.4g}, {high:.4g}]"
