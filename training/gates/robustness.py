"""Does the candidate keep its return when its sensors are bad?"""

from typing import Any

import numpy as np

from policies.spaces import Choices
from policies.verdicts import GateResult, Verdict, judged
from training.evaluation import Evaluation, EvaluationRequest
from training.gates.config import RobustnessConfig
from training.gates.context import Contender, GateContext, GateRun
from training.gates.intervals import difference_interval, mean_interval
from training.perturbations import Perturbation, smallest_flips

FLIP_STATES = 256
LARGEST_FLIP = 2.0  # in spreads: an observation that far off is another one

Strength = tuple[str, float]


def robustness(context: GateContext) -> GateRun:
    """Run episodes under every disturbance; candidate and incumbent see the same ones from the same initial states."""
    config = context.config.robustness
    (undisturbed,) = yield [context.first_look(context.candidate)]
    spread_D = undisturbed.obs_ND.std(axis=0)
    strengths = [(kind, s) for asked in (config.strengths, config.watched) for kind, values in asked.items() for s in values]
    strengths = list(dict.fromkeys(strengths))

    def request(contender: Contender, index: int) -> EvaluationRequest:
        perturbation = Perturbation(*strengths[index], spread_D)
        seed = context.config.seed + 1 + index
        return EvaluationRequest(contender.policy, config.episodes, seed, contender.mode, perturbation=perturbation)

    evaluations = yield [request(contender, index) for contender in context.contenders for index in range(len(strengths))]
    candidate = dict(zip(strengths, evaluations))
    incumbent = dict(zip(strengths, evaluations[len(strengths) :])) if context.incumbent else None
    result = judge_robustness(undisturbed.returns_E, candidate, incumbent, config=config, confidence=context.config.confidence)
    if isinstance(context.candidate.policy.spaces.action, Choices):
        result.numbers["smallest_flip"] = _flips(context, undisturbed, spread_D)
    return result


def judge_robustness(
    clean_E: np.ndarray,
    candidate: dict[Strength, Evaluation],
    incumbent: dict[Strength, Evaluation] | None,
    *,
    config: RobustnessConfig,
    confidence: float,
) -> GateResult:
    """Require a share of the undisturbed mean return at each of `strengths`, and no less than the incumbent has there.

    The share is taken of a positive return; a negative one may get worse by the same share of its size. The comparison with
    the incumbent fails where the candidate is proven to be worse; it need not be proven to be no worse, since that would take
    thousands of episodes where a disturbance makes returns vary. No rule looks at what is only watched.
    """
    clean_return = float(clean_E.mean())
    share = config.min_return_ratio if clean_return > 0 else 2 - config.min_return_ratio
    required = share * clean_return
    must_bear = {(kind, strength) for kind, values in config.strengths.items() for strength in values}
    rules: list[tuple[Verdict, str]] = []
    rows: list[dict[str, Any]] = []
    for kind, strength in must_bear - set(candidate):
        rules.append((Verdict.INCONCLUSIVE, f"{kind} {strength:g} was not measured"))
    for (kind, strength), evaluation in candidate.items():
        interval = mean_interval(evaluation.returns_E, confidence)
        row = {
            "kind": kind,
            "strength": strength,
            "is_required": (kind, strength) in must_bear,
            **interval.to_json("return"),
            "action_change": float(evaluation.action_change_E.mean()),
        }
        if row["is_required"]:
            # Both returns are estimates: what is judged is their difference.
            kept = difference_interval(evaluation.returns_E, share * clean_E, confidence)
            rules.append((kept.at_least(0), f"{kind} {strength:g}: return {interval}, at least {required:.4g}"))
        if incumbent is not None:
            theirs_E = incumbent[kind, strength].returns_E
            difference = mean_interval(evaluation.returns_E - theirs_E, confidence)
            allowed = -config.max_regression * abs(float(theirs_E.mean()))
            row |= {"incumbent_return_mean": float(theirs_E.mean()), **difference.to_json("difference")}
            if row["is_required"] and difference.at_least(allowed) is Verdict.FAIL:
                text = f"{kind} {strength:g}: difference to the incumbent {difference}, at least {allowed:+.4g}"
                rules.append((Verdict.FAIL, text))
        rows.append(row)
    numbers = {"clean_return": clean_return, "required_return": required, "disturbances": rows}
    return judged("robustness", rules, numbers, remedy="raise gates.robustness.episodes")


def _flips(context: GateContext, undisturbed: Evaluation, spread_D: np.ndarray) -> dict[str, Any]:
    """Describe how far an observation must be off, at worst, before the greedy choice changes: in spreads, per feature."""
    rng = np.random.default_rng(context.config.seed)
    rows = rng.choice(len(undisturbed.obs_ND), min(FLIP_STATES, len(undisturbed.obs_ND)), replace=False)
    masks_BA = None if undisturbed.masks_NA is None else undisturbed.masks_NA[rows]
    flip_B = smallest_flips(
        context.candidate.policy,
        undisturbed.obs_ND[rows],
        masks_BA,
        spread_D=spread_D,
        largest=LARGEST_FLIP,
        seed=context.config.seed,
    )
    found_F = np.sort(flip_B[np.isfinite(flip_B)])
    quantiles = {f"{q:g}": float(np.quantile(found_F, q)) for q in (0.05, 0.25, 0.5)} if len(found_F) else {}
    return {
        "states": len(flip_B),
        "share_that_flips": len(found_F) / len(flip_B),
        "largest": LARGEST_FLIP,
        "quantiles": quantiles,
    }
