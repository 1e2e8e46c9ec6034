"""How good a policy is: run it for a number of episodes and keep one row per episode.

E episode, N step of any episode, B environment, D feature, A choices of an action mask.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from policies.distributions import Mode
from policies.errors import EnvironmentFailed
from policies.policy import Policy
from training.config import EnvironmentConfig
from training.environment import VectorEnvironment
from training.perturbations import Disturbance, Perturbation, action_change
from training.seeds import Stream, derived_seed, generator

CHUNK_EPISODES = 64  # episodes that run side by side; part of what a seed means, so it is no option
MAX_EPISODE_STEPS = 1_000_000  # an environment that never ends an episode must not hang a gate


@dataclass(frozen=True, eq=False)
class EvaluationRequest:
    """Which episodes to run. The same seed gives every policy the same initial states, so rows can be paired.

    Episodes are run in chunks; `first_chunk` goes on where an earlier request ended. `environment` and `reset_options` take the
    place of the loop's own (a scenario). `perturbation` is what happens to the observations on their way to the policy.
    """

    policy: Policy
    num_episodes: int
    seed: int
    mode: Mode = "greedy"
    first_chunk: int = 0
    perturbation: Perturbation | None = None
    environment: EnvironmentConfig | None = None
    reset_options: dict[str, Any] | None = None
    keep_steps: bool = False

    @property
    def chunks(self) -> list["Chunk"]:
        """Cut into parts that can run anywhere, in any order."""
        starts = range(0, self.num_episodes, CHUNK_EPISODES)
        return [
            Chunk(self, self.first_chunk + index, min(CHUNK_EPISODES, self.num_episodes - start))
            for index, start in enumerate(starts)
        ]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Episodes that run side by side, one per environment."""

    request: EvaluationRequest
    index: int
    num_episodes: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One row per episode. The steps of all episodes, in the order they were made, are None when they were not asked for.

    `action_change_E` is how much a perturbation changed the greedy action, on average over the episode's steps (see
    `training.perturbations.action_change`); None without one.
    """

    returns_E: np.ndarray  # float64
    lengths_E: np.ndarray  # int64
    action_change_E: np.ndarray | None = None  # float64
    obs_ND: np.ndarray | None = None  # float32, what the environment showed, before any perturbation
    actions_N: np.ndarray | None = None  # [N, …], the environment's own actions
    rewards_N: np.ndarray | None = None  # float32
    masks_NA: np.ndarray | None = None  # bool, where the environment gives action masks
    episode_N: np.ndarray | None = None  # int64, row of the episode

    @property
    def return_mean(self) -> float:
        return float(self.returns_E.mean())


def evaluate(environment: EnvironmentConfig, request: EvaluationRequest) -> Evaluation:
    """Run the episodes one chunk after the other; raises `EnvironmentFailed`."""
    return join([evaluate_chunk(environment, chunk) for chunk in request.chunks])


def evaluate_chunk(environment: EnvironmentConfig, chunk: Chunk) -> Evaluation:
    """Run one episode in each of the chunk's environments; episode numbers start at 0 within the chunk."""
    request = chunk.request
    seed = derived_seed(request.seed, Stream.EVALUATION_ENVIRONMENT, chunk.index)
    vector_environment = VectorEnvironment(
        request.environment or environment, chunk.num_episodes, seed=seed, reset_options=request.reset_options
    )
    try:
        return _run_chunk(vector_environment, chunk)
    finally:
        vector_environment.close()


def join(parts: list[Evaluation]) -> Evaluation:
    """Put chunks, or evaluations that go on from each other, together in their order."""
    starts = np.cumsum([0] + [len(part.returns_E) for part in parts])
    shifted = [
        part if part.episode_N is None else replace(part, episode_N=part.episode_N + start) for part, start in zip(parts, starts)
    ]
    return Evaluation(*(_joined([getattr(part, field.name) for part in shifted]) for field in fields(Evaluation)))


def _joined(parts: list[np.ndarray | None]) -> Any:
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present else None


def _run_chunk(environment: VectorEnvironment, chunk: Chunk) -> Evaluation:
    request, num_episodes = chunk.request, chunk.num_episodes
    policy = request.policy
    action_rng = generator(request.seed, Stream.EVALUATION_ACTIONS, chunk.index)
    disturbance = None
    if request.perturbation is not None:
        rng = generator(request.seed, Stream.OBSERVATION_NOISE, chunk.index)
        disturbance = Disturbance(request.perturbation, policy, num_episodes, rng)
    running_B = np.ones(num_episodes, bool)
    returns_B, change_B, lengths_B = np.zeros(num_episodes), np.zeros(num_episodes), np.zeros(num_episodes, np.int64)
    kept: list[tuple[np.ndarray | None, ...]] = []
    for _ in range(MAX_EPISODE_STEPS):
        obs_BD, mask_BA = environment.obs_BD, environment.mask_BA
        seen_BD = obs_BD if disturbance is None else disturbance.seen(obs_BD, mask_BA)
        parameters_BP = policy.distributions(seen_BD, mask_BA)
        if disturbance is not None:
            change_B += running_B * action_change(policy, policy.distributions(obs_BD, mask_BA), parameters_BP)
        actions_B = policy.distribution.choose_rows(parameters_BP, request.mode, action_rng)
        step = environment.step(actions_B)
        if request.keep_steps:
            kept_mask = None if mask_BA is None else mask_BA[running_B]
            rewards = step.rewards_B[running_B]
            kept.append((obs_BD[running_B], actions_B[running_B], rewards, kept_mask, np.flatnonzero(running_B)))
        returns_B[running_B] += step.rewards_B[running_B]
        lengths_B += running_B
        running_B &= ~(step.terminateds_B | step.truncateds_B)
        if not running_B.any():
            steps = [_joined(list(part)) for part in zip(*kept)]
            return Evaluation(returns_B, lengths_B, None if disturbance is None else change_B / lengths_B, *steps)
    raise EnvironmentFailed(
        f"environment {environment.config.id!r} did not end {running_B.sum()} of {num_episodes} episodes within "
        f"{MAX_EPISODE_STEPS} steps; set environment.max_episode_steps"
    )
