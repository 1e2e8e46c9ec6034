"""How experience is made: a fixed group of environments is stepped with a policy, and every step is kept.

T time, B environment, D feature, K component of an action, A choices of an action mask, F final observations, E episodes.
"""

from dataclasses import dataclass

import numpy as np

from training.config import EnvironmentConfig, TrainingConfig
from training.environment import VectorEnvironment
from training.heads import Head, head_of
from training.network import Weights, layout_of, network_of
from training.seeds import Stream, derived_seed, generator


@dataclass(frozen=True)
class Rollout:
    """A fragment of experience of one shard under one version of the weights.

    `obs_TBD` and `values_TB` have one row more than the rest: what was seen after the last step. What followed step t is row
    t + 1, unless the environment reset in the same step: then it is in `final_obs_FD`, at the flat index t * B + b in
    `final_F`. `valid_TB` is False on the reset steps of environments that reset one step late: nothing happened in them, and
    nothing is learned from them. `return_moments` are count, mean and sum of squared distances of the discounted sums of
    rewards so far, at each valid step.
    """

    shard: int
    version: int
    obs_TBD: np.ndarray  # float32 [T + 1, B, D]
    actions_TBK: np.ndarray  # int64 index of the choice, or float32 number on the policy's scale
    masks_TBA: np.ndarray | None  # bool
    logp_TB: np.ndarray  # float32, log-probability of the action under the behaviour policy
    rewards_TB: np.ndarray  # float32
    terminateds_TB: np.ndarray  # bool
    truncateds_TB: np.ndarray  # bool
    values_TB: np.ndarray  # float32 [T + 1, B]
    valid_TB: np.ndarray  # bool
    final_F: np.ndarray  # int64
    final_obs_FD: np.ndarray  # float32
    final_values_F: np.ndarray  # float32
    return_moments: np.ndarray  # float64 [3]
    episode_returns_E: np.ndarray  # float64, episodes that ended in this fragment
    episode_lengths_E: np.ndarray  # int64

    @property
    def num_env_steps(self) -> int:
        """Steps that happened in an environment: reset steps do not count."""
        return int(self.valid_TB.sum())

    def next_values(self, values_TB: np.ndarray, final_values_F: np.ndarray) -> np.ndarray:
        """Return the value of what followed each step [T, B], given those of `obs_TBD` and of `final_obs_FD`."""
        next_values_TB = values_TB[1:].copy()
        next_values_TB.reshape(-1)[self.final_F] = final_values_F
        return next_values_TB


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
        seed = derived_seed(training.seed, Stream.ENVIRONMENT, shard, update, attempt)
        self._environment = VectorEnvironment(environment, training.num_envs_per_shard, seed=seed)
        self._layout = layout_of(self._environment.spaces, training)
        self._head = head_of(self._layout.spaces, self._layout.architecture)
        self._return_B = np.zeros(self._environment.num_envs)
        self._length_B = np.zeros(self._environment.num_envs, np.int64)
        self._discounted_B = np.zeros(self._environment.num_envs)

    def collect(self, weights: Weights, *, update: int) -> Rollout:
        """Step every environment `rollout_fragment_length` times and return what happened."""
        environment, head = self._environment, self._head
        network = network_of(self._layout, weights.parameters_P)
        T, B, D = self._training.rollout_fragment_length, environment.num_envs, self._layout.spaces.num_features
        obs_TBD = np.empty((T + 1, B, D), np.float32)
        actions_TBK = np.empty((T, B, head.num_components), head.action_dtype)
        outputs, masks, steps = [], [], []
        noise_TB = head.noise(generator(self._training.seed, Stream.ACTIONS, self._shard, update), (T, B))

        for t in range(T + 1):
            obs_TBD[t] = environment.obs_BD
            if t == T:
                break
            outputs.append(network.outputs(weights.normalised(obs_TBD[t])))
            masks.append(environment.mask_BA)
            actions_TBK[t] = head.sample(outputs[t], noise_TB[t], masks[t])
            steps.append(environment.step(head.to_environment(actions_TBK[t])))

        rewards_TB, valid_TB = np.stack([step.rewards_B for step in steps]), np.stack([step.valid_B for step in steps])
        terminateds_TB = np.stack([step.terminateds_B for step in steps])
        truncateds_TB = np.stack([step.truncateds_B for step in steps])
        masks_TBA = np.stack(masks) if self._layout.spaces.has_mask else None
        final_F = np.concatenate([step.final_F + t * B for t, step in enumerate(steps)])
        final_obs_FD = np.concatenate([step.final_obs_FD for step in steps])
        returns_E, lengths_E = self._ended_episodes(rewards_TB, valid_TB, terminateds_TB | truncateds_TB)
        return Rollout(
            shard=self._shard,
            version=weights.version,
            obs_TBD=obs_TBD,
            actions_TBK=actions_TBK,
            masks_TBA=masks_TBA,
            logp_TB=_log_probability(head, np.stack(outputs), actions_TBK, masks_TBA),
            rewards_TB=rewards_TB,
            terminateds_TB=terminateds_TB,
            truncateds_TB=truncateds_TB,
            values_TB=network.values(weights.normalised(obs_TBD).reshape(-1, D)).reshape(T + 1, B),
            valid_TB=valid_TB,
            final_F=final_F,
            final_obs_FD=final_obs_FD,
            final_values_F=network.values(weights.normalised(final_obs_FD)),
            return_moments=self._discounted_moments(rewards_TB, valid_TB, terminateds_TB | truncateds_TB),
            episode_returns_E=returns_E,
            episode_lengths_E=lengths_E,
        )

    def close(self) -> None:
        self._environment.close()

    def _discounted_moments(self, rewards_TB: np.ndarray, valid_TB: np.ndarray, ended_TB: np.ndarray) -> np.ndarray:
        """Return the moments of the discounted sums of rewards, carried from fragment to fragment, when they are asked for."""
        if not self._training.normalize_rewards:
            return np.zeros(3)
        sums_TB, rewards_TB = np.empty(rewards_TB.shape), np.where(valid_TB, rewards_TB, 0)
        for t in range(len(rewards_TB)):
            self._discounted_B = self._discounted_B * self._training.gamma + rewards_TB[t]
            sums_TB[t] = self._discounted_B
            self._discounted_B = self._discounted_B * ~ended_TB[t]
        sums_N = sums_TB[valid_TB]
        return np.array([len(sums_N), sums_N.mean(), ((sums_N - sums_N.mean()) ** 2).sum()])

    def _ended_episodes(
        self, rewards_TB: np.ndarray, valid_TB: np.ndarray, ended_TB: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return returns and lengths of the episodes that ended here, in the order in which they did; carry the unfinished on."""
        T, B = ended_TB.shape
        # Cut the steps of all environments, one environment behind the other, into pieces: each begins with an environment or
        # behind an end. The first piece of an environment goes on with what was carried, the last one is carried on.
        begins_BT = np.ones((B, T), bool)
        begins_BT[:, 1:] = ended_TB.T[:, :-1]
        begins = np.flatnonzero(begins_BT)
        first_B = np.flatnonzero(begins % T == 0)
        last_B = np.append(first_B[1:], len(begins)) - 1
        t_E, b_E = np.divmod(np.flatnonzero(ended_TB), B)
        piece_E = np.searchsorted(begins, b_E * T + t_E, side="right") - 1
        ended = []
        for carried_B, amounts_TB in (
            (self._return_B, np.where(valid_TB, rewards_TB, np.float64(0))),
            (self._length_B, valid_TB.astype(np.int64)),
        ):
            sums = np.add.reduceat(np.ascontiguousarray(amounts_TB.T).reshape(-1), begins)
            sums[first_B] += carried_B
            ended.append(sums[piece_E])
            carried_B[:] = np.where(ended_TB[-1], 0, sums[last_B])
        returns_E, lengths_E = ended
        return returns_E, lengths_E


def _log_probability(head: Head, outputs_TBO: np.ndarray, actions_TBK: np.ndarray, masks_TBA: np.ndarray | None) -> np.ndarray:
    T, B = outputs_TBO.shape[:2]
    masks_NA = None if masks_TBA is None else masks_TBA.reshape(T * B, -1)
    return head.log_probability(outputs_TBO.reshape(T * B, -1), actions_TBK.reshape(T * B, -1), masks_NA).reshape(T, B)
