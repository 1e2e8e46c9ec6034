"""What a shadow would have answered, beside what was sent: the record that is written of it."""

from typing import Any

import numpy as np

from policies.distributions import Categorical, Distribution, Mode
from policies.records import Shadow


def shadow_record(
    decision_id: str,
    sent_action: Any,
    *,
    seed: int,
    version: int,
    digest: str,
    mode: Mode,
    distribution: Distribution,
    parameters_P: np.ndarray,
    now: float,
) -> Shadow:
    """Return what a version with this distribution [P] would have done in a decision's place, with the same random numbers."""
    if not np.isfinite(parameters_P).all():
        failure = f"version {version} gave NaN"
        return failed_shadow(decision_id, version=version, digest=digest, mode=mode, failure=failure, now=now)
    action, propensity = distribution.choose(parameters_P, mode, seed)
    is_discrete = isinstance(distribution, Categorical)
    return Shadow(
        decision_id=decision_id,
        time_s=now,
        version=version,
        digest=digest,
        mode=mode,
        distribution=parameters_P.tolist(),
        action=action,
        propensity=propensity,
        agrees=action == sent_action,
        sent_propensity=distribution.propensity(sent_action, parameters_P, mode) if is_discrete else None,
    )


def failed_shadow(decision_id: str, *, version: int, digest: str, mode: Mode, failure: str, now: float) -> Shadow:
    """Return the record of a version that gave no answer."""
    what = {"decision_id": decision_id, "time_s": now, "version": version, "digest": digest, "mode": mode}
    return Shadow(**what, distribution=None, action=None, propensity=None, failure=failure)
