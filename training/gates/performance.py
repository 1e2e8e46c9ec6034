"""Is the candidate good enough, and not worse than the incumbent?"""

import numpy as np

from policies.verdicts import GateResult, Verdict, judged
from training.gates.config import PerformanceConfig
from training.gates.context import GateContext, GateRun
from training.gates.intervals import mean_interval, share_interval, worst_mean

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def performance(context: GateContext) -> GateRun:
    """Look at more and more episodes until the intervals decide or the budget ends.

    Each look gets an equal part of the allowed error, so that looking often does not make a wrong verdict more likely
    (Bonferroni).
    """
    config = context.config.performance
    looks = look_sizes(config.episodes, config.max_episodes)
    confidence = 1 - (1 - context.config.confidence) / len(looks)
    returns: list[list[np.ndarray]] = [[] for _ in context.contenders]
    num_done, num_chunks, result = 0, 0, None
    for size in looks:
        requests = [context.episodes(c, size - num_done, first_chunk=num_chunks) for c in context.contenders]
        for parts, evaluation in zip(returns, (yield requests)):
            parts.append(evaluation.returns_E)
        num_done, num_chunks = size, num_chunks + len(requests[0].chunks)
        returns_E, *incumbent = (np.concatenate(parts) for parts in returns)
        result = judge_performance(
            returns_E, incumbent[0] if incumbent else None, min_return=context.min_return, config=config, confidence=confidence
        )
        if result.verdict is not Verdict.INCONCLUSIVE:
            break
    assert result is not None
    return result


def look_sizes(first: int, largest: int) -> list[int]:
    """Return how many episodes are looked at: twice as many each time, and in the end all that are allowed."""
    sizes = [first]
    while sizes[-1] < largest:
        sizes.append(min(2 * sizes[-1], largest))
    return sizes


def judge_performance(
    returns_E: np.ndarray,
    incumbent_returns_E: np.ndarray | None,
    *,
    min_return: float,
    config: PerformanceConfig,
    confidence: float,
) -> GateResult:
    """Compare the mean return with a threshold and, episode by episode on the same initial states, with the incumbent.

    The paired difference removes the luck of the initial state; all rules have to pass. The mean of the worst episodes (CVaR)
    is written down and decides nothing: no interval for it holds without knowing how bad an episode can be.
    """
    absolute = mean_interval(returns_E, confidence)
    numbers = {
        "episodes": len(returns_E),
        **absolute.to_json("return"),
        "return_min": float(returns_E.min()),
        "return_quantiles": {f"{q:g}": float(np.quantile(returns_E, q)) for q in QUANTILES},
        "min_return": min_return,
        "worst_share": config.worst_share,
        "worst_return_mean": worst_mean(returns_E, config.worst_share),
        "min_worst_return": config.min_worst_return,
    }
    rules = [(absolute.at_least(min_return), f"return {absolute}, at least {min_return:g}")]
    if config.min_worst_return is not None:
        num_bad = int((returns_E < config.min_worst_return).sum())
        bad = share_interval(num_bad, len(returns_E), confidence)
        numbers |= {"bad_episodes": num_bad, **bad.to_json("bad_share")}
        text = f"{num_bad} episodes below {config.min_worst_return:g}, share {bad}, at most {config.worst_share:g}"
        rules.append((bad.at_most(config.worst_share), text))
    if incumbent_returns_E is not None:
        difference = mean_interval(returns_E - incumbent_returns_E, confidence)
        allowed = -config.max_regression * abs(float(incumbent_returns_E.mean()))
        numbers |= {
            "incumbent_return_mean": float(incumbent_returns_E.mean()),
            "incumbent_worst_return_mean": worst_mean(incumbent_returns_E, config.worst_share),
            **difference.to_json("difference"),
            "allowed_difference": allowed,
        }
        rules.append((difference.at_least(allowed), f"difference to the incumbent {difference}, at least {allowed:+.4g}"))
    return judged("performance", rules, numbers, remedy="raise gates.performance.max_episodes")
