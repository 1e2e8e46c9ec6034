"""Evaluation: whole episodes only, paired by seed, and the same rows wherever its chunks run."""

import dataclasses

import numpy as np
import pytest

from policies.distributions import Categorical
from policies.errors import EnvironmentFailed
from policies.network import Architecture
from policies.policy import Policy
from policies.spaces import Choices
from training import evaluation
from training.config import EnvironmentConfig
from training.environment import read_spaces
from training.evaluation import EvaluationRequest, evaluate, evaluate_chunk, join
from training.learner_state import LearnerState
from training.network import Layout
from training.perturbations import Perturbation

CARTPOLE = EnvironmentConfig(id="CartPole-v1")
COUNTER = EnvironmentConfig(id="tests.training_environments:Counter-v0")


def policy_for(environment: EnvironmentConfig, seed: int = 0, *, last_bias: list[float] | None = None) -> Policy:
    layout = Layout(read_spaces(environment), Architecture((8,)))
    policy = LearnerState.initial(layout, seed).weights().policy(layout)
    if last_bias is None:
        return policy
    tensors = policy.tensors | {
        "policy.1.weight": np.zeros_like(policy.tensors["policy.1.weight"]),
        "policy.1.bias": np.array(last_bias, np.float32),
    }
    return dataclasses.replace(policy, tensors=tensors)


def test_counts_one_whole_episode_per_row():
    second_action = policy_for(COUNTER, last_bias=[0, 1])  # pays 6 in each of 3 steps
    result = evaluate(COUNTER, EvaluationRequest(second_action, num_episodes=5, seed=0, keep_steps=True))
    assert result.returns_E.tolist() == [18] * 5
    assert result.lengths_E.tolist() == [3] * 5
    assert result.obs_ND[:, 0].tolist() == [0] * 5 + [1] * 5 + [2] * 5  # what the policy saw, not what followed
    assert result.actions_N.tolist() == [6] * 15  # the environment's own action
    assert result.masks_NA is None
    assert result.episode_N.tolist() == [0, 1, 2, 3, 4] * 3


def test_rows_are_paired_by_seed():
    candidate, incumbent = policy_for(CARTPOLE, 0), policy_for(CARTPOLE, 1)
    first_obs = []
    for policy in (candidate, incumbent):
        result = evaluate(CARTPOLE, EvaluationRequest(policy, num_episodes=70, seed=7, keep_steps=True))
        first_obs.append([result.obs_ND[result.episode_N == episode][0].tolist() for episode in range(70)])
    assert first_obs[0] == first_obs[1]
    other_seed = evaluate(CARTPOLE, EvaluationRequest(candidate, num_episodes=70, seed=8, keep_steps=True))
    assert first_obs[0][0] != other_seed.obs_ND[0].tolist()


@pytest.mark.parametrize("mode", ["greedy", "sample"])
def test_chunks_run_in_any_order_give_the_same_rows(mode: str):
    noise = Perturbation("noise", 0.1, np.ones(4))
    request = EvaluationRequest(policy_for(CARTPOLE), 150, seed=3, mode=mode, perturbation=noise, keep_steps=True)
    assert [chunk.num_episodes for chunk in request.chunks] == [64, 64, 22]
    backwards = [evaluate_chunk(CARTPOLE, chunk) for chunk in reversed(request.chunks)]
    together, apart = evaluate(CARTPOLE, request), join(backwards[::-1])
    for field in dataclasses.fields(together):
        assert np.array_equal(getattr(together, field.name), getattr(apart, field.name))
    assert len(set(map(tuple, together.obs_ND[together.episode_N > 63][:64]))) == 64  # chunks are not copies of each other


def test_kept_steps_are_those_of_the_rows():
    result = evaluate(CARTPOLE, EvaluationRequest(policy_for(CARTPOLE), num_episodes=10, seed=0, mode="sample", keep_steps=True))
    assert np.bincount(result.episode_N).tolist() == result.lengths_E.tolist() == result.returns_E.tolist()
    assert (
        result.rewards_N.dtype == np.float32
        and np.bincount(result.episode_N, result.rewards_N).tolist() == result.returns_E.tolist()
    )


def test_noise_reaches_the_policy_but_not_the_record():
    sign_of_angle = policy_for(CARTPOLE)
    quiet = evaluate(CARTPOLE, EvaluationRequest(sign_of_angle, num_episodes=20, seed=0, keep_steps=True))
    noise = Perturbation("noise", 100, np.ones(4))
    noisy = evaluate(CARTPOLE, EvaluationRequest(sign_of_angle, num_episodes=20, seed=0, keep_steps=True, perturbation=noise))
    assert np.abs(noisy.obs_ND).max() < 10
    assert noisy.returns_E.tolist() != quiet.returns_E.tolist()


def test_rows_of_a_batch_choose_like_single_decisions():
    probabilities_BA = np.array([[0.2, 0.3, 0.5], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    seeds = [int(u * 2**53) for u in (0.21, 0.499, 0.999999)]
    uniforms = np.array([[seed / 2**53] for seed in seeds])

    class FixedNumbers:
        def random(self, shape):
            return uniforms

    distribution = Categorical(Choices("discrete", (3,), (5,), ()))
    expected = [distribution.choose(row, "sample", seed)[0] for row, seed in zip(probabilities_BA, seeds)]
    assert distribution.choose_rows(probabilities_BA, "sample", FixedNumbers()).tolist() == expected == [6, 5, 6]
    assert distribution.choose_rows(probabilities_BA, "greedy", FixedNumbers()).tolist() == [7, 5, 6]


def test_an_environment_that_never_ends_is_an_error(monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_EPISODE_STEPS", 50)
    endless = EnvironmentConfig(id="tests.training_environments:Constant-v0")
    with pytest.raises(EnvironmentFailed, match=r"set environment\.max_episode_steps"):
        evaluate(endless, EvaluationRequest(policy_for(endless), num_episodes=2, seed=0))
