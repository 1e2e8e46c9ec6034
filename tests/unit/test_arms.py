"""Holdout, shadows and switches: which plan follows from the journal, and what may not be written into it?"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from policies.errors import GateRefused, NotFound, ReleaseRefused, TrimtabError, UsageError
from policies.registry import RegistryState, apply, change_release, start_release
from policies.registry_entries import collect_version, end_holdout, set_holdout, set_shadows, switch_arm
from policies.registry_gc import DAY_S, find_garbage
from policies.release import ReleaseConfig, ReleaseEvidence, judge
from policies.traffic import TrafficPlan, assign
from policies.verdicts import Verdict
from tests.simulators import START_S, ArmBehaviour, registry_with, simulate_release

PASS = Verdict.PASS
Entry = Callable[..., dict[str, Any]]


class Journal:
    """A registry's state that follows entries as `Registry` does, without files."""

    def __init__(self, *verdicts: Verdict) -> None:
        self.state = registry_with(*verdicts)
        self.number = len(verdicts) + 1

    def append(
        self, entry: Callable[..., dict[str, Any]], *arguments: Any, time_s: float = START_S, **keywords: Any
    ) -> TrafficPlan:
        body = entry(self.state, *arguments, **{"reason": "test", **keywords})
        self.number += 1
        self.state = apply(self.state, {"number": self.number, "time_s": time_s, **body})
        assert self.state.plan is not None
        return self.state.plan

    def start(self, candidate: int, *weights: float) -> TrafficPlan:
        return self.append(start_release, candidate, weights=weights, override_gates=None)

    def change(self, action: str) -> TrafficPlan:
        return self.append(change_release, action)

    def hold_out(self, version: int, weight: float) -> TrafficPlan:
        return self.append(set_holdout, version, weight=weight, override_gates=None)

    def shadow(self, *versions: int) -> TrafficPlan:
        return self.append(set_shadows, versions, override_gates=None)

    def switch(self, arm: str, *, enabled: bool) -> TrafficPlan:
        return self.append(switch_arm, arm, enabled=enabled)


def arms(plan: TrafficPlan) -> dict[str, tuple[int, float]]:
    return {arm.name: (arm.version, round(arm.weight, 9)) for arm in plan.arms}


# --- which plan follows ---


def test_a_holdout_outlives_releases_and_takes_its_share_first() -> None:
    """5 % are held out on version 1 for good; of the other 95 % a quarter, 23.75 %, get the canary."""
    journal = Journal(PASS, PASS, PASS)
    assert arms(journal.hold_out(1, 0.05)) == {"holdout": (1, 0.05), "champion": (1, 0.95)}
    assert arms(journal.start(2, 0.25, 1.0)) == {"holdout": (1, 0.05), "canary": (2, 0.2375), "champion": (1, 0.7125)}
    assert arms(journal.change("advance")) == {"holdout": (1, 0.05), "canary": (2, 0.95), "champion": (1, 0.0)}
    assert arms(journal.change("promote")) == {"holdout": (1, 0.05), "champion": (2, 0.95)}
    assert arms(journal.hold_out(1, 0.5)) == {"holdout": (1, 0.5), "champion": (2, 0.5)}
    assert arms(journal.append(end_holdout)) == {"champion": (2, 1.0)}
    assert journal.state.holdout is None


def test_every_change_of_the_plan_has_its_entrys_number_and_stays_known() -> None:
    journal = Journal(PASS, PASS, PASS)
    made = [journal.hold_out(1, 0.05), journal.shadow(3), journal.start(2, 0.5), journal.switch("canary", enabled=False)]
    assert [plan.number for plan in made] == [5, 6, 7, 8]
    assert [journal.state.plan_numbered(number) for number in (5, 6, 7, 8)] == made
    assert [journal.state.plan_numbered(number) for number in (0, 3, 9)] == [None] * 3  # 3 registered a version


def test_shadows_are_asked_unless_they_answer_already() -> None:
    journal = Journal(PASS, PASS, PASS, PASS)
    assert journal.shadow(3, 2).shadows == (3, 2)
    assert journal.start(2, 0.5).shadows == (3,)  # 2 is asked as canary
    assert journal.change("abort").shadows == (3, 2)
    assert journal.shadow(4).shadows == (4,)  # exactly these from now on
    assert journal.switch("shadow", enabled=False).shadows == ()
    assert journal.state.shadows == (4,)
    assert journal.switch("shadow", enabled=True).shadows == (4,)
    assert journal.shadow().shadows == ()


def test_a_version_that_was_switched_off_is_not_asked_as_a_shadow_either() -> None:
    journal = Journal(PASS, PASS, PASS)
    journal.shadow(2, 3)
    journal.start(2, 0.5)
    assert journal.switch("canary", enabled=False).shadows == (3,)
    journal.switch("canary", enabled=True)
    journal.change("promote")
    assert journal.switch("champion", enabled=False).shadows == (3,)
    assert journal.change("rollback").shadows == (2, 3)  # the control: out of the traffic it is a shadow as before


def test_a_canary_or_holdout_that_is_switched_off_gives_its_units_to_the_champion_until_it_is_enabled() -> None:
    journal = Journal(PASS, PASS, PASS)
    journal.hold_out(3, 0.2)
    full = journal.start(2, 0.25, 1.0)
    assert arms(journal.switch("holdout", enabled=False)) == {"canary": (2, 0.2), "champion": (1, 0.8)}
    held_out = [unit for unit in map(str, range(500)) if assign(unit, full).name == "holdout"]
    off = journal.state.plan
    assert held_out and {assign(unit, off).name for unit in held_out} == {"champion"}  # not the canary's
    assert arms(journal.switch("canary", enabled=False)) == {"champion": (1, 1.0)}
    assert journal.state.plan.release == 1  # what the champion does still counts for the release
    journal.switch("holdout", enabled=True)
    back = journal.switch("canary", enabled=True)
    assert dataclasses.replace(back, number=0) == dataclasses.replace(full, number=0)


def test_a_champion_that_is_switched_off_is_stood_in_for_by_the_previous_one() -> None:
    journal = Journal(PASS, PASS, PASS)
    journal.start(2, 1.0)
    journal.change("promote")
    journal.start(3, 0.5)
    assert arms(journal.switch("champion", enabled=False)) == {"canary": (3, 0.5), "champion": (1, 0.5)}
    assert journal.state.champion == 2
    assert arms(journal.switch("champion", enabled=True)) == {"canary": (3, 0.5), "champion": (2, 0.5)}


def test_a_rollback_after_the_switch_does_not_bring_the_bad_champion_back() -> None:
    """2 is switched off, 1 answers; then 2 is rolled back for good: 1 stays, and 2 is nobody's stand-in any more."""
    journal = Journal(PASS, PASS)
    journal.start(2, 1.0)
    journal.change("promote")
    assert arms(journal.switch("champion", enabled=False)) == {"champion": (1, 1.0)}
    assert arms(journal.change("rollback")) == {"champion": (1, 1.0)}
    assert (journal.state.previous_champion, journal.state.switched_off) == (None, {})


def test_a_version_that_was_taken_back_is_never_the_previous_champion() -> None:
    journal = Journal(*[PASS] * 4)

    def promote(version: int) -> tuple[int | None, int | None]:
        journal.start(version, 1.0)
        journal.change("promote")
        return journal.state.champion, journal.state.previous_champion

    def rollback() -> tuple[int | None, int | None]:
        journal.change("rollback")
        return journal.state.champion, journal.state.previous_champion

    assert promote(2) == (2, 1)
    assert rollback() == (1, None)  # the broken one would say 2
    refused(journal, ReleaseRefused, "no champion before version 1", switch_arm, "champion", enabled=False)
    assert [promote(3), promote(4)] == [(3, 1), (4, 3)]
    assert rollback() == (3, 1)
    assert rollback() == (1, None)
    # Champions 1, 2, 3 and then 2 again, which is taken back: 2 was champion before 3 too, and is not asked any more.
    assert [promote(2), promote(3), promote(2)] == [(2, 1), (3, 2), (2, 3)]
    assert rollback() == (3, 1)
    assert promote(2) == (2, 3)  # once promoted again it is a champion like any other
    assert promote(4) == (4, 2)


def test_a_switch_that_outlived_its_champion_would_bring_it_back() -> None:
    """The negative control: the same journal, with the switch kept, gives all traffic to version 2."""
    journal = Journal(PASS, PASS)
    journal.start(2, 1.0)
    journal.change("promote")
    journal.switch("champion", enabled=False)
    kept = journal.state.switched_off
    journal.change("rollback")
    journal.state = dataclasses.replace(journal.state, switched_off=kept, former_champions=(2,))
    assert arms(journal.shadow(2)) == {"champion": (2, 1.0)}


# --- what may not be written ---


def refused(journal: Journal, error: type[TrimtabError], message: str, entry: Entry, *arguments: Any, **keywords: Any) -> None:
    before = journal.state
    with pytest.raises(error, match=message):
        journal.append(entry, *arguments, **keywords)
    assert journal.state is before


@pytest.mark.parametrize("weight", [0.0, -0.1, 0.51, 1.0, 0.00009, float("nan"), float("inf")])
def test_weights_of_nobody_or_of_most_are_no_holdout(weight: float) -> None:
    refused(Journal(PASS), UsageError, "must be between 0.0001 and 0.5", set_holdout, 1, weight=weight, override_gates=None)
    assert arms(Journal(PASS).hold_out(1, 0.5))["holdout"] == (1, 0.5)  # the control
    assert arms(Journal(PASS).hold_out(1, 0.0001))["holdout"] == (1, 0.0001)


def test_only_versions_that_a_release_could_deliver_get_an_arm() -> None:
    journal = Journal(PASS, Verdict.INCONCLUSIVE, PASS)
    journal.append(collect_version, 3)
    for entry, wrap, what in ((set_holdout, int, {"weight": 0.1}), (set_shadows, lambda number: (number,), {})):
        plain, overridden = {**what, "override_gates": None}, {**what, "override_gates": "a demonstration"}
        refused(journal, NotFound, r"version 9 does not exist; registered: \[1, 2, 3\]", entry, wrap(9), **plain)
        refused(journal, GateRefused, "gates said inconclusive.*--override-gates", entry, wrap(2), **plain)
        refused(journal, ReleaseRefused, "version 3 was given up", entry, wrap(3), **overridden)
        journal.append(entry, wrap(2), **overridden)  # the control: break-glass
    assert (journal.state.holdout.version, journal.state.plan.shadows) == (2, ())  # the holdout is asked already


def test_shadows_are_few_different_and_not_the_champion() -> None:
    journal = Journal(*[PASS] * 6)
    refused(journal, UsageError, "at most 4 different", set_shadows, (2, 3, 4, 5, 6), override_gates=None)
    refused(journal, UsageError, "at most 4 different", set_shadows, (2, 2), override_gates=None)
    refused(journal, ReleaseRefused, "version 1 is the champion", set_shadows, (2, 1), override_gates=None)
    assert journal.shadow(2, 3, 4, 5).shadows == (2, 3, 4, 5)


def test_what_is_not_there_cannot_be_ended_or_enabled() -> None:
    journal = Journal(PASS, PASS)
    refused(journal, ReleaseRefused, "no holdout to end", end_holdout)
    refused(journal, ReleaseRefused, "no shadow to end", set_shadows, (), override_gates=None)
    refused(journal, ReleaseRefused, "the canary is not switched off", switch_arm, "canary", enabled=True)
    refused(journal, UsageError, "arm 'king' does not exist; there are canary, champion", switch_arm, "king", enabled=False)
    journal.append(switch_arm, "canary", enabled=False, reason="latency")
    refused(journal, ReleaseRefused, "switched off already: latency", switch_arm, "canary", enabled=False)
    for entry, arguments, what in [
        (set_holdout, (1,), {"weight": 0.1, "override_gates": None}),
        (switch_arm, ("canary",), {"enabled": False}),
    ]:
        with pytest.raises(ReleaseRefused, match="there is no champion"):
            entry(dataclasses.replace(RegistryState(), versions=journal.state.versions), *arguments, reason="test", **what)


def test_what_is_switched_off_is_not_begun_anew_and_the_remedy_is_named() -> None:
    journal = Journal(PASS, PASS, PASS)
    for arm in ("canary", "holdout", "shadow"):
        journal.append(switch_arm, arm, enabled=False, reason="an incident")
    remedy = r"the {} is switched off \(an incident\).*`trimtab arms enable {}` first"
    started = {"weights": (0.5,), "override_gates": None}
    refused(journal, ReleaseRefused, remedy.format("canary", "canary"), start_release, 2, **started)
    refused(journal, ReleaseRefused, remedy.format("holdout", "holdout"), set_holdout, 2, weight=0.1, override_gates=None)
    refused(journal, ReleaseRefused, remedy.format("shadow", "shadow"), set_shadows, (2,), override_gates=None)
    journal.switch("canary", enabled=True)
    assert "canary" in arms(journal.start(2, 0.5))  # the control


def test_a_champion_nobody_can_stand_in_for_is_not_switched_off() -> None:
    journal = Journal(PASS, PASS)
    refused(journal, ReleaseRefused, "no champion before version 1.*`trimtab down`", switch_arm, "champion", enabled=False)
    journal.start(2, 1.0)
    journal.change("promote")
    journal.start(1, 0.5)
    refused(journal, ReleaseRefused, "cannot be compared with itself", switch_arm, "champion", enabled=False)
    journal.change("abort")
    journal.switch("champion", enabled=False)  # the control
    refused(journal, ReleaseRefused, "nothing to compare with", start_release, 1, weights=(0.5,), override_gates=None)


def test_a_reason_is_asked_for() -> None:
    refused(Journal(PASS), UsageError, "1-1000 printable", switch_arm, "canary", enabled=False, reason=" ")
    refused(Journal(PASS), UsageError, "1-1000 printable", set_holdout, 1, weight=0.1, override_gates=None, reason="a\nb")


# --- bundles that must stay ---


def test_bundles_of_holdout_and_shadows_stay_also_while_they_are_switched_off_and_for_a_while_after() -> None:
    journal = Journal(*[PASS] * 4)
    journal.hold_out(2, 0.1)
    journal.shadow(3)
    for arm in ("holdout", "shadow"):
        journal.switch(arm, enabled=False)
    assert [journal.state.in_use(number) for number in (1, 2, 3, 4)] == ["champion", "the holdout", "a shadow", None]
    refused(journal, ReleaseRefused, "version 2 is the holdout: its bundle stays", collect_version, 2)
    year_s = 365 * DAY_S
    ended_s = START_S + year_s
    journal.append(end_holdout, time_s=ended_s)
    journal.append(set_shadows, (), override_gates=None, time_s=ended_s)

    def garbage(now: float) -> list[tuple[int, ...]]:
        ages_s = {version.digest: year_s for version in journal.state.versions.values()}
        return [item.versions for item in find_garbage(journal.state, ages_s, keep_s=30 * DAY_S, now=now)]

    assert garbage(ended_s + DAY_S) == [(4,)]  # registered as long ago as the others, and never used
    assert garbage(ended_s + 31 * DAY_S) == [(2,), (3,), (4,)]


# --- releases ---

CONFIG = ReleaseConfig(weights=(0.25, 1.0), min_step_s=0, min_episodes=1)


def passing_evidence() -> ReleaseEvidence:
    arm = {"decisions": 900, "errors": 0, "episodes": 900, "outcome_mean": 0.9, "outcome_low": 0.85, "outcome_high": 0.95}
    side = arm | {"error_low": 0.0, "error_high": 0.005}
    return ReleaseEvidence.from_json({"outcome_range": [0, 1], "candidate": side, "incumbent": side})


def test_a_release_stands_still_while_one_of_its_arms_is_switched_off() -> None:
    journal = Journal(PASS, PASS)
    journal.start(2, 0.25, 1.0)
    release = journal.state.release
    judged = {"gate_verdict": PASS, "config": CONFIG, "now": START_S + 1000}
    for arm in ("canary", "champion"):
        decision = judge(release, passing_evidence(), switched_off={arm}, **judged)
        assert (decision.action, decision.verdict) == ("hold", PASS) and f"{arm} switched off" in decision.reason
    # The negative control: without the switch, what was collected before it is enough to go on, and later to promote.
    assert judge(release, passing_evidence(), switched_off={"holdout", "shadow"}, **judged).action == "advance"
    last = dataclasses.replace(release, step=1)
    assert judge(last, passing_evidence(), **judged).action == "promote"
    assert judge(last, passing_evidence(), switched_off={"canary"}, **judged).action == "hold"


def test_proven_harm_rolls_back_although_the_canary_is_switched_off() -> None:
    journal = Journal(PASS, PASS)
    journal.start(2, 0.25, 1.0)
    good = passing_evidence()
    bad = dataclasses.replace(good.candidate, outcome_low=0.1, outcome_high=0.3)
    evidence = dataclasses.replace(good, candidate=bad)
    judged = {"gate_verdict": PASS, "config": CONFIG, "now": START_S + 1000, "switched_off": {"canary"}}
    assert judge(journal.state.release, evidence, **judged).action == "rollback"


def test_nobody_promotes_a_canary_that_is_switched_off() -> None:
    journal = Journal(PASS, PASS)
    journal.start(2, 0.25, 1.0)
    journal.switch("canary", enabled=False)
    for action in ("advance", "promote"):
        refused(journal, ReleaseRefused, f"cannot {action}; `trimtab arms enable canary` first", change_release, action)
    assert arms(journal.change("rollback")) == {"champion": (1, 1.0)}
    journal.switch("canary", enabled=True)
    journal.start(2, 0.25, 1.0)
    assert arms(journal.change("promote")) == {"champion": (2, 1.0)}  # the control


@pytest.mark.parametrize("seed", range(3))
def test_a_simulated_release_holds_for_ever_with_its_canary_switched_off_after_a_minute(seed: int) -> None:
    """Good evidence of one minute stays good evidence: only the switch keeps the release from going on."""
    good = ArmBehaviour(0.9)
    setting = {"rng": np.random.default_rng(seed), "config": ReleaseConfig(min_step_s=90, min_episodes=3), "max_seconds": 400}
    held = simulate_release(good, good, switch_off_at_s=60, **setting)
    assert (held.state, held.actions) == ("running", ())
    control = simulate_release(good, good, **{**setting, "rng": np.random.default_rng(seed)})
    assert control.state == "promoted"
