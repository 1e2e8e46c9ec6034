"""What a plan says to one observation in the caller's own process: the arm, the action, and how probable that action was.

The same rules as on the request path (`serve_app.deciding`), for one row: the unit's arm answers, the champion in its place where
that cannot, and the mixture is taken over all arms. Shadows are for the endpoint alone: they are not asked here.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from policies.distributions import Mode, mixed
from policies.errors import ServiceUnavailable
from policies.one_row import RowEvaluator, row_evaluator
from policies.policy import Policy
from policies.spaces import Spaces
from policies.traffic import Arm, TrafficPlan, assign

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalVersion:
    """One version, verified and in memory."""

    version: int
    digest: str
    mode: Mode
    spaces: Spaces
    row: RowEvaluator

    @classmethod
    def of(cls, version: int, digest: str, mode: Mode, policy: Policy) -> "LocalVersion":
        return cls(version, digest, mode, policy.spaces, row_evaluator(policy))


@dataclass(frozen=True)
class LocalPlan:
    """A traffic plan with all of its versions."""

    plan: TrafficPlan
    versions: Mapping[int, LocalVersion]
    champion: LocalVersion


class Drawn(NamedTuple):
    """One decision. `fallback` says why it is the champion's and not the arm's own, if so."""

    arm: str
    version: LocalVersion
    action: Any
    propensity: float
    mixture_propensity: float
    fallback: str | None


class _Said(NamedTuple):
    """Who answers for an arm, and with which distribution."""

    version: LocalVersion
    distribution: Any
    fallback: str | None


def draw(plan: LocalPlan, unit_id: str, features: list[float], mask_A: np.ndarray | None, seed: int) -> Drawn:
    """Return the decision for one observation.

    Raises `ServiceUnavailable` when neither the arm's version nor the champion has an answer, or none that can be learned from.
    """
    arm = assign(unit_id, plan.plan)
    said = _said(plan, arm, features, mask_A)
    version = said.version
    if said.distribution is None:
        raise ServiceUnavailable(f"no version can answer this observation: {said.fallback}")
    action, propensity = version.row.choose(said.distribution, version.mode, seed)
    mixture = propensity
    if len(plan.plan.arms) > 1:
        parts = []
        for other in plan.plan.arms:
            theirs = said if other is arm else _said(plan, other, features, mask_A) if other.weight else None
            if theirs is not None and theirs.distribution is not None:  # else it would have sent no action
                under = theirs.version.row.propensity(action, theirs.distribution, theirs.version.mode)
                parts.append((other.weight, under))
        mixture = mixed(parts).value
    if not (0.0 < propensity < math.inf and 0.0 < mixture < math.inf):
        raise ServiceUnavailable(
            f"the action's propensity is {propensity:g}, and {mixture:g} over all arms: nothing can be learned from that; "
            "serve this policy greedily"
        )
    return Drawn(arm.name, version, action, propensity, mixture, said.fallback)


def _said(plan: LocalPlan, arm: Arm, features: list[float], mask_A: np.ndarray | None) -> _Said:
    own = plan.versions[arm.version]
    distribution, problem = _asked(own, features, mask_A)
    if problem is None or own is plan.champion:
        return _Said(own, distribution, problem)
    distribution, champions_problem = _asked(plan.champion, features, mask_A)
    return _Said(plan.champion, distribution, problem if champions_problem is None else f"{problem}; {champions_problem}")


def _asked(version: LocalVersion, features: list[float], mask_A: np.ndarray | None) -> tuple[Any, str | None]:
    """Return a version's distribution, or None and why there is none."""
    try:
        distribution = version.row.distribution(features, mask_A)
    except Exception as error:  # a version's failure is not the caller's: the champion answers instead
        logger.exception("event=version_failed version=%d", version.version)
        return None, f"version {version.version} raised {error!r:.300}"
    return distribution, None if distribution is not None else f"version {version.version} gave NaN"
