"""Who answers when the arm's version cannot, and how probable the answer was after all: the fallback ladder.

The rungs, from the top: the arm's own version, the champion, the previous champion, a rule, a fixed action. Without a shield the
first that can answer does. With one, what a rung draws is sent only if it is acceptable, else the next rung draws.
So the probability that action `a` is sent for an observation is

    p(a) = sum over rungs k of  prod_{j<k} v_j  *  p_k(a)      for an acceptable a

where p_k is rung k's own distribution and v_j the probability that rung j draws something unacceptable. Where a rung has a
probability for `a` and another only a density, the densities do not count (`policies.distributions.mixed`).
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from policies import records
from policies.distributions import Mode, Propensity, mixed, seed_of
from policies.errors import ConfigError, ServiceUnavailable
from policies.functions import load_function
from policies.spaces import Spaces
from policies.traffic import Arm
from serve_app.config import ServingConfig
from serve_app.shield import Shield
from serve_app.variants import Snapshot, Variant

logger = logging.getLogger(__name__)


class VersionRung(NamedTuple):
    """A version, with its distribution for one row."""

    name: records.Rung
    variant: Variant
    mode: Mode
    parameters_P: np.ndarray

    @property
    def version(self) -> int:
        return self.variant.version

    @property
    def digest(self) -> str:
        return self.variant.digest

    def choose(self, seed: int) -> Any:
        return self.variant.policy.distribution.choose(self.parameters_P, self.mode, seed)[0]

    def propensity(self, action: Any) -> Propensity:
        distribution = self.variant.policy.distribution
        value = distribution.propensity(action, self.parameters_P, self.mode)
        return Propensity(value, distribution.num_densities(action, self.mode))

    def violation_probability(self, shield: Shield, obs_D: np.ndarray) -> float:
        return shield.violation_probability(self.variant.policy.distribution, self.parameters_P, self.mode, obs_D)


class PointRung(NamedTuple):
    """A rule's answer, or the fixed action."""

    name: records.Rung
    action: Any
    mode: Mode = "greedy"
    version: int = 0
    digest: str = ""
    parameters_P: np.ndarray | None = None

    def choose(self, seed: int) -> Any:
        return self.action

    def propensity(self, action: Any) -> Propensity:
        return Propensity(float(np.array_equal(action, self.action)))

    def violation_probability(self, shield: Shield, obs_D: np.ndarray) -> float:
        return float(shield.violated(obs_D, self.action) is not None)


Rung = VersionRung | PointRung


class Row(NamedTuple):
    """What the ladder has to know of one request's observation. `mode` is what the request asks for, None: the version's own."""

    decision_id: str
    seed: int
    obs_D: np.ndarray
    mask_A: np.ndarray | None
    mode: Mode | None


class Sent(NamedTuple):
    """What is sent, by whom, and why not by the arm's own version. `propensity` is that under the arm."""

    rung: Rung
    action: Any
    seed: int
    propensity: float
    fallback: str | None
    shield: str | None


# A version's distribution for this row, or in words why it has none.
Look = Callable[[int], np.ndarray | str]


class Ladder:
    """The rungs below the versions, and the shield beside them."""

    def __init__(self, config: ServingConfig) -> None:
        self.shield = Shield(config.shield) if config.shield.is_on else None
        self._rule = load_function(config.fallback.rule, "serving.fallback.rule") if config.fallback.rule else None
        self._config = config.fallback
        self._request_modes = config.request_modes

    def check(self, variant: Variant) -> None:
        """Raise `ConfigError` if a version cannot be served with this ladder."""
        if self._config.action is not None:
            check_action(variant.policy.spaces, self._config.action, "serving.fallback.action")
        if self.shield is not None:
            for mode in (variant.mode, *self._request_modes):
                self.shield.require_computable(variant.policy.distribution, mode)

    def walk(self, row: Row, versions: list[tuple[records.Rung, Variant]], look: Look) -> "Walk":
        """Return the way down for one row and one arm, whose versions are named from the top."""
        return Walk(self, row, versions, look)

    def lower_rungs(self, row: Row, spaces: Spaces) -> Iterator[PointRung | str]:
        """Yield the rule's and the fixed action, or what is wrong with the rule."""
        if self._rule is not None:
            try:
                action = _as_json(self._rule(row.obs_D, row.mask_A))
                check_action(spaces, action, f"the answer of {self._config.rule}")
                is_allowed = spaces.mask_allows(action, row.mask_A)
                yield PointRung("rule", action) if is_allowed else f"the mask forbids what {self._config.rule} answers"
            except Exception as error:  # the user's code: the fixed action answers instead
                logger.exception("event=rule_failed rule=%s", self._config.rule)
                yield f"rule {self._config.rule} failed: {error!r:.200}"
        if self._config.action is not None:
            is_allowed = spaces.mask_allows(self._config.action, row.mask_A)
            yield PointRung("fixed", self._config.action) if is_allowed else "the mask forbids the fixed action"


class Walk:
    """One row's way down one arm's ladder. Rungs are looked at when they are needed, and once."""

    def __init__(self, ladder: Ladder, row: Row, versions: list[tuple[records.Rung, Variant]], look: Look) -> None:
        self._shield, self._row = ladder.shield, row
        self.reasons: list[str] = []
        self._source = self._rungs(ladder, versions, look)
        self._seen: list[Rung] = []

    def send(self) -> Sent:
        """Draw until something acceptable comes; raises `ServiceUnavailable` when nobody has it."""
        violated = None if self._shield is None else ""
        for depth, rung in enumerate(self._rungs_again()):
            seed = self._row.seed if depth == 0 else seed_of(f"{self._row.decision_id}/{depth}")
            action = rung.choose(seed)
            wrong = self._shield.violated(self._row.obs_D, action) if self._shield is not None else None
            if wrong is None:
                fallback = None if rung.name == "arm" else self.reasons[-1]
                return Sent(rung, action, seed, self.propensity(action).value, fallback, violated)
            violated = violated or wrong
            self.reasons.append(f"{_who(rung)} wanted an action that violates {wrong}")
        raise ServiceUnavailable(f"nobody can answer this observation: {'; '.join(self.reasons) or 'there is no version'}")

    def propensity(self, action: Any) -> Propensity:
        """Return how probably this arm sends an acceptable action, over all rungs that could have sent it."""
        if self._shield is None:
            first = next(self._rungs_again(), None)
            return Propensity(0.0) if first is None else first.propensity(action)
        parts, reaches = [], 1.0
        for rung in self._rungs_again():
            parts.append((reaches, rung.propensity(action)))
            reaches *= rung.violation_probability(self._shield, self._row.obs_D)
            if reaches <= 0:
                break
        return mixed(parts)

    def _rungs_again(self) -> Iterator[Rung]:
        yield from self._seen
        for rung in self._source:
            self._seen.append(rung)
            yield rung

    def _rungs(self, ladder: Ladder, versions: list[tuple[records.Rung, Variant]], look: Look) -> Iterator[Rung]:
        for name, variant in versions:
            found = look(variant.version)
            if isinstance(found, str):
                self.reasons.append(found)
            else:
                yield VersionRung(name, variant, self._row.mode or variant.mode, found)
        for rung in ladder.lower_rungs(self._row, versions[0][1].policy.spaces):
            if isinstance(rung, str):
                self.reasons.append(rung)
            else:
                yield rung


def versions_of(arm: Arm, snapshot: Snapshot) -> list[tuple[records.Rung, Variant]]:
    """Return the versions on an arm's ladder, from the top, each once."""
    steps: list[tuple[records.Rung, Variant]] = [("arm", snapshot.variants[arm.version]), ("champion", snapshot.champion)]
    if snapshot.previous is not None:
        steps.append(("previous", snapshot.previous))
    seen: set[int] = set()
    return [(name, v) for name, v in steps if not (v.version in seen or seen.add(v.version))]


def check_action(spaces: Spaces, action: Any, what: str) -> None:
    """Raise `ConfigError` unless an action is one that the policy's space holds."""
    if not spaces.holds_action(action):
        raise ConfigError(f"{what} is {action!s:.200}, which is not in the action space {spaces.action.to_json()!s:.300}")


def _as_json(action: Any) -> Any:
    return action.tolist() if isinstance(action, np.ndarray | np.generic) else action


def _who(rung: Rung) -> str:
    return f"version {rung.version}" if isinstance(rung, VersionRung) else f"the {rung.name} step"
