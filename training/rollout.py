"""How experience is made: a fixed group of environments is stepped with a policy, and every step is kept.

T time, B environment, D feature, A action.
"""

from dataclasses import dataclass

import numpy as np

from policies.policy import Architecture
from training.config import EnvironmentConfig, TrainingConfig
from training.environment import VectorEnvironment
from training.network import Layout, Weights, forward, layers_of
from training.seeds import Stream, derived_seed, generator


@dataclass(frozen=True)
class Rollout:
    """A fragment of experience of one shard under one version of the weights.

    `obs_TBD` and `values_TB` have one row more than the rest: what followed the last step. Because environments reset one
    step late, row t + 1 is always what followed step t, also when the episode was truncated there. `valid_TB` is False on
    the reset steps in between: nothing happened in them, and nothing is learned from them.
    """

    shard: int
    version: int
    obs_TBD: np.ndarray  # float32 [T + 1, B, D]
    actions_TB: np.ndarray  # int64, index of the action
    logp_TB: np.ndarray  # float32, log-probability of the action under the behaviour policy
    rewards_TB: np.ndarray  # float32
    terminateds_TB: np.ndarray  # bool
    truncateds_TB: np.ndarray  # bool
    values_TB: np.ndarray  # float32 [T + 1, B]
    valid_TB: np.ndarray  # bool
    episode_returns_E: np.ndarray  # float64, episodes that ended in this fragment
    episode_lengths_E: np.ndarray  # int64

    @property
    def num_env_steps(self) -> int:
        """Steps that happened in an environment: reset steps do not count."""
        return int(self.valid_TB.sum())


@dataclass(frozen=True)
class Step:
    """What one call of `env.step` did in all environments; `valid_B` is False where it only reset."""

    valid_B: np.ndarray
    rewards_B: np.ndarray
    terminateds_B: np.ndarray
    truncateds_B: np.ndarray


class Stepper:
    """The one place where environments are stepped, for collecting and for evaluation alike."""

    def __init__(self, environment: VectorEnvironment, seed: int) -> None:
        self._environment = environment
        self.obs_BD = environment.reset(seed)
        self._ended_B = np.zeros(environment.num_envs, bool)

    def step(self, actions_B: np.ndarray) -> Step:
        """Send actions, move `obs_BD` on and say what happened; a reset step has no reward and ends nothing."""
        valid_B = ~self._ended_B
        self.obs_BD, rewards_B, terminateds_B, truncateds_B = self._environment.step(actions_B)
        self._ended_B = terminateds_B | truncateds_B
        return Step(valid_B, rewards_B, terminateds_B, truncateds_B)


class Shard:
    """A fixed group of environments with its own seeds and sampling noise, whichever process it lives in.

    What a shard collects depends on the run's seed, its own number, the update, the weights and its environments' states
    since they were made: never on the worker or on other shards.
    """

    def __init__(
        self, environment: EnvironmentConfig, training: TrainingConfig, shard: int, *, update: int, attempt: int
    ) -> None:
        """Make the environments and start new episodes; a second attempt at the same update starts them elsewhere."""
        self._shard = shard
        self._training = training
        self._environment = VectorEnvironment(environment, training.num_envs_per_shard)
        self._layout = Layout(self._environment.spaces, Architecture(training.hidden, training.activation))
        self._stepper = Stepper(self._environment, derived_seed(training.seed, Stream.ENVIRONMENT, shard, update, attempt))
        self._return_B = np.zeros(self._environment.num_envs)
        self._length_B = np.zeros(self._environment.num_envs, np.int64)

    def collect(self, weights: Weights, *, update: int) -> Rollout:
        """Step every environment `rollout_fragment_length` times and return what happened."""
        tensors = weights.tensors(self._layout)
        policy = layers_of(tensors, "policy", self._layout.num_layers)
        value = layers_of(tensors, "value", self._layout.num_layers)
        activation = self._training.activation
        T, B = self._training.rollout_fragment_length, self._environment.num_envs
        D, A = self._environment.spaces.num_features, self._environment.spaces.num_actions

        obs_TBD = np.empty((T + 1, B, D), np.float32)
        x_TBD = np.empty((T + 1, B, D), np.float32)  # normalised
        logits_TBA = np.empty((T, B, A), np.float32)
        actions_TB = np.empty((T, B), np.int64)
        rewards_TB = np.empty((T, B), np.float32)
        terminateds_TB, truncateds_TB, valid_TB = np.empty((3, T, B), bool)
        # The largest of logits plus Gumbel noise is a sample of their softmax: all noise is drawn at once.
        noise_TBA = _gumbel(generator(self._training.seed, Stream.ACTIONS, self._shard, update), (T, B, A))

        for t in range(T + 1):
            obs_TBD[t] = self._stepper.obs_BD
            np.subtract(obs_TBD[t], weights.normaliser_mean_D, out=x_TBD[t])
            x_TBD[t] *= weights.normaliser_scale_D
            if t == T:
                break
            logits_TBA[t] = forward(policy, activation, x_TBD[t])
            noise_TBA[t] += logits_TBA[t]
            actions_TB[t] = noise_TBA[t].argmax(axis=1)
            step = self._stepper.step(actions_TB[t])
            rewards_TB[t], terminateds_TB[t], truncateds_TB[t] = step.rewards_B, step.terminateds_B, step.truncateds_B
            valid_TB[t] = step.valid_B

        values_TB = forward(value, activation, x_TBD.reshape(-1, D)).reshape(T + 1, B)
        returns_E, lengths_E = self._ended_episodes(rewards_TB, valid_TB, terminateds_TB | truncateds_TB)
        return Rollout(
            shard=self._shard,
            version=weights.version,
            obs_TBD=obs_TBD,
            actions_TB=actions_TB,
            logp_TB=_log_probability(logits_TBA, actions_TB),
            rewards_TB=rewards_TB,
            terminateds_TB=terminateds_TB,
            truncateds_TB=truncateds_TB,
            values_TB=values_TB,
            valid_TB=valid_TB,
            episode_returns_E=returns_E,
            episode_lengths_E=lengths_E,
        )

    def close(self) -> None:
        self._environment.close()

    def _ended_episodes(
        self, rewards_TB: np.ndarray, valid_TB: np.ndarray, ended_TB: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return returns and lengths of the episodes that ended here, and carry the unfinished ones to the next fragment."""
        return_TB = self._return_B + np.cumsum(np.where(valid_TB, rewards_TB, 0), axis=0, dtype=np.float64)
        length_TB = self._length_B + np.cumsum(valid_TB, axis=0)
        returns, lengths = [], []
        before_B, steps_before_B = np.zeros_like(self._return_B), np.zeros_like(self._length_B)
        for t, b in zip(*np.nonzero(ended_TB)):
            returns.append(return_TB[t, b] - before_B[b])
            lengths.append(length_TB[t, b] - steps_before_B[b])
            before_B[b], steps_before_B[b] = return_TB[t, b], length_TB[t, b]
        self._return_B, self._length_B = return_TB[-1] - before_B, length_TB[-1] - steps_before_B
        return np.array(returns, np.float64), np.array(lengths, np.int64)


def _gumbel(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    uniform = rng.random(shape, np.float32)
    np.maximum(uniform, np.finfo(np.float32).tiny, out=uniform)  # 0 has no logarithm
    return -np.log(-np.log(uniform))


def _log_probability(logits_TBA: np.ndarray, actions_TB: np.ndarray) -> np.ndarray:
    top_TB1 = logits_TBA.max(axis=-1, keepdims=True)
    log_sum_TB = np.log(np.exp(logits_TBA - top_TB1).sum(axis=-1)) + top_TB1[..., 0]
    return np.take_along_axis(logits_TBA, actions_TB[..., None], axis=-1)[..., 0] - log_sum_TB
