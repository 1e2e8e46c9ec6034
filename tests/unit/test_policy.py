"""Does a policy give the same bits in every batch, and does the choice follow the distribution?"""

import numpy as np
import pytest

from policies.distributions import Categorical, seed_of, uniform
from policies.errors import IntegrityError
from policies.policy import Policy
from policies.spaces import Choices
from tests.bundles import make_policy

THREE = Categorical(Choices("discrete", (3,), (0,), ()))


@pytest.mark.parametrize(
    ("num_features", "num_actions", "hidden"),
    [
        (4, 2, (64, 64)),
        (27, 5, (33, 17)),
        (128, 18, (512, 512)),  # in panels
        (8000, 3, (16,)),  # too many features for panels
        (3, 2, ()),
    ],
)
def test_a_row_has_the_same_bits_in_every_batch_and_at_every_place(
    num_features: int, num_actions: int, hidden: tuple[int, ...]
) -> None:
    policy = make_policy(1, num_features=num_features, num_actions=num_actions, hidden=hidden)
    rng = np.random.default_rng(0)
    obs_ND = rng.standard_normal((200, num_features)).astype(np.float32)
    alone = np.concatenate([policy.distributions(row[None]) for row in obs_ND])
    for _ in range(50):
        rows = rng.integers(0, len(obs_ND), rng.integers(1, 130))
        assert np.array_equal(policy.distributions(obs_ND[rows]), alone[rows])


def test_one_product_for_the_whole_batch_would_change_the_bits() -> None:
    """The negative control: the plain forward, without blocks of a fixed size, differs between batch sizes."""
    policy = make_policy(1, num_features=128, num_actions=18, hidden=(512, 512))

    def plain_logits(obs_BD: np.ndarray) -> np.ndarray:
        tensors = policy.tensors
        x = (obs_BD - tensors["normaliser.mean"]) * tensors["normaliser.scale"]
        for layer in range(3):
            x = x @ tensors[f"policy.{layer}.weight"] + tensors[f"policy.{layer}.bias"]
            x = np.tanh(x) if layer < 2 else x
        return x

    obs_ND = np.random.default_rng(0).standard_normal((200, 128)).astype(np.float32)
    together = plain_logits(obs_ND)
    np.testing.assert_allclose(policy.outputs(obs_ND), together, atol=1e-4)  # the same function …
    assert any(not np.array_equal(plain_logits(obs_ND[:size]), together[:size]) for size in range(1, 64))  # … not the same bits


def test_sampling_inverts_the_cumulative_distribution() -> None:
    # Cumulative sums 0.2, 0.5, 1: a number below 0.2 is action 0, from 0.2 to below 0.5 action 1, from there action 2.
    probabilities_A = np.array([0.2, 0.3, 0.5])
    for number, expected in [(0.0, 0), (0.19, 0), (0.21, 1), (0.49, 1), (0.51, 2), (0.999999, 2)]:
        action, propensity = THREE.choose(probabilities_A, "sample", int(number * (1 << 53)))
        assert (action, propensity) == (expected, probabilities_A[expected])


def test_sampled_shares_match_the_distribution() -> None:
    probabilities_A = np.array([0.1, 0.6, 0.3])
    draws = [THREE.choose(probabilities_A, "sample", seed_of(f"decision-{k}"))[0] for k in range(20_000)]
    shares = np.bincount(draws, minlength=3) / len(draws)
    # Five standard errors of the largest share: sqrt(0.6 * 0.4 / 20000) = 0.0035.
    np.testing.assert_allclose(shares, probabilities_A, atol=5 * 0.0035)


def test_greedy_takes_the_first_of_the_most_probable() -> None:
    assert THREE.choose(np.array([0.25, 0.375, 0.375]), "greedy", 0) == (1, 1.0)
    assert [THREE.propensity(action, np.array([0.25, 0.375, 0.375]), "greedy") for action in range(3)] == [0.0, 1.0, 0.0]


def test_a_cumulative_sum_that_ends_below_one_still_gives_an_action() -> None:
    probabilities_A = np.full(3, (1 - 1e-9) / 3)
    assert THREE.choose(probabilities_A, "sample", (1 << 53) - 1)[0] == 2


def test_seeds_are_known_numbers() -> None:
    # sha256("a") starts with ca978112ca1bbdca; without its last 11 bits that is 0xca978112ca1bbdca >> 11.
    assert seed_of("a") == 0xCA978112CA1BBDCA >> 11
    assert 0 <= uniform(seed_of("a")) < 1


@pytest.mark.parametrize(
    "breakage",
    [
        lambda t: t.pop("policy.0.bias"),
        lambda t: t.update({"policy.9.bias": np.zeros(2, np.float32)}),
        lambda t: t.update({"policy.0.weight": t["policy.0.weight"].astype(np.float64)}),
        lambda t: t.update({"policy.0.weight": t["policy.0.weight"].T.copy()}),
        lambda t: t.update({"policy.0.bias": np.full_like(t["policy.0.bias"], np.nan)}),
    ],
)
def test_tensors_that_do_not_fit_are_refused(breakage) -> None:
    policy = make_policy()
    tensors = dict(policy.tensors)
    breakage(tensors)
    with pytest.raises(IntegrityError, match="tensor"):
        Policy(policy.spaces, policy.architecture, tensors)


def test_the_digest_sees_every_number() -> None:
    policy = make_policy()
    for name, tensor in policy.tensors.items():
        changed = tensor.copy()
        changed.flat[-1] += np.float32(1e-3)
        other = Policy(policy.spaces, policy.architecture, {**policy.tensors, name: changed})
        assert other.sha256() != policy.sha256(), name
