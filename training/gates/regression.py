"""Does the candidate still manage the rare but important situations that earlier versions managed?"""

import numpy as np

from policies.verdicts import GateResult, Verdict, judged
from training.config import EnvironmentConfig
from training.evaluation import EvaluationRequest
from training.gates.config import RegressionConfig, ScenarioConfig
from training.gates.context import GateContext, GateRun
from training.gates.intervals import Interval, mean_interval


def regression(context: GateContext) -> GateRun:
    """Run every scenario; one that the incumbent had to pass and that is neither here nor retired is missing evidence."""
    scenarios = context.config.regression.scenarios
    candidate = context.candidate
    evaluations = yield [
        EvaluationRequest(
            candidate.policy,
            scenario.episodes,
            scenario.seed,
            candidate.mode,
            environment=environment_of(scenario, context.environment),
            reset_options=scenario.reset_options,
        )
        for scenario in scenarios
    ]
    returns = {scenario.name: evaluation.returns_E for scenario, evaluation in zip(scenarios, evaluations)}
    return judge_regression(
        returns, context.known_scenarios, config=context.config.regression, confidence=context.config.confidence
    )


def environment_of(scenario: ScenarioConfig, environment: EnvironmentConfig) -> EnvironmentConfig:
    """Return the loop's environment with what the scenario changes of it."""
    changes = {
        "id": scenario.environment,
        "kwargs": scenario.kwargs,
        "max_episode_steps": scenario.max_episode_steps,
    }
    return environment.model_copy(update={key: value for key, value in changes.items() if value is not None})


def judge_regression(
    returns: dict[str, np.ndarray], known: tuple[str, ...], *, config: RegressionConfig, confidence: float
) -> GateResult:
    """Require of each scenario's mean return its own minimum. One episode, or equal ones, are taken as they are."""
    rules: list[tuple[Verdict, str]] = []
    rows = []
    for scenario in config.scenarios:
        returns_E = returns[scenario.name]
        mean = float(returns_E.mean())
        interval = Interval(mean, mean, mean) if len(returns_E) == 1 else mean_interval(returns_E, confidence)
        rules.append((interval.at_least(scenario.min_return), f"{scenario.name}: {interval}, at least {scenario.min_return:g}"))
        rows.append({"name": scenario.name, "episodes": len(returns_E), **interval.to_json("return"),
                     "min_return": scenario.min_return})  # fmt: skip
    here = {scenario.name for scenario in config.scenarios} | set(config.retired)
    for name in known:
        if name not in here:
            text = f"{name}: the incumbent had to pass this scenario; add it to gates.regression.scenarios, or to `retired`"
            rules.append((Verdict.INCONCLUSIVE, text))
    return judged("regression", rules, {"scenarios": rows, "retired": config.retired}, remedy="raise the scenario's episodes")


def scenario_names(result: GateResult | None) -> tuple[str, ...]:
    """Return the scenarios that a policy had to pass, from its own gate's result."""
    return () if result is None else tuple(row["name"] for row in result.numbers.get("scenarios", ()))
