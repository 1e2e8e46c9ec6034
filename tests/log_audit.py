"""Does the decision log hold exactly what clients were told? The checker of the kill tests; it knows nothing of the server."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from policies.records import Decision
from policies.traffic import ArmName

TOLD = ("action", "version", "arm", "propensity", "fallback")


def broken_rules(decisions: Iterable[Decision], told: Mapping[str, Mapping[str, Any]], *, versions: set[int]) -> list[str]:
    """Return one sentence per rule that a log breaks, none for a good one.

    `told` is what clients were answered, by decision id. A decision that nobody was told of may be in the log: its answer was
    lost with the replica. It may be there once, like every other.
    """
    decisions = list(decisions)
    count = Counter(decision.decision_id for decision in decisions)
    by_id = {decision.decision_id: decision for decision in decisions}
    problems = [f"{name} was answered and is not in the log" for name in told if name not in count]
    problems += [f"{name} is in the log {number} times" for name, number in count.items() if number > 1]
    problems += [
        f"{name} was answered with {key}={told[name][key]!r}, the log says {getattr(by_id[name], key)!r}"
        for name in told
        if name in by_id
        for key in TOLD
        if told[name][key] != getattr(by_id[name], key)
    ]
    for decision in decisions:
        if not 0.0 < decision.propensity <= 1.0 or not 0.0 < decision.mixture_propensity <= 1.0:
            problems.append(
                f"{decision.decision_id} has propensities {decision.propensity!r} and {decision.mixture_propensity!r}"
            )
        if decision.version not in versions:
            problems.append(f"{decision.decision_id} is by version {decision.version}, known are {sorted(versions)}")
        if decision.arm not in get_args(ArmName):
            problems.append(f"{decision.decision_id} is of arm {decision.arm!r}")
    return problems
