"""How a decision is written down, and how it is told."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from msgspec import UNSET, UnsetType

from policies import history
from policies.errors import RequestConflict, RequestRefused
from policies.records import Assigned, Decision, DecisionBatch, per_row, unit_id_of
from policies.spaces import Spaces
from policies.traffic import TrafficPlan
from serve_app.answers import Answer, Answers
from serve_app.asks import Ask, ManyAsk, chosen
from serve_app.deciding import Rows
from serve_app.features import Encoded
from serve_app.wire import DecideAnswer, DecideFailure, Explanation, Failure


@dataclass(frozen=True, eq=False, slots=True)
class Line:
    """What was decided together, as one line of the log. `names` are what it may be asked for by again."""

    data: bytes
    names: Sequence[str]
    rows: Rows
    answers: Answers
    num_repaired: int

    @property
    def num_decisions(self) -> int:
        return len(self.answers.seeds)


class Draft(NamedTuple):
    """An ask's result that goes out once its line is in the log.

    Without a line there is nothing to write: a refusal, or an answer from the log. `told_from` are the segments of other replicas
    that it, or a part of it, was found in.
    """

    result: Any
    line: Line | None = None
    told_from: tuple[Path, ...] = ()


class Columns(NamedTuple):
    """A result of many decisions that were all made now, as tensors want it. `repairs` is None where nothing was mended."""

    decision_ids: list[str]
    answers: Answers
    repairs: list[str | None] | None


class Moment(NamedTuple):
    """When a batch is decided, on both clocks, under which plan, and by which engines where not by numpy."""

    plan: TrafficPlan
    wall_s: float
    now_s: float
    engines: dict[int, str] | None = None


def batch_of(ask: ManyAsk, encoded: Encoded, rows: Sequence[int], answers: Answers, at: Moment) -> DecisionBatch:
    """Return the log's record of many decisions. `rows` are their places among those that were asked for."""
    started_s, arms = chosen(ask.started_s, rows), chosen(ask.arm, rows)
    return DecisionBatch(
        batch_id=ask.batch_id,
        decision_ids=chosen(ask.decision_ids, rows),
        time_s=at.wall_s,
        unit_ids=chosen(ask.unit_ids, rows),
        episode_ids=chosen(ask.episode_ids, rows),
        plan=at.plan.number,
        release=at.plan.release,
        arms=answers.arms,
        versions=answers.versions,
        digests=answers.digests,
        observations=_observations(ask, encoded, rows),
        shape=None if ask.numbers is None else list(ask.numbers.shape[1:]),
        actions=answers.actions,
        modes=answers.modes,
        seeds=answers.seeds,
        propensities=answers.propensities,
        mixture_propensities=None if len(at.plan.arms) == 1 else answers.mixture_propensities,
        fallbacks=answers.fallbacks,
        latency_s=[at.now_s - began_s for began_s in started_s] if isinstance(started_s, list) else at.now_s - started_s,
        action_masks=None if encoded.mask_BA is None else encoded.mask_BA[encoded.places(rows)].tolist(),
        rungs=_rungs(answers),
        shields=answers.shields,
        assigned=[_assigned(arm) for arm in arms] if isinstance(arms, list) else _assigned(arms),
        repairs=repairs_of(encoded, rows),
        engines=at.engines,
    )


def answer_of(decision: Decision, policy: str | UnsetType, *, explain: bool, state: str | None = None) -> DecideAnswer:
    """Return what the client is told of a logged decision. `state` is the request's; who sent one is told the next."""
    return DecideAnswer(
        decision.decision_id,
        decision.action,
        policy,
        decision.version,
        decision.arm,
        decision.propensity,
        decision.fallback,
        decision.repair,
        explanation_of(decision, None) if explain else None,
        None if state is None else history.state_after(decision.observation),
    )


def explanation_of(decision: Decision | Answer, parameters_P: np.ndarray | None) -> Explanation:
    distribution = None if parameters_P is None else parameters_P.tolist()
    return Explanation(distribution, decision.seed, decision.mode, decision.mixture_propensity, decision.rung, decision.shield)


def told_of_many(
    ask: ManyAsk, encoded: Encoded, rows: Sequence[int], answers: Answers, policy: str | UnsetType = UNSET
) -> list[DecideAnswer]:
    """Return what the client is told of many decisions. `rows` are their places among those that were asked for."""
    explanations: Any = None
    if ask.explain:
        wanted = zip(answers.each(), per_row(chosen(ask.explain, rows)))
        explanations = [explanation_of(answer, answer.parameters_P) if is_wanted else None for answer, is_wanted in wanted]
    states: Any = None
    if ask.states is not None:
        states = [None if ask.states[row] is None else history.state_after(encoded.observations[row]) for row in rows]
    columns = (
        chosen(ask.decision_ids, rows),
        answers.actions,
        policy,
        answers.versions,
        answers.arms,
        answers.propensities,
        answers.fallbacks,
        repairs_of(encoded, rows),
        explanations,
        states,
    )
    return list(map(DecideAnswer, *map(per_row, columns)))


def repairs_of(encoded: Encoded, rows: Sequence[int]) -> list[str | None] | None:
    """Return what was mended of each row; None where nothing was."""
    repairs = [encoded.repairs.get(row) for row in rows] if encoded.repairs else []
    return repairs if any([repair is not None for repair in repairs]) else None


def failure_of(error: RequestRefused) -> DecideFailure:
    """Return what stands in the place of an answer that there is none of."""
    return DecideFailure(Failure(error.status, str(error)))


def told_again(ask: Ask, logged: Decision, policy: str, spaces: Spaces) -> DecideAnswer:
    """Return the logged decision of a request that came before; raises `RequestConflict` if this one asks for something else."""
    observation, mask = spaces.split_mask(ask.observation, ask.mask)
    different = _different_frames(logged, observation, ask.state, spaces)
    mask_A = spaces.check_mask(mask)
    _require_same(logged, different, mask_A, unit_id=ask.unit_id, episode_id=ask.episode_id, mode=ask.mode)
    return answer_of(logged, policy, explain=ask.explain, state=ask.state)


def row_told_again(ask: ManyAsk, row: int, logged: Decision, spaces: Spaces) -> DecideAnswer | DecideFailure:
    """Return the same for one of many, a conflict in its place."""
    observation = ask.observations[row] if ask.numbers is None else ask.numbers[row].tolist()
    state = ask.states[row] if ask.states is not None else None
    try:
        observation, mask = spaces.split_mask(observation, ask.masks[row] if ask.masks is not None else None)
        _require_same(
            logged,
            _different_frames(logged, observation, state, spaces),
            spaces.check_mask(mask),
            unit_id=unit_id_of(ask.unit_ids, row, ask.decision_ids[row]),
            episode_id=ask.episode_ids[row] if ask.episode_ids is not None else None,
            mode=ask.mode,
        )
    except RequestRefused as error:
        return failure_of(error)
    return answer_of(logged, UNSET, explain=ask.explain, state=state)


def _different_frames(logged: Decision, observation: Any, state: str | None, spaces: Spaces) -> list[str]:
    """Return which of an observation and a state are others than in the log, which holds them as one observation.

    One that was mended is not compared: then the log holds another one than the request; of a state, what may have been cut to
    its bounds. Otherwise bounds are not looked at again: they may have been wider when this was decided.
    """
    is_mended = logged.repair is not None
    if state is None:
        return ["observation"] if not is_mended and observation != logged.observation else []
    unbounded, newest = spaces.without_observation_bounds(), logged.observation[-1]
    frame_F = unbounded.check_frame(newest if is_mended else observation)
    obs_D = history.with_frame(frame_F, state, unbounded)
    *earlier, frame = history.as_observation(obs_D, spaces)
    is_same_state = earlier == logged.observation[:-1]
    if is_mended and not is_same_state:
        cut_D = np.clip(obs_D, spaces.low_D, spaces.high_D)
        is_same_state = history.as_observation(cut_D, spaces)[:-1] == logged.observation[:-1]
    different = {"observation": frame != newest, "state": not is_same_state}
    return [name for name, is_different in different.items() if is_different]


def _require_same(
    logged: Decision, different: list[str], mask_A: np.ndarray | None, *, unit_id: str, episode_id: str | None, mode: str | None
) -> None:
    """Raise `RequestConflict` unless a request asks for what is logged; `different` says of its observation what is not."""
    pairs = {"unit_id": (unit_id, logged.unit_id), "episode_id": (episode_id, logged.episode_id)}
    pairs["action_mask"] = (None if mask_A is None else mask_A.tolist(), logged.action_mask)
    if mode is not None:
        pairs["mode"] = (mode, logged.mode)
    different = [name for name, (asked, found) in pairs.items() if asked != found] + different
    if different:
        raise RequestConflict(
            f"decision {logged.decision_id!r} was made before, for another {' and '.join(different)}; "
            "a new request needs a new request_id"
        )


def _observations(ask: ManyAsk, encoded: Encoded, rows: Sequence[int]) -> list[Any] | str:
    if ask.numbers is not None:
        assert isinstance(encoded.observations, np.ndarray)
        chosen = encoded.observations if len(rows) == len(ask.numbers) else encoded.observations[list(rows)]
        return base64.b64encode(np.ascontiguousarray(chosen, "<f4").tobytes()).decode()
    if len(rows) == len(ask.decision_ids):
        return list(encoded.observations)
    return [encoded.observations[row] for row in rows]


def _assigned(arm: str | None) -> Assigned:
    return "plan" if arm is None else "request"


def _rungs(answers: Answers) -> list[Any] | None:
    rungs = answers.rungs
    if isinstance(rungs, list):
        return rungs
    return None if rungs == "arm" else [rungs] * len(answers.seeds)
