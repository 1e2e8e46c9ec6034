"""Does the candidate keep its return when its sensors are noisy?"""

import numpy as np

from policies.verdicts import GateResult, Verdict
from training.gates.config import RobustnessConfig
from training.gates.intervals import mean_interval


def judge_robustness(
    clean_return: float, returns_by_level: dict[float, np.ndarray], *, config: RobustnessConfig, confidence: float
) -> GateResult:
    """Require a share of the noise-free mean return at every noise level.

    The share is taken of a positive return; a negative one may get worse by the same share of its size.
    """
    required = clean_return - (1 - config.min_return_ratio) * abs(clean_return)
    numbers: dict = {"clean_return": clean_return, "required_return": required, "levels": []}
    verdict, reasons = Verdict.PASS, []
    for level in config.noise_levels:
        if level not in returns_by_level:
            verdict = Verdict.INCONCLUSIVE if verdict is Verdict.PASS else verdict
            reasons.append(f"noise {level:g} was not measured")
            continue
        interval = mean_interval(returns_by_level[level], confidence)
        row = {"noise": level, "return_mean": interval.mean, "return_low": interval.low, "return_high": interval.high}
        numbers["levels"].append(row)
        reasons.append(f"noise {level:g}: {interval.mean:.1f} [{interval.low:.1f}, {interval.high:.1f}]")
        if interval.high < required:
            verdict = Verdict.FAIL
        elif interval.low < required and verdict is Verdict.PASS:
            verdict = Verdict.INCONCLUSIVE
    return GateResult("robustness", verdict, f"{'; '.join(reasons)}; required {required:.1f}", numbers)
