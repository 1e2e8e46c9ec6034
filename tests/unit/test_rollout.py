"""Rollouts and advantages: which steps count, what follows an episode's end, and numbers derived by hand."""

import dataclasses

import numpy as np
import pytest

from training.config import EnvironmentConfig, TrainingConfig
from training.environment import read_spaces
from training.gae import advantages
from training.network import Layout, Weights, initial_parameters, layout_of
from training.rollout import Rollout, Shard

COUNTER = EnvironmentConfig(id="tests.training_environments:Counter-v0")  # 3 steps per episode, observes the step number
CARTPOLE = EnvironmentConfig(id="CartPole-v1")


def settings(**changes) -> TrainingConfig:
    sizes = {"num_envs_per_shard": 4, "num_shards": 1, "num_env_runners": 1, "rollout_fragment_length": 10, "minibatch_size": 8}
    return TrainingConfig(**{**sizes, **changes})


def layout_for(environment: EnvironmentConfig, training: TrainingConfig) -> Layout:
    return layout_of(read_spaces(environment), training)


def weights_of(environment: EnvironmentConfig, training: TrainingConfig) -> Weights:
    layout = layout_for(environment, training)
    D = layout.spaces.num_features
    return Weights(0, initial_parameters(layout, 0), np.zeros(D, np.float32), np.ones(D, np.float32))


def collect(environment: EnvironmentConfig, training: TrainingConfig, *, shard: int = 0, update: int = 0) -> Rollout:
    return Shard(environment, training, shard, update=update, attempt=0).collect(weights_of(environment, training), update=update)


def same_bits(a: Rollout, b: Rollout) -> bool:
    return all(np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(Rollout))


def test_reset_steps_are_invalid_and_the_final_observation_is_kept():
    rollout = collect(COUNTER, settings())
    # Steps 0, 1, 2 make the counter 1, 2, 3 and end the episode; step 3 only resets to 0; and so on.
    assert rollout.obs_TBD[:, 0, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    assert rollout.terminateds_TB[:, 0].tolist() == [0, 0, 1, 0, 0, 0, 1, 0, 0, 0]
    assert rollout.valid_TB[:, 0].tolist() == [1, 1, 1, 0, 1, 1, 1, 0, 1, 1]
    assert rollout.num_env_steps == 8 * 4


def test_a_reset_step_at_the_start_of_the_next_fragment_is_invalid_too():
    training = settings(rollout_fragment_length=3)
    shard = Shard(COUNTER, training, 0, update=0, attempt=0)
    first, second = (shard.collect(weights_of(COUNTER, training), update=update) for update in range(2))
    assert first.terminateds_TB[-1].all() and first.valid_TB.all()
    assert second.valid_TB[:, 0].tolist() == [0, 1, 1]


def test_episode_returns_span_fragments_and_leave_out_reset_steps():
    training = settings(rollout_fragment_length=2)
    shard = Shard(COUNTER, training, 0, update=0, attempt=0)
    rollouts = [shard.collect(weights_of(COUNTER, training), update=update) for update in range(4)]
    rewards_TB = np.concatenate([rollout.rewards_TB for rollout in rollouts])
    returns = np.concatenate([rollout.episode_returns_E for rollout in rollouts])
    assert returns.tolist() == [*rewards_TB[0:3].sum(axis=0), *rewards_TB[4:7].sum(axis=0)]  # steps 3 and 7 reset
    assert np.concatenate([rollout.episode_lengths_E for rollout in rollouts]).tolist() == [3] * 8


def test_a_shard_depends_on_its_number_the_seed_and_the_update_only():
    rollout = collect(CARTPOLE, settings())
    assert same_bits(rollout, collect(CARTPOLE, settings()))
    for other in (
        collect(CARTPOLE, settings(), shard=1),
        collect(CARTPOLE, settings(seed=1)),
        collect(CARTPOLE, settings(), update=1),
    ):
        assert not np.array_equal(rollout.obs_TBD, other.obs_TBD)
        assert not np.array_equal(rollout.actions_TBK, other.actions_TBK)


def test_behaviour_log_probabilities_are_those_of_the_policy_that_serves():
    training = settings(normalize_observations=True)
    weights = dataclasses.replace(
        weights_of(CARTPOLE, training),
        normaliser_mean_D=np.full(4, 0.1, np.float32),
        normaliser_scale_D=np.full(4, 3, np.float32),
    )
    rollout = Shard(CARTPOLE, training, 0, update=0, attempt=0).collect(weights, update=0)
    policy = weights.policy(layout_for(CARTPOLE, training))
    probabilities = policy.distributions(rollout.obs_TBD[:-1].reshape(-1, 4))
    expected = np.log(np.take_along_axis(probabilities, rollout.actions_TBK.reshape(-1, 1), axis=1))[:, 0]
    np.testing.assert_allclose(rollout.logp_TB.reshape(-1), expected, atol=1e-6)  # float32 against float64


def test_actions_are_drawn_with_the_policys_probabilities():
    training = settings(num_envs_per_shard=64, rollout_fragment_length=200)
    constant = EnvironmentConfig(id="tests.training_environments:Constant-v0")
    layout = layout_for(constant, training)
    weights = weights_of(constant, training)
    bias_A = layout.split(weights.parameters_P)["policy.2.bias"]
    bias_A[:] = [np.log(0.8), np.log(0.2)]
    layout.split(weights.parameters_P)["policy.2.weight"][:] = 0
    rollout = Shard(constant, training, 0, update=0, attempt=0).collect(weights, update=0)
    # 12,800 draws: the standard deviation of the share is 0.0035, so 0.02 is beyond 5 of them
    assert rollout.actions_TBK.mean() == pytest.approx(0.2, abs=0.02)


# One environment, gamma 0.5, lambda 0.5, values V = 10, 20, 30 and 40 for what follows the last step, rewards 1, 2, 3:
#   delta_0 = 1 + 0.5 * 20 - 10 = 1     delta_1 = 2 + 0.5 * 30 - 20 = -3     delta_2 = 3 + 0.5 * 40 - 30 = -7
#   A_2 = -7     A_1 = -3 + 0.25 * -7 = -4.75     A_0 = 1 + 0.25 * -4.75 = -0.1875
REWARDS_TB = np.array([[1.0], [2.0], [3.0]])
VALUES_TB = np.array([[10.0], [20.0], [30.0], [40.0]])
NEVER, AT_STEP_1 = np.array([[False]] * 3), np.array([[False], [True], [False]])


def gae(terminateds_TB: np.ndarray, truncateds_TB: np.ndarray) -> list[float]:
    terms = REWARDS_TB, VALUES_TB[:-1], VALUES_TB[1:], terminateds_TB, truncateds_TB
    return advantages(*terms, gamma=0.5, lambda_=0.5)[:, 0].tolist()


def test_gae_hand_computed():
    assert gae(NEVER, NEVER) == [-0.1875, -4.75, -7]


def test_termination_has_no_future():
    # delta_1 = 2 - 20 = -18 = A_1, since nothing follows; A_0 = 1 + 0.25 * -18 = -3.5; A_2 belongs to the reset step
    assert gae(AT_STEP_1, NEVER) == [-3.5, -18, -7]


def test_truncation_bootstraps_from_the_final_observation_and_takes_no_advantage_from_beyond():
    # delta_1 = 2 + 0.5 * 30 - 20 = -3 = A_1; A_0 = 1 + 0.25 * -3 = 0.25
    assert gae(NEVER, AT_STEP_1) == [0.25, -3, -7]
