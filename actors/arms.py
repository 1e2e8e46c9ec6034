"""How releases, holdout, shadows and switches look in the status, and in whose place a decision was made."""

from typing import Any

from policies.records import Decision, Shadow
from policies.registry import RegistryState, Release


class ShadowTally:
    """Counts what one version would have answered."""

    def __init__(self) -> None:
        self._num_answers = 0
        self._num_failures = 0
        self._num_compared = 0
        self._num_agreed = 0
        self._num_discrete = 0
        self._sent_propensity_sum = 0.0

    def add(self, shadow: Shadow) -> None:
        self._num_answers += 1
        self._num_failures += shadow.failure is not None
        if shadow.agrees is not None:
            self._num_compared += 1
            self._num_agreed += shadow.agrees
        if shadow.sent_propensity is not None:
            self._num_discrete += 1
            self._sent_propensity_sum += shadow.sent_propensity

    def to_json(self) -> dict[str, Any]:
        """Return the counts, the share of answers that agree with the sent action, and its mean probability under the shadow."""
        return {
            "decisions": self._num_answers,
            "failures": self._num_failures,
            "agreement": self._num_agreed / self._num_compared if self._num_compared else None,
            "sent_propensity": self._sent_propensity_sum / self._num_discrete if self._num_discrete else None,
        }


def arm_version(decision: Decision, state: RegistryState) -> int:
    """Return the version that should have answered: that of the decision's arm in the plan by which it was assigned."""
    plan = state.plan_numbered(decision.plan) or state.plan  # the last one while the journal cannot be read
    arm = next((arm for arm in plan.arms if arm.name == decision.arm), None) if plan else None
    return decision.version if arm is None else arm.version


def holdout_status(state: RegistryState) -> dict[str, Any] | None:
    """Return who is held out, also while the holdout is switched off."""
    holdout = state.holdout
    if holdout is None:
        return None
    return {"version": holdout.version, "weight": holdout.weight, "reason": holdout.reason, "since_s": holdout.time_s}


def shadows_status(state: RegistryState, tallies: dict[int, ShadowTally]) -> list[dict[str, Any]]:
    """Return a row for each version that is a shadow now, asked or not."""
    asked = state.plan.shadows if state.plan else ()
    return [
        {"version": version, "is_asked": version in asked, **tallies.get(version, ShadowTally()).to_json()}
        for version in state.shadows
    ]


def switches_status(state: RegistryState) -> list[dict[str, Any]]:
    """Return the arms that are switched off, why and since when."""
    return [{"arm": arm, "reason": off.reason, "since_s": off.time_s} for arm, off in state.switched_off.items()]


def release_status(release: Release) -> dict[str, Any]:
    """Return what the journal says of a release."""
    return {
        "number": release.number,
        "candidate": release.candidate,
        "incumbent": release.incumbent,
        "state": release.state,
        "step": release.step,
        "weights": list(release.weights),
        "canary_weight": release.weights[release.step] if release.is_open else 0.0,
        "override_gates": release.override_gates,
        "started_at": release.started_at,
        "history": [
            {"time_s": entry.time_s, "action": entry.action, "step": entry.step, "reason": entry.reason}
            for entry in release.history
        ],
    }
