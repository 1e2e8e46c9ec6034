"""How often does the candidate do what is forbidden, and what does it cost?"""

from typing import Any

import numpy as np

from policies.confidence import ConfidenceSequence
from policies.errors import ConfigError
from policies.functions import load_function
from policies.verdicts import GateResult, Verdict, judged
from training.evaluation import Evaluation
from training.gates.config import ConstraintConfig, CostConfig
from training.gates.context import GateContext, GateRun
from training.gates.intervals import Interval, share_interval

MAX_SHOWN, MAX_SHOWN_FEATURES = 3, 64


def safety(context: GateContext) -> GateRun:
    """Ask the constraints and costs about every decision of the first look's episodes.

    They get an observation as the policy sees it (its features, flat) and the environment's own action: an int, or an array.
    """
    config = context.config.safety
    functions = {
        rule.function: load_function(rule.function, "gates.safety") for rule in (*(config.constraints or ()), *config.costs)
    }
    (episodes,) = yield [context.first_look(context.candidate)]
    return judge_safety(
        [(rule, functions[rule.function]) for rule in config.constraints] if config.constraints is not None else None,
        [(rule, functions[rule.function]) for rule in config.costs],
        episodes,
        confidence=context.config.confidence,
    )


def judge_safety(
    constraints: list[tuple[ConstraintConfig, Any]] | None,
    costs: list[tuple[CostConfig, Any]],
    episodes: Evaluation,
    *,
    confidence: float,
) -> GateResult:
    """Compare each rate and each mean cost with its limit.

    Episodes are independent, the decisions of one are not: a policy that goes wrong in one episode of fifty goes wrong
    hundreds of times there and never elsewhere. So intervals count episodes.
    """
    rules: list[tuple[Verdict, str]] = []
    if constraints is None:
        rules.append((Verdict.INCONCLUSIVE, "nobody has said what is forbidden; set gates.safety.constraints ([] if nothing is)"))
    numbers: dict[str, Any] = {"episodes": len(episodes.returns_E), "constraints": [], "costs": []}
    for config, accepts in constraints or ():
        rule, row = _judge_constraint(config, accepts, episodes, confidence)
        rules.append(rule)
        numbers["constraints"].append(row)
    for cost_config, cost in costs:
        rule, row = _judge_cost(cost_config, cost, episodes, confidence)
        rules.append(rule)
        numbers["costs"].append(row)
    if not rules:
        rules.append((Verdict.PASS, "nothing is forbidden: gates.safety.constraints is empty"))
    return judged("safety", rules, numbers, remedy="" if constraints is None else "raise gates.performance.episodes")


def _judge_constraint(
    config: ConstraintConfig, accepts: Any, episodes: Evaluation, confidence: float
) -> tuple[tuple[Verdict, str], dict[str, Any]]:
    violations = [index for index, step in enumerate(_decisions(episodes)) if not _is_accepted(config, accepts(*step))]
    decisions_E = np.bincount(episodes.episode_N)
    share_E = np.bincount(episodes.episode_N[violations], minlength=len(decisions_E)) / decisions_E
    num_bad, num_episodes = int((share_E > 0).sum()), len(share_E)
    row = {
        "function": config.function,
        "decisions": len(episodes.actions_N),
        "violations": len(violations),
        "episodes_with_violations": num_bad,
        "violation_rate": float(share_E.mean()),
        "max_violation_rate": config.max_violation_rate,
        "first_violations": [_shown(episodes, index) for index in violations[:MAX_SHOWN]],
    }
    if config.max_violation_rate == 0:
        unseen = share_interval(num_bad, num_episodes, confidence)
        row |= {**unseen.to_json("violating_episodes"), "max_unseen_rate": config.max_unseen_rate}
        if num_bad:
            return (Verdict.FAIL, f"{config.function}: {len(violations)} violations in {num_bad} episodes, none is allowed"), row
        text = f"{config.function}: none in {num_episodes} episodes, so in {unseen.high:.2g} of all at most"
        return (unseen.at_most(config.max_unseen_rate), f"{text} (limit {config.max_unseen_rate:g})"), row
    rate = _bounded_mean(share_E, 1.0, confidence)
    row |= rate.to_json("violation_rate")
    text = f"{config.function}: {len(violations)} violations in {num_bad} of {num_episodes} episodes, rate {rate}"
    return (rate.at_most(config.max_violation_rate), f"{text} (limit {config.max_violation_rate:g})"), row


def _is_accepted(config: ConstraintConfig, answer: Any) -> bool:
    if not isinstance(answer, bool | np.bool_):  # NaN and coroutines are as good as true
        raise ConfigError(f"gates.safety.constraints {config.function!r} returned {answer!r:.80}; expected true or false")
    return bool(answer)


def _judge_cost(
    config: CostConfig, cost: Any, episodes: Evaluation, confidence: float
) -> tuple[tuple[Verdict, str], dict[str, Any]]:
    cost_N = np.array([float(cost(*step)) for step in _decisions(episodes)])
    wrong = np.flatnonzero(~((cost_N >= 0) & (cost_N <= config.largest)))
    if len(wrong):
        raise ConfigError(
            f"gates.safety.costs {config.function!r} returned {cost_N[wrong[0]]:g} for {_shown(episodes, int(wrong[0]))}; "
            f"a cost is from 0 to `largest`, {config.largest:g}"
        )
    mean_E = np.bincount(episodes.episode_N, cost_N) / np.bincount(episodes.episode_N)
    mean = _bounded_mean(mean_E, config.largest, confidence)
    dearest = np.argsort(-cost_N, kind="stable")[:MAX_SHOWN]
    row = {
        "function": config.function,
        **mean.to_json("cost"),
        "max_mean": config.max_mean,
        "largest_seen": float(cost_N.max()),
        "dearest": [_shown(episodes, int(index)) | {"cost": float(cost_N[index])} for index in dearest],
    }
    return (mean.at_most(config.max_mean), f"{config.function}: mean cost {mean} (limit {config.max_mean:g})"), row


def _decisions(episodes: Evaluation) -> Any:
    acts = episodes.actions_N.tolist() if episodes.actions_N.ndim == 1 else episodes.actions_N  # integers as integers
    return zip(episodes.obs_ND, acts)


def _shown(episodes: Evaluation, index: int) -> dict[str, Any]:
    obs_D = episodes.obs_ND[index]
    return {
        "observation": obs_D[:MAX_SHOWN_FEATURES].tolist(),  # an image would fill the report
        **({"features": len(obs_D)} if len(obs_D) > MAX_SHOWN_FEATURES else {}),
        "action": episodes.actions_N[index].tolist(),
        "episode": int(episodes.episode_N[index]),
    }


def _bounded_mean(values_E: np.ndarray, largest: float, confidence: float) -> Interval:
    """Return an interval that supposes nothing but the bounds 0 and `largest`: few episodes of many may hold all the harm."""
    sequence = ConfidenceSequence(0.0, largest, alpha=1 - confidence)
    for value in values_E:
        sequence.update(float(value))
    return Interval(float(values_E.mean()), *sequence.interval())
