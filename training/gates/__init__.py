"""May this policy meet traffic? Three gates, each with a three-valued verdict, and the report that binds them to the policy."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from policies.distributions import Mode
from policies.policy import Policy
from policies.verdicts import GateReport
from training.evaluation import Evaluation
from training.gates.config import GatesConfig
from training.gates.performance import judge_performance
from training.gates.robustness import judge_robustness
from training.gates.safety import judge_safety, load_constraint

# (policy, mode, num_episodes, seed, noise_std_D or None, keep_steps) -> rows; on the worker pool or in this process
Evaluate = Callable[..., Evaluation]


@dataclass(frozen=True)
class Incumbent:
    """What the candidate is compared with, in the mode in which it is served."""

    version: int
    policy: Policy
    mode: Mode


def run_gates(
    policy: Policy,
    *,
    mode: Mode,
    incumbent: Incumbent | None,
    evaluate: Evaluate,
    config: GatesConfig,
    min_return: float,
    conditions_sha256: str,
    now: float,
) -> tuple[GateReport, Evaluation]:
    """Evaluate the candidate (and the incumbent on the same initial states) and judge it.

    Returns the report and the noise-free episodes with their steps, from which golden vectors are drawn.
    Raises `ConfigError` before anything runs when the constraint function cannot be imported.
    """
    constraint = load_constraint(config.safety.constraint) if config.safety.constraint else None
    episodes = config.performance.episodes
    clean = evaluate(policy, mode=mode, num_episodes=episodes, seed=config.seed, noise_std_D=None, keep_steps=True)
    incumbent_returns_E = None
    if incumbent is not None:
        options = {"num_episodes": episodes, "seed": config.seed, "noise_std_D": None, "keep_steps": False}
        incumbent_returns_E = evaluate(incumbent.policy, mode=incumbent.mode, **options).returns_E
    spread_D = clean.obs_ND.std(axis=0)
    noisy = {
        level: evaluate(
            policy,
            mode=mode,
            num_episodes=config.robustness.episodes,
            seed=config.seed + 1 + index,
            noise_std_D=(level * spread_D).astype(np.float32),
            keep_steps=False,
        ).returns_E
        for index, level in enumerate(config.robustness.noise_levels)
    }
    results = (
        judge_performance(
            clean.returns_E,
            incumbent_returns_E,
            min_return=min_return,
            config=config.performance,
            confidence=config.confidence,
        ),
        judge_safety(
            constraint, clean.obs_ND, clean.actions_N, clean.episode_N, config=config.safety, confidence=config.confidence
        ),
        judge_robustness(float(clean.returns_E.mean()), noisy, config=config.robustness, confidence=config.confidence),
    )
    report = GateReport(policy.sha256(), conditions_sha256, now, incumbent.version if incumbent else None, results)
    return report, clean
