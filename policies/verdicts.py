"""What a gate says of a policy: pass, fail or inconclusive, with the numbers and the reason."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from policies.errors import GateRefused, IntegrityError

SCHEMA_VERSION = 2
REQUIRED_GATES_BY_SCHEMA = {
    1: ("performance", "robustness", "safety"),
    2: ("performance", "safety", "robustness", "edge_cases", "budget"),
}
REQUIRED_GATES = REQUIRED_GATES_BY_SCHEMA[SCHEMA_VERSION]


class Verdict(StrEnum):
    INCONCLUSIVE = "inconclusive"
    PASS = "pass"
    FAIL = "fail"


def worst_of(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict of several together: one that fails makes them fail, and only if all pass, and there are any, do they.

    Raises `ValueError` for what is no verdict.
    """
    found = {Verdict(verdict) for verdict in verdicts}
    if Verdict.FAIL in found:
        return Verdict.FAIL
    return Verdict.PASS if found == {Verdict.PASS} else Verdict.INCONCLUSIVE


@dataclass(frozen=True)
class GateResult:
    """One gate's verdict. `numbers` holds what it measured and the thresholds it compared with (JSON values)."""

    gate: str
    verdict: Verdict
    reason: str
    numbers: dict[str, Any]


def judged(gate: str, rules: list[tuple[Verdict, str]], numbers: dict[str, Any], *, remedy: str = "") -> GateResult:
    """Return the verdict of a gate's rules together, with the texts of those that made it what it is.

    `remedy` says how an inconclusive gate gets to a verdict.
    """
    verdict = worst_of(rule_verdict for rule_verdict, _ in rules)
    reason = "; ".join(text for rule_verdict, text in rules if rule_verdict is verdict)
    if verdict is Verdict.INCONCLUSIVE and remedy:
        reason += f"; {remedy}"
    return GateResult(gate, verdict, reason, numbers)


@dataclass(frozen=True)
class GateReport:
    """All gates' verdicts of one policy, named by its digest so that a report cannot be moved to another policy.

    `conditions_sha256` names what it was judged under: environment, thresholds, serving mode.
    """

    policy_sha256: str
    conditions_sha256: str
    created_at: float
    incumbent_version: int | None
    results: tuple[GateResult, ...]
    schema_version: int = SCHEMA_VERSION

    @property
    def verdict(self) -> Verdict:
        """Missing evidence never passes: a required gate that did not run makes the whole inconclusive at best."""
        return worst_of([result.verdict for result in self.results] + [Verdict.INCONCLUSIVE for _ in self.missing])

    @property
    def missing(self) -> list[str]:
        """The required gates that did not run."""
        ran = {result.gate for result in self.results}
        return [gate for gate in REQUIRED_GATES_BY_SCHEMA[self.schema_version] if gate not in ran]

    def result(self, gate: str) -> GateResult | None:
        return next((result for result in self.results if result.gate == gate), None)

    @property
    def reason(self) -> str:
        """The reasons of the gates that did not pass, or how many did."""
        parts = [f"{r.gate} {r.verdict}: {r.reason}" for r in self.results if r.verdict is not Verdict.PASS]
        parts += [f"{gate} did not run" for gate in self.missing]
        return "; ".join(parts) or f"all {len(self.results)} gates pass"

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": self.schema_version,
            "policy_sha256": self.policy_sha256,
            "conditions_sha256": self.conditions_sha256,
            "created_at": self.created_at,
            "incumbent_version": self.incumbent_version,
            "verdict": str(self.verdict),
            "results": [
                {"gate": r.gate, "verdict": str(r.verdict), "reason": r.reason, "numbers": r.numbers} for r in self.results
            ],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "GateReport":
        """Read a report; raises `IntegrityError` when it is malformed or its summary contradicts its parts."""
        try:
            schema_version = value["schema_version"]
            if type(schema_version) is not int or schema_version not in REQUIRED_GATES_BY_SCHEMA:
                readable = ", ".join(map(str, REQUIRED_GATES_BY_SCHEMA))
                raise ValueError(f"schema version {schema_version}, this Trimtab reads {readable}")
            results = tuple(
                GateResult(r["gate"], Verdict(r["verdict"]), r["reason"], dict(r["numbers"])) for r in value["results"]
            )
            created_at, incumbent_version = float(value["created_at"]), value["incumbent_version"]
            report = cls(
                value["policy_sha256"], value["conditions_sha256"], created_at, incumbent_version, results, schema_version
            )
            if str(report.verdict) != value["verdict"]:
                raise ValueError(f"says {value['verdict']!r} but its gates make {str(report.verdict)!r}")
            return report
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"gate report cannot be read: {error}") from error


def require_passing(report: GateReport | None, policy_sha256: str, *, override: str | None, what: str) -> None:
    """Raise `GateRefused` unless this policy's own report passes or a break-glass reason is given."""
    if report is None:
        raise GateRefused(f"{what}: there is no gate report; run `trimtab gate` first")
    if report.policy_sha256 != policy_sha256:
        raise GateRefused(f"{what}: the gate report is of policy {report.policy_sha256[:12]}…, this one is {policy_sha256[:12]}…")
    if report.verdict is not Verdict.PASS and not override:
        raise GateRefused(f'{what}: gates say {report.verdict}: {report.reason}. Break-glass: --override-gates "reason"')
