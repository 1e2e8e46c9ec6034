"""What a broken sensor shows, and how near to a policy's observations another action lies."""

from itertools import pairwise

import numpy as np
import pytest

from policies.network import Architecture, Gaussian
from policies.observations import Box
from policies.policy import Policy
from policies.spaces import Choices, Numbers, Spaces
from tests.bundles import make_policy, policy_on
from training.perturbations import DRIFT_STEPS, STUCK_STEPS, Disturbance, Perturbation, action_change, smallest_flips, worst_case

ONES = np.ones(4)


def threshold_policy(boundary: float) -> Policy:
    """Return a policy on one number that takes action 1 above the boundary and action 0 below."""
    open_1 = np.full(1, np.inf, np.float32)
    spaces = Spaces(Box(-open_1, open_1), Choices("discrete", (2,), (0,), ()))
    tensors = {
        "normaliser.mean": np.zeros(1, np.float32),
        "normaliser.scale": np.ones(1, np.float32),
        "policy.0.weight": np.array([[-1, 1]], np.float32),
        "policy.0.bias": np.array([boundary, -boundary], np.float32),
    }
    return Policy(spaces, Architecture(()), tensors)


def shown(kind: str, strength: float, num_steps: int, *, rows: int = 2000, spread_D: np.ndarray = ONES) -> np.ndarray:
    """Return what is seen [T, rows, 4] of observations that are t + 1 in step t."""
    policy = make_policy()
    disturbance = Disturbance(Perturbation(kind, strength, spread_D), policy, rows, np.random.default_rng(0))
    return np.stack([disturbance.seen(np.full((rows, 4), t + 1, np.float32), None) for t in range(num_steps)])


def test_noise_has_the_deviation_that_was_asked_for() -> None:
    seen_BD = shown("noise", 0.1, 1, rows=20_000, spread_D=np.array([1, 2, 3, 0]))[0]
    np.testing.assert_allclose(seen_BD.std(axis=0), [0.1, 0.2, 0.3, 0], rtol=0.03)
    np.testing.assert_allclose(seen_BD.mean(axis=0), 1, atol=0.01)


def test_dropout_loses_as_many_readings_as_was_asked_for() -> None:
    seen_BD = shown("dropout", 0.2, 1, rows=20_000)[0]
    assert set(np.unique(seen_BD)) == {0, 1}
    assert (seen_BD == 0).mean() == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(("kind", "strength"), [("noise", 0.5), ("dropout", 0.5), ("stuck", 0.2), ("drift", 0.9)])
def test_a_policy_with_a_history_goes_on_seeing_what_its_sensors_said(kind: str, strength: float) -> None:
    open_42 = np.full((4, 2), np.inf, np.float32)
    policy = policy_on(Spaces(Box(-open_42, open_42), Choices("discrete", (2,), (0,), ()), history=4), Architecture((8,)))
    disturbance = Disturbance(Perturbation(kind, strength, np.ones(8)), policy, 50, np.random.default_rng(0))
    frames = [np.full((50, 2), t + 1, np.float32) for t in range(30)]
    true = [np.concatenate([frames[max(0, t - age)] for age in (3, 2, 1, 0)], axis=1) for t in range(30)]
    seen = [disturbance.seen(obs_BD, None) for obs_BD in true]
    assert (seen[0] == np.tile(seen[0][:, -2:], 4)).all()
    for before, after in pairwise(seen):
        assert (after[:, :-2] == before[:, 2:]).all()
    said, were = np.stack(seen)[:, :, -2:], np.stack(frames)
    assert said.shape == were.shape and (said != were).mean() > 0.2  # and what they said was wrong often
    apart = Disturbance(Perturbation(kind, strength, np.ones(8)), policy_on_flat_8(), 50, np.random.default_rng(0))
    seen = [apart.seen(obs_BD, None) for obs_BD in true]
    assert any((after[:, :-2] != before[:, 2:]).any() for before, after in pairwise(seen)), "negative control: without it"


def policy_on_flat_8() -> Policy:
    open_8 = np.full(8, np.inf, np.float32)
    return policy_on(Spaces(Box(-open_8, open_8), Choices("discrete", (2,), (0,), ())), Architecture((8,)))


def test_a_delay_shows_what_was_and_first_the_first() -> None:
    assert shown("delay", 2, 5)[:, 0, 0].tolist() == [1, 1, 1, 2, 3]


def test_stuck_readings_stay_for_some_steps_and_come_back() -> None:
    seen_TB = shown("stuck", 1.0, 2 * STUCK_STEPS + 3)[:, 0, 0]
    # With certainty it sticks at once, at 1, for ten steps more; the next reading is right, and sticks again.
    assert seen_TB.tolist() == [1] * (STUCK_STEPS + 1) + [STUCK_STEPS + 2] * (STUCK_STEPS + 1) + [2 * STUCK_STEPS + 3]
    rarely_TBD = shown("stuck", 0.01, 2)
    assert (rarely_TBD[1] == 1).mean() == pytest.approx(0.01, abs=0.005)


def test_drift_grows_to_its_strength_and_no_further() -> None:
    steps = np.arange(1, 2 * DRIFT_STEPS + 1)
    factor_TBD = shown("drift", 0.3, 2 * DRIFT_STEPS) / steps[:, None, None]
    assert np.all(factor_TBD[0] == 1) and np.abs(factor_TBD - 1).max() <= 0.3001
    np.testing.assert_allclose(factor_TBD[-1], factor_TBD[DRIFT_STEPS], rtol=1e-5)
    np.testing.assert_allclose(factor_TBD[DRIFT_STEPS // 2] - 1, (factor_TBD[-1] - 1) / 2, atol=1e-5)
    assert factor_TBD[-1].std() == pytest.approx(0.3 / 3**0.5, rel=0.05)  # uniform between -0.3 and 0.3


def test_the_worst_case_crosses_a_boundary_that_is_near_enough_and_stays_in_its_box() -> None:
    obs_BD = np.array([[1.0], [0.7], [-2.0]], np.float32)
    policy = threshold_policy(0.5)
    seen_BD = worst_case(policy, obs_BD, None, radius_D=np.array([0.3]), rng=np.random.default_rng(0))
    assert np.abs(seen_BD - obs_BD).max() <= 0.3 + 1e-6
    changed_B = action_change(policy, policy.distributions(obs_BD, None), policy.distributions(seen_BD, None))
    assert changed_B.tolist() == [0, 1, 0]  # 1 is 0.5 away from the boundary, 0.7 only 0.2, -2 is 2.5 away
    np.testing.assert_allclose(seen_BD[:, 0], [0.7, 0.4, -1.7], atol=1e-6)  # all went straight for the boundary


def test_the_worst_case_beats_random_noise_of_the_same_size() -> None:
    """Negative control: random directions in 32 dimensions hardly ever find what the gradient finds."""
    policy = make_policy(3, num_features=32)
    rng = np.random.default_rng(1)
    obs_BD = rng.standard_normal((200, 32)).astype(np.float32)
    before_BP = policy.distributions(obs_BD)
    radius_D = np.full(32, 0.05)
    worst_BD = worst_case(policy, obs_BD, None, radius_D=radius_D, rng=rng)
    random_BD = obs_BD + (radius_D * rng.choice((-1, 1), obs_BD.shape)).astype(np.float32)
    changes = [action_change(policy, before_BP, policy.distributions(seen_BD)).mean() for seen_BD in (worst_BD, random_BD)]
    assert changes[0] > 3 * changes[1] > 0


def test_the_smallest_flip_is_the_distance_to_the_boundary() -> None:
    obs_BD = np.array([[1.0], [0.7], [-2.0]], np.float32)
    spread_D = np.array([0.5])
    flips_B = smallest_flips(threshold_policy(0.5), obs_BD, None, spread_D=spread_D, largest=2.0, seed=0)
    np.testing.assert_allclose(flips_B, [1.0, 0.4, np.inf], atol=0.02)  # distances 0.5, 0.2 and 2.5, in spreads of 0.5


def test_a_masked_choice_is_no_rival() -> None:
    spaces = Spaces(threshold_policy(0).spaces.observation, Choices("discrete", (3,), (0,), ()), has_mask=True)
    tensors = {
        "normaliser.mean": np.zeros(1, np.float32),
        "normaliser.scale": np.ones(1, np.float32),
        "policy.0.weight": np.array([[1, -1, 0]], np.float32),
        "policy.0.bias": np.array([0, 0, 0.9], np.float32),  # at 1: logits 1, -1 and 0.9
    }
    policy, obs_BD = Policy(spaces, Architecture(()), tensors), np.ones((1, 1), np.float32)
    flips = [
        smallest_flips(policy, obs_BD, np.array([mask]), spread_D=np.ones(1), largest=4.0, seed=0)[0]
        for mask in ([True, True, True], [True, True, False], [True, False, False])
    ]
    np.testing.assert_allclose(flips, [0.1, 1.0, np.inf], atol=0.04)  # the third at 0.9, the second at 0, then nothing


def test_of_several_components_the_weakest_one_is_attacked() -> None:
    open_2 = np.full(2, np.inf, np.float32)
    spaces = Spaces(Box(-open_2, open_2), Choices("multi_discrete", (2, 2), (0, 0), (2,)))
    tensors = {
        "normaliser.mean": np.zeros(2, np.float32),
        "normaliser.scale": np.ones(2, np.float32),
        "policy.0.weight": np.array([[1, -1, 0, 0], [0, 0, 1, -1]], np.float32),  # each component looks at one feature
        "policy.0.bias": np.zeros(4, np.float32),
    }
    policy = Policy(spaces, Architecture(()), tensors)
    obs_BD = np.array([[3.0, 0.5], [0.25, 3.0]], np.float32)
    flips_B = smallest_flips(policy, obs_BD, None, spread_D=np.ones(2), largest=2.0, seed=0)
    np.testing.assert_allclose(flips_B, [0.5, 0.25], atol=0.02)


@pytest.mark.parametrize("std", ["parameter", "output"])
def test_real_valued_actions_are_moved_as_far_as_the_box_allows(std: str) -> None:
    """The mean is 2 x: within 0.1 it moves by 0.2 on the policy's scale, which reaches from -1 to 1 for bounds of any size."""
    open_1 = np.full(1, np.inf, np.float32)
    spaces = Spaces(Box(-open_1, open_1), Numbers(np.array([-5], np.float32), np.array([5], np.float32)))
    policy = policy_on(spaces, Architecture((), gaussian=Gaussian(std=std)))
    policy.tensors["normaliser.mean"][:], policy.tensors["normaliser.scale"][:] = 0, 1
    policy.tensors["policy.0.weight"][:, 0], policy.tensors["policy.0.bias"][0] = 2, 0
    policy = Policy(spaces, policy.architecture, policy.tensors)
    obs_BD = np.array([[0.1], [-0.2], [4.0]], np.float32)
    seen_BD = worst_case(policy, obs_BD, None, radius_D=np.array([0.1]), rng=np.random.default_rng(0))
    np.testing.assert_allclose(np.abs(seen_BD - obs_BD), 0.1, atol=1e-6)
    change_B = action_change(policy, policy.distributions(obs_BD), policy.distributions(seen_BD))
    np.testing.assert_allclose(change_B, [0.2, 0.2, 0], atol=1e-5)  # the last one sends its bound before and after
