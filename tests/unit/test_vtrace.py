"""V-trace: equation 1 of https://arxiv.org/abs/1802.01561, by hand, by brute force, and on a problem with a known answer."""

import dataclasses

import numpy as np
import pytest

from training.config import EnvironmentConfig, TrainingConfig
from training.environment import read_spaces
from training.gae import advantages, vtrace
from training.learner_state import LearnerState
from training.network import layout_of
from training.ppo import PPO, Batch
from training.rollout import Rollout, Shard

T, B = 12, 6


def random_terms(seed: int) -> tuple[np.ndarray, ...]:
    """Return rewards, values, next values, terminateds and truncateds [T, B]; next values differ from values where one ended."""
    rng = np.random.default_rng(seed)
    rewards_TB, values_TB, next_values_TB = rng.standard_normal((3, T, B))
    terminateds_TB = rng.random((T, B)) < 0.15
    truncateds_TB = (rng.random((T, B)) < 0.15) & ~terminateds_TB
    follows_TB = ~(terminateds_TB | truncateds_TB)[:-1]
    next_values_TB[:-1][follows_TB] = values_TB[1:][follows_TB]
    return rewards_TB, values_TB, next_values_TB, terminateds_TB, truncateds_TB


@pytest.mark.parametrize("lambda_", [0.0, 0.9, 1.0])
def test_with_the_policy_unchanged_it_is_generalised_advantage_estimation(lambda_: float) -> None:
    terms = random_terms(0)
    expected_TB = advantages(*terms, gamma=0.9, lambda_=lambda_)
    advantages_TB, targets_TB = vtrace(np.ones((T, B)), *terms, gamma=0.9, lambda_=lambda_)
    np.testing.assert_allclose(advantages_TB, expected_TB, atol=1e-6)
    np.testing.assert_allclose(targets_TB, terms[1] + expected_TB, atol=1e-6)
    changed_TB, _ = vtrace(np.full((T, B), 0.5), *terms, gamma=0.9, lambda_=lambda_)
    # Negative control; without lambda only the step itself counts, and its own ratio is left to the loss.
    assert (np.abs(changed_TB - expected_TB).max() > 0.1) == (lambda_ > 0)


# gamma 0.5, lambda 1, values 10, 20, 30 and 40 for what follows, rewards 1, 2, 3, ratios 2, 0.5 and 1:
#   r + gamma V' - V         1 + 10 - 10 = 1      2 + 15 - 20 = -3      3 + 20 - 30 = -7
#   rho = c = min(1, ratio)  1                    0.5                   1
#   delta = rho (…)          1                    -1.5                  -7
#   v_2 = 30 - 7 = 23
#   v_1 = 20 - 1.5 + 0.5 * 0.5 * (v_2 - 30) = 16.75
#   v_0 = 10 + 1 + 0.5 * 1 * (v_1 - 20) = 9.375; by the sum of equation 1: 10 + 1 + 0.5 * 1 * -1.5 + 0.25 * 1 * 0.5 * -7 = 9.375
#   A_s = r_s + gamma v_{s+1} - V_s: 1 + 0.5 * 16.75 - 10 = -0.625, 2 + 0.5 * 23 - 20 = -6.5, 3 + 0.5 * 40 - 30 = -7
RATIOS_TB = np.array([[2.0], [0.5], [1.0]])
REWARDS_TB = np.array([[1.0], [2.0], [3.0]])
VALUES_TB, NEXT_VALUES_TB = np.array([[10.0], [20.0], [30.0]]), np.array([[20.0], [30.0], [40.0]])
NEVER, AT_STEP_1 = np.zeros((3, 1), bool), np.array([[False], [True], [False]])


def by_hand(terminateds_TB: np.ndarray, truncateds_TB: np.ndarray) -> tuple[list[float], list[float]]:
    ends = terminateds_TB, truncateds_TB
    found = vtrace(RATIOS_TB, REWARDS_TB, VALUES_TB, NEXT_VALUES_TB, *ends, gamma=0.5, lambda_=1.0)
    return found[0][:, 0].tolist(), found[1][:, 0].tolist()


def test_three_steps_by_hand() -> None:
    assert by_hand(NEVER, NEVER) == ([-0.625, -6.5, -7], [9.375, 16.75, 23])


def test_nothing_comes_back_over_the_end_of_an_episode() -> None:
    # Terminated at step 1: 2 - 20 = -18, halved -9: v_1 = 11, v_0 = 10 + 1 + 0.5 * -9 = 6.5; A_0 = 1 + 0.5 * 11 - 10 = -3.5
    assert by_hand(AT_STEP_1, NEVER) == ([-3.5, -18, -7], [6.5, 11, 23])
    # Truncated there: 2 + 15 - 20 = -3, halved -1.5: v_1 = 18.5, v_0 = 10 + 1 - 0.75 = 10.25; A_0 = 1 + 9.25 - 10 = 0.25
    assert by_hand(NEVER, AT_STEP_1) == ([0.25, -3, -7], [10.25, 18.5, 23])


def equation_1(ratios_T: np.ndarray, terms: tuple[np.ndarray, ...], *, gamma: float, lambda_: float) -> np.ndarray:
    """Return the targets of one environment by the paper's own sum, episode by episode."""
    rewards_T, values_T, next_values_T, terminateds_T, truncateds_T = terms
    targets = []
    for s in range(len(rewards_T)):
        target, trace = values_T[s], 1.0
        for t in range(s, len(rewards_T)):
            future = 0.0 if terminateds_T[t] else next_values_T[t]
            target += gamma ** (t - s) * trace * min(1, ratios_T[t]) * (rewards_T[t] + gamma * future - values_T[t])
            if terminateds_T[t] or truncateds_T[t]:
                break
            trace *= lambda_ * min(1, ratios_T[t])
        targets.append(target)
    return np.array(targets)


@pytest.mark.parametrize(("gamma", "lambda_"), [(0.9, 1.0), (0.99, 0.8), (1.0, 0.0)])
def test_targets_are_the_sum_that_the_paper_defines(gamma: float, lambda_: float) -> None:
    terms = random_terms(1)
    ratios_TB = np.exp(np.random.default_rng(2).standard_normal((T, B)))
    _, targets_TB = vtrace(ratios_TB, *terms, gamma=gamma, lambda_=lambda_)
    for b in range(B):
        expected_T = equation_1(ratios_TB[:, b], tuple(term[:, b] for term in terms), gamma=gamma, lambda_=lambda_)
        np.testing.assert_allclose(targets_TB[:, b], expected_T, atol=1e-5)


@pytest.mark.parametrize(("drawn_with", "now"), [(0.2, 0.8), (0.5, 0.6)])
def test_targets_from_the_data_of_another_policy_are_nearer_to_the_truth_than_its_own_returns(
    drawn_with: float, now: float
) -> None:
    """A bandit without end: one action pays 1, the other nothing. Its value is p / (1 - gamma), p the share of the first.

    With clipped ratios V-trace finds the value of the policy that is proportional to min(mu, pi) (theorem 1 of the paper).
    """
    gamma, num_steps = 0.9, 300
    is_paid_TB = np.random.default_rng(0).random((num_steps, 300)) < drawn_with
    ratios_TB = np.where(is_paid_TB, now / drawn_with, (1 - now) / (1 - drawn_with))
    never_TB = np.zeros(is_paid_TB.shape, bool)

    def fixed_point(ratios_TB: np.ndarray) -> float:
        value = 0.0
        for _ in range(60):  # all states are one; each round takes the mean of the targets as the value
            values_TB = np.full(is_paid_TB.shape, value)
            _, targets_TB = vtrace(
                ratios_TB, is_paid_TB.astype(float), values_TB, values_TB, never_TB, never_TB, gamma=gamma, lambda_=1.0
            )
            value = float(targets_TB.mean())
        return value

    corrected, uncorrected, truth = fixed_point(ratios_TB), fixed_point(np.ones_like(ratios_TB)), now / (1 - gamma)
    both = min(drawn_with, now), min(1 - drawn_with, 1 - now)
    # 90,000 draws: the standard error of a share is 0.0017, that of a value ten times as much.
    assert corrected == pytest.approx(both[0] / sum(both) / (1 - gamma), abs=0.1)
    assert uncorrected == pytest.approx(drawn_with / (1 - gamma), abs=0.1)
    assert abs(corrected - truth) < 0.6 * abs(uncorrected - truth)


TRAINING = TrainingConfig(
    num_shards=1, num_env_runners=1, num_envs_per_shard=8, rollout_fragment_length=16, minibatch_size=64, max_staleness=1
)
ENVIRONMENT = EnvironmentConfig(id="CartPole-v1", max_episode_steps=5)


def stale_learner(change: float) -> tuple[PPO, Rollout]:
    """Return a learner at version 1 and a fragment of version 0; its parameters have changed by about this much since."""
    layout = layout_of(read_spaces(ENVIRONMENT), TRAINING)
    state = LearnerState.initial(layout, 0)
    fragment = Shard(ENVIRONMENT, TRAINING, 0, update=0, attempt=0).collect(state.weights(), update=0)
    moved_P = state.parameters_P + np.random.default_rng(1).standard_normal(layout.size).astype(np.float32) * np.float32(change)
    return PPO(layout, TRAINING, dataclasses.replace(state, parameters_P=moved_P, update=1)), fragment


def batch_of(learner: PPO, fragment: Rollout) -> Batch:
    return learner._batch([fragment])


def test_a_stale_fragment_of_unchanged_weights_is_learned_from_like_a_fresh_one() -> None:
    learner, fragment = stale_learner(change=0.0)
    stale, fresh = batch_of(learner, fragment), batch_of(learner, dataclasses.replace(fragment, version=1))
    assert fresh.weights_N is None and stale.weights_N == pytest.approx(1, abs=1e-5)
    for name in ("x_ND", "actions_NK", "logp_N", "values_N", "advantages_N", "returns_N"):
        np.testing.assert_allclose(getattr(stale, name), getattr(fresh, name), atol=1e-5, err_msg=name)


def test_a_stale_fragment_is_corrected_by_what_the_weights_say_now() -> None:
    learner, fragment = stale_learner(change=0.1)
    batch, valid_TB = batch_of(learner, fragment), fragment.valid_TB
    policy = learner.state.weights().policy(layout_of(read_spaces(ENVIRONMENT), TRAINING))
    p_NA = policy.distributions(fragment.obs_TBD[:-1][valid_TB])
    p_now_N = np.take_along_axis(p_NA, fragment.actions_TBK[valid_TB], axis=1)[:, 0]
    ratio_N = p_now_N / np.exp(fragment.logp_TB[valid_TB])
    assert ratio_N.min() < 0.8 and ratio_N.max() > 1.2
    np.testing.assert_allclose(batch.logp_N, np.log(p_now_N), atol=1e-5)
    np.testing.assert_allclose(batch.weights_N, np.minimum(1, ratio_N), atol=1e-5)
    # The values are those of the weights now, not the ones that came with the fragment.
    assert np.abs(batch.values_N - fragment.values_TB[:-1][valid_TB]).max() > 0.01
    report = learner.update([fragment])
    assert (report.lag_mean, report.lag_max) == (1.0, 1)


def test_reset_steps_of_a_stale_fragment_are_never_learned_from() -> None:
    learner, fragment = stale_learner(change=0.1)
    assert not fragment.valid_TB.all()
    garbage = dataclasses.replace(
        fragment,
        rewards_TB=np.where(fragment.valid_TB, fragment.rewards_TB, 1e6).astype(np.float32),
        logp_TB=np.where(fragment.valid_TB, fragment.logp_TB, -50).astype(np.float32),
    )
    for name, column in vars(batch_of(learner, fragment)).items():
        assert np.array_equal(column, getattr(batch_of(learner, garbage), name)), name
