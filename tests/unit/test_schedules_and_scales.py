"""Settings that change during a run, and the running scales of rewards and observations."""

import dataclasses

import numpy as np
import pytest
from pydantic import ValidationError
from stable_baselines3.common.running_mean_std import RunningMeanStd

from policies.network import Architecture
from policies.observations import Box
from policies.spaces import Choices, Spaces
from tests.bundles import vector_spaces
from training.config import EnvironmentConfig, Schedule, TrainingConfig, value_at
from training.environment import read_spaces
from training.learner_state import MAX_NORMALISER_SCALE, LearnerState
from training.network import Layout, layout_of
from training.ppo import MAX_REWARD, PPO, merged_moments
from training.rollout import Rollout, Shard

SIZES = {"num_shards": 2, "num_env_runners": 1, "num_envs_per_shard": 3, "rollout_fragment_length": 5, "minibatch_size": 8}
POINTS = ((0, 1.0), (100, 0.5), (100_000, 0.1))


@pytest.mark.parametrize(
    ("schedule", "env_steps", "expected"),
    [
        (0.3, 0, 0.3),
        (0.3, 10**9, 0.3),
        (POINTS, 0, 1.0),
        (POINTS, 50, 0.75),
        (POINTS, 100, 0.5),
        (POINTS, 50_050, 0.3),  # halfway from 100 to 100,000
        (POINTS, 100_000, 0.1),
        (POINTS, 10**9, 0.1),
        (((50, 0.2), (150, 0.4)), 0, 0.2),  # before the first point
        (((50, 0.2), (150, 0.4)), 75, 0.25),
        (((50, 0.2),), 49, 0.2),
        (((50, 0.2),), 51, 0.2),
    ],
)
def test_a_schedule_runs_in_straight_lines_between_its_points(schedule: Schedule, env_steps: int, expected: float) -> None:
    assert value_at(schedule, env_steps) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["lr", "clip_param", "entropy_coeff"])
@pytest.mark.parametrize(
    "schedule", [[], [[100, 0.1], [0, 0.2]], [[0, 0.1], [0, 0.2]], [[0, -0.1]], -0.1, float("nan"), [[0, float("nan")]]]
)
def test_what_is_no_schedule_is_refused(name: str, schedule: object) -> None:
    with pytest.raises(ValidationError, match=name):
        TrainingConfig(**{name: schedule})
    TrainingConfig(**{name: [[0, 0.1], [100, 0.2]]})  # the control


def test_a_learning_rate_that_is_always_zero_is_refused_but_no_entropy_bonus_is_usual() -> None:
    with pytest.raises(ValidationError, match="lr"):
        TrainingConfig(lr=0.0)
    assert TrainingConfig(entropy_coeff=0, lr=[[0, 0.1], [10, 0]]).entropy_coeff == 0


ENVIRONMENT = EnvironmentConfig(id="CartPole-v1", max_episode_steps=7)


def learner_of(training: TrainingConfig) -> PPO:
    layout = layout_of(read_spaces(ENVIRONMENT), training)
    return PPO(layout, training, LearnerState.initial(layout, 0))


def collect(training: TrainingConfig, num_updates: int, environment: EnvironmentConfig = ENVIRONMENT) -> list[list[Rollout]]:
    """Return the fragments of all shards, update by update, with the initial weights."""
    weights = LearnerState.initial(layout_of(read_spaces(environment), training), 0).weights()
    shards = [Shard(environment, training, shard, update=0, attempt=0) for shard in range(training.num_shards)]
    return [[shard.collect(weights, update=update) for shard in shards] for update in range(num_updates)]


def test_an_update_uses_the_values_of_its_own_env_steps() -> None:
    scheduled = {"lr": ((0, 0.01), (100, 0.001)), "clip_param": ((0, 0.3), (100, 0.1)), "entropy_coeff": ((0, 0.0), (100, 0.1))}
    training = TrainingConfig(**SIZES, **scheduled)
    [fragments] = collect(training, 1)
    for env_steps, constants in (
        (0, {"lr": 0.01, "clip_param": 0.3, "entropy_coeff": 0.0}),
        (50, {"lr": 0.0055, "clip_param": 0.2, "entropy_coeff": 0.05}),
        (500, {"lr": 0.001, "clip_param": 0.1, "entropy_coeff": 0.1}),
    ):
        parameters = []
        for settings in (training, TrainingConfig(**SIZES, **constants)):
            learner = learner_of(settings)
            learner.state.env_steps = env_steps
            assert learner.update(fragments).lr == pytest.approx(constants["lr"])
            parameters.append(learner.state.parameters_P)
        np.testing.assert_allclose(*parameters, atol=1e-7)
        assert learner.state.env_steps == env_steps + sum(fragment.num_env_steps for fragment in fragments)


def discounted_sums(rewards_TB: np.ndarray, valid_TB: np.ndarray, ended_TB: np.ndarray, gamma: float) -> np.ndarray:
    """Return the discounted sum of an episode's rewards so far at each step that happened, as VecNormalize looks at it."""
    sums = []
    for b in range(rewards_TB.shape[1]):
        so_far = 0.0
        for t in range(len(rewards_TB)):
            if not valid_TB[t, b]:
                continue
            so_far = gamma * so_far + float(rewards_TB[t, b])
            sums.append(so_far)
            so_far = 0.0 if ended_TB[t, b] else so_far
    return np.array(sums)


def everything_until(updates: list[list[Rollout]], shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    fragments = [fragments[shard] for fragments in updates]
    rewards_TB, valid_TB = (np.concatenate([getattr(f, name) for f in fragments]) for name in ("rewards_TB", "valid_TB"))
    return rewards_TB, valid_TB, np.concatenate([f.terminateds_TB | f.truncateds_TB for f in fragments])


def test_rewards_are_divided_by_the_deviation_of_their_discounted_sums_so_far() -> None:
    training = TrainingConfig(**SIZES, normalize_rewards=True, gamma=0.9)
    updates = collect(training, 4)
    learner = learner_of(training)
    theirs = RunningMeanStd()
    for update, fragments in enumerate(updates):
        scaled = learner._with_scaled_rewards(fragments)
        parts = [everything_until(updates[: update + 1], shard) for shard in range(2)]
        sums_N = np.concatenate([discounted_sums(*part, gamma=0.9) for part in parts])
        assert learner.state.return_moments[0] == len(sums_N)
        deviation = np.sqrt(sums_N.var() + 1e-8)
        for before, after in zip(fragments, scaled):
            np.testing.assert_allclose(after.rewards_TB, before.rewards_TB / deviation, rtol=1e-6)
        learner.state.update += 1
        new = sum(fragment.num_env_steps for fragment in fragments)
        assert len(sums_N) >= new
    # stable-baselines3 keeps the same running moments; it starts them with a ten-thousandth of a sample of variance 1.
    theirs.update(sums_N)
    assert learner.state.return_moments[2] / learner.state.return_moments[0] == pytest.approx(theirs.var, rel=1e-4)
    # Negative control: the deviation of the rewards themselves is another number: CartPole always pays 1.
    assert deviation > 0.5 and np.concatenate([f.rewards_TB[f.valid_TB] for f in updates[0]]).std() == 0


def test_a_reward_of_a_reset_step_does_not_reach_the_scale() -> None:
    """A vectorised environment may pay anything in the step in which it only resets."""
    training = TrainingConfig(**SIZES | {"num_envs_per_shard": 2}, normalize_rewards=True)
    shard = Shard(ENVIRONMENT, training, 0, update=0, attempt=0)
    rewards_TB = np.array([[1.0, 2.0], [3.0, 1e6], [5.0, 6.0]])
    valid_TB = np.array([[True, True], [True, False], [True, True]])
    ended_TB = np.array([[False, True], [False, False], [False, False]])
    count, mean, m2 = shard._discounted_moments(rewards_TB, valid_TB, ended_TB)
    gamma = training.gamma
    sums_N = np.array([1, 3 + gamma, 5 + gamma * (3 + gamma), 2, 6])
    assert count == 5 and mean == pytest.approx(sums_N.mean()) and m2 == pytest.approx(((sums_N - sums_N.mean()) ** 2).sum())


def test_scaled_rewards_are_clipped() -> None:
    training = TrainingConfig(**SIZES, normalize_rewards=True)
    learner = learner_of(training)
    [[fragment, _]] = collect(training, 1)
    learner.state.return_moments = np.array([1e6, 0.0, 1e6 * 1e-4])  # many sums with a deviation of 0.01
    [scaled] = learner._with_scaled_rewards([dataclasses.replace(fragment, return_moments=np.array([1.0, 0.0, 0.0]))])
    assert set(scaled.rewards_TB[fragment.valid_TB]) == {MAX_REWARD}
    plain = learner_of(TrainingConfig(**SIZES))
    assert plain._with_scaled_rewards([fragment])[0] is fragment  # the control: it is an option


def test_the_scale_of_rewards_survives_a_checkpoint() -> None:
    training = TrainingConfig(**SIZES, normalize_rewards=True)
    learner = learner_of(training)
    first, second = collect(training, 2)
    learner.update(first)
    layout = layout_of(read_spaces(ENVIRONMENT), training)
    tensors = {name: tensor.copy() for name, tensor in learner.state.to_tensors(layout).items()}
    again = PPO(layout, training, LearnerState.from_tensors(layout, tensors, learner.state.counters()))
    for each in (learner, again):
        each.update([dataclasses.replace(fragment, version=1) for fragment in second])
    assert np.array_equal(learner.state.parameters_P, again.state.parameters_P)
    assert np.array_equal(learner.state.return_moments, again.state.return_moments)


@pytest.mark.parametrize("cuts", [(1, 2), (3, 50), (50, 99)])
def test_moments_of_parts_together_are_those_of_the_whole(cuts: tuple[int, int]) -> None:
    values_N = np.random.default_rng(0).normal(1e3, 2, 100)
    moments: tuple = (0, 0.0, 0.0)
    for part in np.split(values_N, cuts):
        moments = merged_moments(moments, (len(part), part.mean(), ((part - part.mean()) ** 2).sum()))
    count, mean, m2 = moments
    assert count == 100 and mean == pytest.approx(values_N.mean(), rel=1e-12) and m2 == pytest.approx(values_N.var() * 100)


def test_a_feature_that_never_changes_is_not_blown_up() -> None:
    state = LearnerState.initial(Layout(vector_spaces(2, 2), Architecture()), 0)
    state.normaliser_count, state.normaliser_mean_D, state.normaliser_m2_D = 100, np.array([5.0, 0.0]), np.array([0.0, 400.0])
    weights = state.weights()
    assert weights.normaliser_scale_D[0] <= MAX_NORMALISER_SCALE and weights.normaliser_scale_D[1] == pytest.approx(0.5)
    assert weights.normaliser_mean_D.tolist() == [5, 0]


@pytest.mark.parametrize(("dtype", "scale"), [("uint8", 1 / 255), ("float32", 1.0)])
def test_bytes_are_scaled_by_their_range_from_the_start(dtype: str, scale: float) -> None:
    box = Box(np.zeros((4, 4, 1), np.float32), np.full((4, 4, 1), 255, np.float32), dtype)
    layout = Layout(Spaces(box, Choices("discrete", (2,), (0,), ())), Architecture())
    weights = LearnerState.initial(layout, 0).weights()
    assert weights.normaliser_mean_D.tolist() == [0] * 16 and weights.normaliser_scale_D == pytest.approx(np.full(16, scale))


def test_an_update_always_has_something_to_learn_from() -> None:
    """Fragments of one step could all be reset steps; in two there is always one that happened."""
    two_steps = SIZES | {"rollout_fragment_length": 2, "minibatch_size": 1}
    with pytest.raises(ValidationError, match="rollout_fragment_length"):
        TrainingConfig(**two_steps | {"rollout_fragment_length": 1})
    training = TrainingConfig(**two_steps, normalize_rewards=True)
    one_step = EnvironmentConfig(id="tests.training_environments:Constant-v0", max_episode_steps=1)
    layout = layout_of(read_spaces(one_step), training)
    learner = PPO(layout, training, LearnerState.initial(layout, 0))
    for fragments in collect(training, 3, one_step):
        report = learner.update([dataclasses.replace(fragment, version=learner.state.update) for fragment in fragments])
        assert report.num_env_steps == 6 and np.isfinite(report.policy_loss)
