"""Does one observation alone get the same bits as in a batch?"""

import numpy as np
import pytest

from policies.network import Architecture, Gaussian
from policies.observations import Box
from policies.one_row import AnyRow, OneChoice, row_evaluator
from policies.policy import Policy
from policies.spaces import Choices, Numbers, Spaces
from tests.bundles import make_policy, policy_on, vector_spaces

SHAPES = [((64, 64), 4, 2), ((), 3, 2), ((16,), 7, 3), ((480, 480), 4, 9), ((64, 64), 33, 130), ((17, 5), 300, 8), ((8,), 2, 300)]


def observations(num: int, num_features: int) -> list[list[float]]:
    return (3 * np.random.default_rng(num_features).normal(size=(num, num_features))).tolist()


def batch_of(policy: Policy, rows: list[list[float]]) -> np.ndarray:
    return policy.distributions(np.array(rows).astype(np.float32))


@pytest.mark.parametrize(("hidden", "num_features", "num_actions"), SHAPES)
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_one_row_has_the_bits_of_the_batch(hidden, num_features: int, num_actions: int, activation: str) -> None:
    spaces = vector_spaces(num_features, num_actions, start=5)
    policy = policy_on(spaces, Architecture(hidden, activation, observation_clip=2.5))
    row, rows = row_evaluator(policy), observations(100, num_features)
    assert isinstance(row, OneChoice)
    rng = np.random.default_rng(0)
    for features, expected_A in zip(rows, batch_of(policy, rows)):
        found = row.distribution(features, None)
        assert found == expected_A.tolist()  # equal floats, not close ones
        for mode, seed in (("greedy", 0), ("sample", int(rng.integers(1 << 53)))):
            action, propensity = policy.distribution.choose(expected_A, mode, seed)
            assert row.choose(found, mode, seed) == (action, propensity)
            for other in {action, 5, 5 + num_actions - 1}:
                assert row.propensity(other, found, mode).value == policy.distribution.propensity(other, expected_A, mode)


def test_a_product_of_one_row_would_have_other_bits() -> None:
    """Negative control: without the block the sums are added in another order, and the log would not replay."""
    policy = make_policy(hidden=(64, 64))
    rows = observations(200, 4)
    x_B1H = np.array(rows, np.float32)[:, None]
    tensors = policy.tensors
    x_B1H = (x_B1H - tensors["normaliser.mean"]) * tensors["normaliser.scale"]
    for layer in range(2):
        x_B1H = np.tanh(x_B1H @ tensors[f"policy.{layer}.weight"] + tensors[f"policy.{layer}.bias"])
    alone_BA = (x_B1H @ tensors["policy.2.weight"] + tensors["policy.2.bias"])[:, 0]
    assert (alone_BA != policy.outputs(np.array(rows, np.float32))).any()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_one_row_after_another_leaves_nothing_behind() -> None:
    policy = make_policy(hidden=(64, 64))
    row, (first, second) = row_evaluator(policy), observations(2, 4)
    before = row.distribution(first, None)
    row.distribution(second, None)
    assert row.distribution(first, None) == before
    row.distribution([float("inf")] * 4, None)
    assert row.distribution(first, None) == before


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_overflow_has_no_distribution(value: float) -> None:
    policy = make_policy()
    assert row_evaluator(policy).distribution([value, value, -value, value], None) is None
    assert AnyRow(policy).distribution([value, value, -value, value], None) is None


def test_a_draw_beyond_the_sum_takes_the_last_choice_that_is_possible() -> None:
    """Ten times 0.1 add up to less than 1, and the largest draw is beyond that."""
    row, probabilities = row_evaluator(make_policy(num_actions=11)), [0.1] * 10 + [0.0]
    assert row.choose(probabilities, "sample", (1 << 53) - 1) == (9, 0.1)


BOUND = np.ones(3, np.float32)
OTHERS = {
    "several choices": (Spaces(Box(-BOUND, BOUND), Choices("multi_discrete", (2, 3), (0, 1), (2,))), Architecture((8,))),
    "bits": (Spaces(Box(-BOUND, BOUND), Choices("multi_binary", (2,), (0,), (1,))), Architecture((8,))),
    "numbers": (Spaces(Box(-BOUND, BOUND), Numbers(-BOUND, BOUND)), Architecture((8,), gaussian=Gaussian())),
    "masks": (Spaces(Box(-BOUND, BOUND), Choices("discrete", (4,), (0,), ()), True), Architecture((8,))),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_whatever_else_a_policy_is_its_rows_are_those_of_a_batch_too(kind: str) -> None:
    spaces, architecture = OTHERS[kind]
    policy = policy_on(spaces, architecture)
    mask_A = np.array([True, False, True, True]) if spaces.has_mask else None
    row, rows = row_evaluator(policy), observations(20, 3)
    assert isinstance(row, AnyRow)
    masks_BA = None if mask_A is None else np.tile(mask_A, (20, 1))
    expected_BP = policy.distributions(np.array(rows).astype(np.float32), masks_BA)
    for features, expected_P in zip(rows, expected_BP):
        found_P = row.distribution(features, mask_A)
        assert (found_P == expected_P).all()
        action, propensity = row.choose(found_P, "sample", 1 << 50)
        assert (action, propensity) == policy.distribution.choose(expected_P, "sample", 1 << 50)
        assert row.propensity(action, found_P, "sample").value == policy.distribution.propensity(action, expected_P, "sample")
