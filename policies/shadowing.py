"""What a shadow would have answered, beside what was sent: the record that is written of it."""

import numpy as np

from policies.distributions import Categorical, Distribution, Mode
from policies.records import Decision, Shadow


def shadow_record(
    decision: Decision,
    *,
    version: int,
    digest: str,
    mode: Mode,
    distribution: Distribution,
    parameters_P: np.ndarray,
    now: float,
) -> Shadow:
    """Return what a version with this distribution [P] would have done in a decision's place, with the same random numbers."""
    if not np.isfinite(parameters_P).all():
        return failed_shadow(decision, version=version, digest=digest, mode=mode, failure=f"version {version} gave NaN", now=now)
    action, propensity = distribution.choose(parameters_P, mode, decision.seed)
    is_discrete = isinstance(distribution, Categorical)
    return Shadow(
        decision_id=decision.decision_id,
        time_s=now,
        version=version,
        digest=digest,
        mode=mode,
        distribution=parameters_P.tolist(),
        action=action,
        propensity=propensity,
        agrees=action == decision.action,
        sent_propensity=distribution.propensity(decision.action, parameters_P, mode) if is_discrete else None,
    )


def failed_shadow(decision: Decision, *, version: int, digest: str, mode: Mode, failure: str, now: float) -> Shadow:
    """Return the record of a version that gave no answer."""
    what = {"decision_id": decision.decision_id, "time_s": now, "version": version, "digest": digest, "mode": mode}
    return Shadow(**what, distribution=None, action=None, propensity=None, failure=failure)
