"""What each row of a batch is answered, and how probable that answer was.

Usually every version of the plan answers for every row. Then all rows are decided at once, arm by arm. Whatever is not usual goes
down the ladder (`serve_app.rungs`) row by row: a version that raised or gave NaN, a shield, a mode that a request asks for.

B rows, P numbers of a distribution.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from policies.distributions import Categorical, Mode, Propensity, mixed
from policies.errors import ServiceUnavailable
from policies.records import per_row, unit_id_of
from policies.traffic import Arm, assign, assign_many
from serve_app.answers import Answer, Answers, Decided, if_learnable, put_together, same
from serve_app.breaker import Breaker
from serve_app.config import ServingConfig
from serve_app.rungs import Ladder, Row, Walk, versions_of
from serve_app.variants import Snapshot, Variant

logger = logging.getLogger(__name__)


class Rows(NamedTuple):
    """A batch to decide. `modes` and `arms` are what the requests ask for, per row; None where no row asks for anything.

    `keeps_distributions`: somebody wants to see them.
    """

    decision_ids: list[str]
    seeds: list[int]
    unit_ids: str | list[str] | None  # see `policies.records.unit_id_of`
    obs_BD: np.ndarray
    mask_BA: np.ndarray | None
    modes: list[Mode | None] | None = None
    arms: list[str | None] | None = None
    keeps_distributions: bool = False

    def only(self, rows: list[int]) -> "Rows":
        """Return these rows."""

        def chosen(column: Any) -> Any:
            if isinstance(column, list):
                return [column[row] for row in rows]
            return column[rows] if isinstance(column, np.ndarray) else column

        return Rows(*map(chosen, self))


@dataclass
class _Looks:
    """What the versions say of a batch. A version is asked when somebody needs it, and once.

    `failures` says why a version has no distribution at all, `bad_rows` for which rows it has none.
    """

    snapshot: Snapshot
    rows: Rows
    breakers: dict[int, Breaker]
    now_s: Callable[[], float]
    slow_s: float
    parameters: dict[int, np.ndarray] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    bad_rows: dict[int, set[int]] = field(default_factory=dict)

    def ask(self, variant: Variant) -> bool:
        """Ask a version about all rows and return whether every row got a distribution."""
        version = variant.version
        if version not in self.parameters and version not in self.failures:
            self._ask(variant)
        return version in self.parameters and not self.bad_rows[version]

    def of_row(self, variant: Variant, row: int) -> np.ndarray | str:
        """Return the distribution of one row, or why there is none."""
        self.ask(variant)
        version = variant.version
        if version in self.failures:
            return self.failures[version]
        return f"version {version} gave NaN" if row in self.bad_rows[version] else self.parameters[version][row]

    def _ask(self, variant: Variant) -> None:
        version, num_rows, started_s = variant.version, len(self.rows.obs_BD), self.now_s()
        breaker = self.breakers.setdefault(version, Breaker())
        if not breaker.allows(started_s):
            self.failures[version] = f"version {version} is not asked for a while: {breaker.reason}"
            return
        try:
            parameters_BP = variant.distributions(self.rows.obs_BD, self.rows.mask_BA)
        except Exception as error:  # a version's failure is not the request's: the ladder's next step answers
            logger.exception("event=version_failed version=%d", version)
            self.failures[version] = f"version {version} raised {error!r:.300}"
            breaker.note(0, num_rows, self.now_s(), self.failures[version])
            return
        self.parameters[version] = parameters_BP
        is_usable = np.isfinite(parameters_BP)
        bad = set() if is_usable.all() else set(np.flatnonzero(~is_usable.all(axis=1)).tolist())
        self.bad_rows[version] = bad
        ended_s = self.now_s()
        if ended_s - started_s > self.slow_s:
            breaker.note(0, num_rows, ended_s, f"version {version} took {1000 * (ended_s - started_s):.0f} ms")
        else:  # NaN too is an answer: the row has its fallback, and no client may close a version to all others
            breaker.note(num_rows, 0, ended_s, "")


class Decider:
    """Decides batches. Holds nothing but the ladder and the breakers; `now_s` is a clock that does not go back."""

    def __init__(self, config: ServingConfig, *, now_s: Callable[[], float]) -> None:
        self.ladder = Ladder(config)
        self.breakers: dict[int, Breaker] = {}
        self._now_s = now_s
        self._slow_s = config.fallback.slow_ms / 1000

    def decide(self, rows: Rows, snapshot: Snapshot) -> Decided:
        """Return an answer per row, or why there is none; what is wrong with a row is nobody else's. There is a row at least."""
        looks = _Looks(snapshot, rows, self.breakers, self._now_s, self._slow_s)
        is_usual = self.ladder.shield is None and rows.modes is None and rows.arms is None
        if is_usual and all([looks.ask(variant) for variant in snapshot.variants.values()]):
            return _decide_usual(rows, snapshot, looks.parameters)
        return [self._decide_row(row, rows, snapshot, looks) for row in range(len(rows.decision_ids))]

    def open_breakers(self) -> dict[int, str]:
        """Return the versions that are not asked at the moment, and why."""
        return {version: breaker.reason for version, breaker in self.breakers.items() if breaker.is_open}

    def _decide_row(self, index: int, rows: Rows, snapshot: Snapshot, looks: _Looks) -> Answer | ServiceUnavailable:
        row = Row(
            rows.decision_ids[index],
            rows.seeds[index],
            rows.obs_BD[index],
            None if rows.mask_BA is None else rows.mask_BA[index],
            rows.modes[index] if rows.modes else None,
        )
        asked_arm = rows.arms[index] if rows.arms else None
        plan = snapshot.plan
        arm = (
            assign(unit_id_of(rows.unit_ids, index, rows.decision_ids[index]), plan) if asked_arm is None else plan.arm(asked_arm)
        )
        if arm is None:
            return ServiceUnavailable(f"the plan has no arm {asked_arm!r}; it has {', '.join(a.name for a in plan.arms)}")
        walks = {a.name: self._walk(row, index, a, snapshot, looks) for a in plan.arms}
        try:
            sent = walks[arm.name].send()
        except ServiceUnavailable as error:
            return error
        rung = sent.rung
        mixture = sent.propensity
        if asked_arm is None:
            mixture = mixed((a.weight, walks[a.name].propensity(sent.action)) for a in plan.arms if a.weight).value
        answer = Answer(
            arm.name,
            rung.version,
            rung.digest,
            rung.mode,
            sent.seed,
            sent.action,
            sent.propensity,
            mixture,
            rung.name,
            sent.fallback,
            sent.shield,
            rung.parameters_P,
        )
        return if_learnable(answer)

    def _walk(self, row: Row, index: int, arm: Arm, snapshot: Snapshot, looks: _Looks) -> Walk:
        versions = versions_of(arm, snapshot)
        by_version = {variant.version: variant for _, variant in versions}
        return self.ladder.walk(row, versions, lambda version: looks.of_row(by_version[version], index))


def _decide_usual(rows: Rows, snapshot: Snapshot, parameters: dict[int, np.ndarray]) -> Decided:
    """Decide all rows at once, given that each version of the plan answers for each of them."""
    answers = _sent(rows, snapshot, parameters)
    if rows.keeps_distributions:
        seen = [parameters[version][row] for row, version in zip(range(len(rows.seeds)), per_row(answers.versions))]
        answers = answers._replace(parameters=seen)
    for propensities in (answers.propensities, answers.mixture_propensities or (1.0,)):
        if not (min(propensities) > 0 and max(propensities) < math.inf):
            return [if_learnable(answer) for answer in answers.each()]
    return answers


def _sent(rows: Rows, snapshot: Snapshot, parameters: dict[int, np.ndarray]) -> Answers:
    plan = snapshot.plan
    if len(plan.arms) == 1:
        return _drawn(plan.arms[0], snapshot, parameters, rows.seeds)
    units = rows.unit_ids
    if not isinstance(units, list):
        units = [unit_id_of(units, row, name) for row, name in enumerate(rows.decision_ids)]
    arms = assign_many(units, plan)
    how = {arm.name: _how_drawn(arm, snapshot) for arm in plan.arms}
    if len(set(how.values())) == 1:
        return _drawn(arms, snapshot, parameters, rows.seeds)
    together: dict[str, list[int]] = {}
    for row, arm in enumerate(arms):
        together.setdefault(how[arm.name], []).append(row)
    parts = []
    for chosen in together.values():
        its_own = {version: parameters_BP[chosen] for version, parameters_BP in parameters.items()}
        parts.append(_drawn([arms[row] for row in chosen], snapshot, its_own, [rows.seeds[row] for row in chosen]))
    return put_together(list(together.values()), parts)


def _how_drawn(arm: Arm, snapshot: Snapshot) -> str:
    """Choices of one mode are drawn alike, whichever version they are of; of real numbers each version has a scale of its own."""
    variant = snapshot.variants[arm.version]
    return variant.mode if isinstance(variant.policy.distribution, Categorical) else arm.name


def _drawn(arms: Arm | list[Arm], snapshot: Snapshot, parameters: dict[int, np.ndarray], seeds: list[int]) -> Answers:
    """Return what one arm answers its rows, or one per row: then all draw alike."""
    if isinstance(arms, Arm):
        names: str | list[str] = arms.name
        versions: int | list[int] = arms.version
        variant, own_BP = snapshot.variants[arms.version], parameters[arms.version]
        digests = {variant.version: variant.digest}
    else:
        names, versions = same([arm.name for arm in arms]), [arm.version for arm in arms]
        variant = snapshot.variants[versions[0]]
        own_BP = _of_each(versions, parameters)
        digests = {version: snapshot.variants[version].digest for version in set(versions)}
        versions = same(versions)
    actions, propensities = variant.policy.distribution.choose_many(own_BP, variant.mode, seeds)
    mixtures = None if len(snapshot.plan.arms) == 1 else _mixtures(actions, snapshot, parameters)
    return Answers(names, versions, digests, variant.mode, seeds, actions, propensities, mixtures)


def _of_each(versions: list[int], parameters: dict[int, np.ndarray]) -> np.ndarray:
    """Return each row's distribution by its own version, [B, P]."""
    place = {version: index for index, version in enumerate(parameters)}
    parameters_VBP = np.stack(list(parameters.values()))
    return parameters_VBP[[place[version] for version in versions], np.arange(len(versions))]


def _mixtures(actions: list[Any], snapshot: Snapshot, parameters: dict[int, np.ndarray]) -> list[float]:
    """Return each action's propensity under the plan as a whole."""
    arms = [(arm.weight, snapshot.variants[arm.version]) for arm in snapshot.plan.arms if arm.weight]
    under = [v.policy.distribution.propensity_many(actions, parameters[v.version], v.mode) for _, v in arms]
    if isinstance(snapshot.champion.policy.distribution, Categorical):  # probabilities only, so all rows at once
        shares = np.zeros(len(actions))
        for (weight, _), propensities in zip(arms, under):
            shares += weight * np.array(propensities)
        return shares.tolist()
    return [
        mixed(
            (weight, Propensity(value, variant.policy.distribution.num_densities(action, variant.mode)))
            for (weight, variant), value in zip(arms, values)
        ).value
        for action, values in zip(actions, zip(*under))
    ]
