"""How often does the candidate do what the constraint function forbids?"""

import importlib
from collections.abc import Callable

import numpy as np

from policies.errors import ConfigError
from policies.verdicts import GateResult, Verdict
from training.gates.config import SafetyConfig
from training.gates.intervals import proportion_interval

MAX_SHOWN = 3

Constraint = Callable[[np.ndarray, int], bool]


def no_constraint(obs_D: np.ndarray, action: int) -> bool:
    """Accept everything: name this function in the loop file to say that there is nothing to forbid."""
    return True


def load_constraint(reference: str) -> Constraint:
    """Import `module:function`; raises `ConfigError` that says which half is wrong."""
    module_name, separator, name = reference.partition(":")
    if not separator or not module_name or not name:
        raise ConfigError(f"gates.safety.constraint is {reference!r}, expected `module:function`")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"gates.safety.constraint {reference!r}: cannot import {module_name!r}: {error}") from error
    constraint = getattr(module, name, None)
    if not callable(constraint):
        raise ConfigError(f"gates.safety.constraint {reference!r}: {module_name} has no function {name!r}")
    return constraint


def judge_safety(
    constraint: Constraint | None, obs_ND: np.ndarray, actions_N: np.ndarray, *, config: SafetyConfig, confidence: float
) -> GateResult:
    """Count the decisions that the constraint does not accept and compare the exact bounds of their rate with the limit."""
    if constraint is None:
        reason = "no constraint is named; set gates.safety.constraint (to training.gates.safety:no_constraint if there is none)"
        return GateResult("safety", Verdict.INCONCLUSIVE, reason, {"constraint": None})
    violations = [index for index in range(len(actions_N)) if not constraint(obs_ND[index], int(actions_N[index]))]
    rate = proportion_interval(len(violations), len(actions_N), confidence)
    numbers = {
        "constraint": config.constraint,
        "decisions": len(actions_N),
        "violations": len(violations),
        "violation_rate": rate.mean,
        "violation_rate_low": rate.low,
        "violation_rate_high": rate.high,
        "max_violation_rate": config.max_violation_rate,
        "first_violations": [
            {"observation": [float(x) for x in obs_ND[index]], "action": int(actions_N[index])}
            for index in violations[:MAX_SHOWN]
        ],
    }
    text = f"{len(violations)} violations in {len(actions_N)} decisions, rate at most {rate.high:.2g}"
    if rate.low > config.max_violation_rate:
        return GateResult("safety", Verdict.FAIL, f"{text}, at least {rate.low:.2g}: over {config.max_violation_rate:g}", numbers)
    if rate.high > config.max_violation_rate:
        return GateResult("safety", Verdict.INCONCLUSIVE, f"{text} does not prove {config.max_violation_rate:g}", numbers)
    return GateResult("safety", Verdict.PASS, f"{text}, within {config.max_violation_rate:g}", numbers)
