"""Does missing evidence ever pass?"""

from dataclasses import replace

import pytest

from policies.errors import GateRefused, IntegrityError
from policies.verdicts import REQUIRED_GATES, GateReport, GateResult, Verdict, require_passing, worst_of

P, F, I = Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE  # noqa: E741


def _report(**verdicts: Verdict) -> GateReport:
    return GateReport(
        "abc", "conditions", 1.0, None, tuple(GateResult(gate, verdict, "because", {}) for gate, verdict in verdicts.items())
    )


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (dict.fromkeys(REQUIRED_GATES, P), P),
        ({**dict.fromkeys(REQUIRED_GATES, P), "own": I}, I),
        ({**dict.fromkeys(REQUIRED_GATES, P), "safety": I}, I),
        ({**dict.fromkeys(REQUIRED_GATES, P), "safety": I, "robustness": F}, F),
        ({"performance": P, "safety": P, "robustness": P, "edge_cases": P}, I),
        ({}, I),
        (dict.fromkeys(REQUIRED_GATES, I), I),
    ],
)
def test_the_worst_gate_decides_and_a_missing_one_is_inconclusive(verdicts: dict[str, Verdict], expected: Verdict) -> None:
    assert _report(**verdicts).verdict is expected


def test_a_report_survives_json_and_one_that_contradicts_itself_is_refused() -> None:
    report = _report(performance=P, safety=P, robustness=F)
    assert GateReport.from_json(report.to_json()) == report
    with pytest.raises(IntegrityError, match="its gates make 'fail'"):
        GateReport.from_json({**report.to_json(), "verdict": "pass"})


def test_a_report_of_the_first_schema_is_judged_by_the_gates_of_its_time() -> None:
    old = replace(_report(performance=P, safety=P, robustness=P), schema_version=1)
    assert GateReport.from_json(old.to_json()) == old and old.verdict is P
    assert replace(old, schema_version=2).verdict is I
    with pytest.raises(IntegrityError, match="schema version 3, this Trimtab reads 1, 2"):
        GateReport.from_json({**old.to_json(), "schema_version": 3})


def test_nothing_judged_is_nothing_proven_and_what_is_no_verdict_is_refused() -> None:
    assert worst_of([]) is I and worst_of([P, P]) is P and worst_of([P, I]) is I and worst_of([P, I, F]) is F
    with pytest.raises(ValueError, match="passed"):
        worst_of(["passed"])


def test_only_a_passing_report_of_this_policy_or_a_reason_opens_the_door() -> None:
    passing = _report(**dict.fromkeys(REQUIRED_GATES, P))
    require_passing(passing, "abc", override=None, what="x")
    require_passing(_report(performance=F), "abc", override="drill", what="x")
    with pytest.raises(
        GateRefused, match="performance fail: because; safety did not run; robustness did not run; edge_cases did"
    ):
        require_passing(_report(performance=F), "abc", override=None, what="x")
    with pytest.raises(GateRefused, match="no gate report"):
        require_passing(None, "abc", override="drill", what="x")
    with pytest.raises(GateRefused, match="gate report is of policy"):
        require_passing(passing, "def", override="drill", what="x")
