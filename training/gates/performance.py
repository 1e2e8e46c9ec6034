"""Is the candidate good enough, and not worse than the incumbent?"""

import numpy as np

from policies.verdicts import GateResult, Verdict
from training.gates.config import PerformanceConfig
from training.gates.intervals import mean_interval


def judge_performance(
    returns_E: np.ndarray,
    incumbent_returns_E: np.ndarray | None,
    *,
    min_return: float,
    config: PerformanceConfig,
    confidence: float,
) -> GateResult:
    """Compare the mean return with a threshold and, episode by episode on the same initial states, with the incumbent.

    The paired difference removes the luck of the initial state; both rules have to pass.
    """
    absolute = mean_interval(returns_E, confidence)
    numbers = {
        "episodes": len(returns_E),
        "return_mean": absolute.mean,
        "return_low": absolute.low,
        "return_high": absolute.high,
        "return_min": float(returns_E.min()),
        "min_return": min_return,
    }
    text = f"return {absolute.mean:.1f} [{absolute.low:.1f}, {absolute.high:.1f}]"
    if absolute.high < min_return:
        return GateResult("performance", Verdict.FAIL, f"{text} is below {min_return:g}", numbers)
    verdict, reason = Verdict.PASS, f"{text} reaches {min_return:g}"
    if absolute.low < min_return:
        verdict, reason = Verdict.INCONCLUSIVE, f"{text} does not decide on {min_return:g}; raise gates.performance.episodes"
    if incumbent_returns_E is None:
        return GateResult("performance", verdict, reason, numbers)

    difference = mean_interval(returns_E - incumbent_returns_E, confidence)
    allowed = -config.max_regression * abs(float(incumbent_returns_E.mean()))
    numbers |= {
        "incumbent_return_mean": float(incumbent_returns_E.mean()),
        "difference_mean": difference.mean,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "allowed_difference": allowed,
    }
    text = f"difference to the incumbent {difference.mean:+.1f} [{difference.low:+.1f}, {difference.high:+.1f}]"
    if difference.high < allowed:
        return GateResult("performance", Verdict.FAIL, f"{text} is below {allowed:+.1f}", numbers)
    if difference.low < allowed:
        undecided = f"{text} does not decide on {allowed:+.1f}; raise gates.performance.episodes"
        return GateResult("performance", Verdict.INCONCLUSIVE, undecided, numbers)
    return GateResult("performance", verdict, f"{reason}; {text}", numbers)
