"""What a gate says of a policy: pass, fail or inconclusive, with the numbers and the reason."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from policies.errors import GateRefused, IntegrityError

SCHEMA_VERSION = 1
REQUIRED_GATES = ("performance", "robustness", "safety")


class Verdict(StrEnum):
    INCONCLUSIVE = "inconclusive"
    PASS = "pass"
    FAIL = "fail"


@dataclass(frozen=True)
class GateResult:
    """One gate's verdict. `numbers` holds what it measured and the thresholds it compared with (JSON values)."""

    gate: str
    verdict: Verdict
    reason: str
    numbers: dict[str, Any]


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

    @property
    def verdict(self) -> Verdict:
        """Missing evidence first: a required gate that did not run makes the whole inconclusive, never a pass."""
        verdicts = {result.gate: result.verdict for result in self.results}
        if Verdict.FAIL in verdicts.values():
            return Verdict.FAIL
        if any(verdicts.get(gate) is None for gate in REQUIRED_GATES) or Verdict.INCONCLUSIVE in verdicts.values():
            return Verdict.INCONCLUSIVE
        return Verdict.PASS

    @property
    def reason(self) -> str:
        """The reasons of the gates that did not pass, or how many did."""
        parts = [f"{r.gate} {r.verdict}: {r.reason}" for r in self.results if r.verdict is not Verdict.PASS]
        parts += [f"{gate} did not run" for gate in REQUIRED_GATES if gate not in {r.gate for r in self.results}]
        return "; ".join(parts) or f"all {len(self.results)} gates pass"

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
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
            if value["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema version {value['schema_version']}, this Trimtab reads {SCHEMA_VERSION}")
            results = tuple(
                GateResult(r["gate"], Verdict(r["verdict"]), r["reason"], dict(r["numbers"])) for r in value["results"]
            )
            created_at, incumbent_version = float(value["created_at"]), value["incumbent_version"]
            report = cls(value["policy_sha256"], value["conditions_sha256"], created_at, incumbent_version, results)
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
