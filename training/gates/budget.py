"""Can the policy be served with the time and memory that there is?"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from policies.spaces import Choices
from policies.verdicts import GateResult, judged
from training.gates.context import GateContext, GateRun
from training.gates.intervals import Interval

BATCH_ROWS = 64
REPETITIONS = 100
MAX_MEASURING_S = 2.0


def budget(context: GateContext) -> GateRun:
    """Measure in this process, before the first episodes are asked for: while they run, both cores may be busy."""
    policy, mode = context.candidate.policy, context.candidate.mode
    obs_BD = np.zeros((BATCH_ROWS, policy.spaces.num_features), np.float32)
    mask_BA = None
    if isinstance(policy.spaces.action, Choices) and policy.spaces.has_mask:
        mask_BA = np.ones((BATCH_ROWS, policy.spaces.mask_size), bool)

    def decide(num_rows: int) -> None:
        parameters_BP = policy.distributions(obs_BD[:num_rows], None if mask_BA is None else mask_BA[:num_rows])
        for parameters_P in parameters_BP:
            policy.distribution.choose(parameters_P, mode, 0)

    numbers = {
        "decision_ms": _median_ms(lambda: decide(1)),
        "batch_ms": _median_ms(lambda: decide(BATCH_ROWS)),
        "parameters": sum(tensor.size for tensor in policy.tensors.values()),
        "bundle_bytes": sum(tensor.nbytes for tensor in policy.tensors.values()),
    }
    return judge_budget(numbers, context.config.budget)
    yield  # it needs no episodes, but is a gate like the others


def judge_budget(numbers: dict[str, Any], config: Any) -> GateResult:
    """Compare each number with its limit `max_…`."""
    rules = []
    for name, value in list(numbers.items()):
        limit = numbers[f"max_{name}"] = getattr(config, f"max_{name}")
        exact = Interval(value, value, value)
        rules.append((exact.at_most(limit), f"{name} {value if isinstance(value, int) else round(value, 3):,} of {limit:,}"))
    return judged("budget", rules, numbers)


def _median_ms(work: Callable[[], None]) -> float:
    work()  # the first time reserves memory
    times_s: list[float] = []
    began_s = time.perf_counter()
    while len(times_s) < REPETITIONS and time.perf_counter() - began_s < MAX_MEASURING_S:
        start_s = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - start_s)
    return 1000 * float(np.median(times_s))
