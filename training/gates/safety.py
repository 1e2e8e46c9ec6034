"""How often does the candidate do what the constraint function forbids?"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from policies.confidence import ConfidenceSequence
from policies.errors import ConfigError
from policies.verdicts import GateResult, Verdict
from training.gates.config import SafetyConfig

MAX_SHOWN = 3

# An observation as the policy sees it (its features, flat) and the environment's own action: an int, or an array.
Constraint = Callable[[np.ndarray, Any], bool]


def no_constraint(obs_D: np.ndarray, action: Any) -> bool:
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
    constraint: Constraint | None,
    obs_ND: np.ndarray,
    actions_N: np.ndarray,
    episode_N: np.ndarray,
    *,
    config: SafetyConfig,
    confidence: float,
) -> GateResult:
    """Compare the share of an episode's decisions that the constraint does not accept, on average, with the limit.

    Episodes are independent, the decisions of one are not: a policy that goes wrong in one episode of fifty goes wrong
    hundreds of times there and never elsewhere. So the interval counts episodes.
    """
    if constraint is None:
        reason = "no constraint is named; set gates.safety.constraint (to training.gates.safety:no_constraint if there is none)"
        return GateResult("safety", Verdict.INCONCLUSIVE, reason, {"constraint": None})
    acts = actions_N.tolist() if actions_N.ndim == 1 else actions_N  # integers as integers
    violations = [index for index in range(len(acts)) if not constraint(obs_ND[index], acts[index])]
    decisions_E = np.bincount(episode_N)
    share_E = np.bincount(episode_N[violations], minlength=len(decisions_E)) / decisions_E
    rate = ConfidenceSequence(0.0, 1.0, alpha=1 - confidence)
    for share in share_E:
        rate.update(float(share))
    low, high = rate.interval()
    shown = violations[:MAX_SHOWN]
    numbers = {
        "constraint": config.constraint,
        "decisions": len(actions_N),
        "violations": len(violations),
        "episodes": len(decisions_E),
        "episodes_with_violations": int((share_E > 0).sum()),
        "violation_rate": float(share_E.mean()),
        "violation_rate_low": low,
        "violation_rate_high": high,
        "max_violation_rate": config.max_violation_rate,
        "first_violations": [{"observation": obs_ND[index].tolist(), "action": actions_N[index].tolist()} for index in shown],
    }
    where = f"in {numbers['episodes_with_violations']} of {len(decisions_E)} episodes"
    text = f"{len(violations)} violations {where}, rate {high:.2g} at most"
    if low > config.max_violation_rate:
        return GateResult("safety", Verdict.FAIL, f"{text}, {low:.2g} at least: over {config.max_violation_rate:g}", numbers)
    if high > config.max_violation_rate:
        undecided = f"{text} does not prove {config.max_violation_rate:g}; raise gates.performance.episodes"
        return GateResult("safety", Verdict.INCONCLUSIVE, undecided, numbers)
    return GateResult("safety", Verdict.PASS, f"{text}, within {config.max_violation_rate:g}", numbers)
