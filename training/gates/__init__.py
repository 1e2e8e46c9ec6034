"""May this policy meet traffic? Gates with three-valued verdicts, and the report that binds them to the policy."""

import inspect
from collections.abc import Callable, Sequence

from policies.errors import ConfigError
from policies.functions import load_function
from policies.integrity import canonical_json
from policies.verdicts import GateReport, GateResult, Verdict
from training.evaluation import Evaluation, EvaluationRequest
from training.gates.budget import budget
from training.gates.context import Contender, Gate, GateContext, GateRun
from training.gates.edge_cases import edge_cases
from training.gates.objective import reward_hacking
from training.gates.performance import performance
from training.gates.regression import regression
from training.gates.robustness import robustness
from training.gates.safety import safety

__all__ = ["Contender", "Gate", "GateContext", "GateRun", "run_gates"]

Evaluate = Callable[..., Sequence[Evaluation]]  # (*requests) -> one evaluation each; on the worker pool or in this process


def run_gates(context: GateContext, *, evaluate: Evaluate, conditions_sha256: str, now: float) -> tuple[GateReport, Evaluation]:
    """Judge the candidate by all gates at once.

    Returns the report and the candidate's undisturbed episodes with their steps, from which golden vectors are drawn. Raises
    `ConfigError` before any episode is run when a function that the settings name cannot be imported.
    """
    runs = {name: gate(context) for name, gate in gates_of(context).items()}
    results, done = drive(runs, evaluate)
    incumbent = context.incumbent.version if context.incumbent else None
    report = GateReport(context.candidate.policy.sha256(), conditions_sha256, now, incumbent, results)
    return report, done[context.first_look(context.candidate)]


def gates_of(context: GateContext) -> dict[str, Gate]:
    """Return the gates that the settings ask for, by name; raises `ConfigError`."""
    gates: dict[str, Gate] = {
        "performance": performance,
        "safety": safety,
        "robustness": robustness,
        "edge_cases": edge_cases,
        "budget": budget,
    }
    if context.config.regression.scenarios or context.known_scenarios:
        gates["regression"] = regression
    if context.config.objective is not None:
        gates["reward_hacking"] = reward_hacking
    for reference in context.config.own:
        gates[reference] = load_function(reference, "gates.own")
        if not inspect.isgeneratorfunction(gates[reference]):
            raise ConfigError(f"gates.own {reference!r} is no generator function: a gate yields the evaluations that it needs")
    return gates


def drive(runs: dict[str, GateRun], evaluate: Evaluate) -> tuple[tuple[GateResult, ...], dict[EvaluationRequest, Evaluation]]:
    """Run gates to their ends, round by round: what they ask for in a round is evaluated together, each request once."""
    results: dict[str, GateResult] = {}
    done: dict[EvaluationRequest, Evaluation] = {}
    answers: dict[str, list[Evaluation] | None] = dict.fromkeys(runs)
    while len(results) < len(runs):
        wanted: dict[str, list[EvaluationRequest]] = {}
        for name, run in runs.items():
            if name in results:
                continue
            try:
                wanted[name] = run.send(answers[name])  # type: ignore[arg-type]
            except StopIteration as end:
                results[name] = _checked_result(name, end.value)
        new = list(dict.fromkeys(request for requests in wanted.values() for request in requests if request not in done))
        done |= zip(new, evaluate(*new)) if new else ()
        answers = {name: [done[request] for request in requests] for name, requests in wanted.items()}
    return tuple(results[name] for name in runs), done


def _checked_result(name: str, result: object) -> GateResult:
    if not isinstance(result, GateResult):
        raise ConfigError(f"gate {name} returned {type(result).__name__}; expected a policies.verdicts.GateResult")
    if not isinstance(result.verdict, Verdict):
        raise ConfigError(f"gate {name} returned the verdict {result.verdict!r}; expected one of policies.verdicts.Verdict")
    try:
        canonical_json(result.numbers)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"gate {name} returned numbers that no report can hold: {error}; give plain, finite ones") from error
    return GateResult(name, result.verdict, result.reason, result.numbers)
