"""How good a policy is: run it for a number of episodes and keep one row per episode.

E episode, N step of any episode, B environment, D feature, A choices of an action mask.
"""

from dataclasses import dataclass

import numpy as np

from policies.distributions import Mode
from policies.errors import EnvironmentFailed
from policies.policy import Policy
from training.config import EnvironmentConfig
from training.environment import VectorEnvironment
from training.seeds import Stream, derived_seed, generator

CHUNK_EPISODES = 64  # episodes that run side by side; part of what a seed means, so it is no option
MAX_EPISODE_STEPS = 1_000_000  # an environment that never ends an episode must not hang a gate


@dataclass(frozen=True)
class Evaluation:
    """One row per episode. The steps of all episodes, in the order they were made, are None when they were not asked for."""

    returns_E: np.ndarray  # float64
    lengths_E: np.ndarray  # int64
    obs_ND: np.ndarray | None  # float32, what the environment showed, without added noise
    actions_N: np.ndarray | None  # [N, …], the environment's own actions
    rewards_N: np.ndarray | None  # float32
    masks_NA: np.ndarray | None  # bool, where the environment gives action masks
    episode_N: np.ndarray | None  # int64, row of the episode

    @property
    def return_mean(self) -> float:
        return float(self.returns_E.mean())


def evaluate(
    environment: EnvironmentConfig,
    policy: Policy,
    *,
    num_episodes: int,
    seed: int,
    mode: Mode = "greedy",
    noise_std_D: np.ndarray | None = None,
    keep_steps: bool = False,
) -> Evaluation:
    """Run `num_episodes` episodes; the same seed gives every policy the same initial states, so rows can be paired.

    `noise_std_D` is added as Gaussian noise to what the policy sees. Raises `EnvironmentFailed`.
    """
    chunks = [
        evaluate_chunk(environment, policy, chunk, seed=seed, mode=mode, noise_std_D=noise_std_D, keep_steps=keep_steps)
        for chunk in chunks_of(num_episodes)
    ]
    return join(chunks)


@dataclass(frozen=True)
class Chunk:
    """Episodes that run side by side, one per environment."""

    index: int
    num_episodes: int


def chunks_of(num_episodes: int) -> list[Chunk]:
    """Cut a number of episodes into chunks that can run anywhere, in any order."""
    starts = range(0, num_episodes, CHUNK_EPISODES)
    return [Chunk(index, min(CHUNK_EPISODES, num_episodes - start)) for index, start in enumerate(starts)]


def evaluate_chunk(
    environment: EnvironmentConfig,
    policy: Policy,
    chunk: Chunk,
    *,
    seed: int,
    mode: Mode,
    noise_std_D: np.ndarray | None,
    keep_steps: bool,
) -> Evaluation:
    """Run one episode in each of the chunk's environments; episode numbers start at 0 within the chunk."""
    environment_seed = derived_seed(seed, Stream.EVALUATION_ENVIRONMENT, chunk.index)
    vector_environment = VectorEnvironment(environment, chunk.num_episodes, seed=environment_seed)
    try:
        return _run_chunk(vector_environment, policy, chunk, seed, mode, noise_std_D, keep_steps)
    finally:
        vector_environment.close()


def join(chunks: list[Evaluation]) -> Evaluation:
    """Put chunks in their order together again."""
    starts = np.cumsum([0] + [len(chunk.returns_E) for chunk in chunks])
    episodes = [chunk.episode_N + start for chunk, start in zip(chunks, starts) if chunk.episode_N is not None]
    return Evaluation(
        returns_E=np.concatenate([chunk.returns_E for chunk in chunks]),
        lengths_E=np.concatenate([chunk.lengths_E for chunk in chunks]),
        obs_ND=_joined([chunk.obs_ND for chunk in chunks]),
        actions_N=_joined([chunk.actions_N for chunk in chunks]),
        rewards_N=_joined([chunk.rewards_N for chunk in chunks]),
        masks_NA=_joined([chunk.masks_NA for chunk in chunks]),
        episode_N=np.concatenate(episodes) if episodes else None,
    )


def _joined(parts: list[np.ndarray | None]) -> np.ndarray | None:
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present else None


def _run_chunk(
    environment: VectorEnvironment,
    policy: Policy,
    chunk: Chunk,
    seed: int,
    mode: Mode,
    noise_std_D: np.ndarray | None,
    keep_steps: bool,
) -> Evaluation:
    noise_rng = generator(seed, Stream.OBSERVATION_NOISE, chunk.index)
    action_rng = generator(seed, Stream.EVALUATION_ACTIONS, chunk.index)
    running_B = np.ones(chunk.num_episodes, bool)
    returns_B, lengths_B = np.zeros(chunk.num_episodes), np.zeros(chunk.num_episodes, np.int64)
    kept: list[tuple[np.ndarray | None, ...]] = []
    for _ in range(MAX_EPISODE_STEPS):
        obs_BD, mask_BA = environment.obs_BD, environment.mask_BA
        seen_BD = obs_BD if noise_std_D is None else _with_noise(obs_BD, noise_std_D, noise_rng)
        actions_B = policy.distribution.choose_rows(policy.distributions(seen_BD, mask_BA), mode, action_rng)
        step = environment.step(actions_B)
        if keep_steps:
            kept_mask = None if mask_BA is None else mask_BA[running_B]
            rewards = step.rewards_B[running_B]
            kept.append((obs_BD[running_B], actions_B[running_B], rewards, kept_mask, np.flatnonzero(running_B)))
        returns_B[running_B] += step.rewards_B[running_B]
        lengths_B += running_B
        running_B &= ~(step.terminateds_B | step.truncateds_B)
        if not running_B.any():
            steps = [_joined(list(part)) for part in zip(*kept)] if keep_steps else [None] * 5
            return Evaluation(returns_B, lengths_B, *steps)
    raise EnvironmentFailed(
        f"environment {environment.config.id!r} did not end {running_B.sum()} of {chunk.num_episodes} episodes within "
        f"{MAX_EPISODE_STEPS} steps; set environment.max_episode_steps"
    )


def _with_noise(obs_BD: np.ndarray, noise_std_D: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return obs_BD + (rng.standard_normal(obs_BD.shape) * noise_std_D).astype(np.float32)
