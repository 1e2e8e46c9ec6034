"""Does the policy answer properly where no training episode has been: at the corners of its spaces, and to what is no input?"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from policies.errors import RequestInvalid
from policies.policy import Policy
from policies.spaces import Choices, Spaces
from policies.verdicts import Verdict, judged
from training.gates.context import GateContext, GateRun

NUM_RANDOM = 128
FAR = np.float32(1e3)  # stands for a bound that is open
MAX_SINGLE_MASKS = 256
SEEDS = (0, 1, 2**53 - 1)


def edge_cases(context: GateContext) -> GateRun:
    """Ask for decisions at corners, zeros, far outside and under every mask, and look at every answer."""
    policy = context.candidate.policy
    problems = [*answer_problems(policy, context.config.seed), *refusal_problems(policy.spaces)]
    obs_ND, masks_NA = edge_inputs(policy.spaces, context.config.seed)
    numbers = {"inputs": len(obs_ND), "masks": masks_NA is not None, "problems": problems[:10]}
    rules = [(Verdict.FAIL, text) for text in problems[:3]]
    rules.append((Verdict.PASS, f"{len(obs_ND)} unusual inputs answered properly, all that is no input refused"))
    return judged("edge_cases", rules, numbers)
    yield  # it needs no episodes, but is a gate like the others


def edge_inputs(spaces: Spaces, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return unusual observations [N, D] and, where the policy takes masks, one for each [N, A]: every choice alone, and all."""
    rng = np.random.default_rng(seed)
    is_open_low_D, is_open_high_D = ~np.isfinite(spaces.low_D), ~np.isfinite(spaces.high_D)
    low_D = np.where(is_open_low_D, np.minimum(-FAR, np.where(is_open_high_D, FAR, spaces.high_D) - FAR), spaces.low_D)
    high_D = np.where(is_open_high_D, np.maximum(FAR, low_D + FAR), spaces.high_D)
    corners_ND = np.where(rng.random((NUM_RANDOM, spaces.num_features)) < 0.5, low_D, high_D)
    inside_ND = rng.uniform(low_D.astype(np.float64), high_D, (NUM_RANDOM, spaces.num_features))
    zero_D = np.clip(np.zeros_like(low_D), low_D, high_D)
    obs_ND = np.concatenate([[zero_D, low_D, high_D], corners_ND, inside_ND]).astype(np.float32)
    if not spaces.has_mask:
        return obs_ND, None
    masks_MA = _masks(spaces.action, rng)
    rows = np.arange(max(len(obs_ND), len(masks_MA)))
    return obs_ND[rows % len(obs_ND)], masks_MA[rows % len(masks_MA)]


def _masks(action: Choices, rng: np.random.Generator) -> np.ndarray:
    """Return masks [M, A]: everything, and for each choice one that leaves its component nothing else."""
    ends = np.cumsum(action.nvec)
    masks = [np.ones(ends[-1], bool)]
    singles = [(end - n, end, choice) for n, end in zip(action.nvec, ends) for choice in range(end - n, end)]
    if len(singles) > MAX_SINGLE_MASKS:
        singles = [singles[index] for index in rng.choice(len(singles), MAX_SINGLE_MASKS, replace=False)]
    for start, end, choice in singles:
        mask_A = np.ones(ends[-1], bool)
        mask_A[start:end] = False
        mask_A[choice] = True
        masks.append(mask_A)
    return np.array(masks)


def answer_problems(policy: Policy, seed: int) -> Iterator[str]:
    """Say what is wrong with the policy's answers, if anything."""
    obs_ND, masks_NA = edge_inputs(policy.spaces, seed)
    with np.errstate(all="ignore"):  # what overflows is found below
        together_NP = policy.distributions(obs_ND, masks_NA)
    for row, (obs_D, parameters_P) in enumerate(zip(obs_ND, together_NP)):
        mask_A = None if masks_NA is None else masks_NA[row]
        where = f"for observation {np.array2string(obs_D, threshold=8, precision=4)}"
        if not np.isfinite(parameters_P).all():
            yield f"the distribution is not finite {where}"
            continue
        with np.errstate(all="ignore"):
            alone_P = policy.distributions(obs_D[None], None if mask_A is None else mask_A[None])[0]
        if alone_P.tobytes() != parameters_P.tobytes():
            yield f"the answer depends on the batch {where}"
        if mask_A is not None and parameters_P[~mask_A].any():
            yield f"a choice that the mask forbids has a probability {where}"
        for mode in ("greedy", "sample"):
            yield from _action_problems(policy, parameters_P, mask_A, mode, where)


def _action_problems(policy: Policy, parameters_P: np.ndarray, mask_A: Any, mode: Any, where: str) -> Iterator[str]:
    for sampling_seed in SEEDS:
        action, propensity = policy.distribution.choose(parameters_P, mode, sampling_seed)
        if (action, propensity) != policy.distribution.choose(parameters_P, mode, sampling_seed):
            yield f"the {mode} action is not determined by its seed {where}"
        if not is_inside(policy.spaces, action, mask_A):
            yield f"the {mode} action {action} is not in the action space {where}"
        if not propensity > 0:
            yield f"the {mode} action has the propensity {propensity:g} {where}"


def is_inside(spaces: Spaces, action: Any, mask_A: np.ndarray | None) -> bool:
    """Say whether an action, as it is answered, is one of the action space's, and one that the mask allows."""
    value_K = np.asarray(action).reshape(-1)
    if not isinstance(spaces.action, Choices):
        return bool(((value_K >= spaces.action.low.reshape(-1)) & (value_K <= spaces.action.high.reshape(-1))).all())
    index_K = value_K - np.array(spaces.action.starts)
    if not ((index_K >= 0) & (index_K < np.array(spaces.action.nvec))).all():
        return False
    starts_K = np.cumsum((0, *spaces.action.nvec[:-1]))
    return mask_A is None or bool(mask_A[starts_K + index_K].all())


def refusal_problems(spaces: Spaces) -> Iterator[str]:
    """Say which requests are not refused although they are no input: NaN, infinity, out of bounds, a mask that allows nothing."""
    usual = spaces.observation.example()
    broken = {"NaN": math.nan, "infinity": math.inf, "text": "0", "null": None}
    if spaces.high_D[0] < 1e29:
        broken["a number outside of the bounds"] = 1e30
    for what, leaf in broken.items():
        try:
            spaces.check_observation(_with_first_leaf(usual, leaf))
        except RequestInvalid:
            continue
        yield f"an observation with {what} in it is not refused"
    if spaces.has_mask:
        try:
            spaces.check_mask([0] * spaces.mask_size)
        except RequestInvalid:
            return
        yield "a mask that allows nothing is not refused"


def _with_first_leaf(value: Any, leaf: Any) -> Any:
    """Return a JSON value with something else in place of its first number."""
    if isinstance(value, dict):
        first = next(iter(value))
        return {**value, first: _with_first_leaf(value[first], leaf)}
    return [_with_first_leaf(value[0], leaf), *value[1:]] if isinstance(value, list) else leaf
