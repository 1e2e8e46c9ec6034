"""Distributions: what is drawn follows the distribution, and the propensity that is logged is the one it was drawn with."""

import hashlib
import itertools
import math
from collections import Counter
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces as gym_spaces
from scipy import integrate, stats

from policies.distributions import Categorical, Normal, distribution_of, seed_of, seeds_of_many
from policies.errors import SpaceUnsupported
from policies.network import Architecture, Gaussian
from policies.spaces import Choices, Numbers, Spaces
from training.heads import NumberHead

OBSERVATION = gym_spaces.Box(-1, 1, (1,))
CHOICES = {
    "discrete": gym_spaces.Discrete(3, start=5),
    "multi_discrete": gym_spaces.MultiDiscrete([2, 3], start=[-1, 4]),
    "table": gym_spaces.MultiDiscrete([[2, 2], [1, 3]]),
    "multi_binary": gym_spaces.MultiBinary(3),
}


def choices_of(name: str) -> Choices:
    action = Spaces.from_gymnasium(OBSERVATION, CHOICES[name]).action
    assert isinstance(action, Choices)
    return action


def random_distribution(action: Choices, *, masked: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Return probabilities [A] far from 0 and 1, and the mask they were made with: all but first and last choices are gone."""
    rng = np.random.default_rng(3)
    outputs_BO = rng.standard_normal((1, sum(action.nvec))).astype(np.float32)
    mask_BA = None
    if masked:
        mask_BA = np.zeros(outputs_BO.shape, bool)
        mask_BA[:, 0] = mask_BA[:, np.cumsum(action.nvec) - 1] = True
    return Categorical(action).parameters(outputs_BO, mask_BA)[0], None if mask_BA is None else mask_BA[0]


def every_action(action: Choices) -> list[Any]:
    return [action.to_answer(np.array(index_K)) for index_K in itertools.product(*map(range, action.nvec))]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CHOICES)
def test_the_share_of_every_action_is_its_propensity(name: str, masked: bool) -> None:
    action = choices_of(name)
    distribution = Categorical(action)
    p_A, _ = random_distribution(action, masked=masked)
    propensities = {str(a): distribution.propensity(a, p_A, "sample") for a in every_action(action)}
    assert sum(propensities.values()) == pytest.approx(1, abs=1e-12)
    num_draws = 8_000
    one_by_one: Counter[str] = Counter()
    for k in range(num_draws):
        drawn, propensity = distribution.choose(p_A, "sample", seed_of(f"decision-{k}"))
        assert propensity == propensities[str(drawn)]
        one_by_one[str(drawn)] += 1
    rows = distribution.choose_rows(np.repeat(p_A[None], num_draws, axis=0), "sample", np.random.default_rng(0))
    together = Counter(str(row.tolist()) for row in rows)
    for a, propensity in propensities.items():
        # Five standard errors; a propensity of 0 allows no draw at all.
        allowed = 5 * math.sqrt(propensity * (1 - propensity) / num_draws)
        for shares in (one_by_one, together):
            assert abs(shares[a] / num_draws - propensity) <= allowed, a
    assert masked == (0.0 in propensities.values())


def test_components_drawn_with_the_same_number_would_be_noticed() -> None:
    """Negative control: two fair bits from one number are always equal, though each alone has the right share."""
    num_draws = 20_000
    numbers_N = np.random.default_rng(0).random(num_draws)
    equal_share = (np.stack([numbers_N < 0.5, numbers_N < 0.5]).all(axis=0)).mean()
    assert abs(equal_share - 0.25) > 5 * math.sqrt(0.25 * 0.75 / num_draws)


@pytest.mark.parametrize("name", CHOICES)
def test_a_masked_choice_has_propensity_zero_and_is_never_drawn(name: str) -> None:
    action = choices_of(name)
    distribution = Categorical(action)
    p_A, mask_A = random_distribution(action, masked=True)
    assert mask_A is not None and (p_A[~mask_A] == 0).all() and (p_A[mask_A] > 0).all()
    # The ends of the range of seeds, where rounding could pick the first or the last choice, too.
    seeds = [0, 1, (1 << 53) - 1, *(seed_of(str(k)) for k in range(2_000))]
    for mode in ("sample", "greedy"):
        for seed in seeds:
            drawn, propensity = distribution.choose(p_A, mode, seed)
            index_K = np.asarray(drawn).reshape(-1) - np.array(action.starts)
            assert mask_A[index_K + np.cumsum((0, *action.nvec[:-1]))].all() and propensity > 0


def test_greedy_takes_the_best_choice_that_exists() -> None:
    distribution = Categorical(choices_of("multi_discrete"))
    outputs_BO = np.array([[0, 9, 5, 7, 6]], np.float32)
    mask_BA = np.array([[True, False, True, False, True]])
    assert distribution.choose(distribution.parameters(outputs_BO, None)[0], "greedy", 0) == ([0, 5], 1.0)
    p_A = distribution.parameters(outputs_BO, mask_BA)[0]
    assert distribution.choose(p_A, "greedy", 0) == ([-1, 6], 1.0)
    assert distribution.choose_rows(p_A[None], "greedy", np.random.default_rng(0)).tolist() == [[-1, 6]]
    assert [distribution.propensity(a, p_A, "greedy") for a in ([-1, 6], [0, 5], [-1, 5])] == [1, 0, 0]


def test_probabilities_are_those_of_the_logits_that_exist() -> None:
    # Logits log 1, log 2, log 3: 1/6, 2/6, 3/6; without the second 1/4 and 3/4.
    distribution = Categorical(choices_of("discrete"))
    outputs_BO = np.log(np.array([[1, 2, 3]], np.float32))
    assert distribution.parameters(outputs_BO, None)[0] == pytest.approx([1 / 6, 2 / 6, 3 / 6], abs=1e-7)
    mask_BA = np.array([[True, False, True]])
    assert distribution.parameters(outputs_BO, mask_BA)[0] == pytest.approx([1 / 4, 0, 3 / 4], abs=1e-7)
    assert outputs_BO[0, 1] == np.float32(np.log(2))  # what came in was not changed


BOXES = {
    "two bounds": (-2.0, 4.0),
    "a lower bound": (-1.0, np.inf),
    "an upper bound": (-np.inf, 0.5),
    "no bounds": (-np.inf, np.inf),
}
SHAPES = [(name, squash) for name in BOXES for squash in ("clip", "tanh")]
MEAN, STD = 0.4, 0.9  # on the policy's scale, where two bounds are at -1 and 1


def normal_of(name: str, squash: str, size: int = 1) -> Normal:
    low, high = (np.full(size, bound, np.float32) for bound in BOXES[name])
    return Normal(Numbers(low, high), Gaussian(squash))


def reference_cdf(name: str, squash: str, x: np.ndarray) -> np.ndarray:
    """Return how probable an action of at most x is, by scipy; bounded components have their bounds at -1 and 1 before."""
    low, high = BOXES[name]
    y = np.asarray(x, float)
    if np.isfinite(low) and np.isfinite(high):
        y = (y - (low + high) / 2) / ((high - low) / 2)
        if squash == "tanh":
            with np.errstate(divide="ignore"):
                y = np.arctanh(np.clip(y, -1, 1))
    return np.where(x >= high, 1.0, np.where(x < low, 0.0, stats.norm.cdf(y, MEAN, STD)))


def density_at(normal: Normal, x: float) -> float:
    return normal.propensity([x], np.array([MEAN, STD]), "sample")


@pytest.mark.parametrize(("name", "squash"), SHAPES)
def test_the_density_is_scipys_and_adds_up_to_one_with_what_lies_on_the_bounds(name: str, squash: str) -> None:
    normal = normal_of(name, squash)
    low, high = BOXES[name]
    inside = (max(low, -30) + 1e-9, min(high, 30) - 1e-9)
    points = [x for x in np.linspace(-1.9, 3.9, 30) if low < x < high]
    step = 1e-5
    for x in points:  # the density is the slope of the cumulative distribution
        slope = (reference_cdf(name, squash, x + step) - reference_cdf(name, squash, x - step)) / (2 * step)
        assert density_at(normal, x) == pytest.approx(slope, rel=1e-5)
    is_bent = squash == "tanh" and name == "two bounds"
    on_low = density_at(normal, low) if np.isfinite(low) and not is_bent else 0.0
    on_high = density_at(normal, high) if np.isfinite(high) and not is_bent else 0.0
    if not is_bent:
        assert on_low == pytest.approx(float(reference_cdf(name, squash, low)) if np.isfinite(low) else 0)
        assert on_high == pytest.approx(1 - float(reference_cdf(name, squash, high - 1e-12)) if np.isfinite(high) else 0)
    between, _ = integrate.quad(lambda x: density_at(normal, x), *inside, limit=200, points=[0.0])
    assert on_low + between + on_high == pytest.approx(1, abs=1e-5)
    if np.isfinite([low, high]).any() and not is_bent:
        assert between < 0.99  # negative control: without what lies on the bounds it would not add up


def test_a_bent_density_without_its_change_of_variables_does_not_add_up() -> None:
    """Negative control: the normal density at atanh(y), alone, is not a density of y."""
    wrong, _ = integrate.quad(lambda y: stats.norm.pdf(np.arctanh(y), MEAN, STD), -1, 1)
    assert abs(wrong - 1) > 0.1


@pytest.mark.parametrize(("name", "squash"), SHAPES)
def test_what_is_drawn_follows_the_density(name: str, squash: str) -> None:
    normal = normal_of(name, squash)
    low, high = BOXES[name]
    parameters_P = np.array([MEAN, STD])
    num_draws = 5_000
    one_by_one = [normal.choose(parameters_P, "sample", seed_of(f"decision-{k}"))[0][0] for k in range(num_draws)]
    rows = np.repeat(parameters_P[None], num_draws, axis=0)
    together = normal.choose_rows(rows, "sample", np.random.default_rng(0))
    assert together.dtype == np.float32
    head = NumberHead(normal.action, squash)  # what training sends to its environments
    outputs_NO = np.tile(np.array([MEAN, np.log(STD)], np.float32), (num_draws, 1))
    noise_N = head.noise(np.random.default_rng(1), (num_draws,))
    in_training = head.to_environment(head.sample(outputs_NO, noise_N, None))
    for drawn_N in (np.array(one_by_one), together[:, 0], in_training[:, 0]):
        assert drawn_N.min() >= low and drawn_N.max() <= high
        is_inside_N = (drawn_N > low) & (drawn_N < high)
        is_bent = squash == "tanh" and name == "two bounds"
        share_inside = float(reference_cdf(name, squash, high - 1e-9) - reference_cdf(name, squash, low)) if not is_bent else 1.0
        # Five standard errors of a share in 5,000 draws are 0.035 at most. That of few on the bounds has to be right, too.
        assert is_inside_N.mean() == pytest.approx(share_inside, abs=5 * math.sqrt(share_inside * (1 - share_inside) / num_draws))
        at_low = float(reference_cdf(name, squash, low)) if np.isfinite(low) and not is_bent else 0.0

        def cdf_inside(x: np.ndarray, at_low: float = at_low, share_inside: float = share_inside) -> np.ndarray:
            return (reference_cdf(name, squash, x) - at_low) / share_inside

        # Kolmogorov and Smirnov: a right sampler gets below 0.001 in one of a thousand seeds, and these are fixed.
        assert stats.kstest(drawn_N[is_inside_N], cdf_inside).pvalue > 0.001
        assert stats.kstest(drawn_N[is_inside_N] * 1.1, cdf_inside).pvalue < 0.001  # negative control


@pytest.mark.parametrize(("name", "squash"), SHAPES)
def test_the_answered_number_has_the_logged_propensity_and_the_seed_decides(name: str, squash: str) -> None:
    normal = normal_of(name, squash, size=3)
    parameters_P = np.array([0.1, -0.5, 2.5, 0.5, 1.0, 0.7])
    answers = [normal.choose(parameters_P, "sample", seed_of(str(k))) for k in range(200)]
    assert answers == [normal.choose(parameters_P, "sample", seed_of(str(k))) for k in range(200)]
    assert len({str(action) for action, _ in answers}) > 100
    for action, propensity in answers:
        assert all(x == float(np.float32(x)) for x in action)  # an environment's float32 holds exactly what was answered
        assert propensity == normal.propensity(action, parameters_P, "sample") > 0
        # The numbers of an action are independent: their densities multiply.
        single = normal_of(name, squash)
        apart = [single.propensity([x], parameters_P[[k, k + 3]], "sample") for k, x in enumerate(action)]
        assert propensity == pytest.approx(math.prod(apart), rel=1e-12)


@pytest.mark.parametrize(("name", "squash"), SHAPES)
def test_greedy_sends_the_mean_within_the_bounds_with_certainty(name: str, squash: str) -> None:
    normal = normal_of(name, squash, size=2)
    low, high = BOXES[name]
    parameters_P = np.array([0.25, 1.5, 0.5, 1.0])
    bounded = np.isfinite(low) and np.isfinite(high)
    # Two bounds, -2 and 4, are at -1 and 1: 0.25 is 1 + 3 * 0.25 and 1.5 is beyond 4, or their tanh.
    if bounded:
        expected = [1 + 3 * math.tanh(0.25), 1 + 3 * math.tanh(1.5)] if squash == "tanh" else [1.75, 4.0]
    else:
        expected = [0.25, min(1.5, high)]
    action, propensity = normal.choose(parameters_P, "greedy", 7)
    assert action == pytest.approx(expected, rel=1e-6) and propensity == 1.0
    assert normal.choose(parameters_P, "greedy", 8) == (action, 1.0)
    assert normal.propensity(action, parameters_P, "greedy") == 1.0
    other = [action[0], np.nextafter(np.float32(action[1]), np.float32(-9)).item()]
    assert normal.propensity(other, parameters_P, "greedy") == 0.0
    assert normal.choose_rows(parameters_P[None], "greedy", np.random.default_rng(0)).tolist() == [action]


def test_a_mean_far_beyond_a_bent_bound_still_has_a_finite_propensity() -> None:
    normal = normal_of("two bounds", "tanh")
    for mean in (-50.0, 0.0, 50.0):
        for seed in range(20):
            action, propensity = normal.choose(np.array([mean, 0.5]), "sample", seed)
            assert -2 <= action[0] <= 4 and math.isfinite(propensity) and propensity > 0
            assert mean == 0 or (action[0] in (-2, 4) and propensity == pytest.approx(1))  # all of it is sent as the bound


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (100.0, 101.0)])  # near 100 float32 is 64 times coarser
def test_as_much_is_sent_as_a_bent_bound_as_its_propensity_says(bounds: tuple[float, float]) -> None:
    low, high = (np.full(1, bound, np.float32) for bound in bounds)
    normal = Normal(Numbers(low, high), Gaussian("tanh"))
    gap = np.spacing(high).item() / (bounds[1] - bounds[0])  # of float32 before the bound, half of it, on the policy's scale
    parameters_P = np.array([math.atanh(1 - gap), 0.5])  # the mean is where rounding to the bound begins, or nearly so
    sent_N = normal.choose_rows(np.repeat(parameters_P[None], 5_000, axis=0), "sample", np.random.default_rng(0))[:, 0]
    share = normal.propensity([bounds[1]], parameters_P, "sample")
    # Five standard errors of a share of a half in 5,000 draws are 0.035.
    assert 0.2 < share < 0.8 and (sent_N == high).mean() == pytest.approx(share, abs=0.035)


@pytest.mark.parametrize("squash", ["clip", "tanh"])
def test_a_number_that_cannot_be_another_has_propensity_one(squash: str) -> None:
    low, high = np.array([3, -1], np.float32), np.array([3, 1], np.float32)
    parameters_P = np.array([0.1, 0.2, 0.5, 0.5])
    action, propensity = Normal(Numbers(low, high), Gaussian(squash)).choose(parameters_P, "sample", 5)
    assert action[0] == 3
    alone = Normal(Numbers(low[1:], high[1:]), Gaussian(squash))
    assert propensity == alone.propensity(action[1:], parameters_P[1::2], "sample") > 0


@pytest.mark.parametrize("std", ["parameter", "output"])
def test_a_log_deviation_is_kept_within_its_limits(std: str) -> None:
    normal = Normal(Numbers(np.full(3, -1, np.float32), np.ones(3, np.float32)), Gaussian("clip", std))
    parameters_BP = normal.parameters(np.array([[1, 2, 3, -30, 0, 5]], np.float32), None)
    assert parameters_BP[0] == pytest.approx([1, 2, 3, math.exp(-20), 1, math.exp(2)])


ACTION_SPACES: list[gymnasium.Space] = [
    *CHOICES.values(),
    gym_spaces.Box(-2, 4, (2, 2)),
    gym_spaces.Box(-np.inf, np.inf, ()),
    gym_spaces.Box(0, np.inf, (3,)),
    gym_spaces.Box(-0.1, 0.7, (2,), np.float64),  # as float32 its upper bound would be beyond it
    gym_spaces.Box(np.array([-1 / 3, 0.1]), np.array([1 / 3, 0.3]), (2,), np.float64),
]


@pytest.mark.parametrize("squash", ["clip", "tanh"])
@pytest.mark.parametrize("space", ACTION_SPACES, ids=str)
def test_every_action_is_one_of_the_environments_own(space: gymnasium.Space, squash: str) -> None:
    spaces = Spaces.from_gymnasium(OBSERVATION, space)
    gaussian = Gaussian(squash, "output") if isinstance(spaces.action, Numbers) else None
    distribution = distribution_of(spaces, Architecture(gaussian=gaussian))
    rng = np.random.default_rng(0)
    outputs = rng.standard_normal((200, 2 * spaces.action.num_components if gaussian else spaces.mask_size))
    parameters_BP = distribution.parameters((2 * outputs).astype(np.float32), None)
    for mode in ("greedy", "sample"):
        batch = distribution.choose_rows(parameters_BP, mode, rng)
        singles = list(gymnasium.vector.utils.iterate(gymnasium.vector.utils.batch_space(space, 200), batch))
        assert len(singles) == 200 and all(space.contains(np.asarray(action)) for action in singles)
        for row, parameters_P in enumerate(parameters_BP):
            answer, _ = distribution.choose(parameters_P, mode, row)
            as_space = answer if isinstance(space, gym_spaces.Discrete) else np.array(answer, space.dtype)
            assert space.contains(as_space)
    assert Spaces.from_json(spaces.to_json()).action.to_json() == spaces.action.to_json()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_largest_number_as_a_bound_means_no_bound(dtype: type) -> None:
    """As a limit it would put all that a policy can say into the one number in the middle."""
    largest = np.finfo(dtype).max
    action = Spaces.from_gymnasium(OBSERVATION, gym_spaces.Box(-largest, largest, (1,), dtype)).action
    assert isinstance(action, Numbers)
    assert Normal(action, Gaussian("tanh")).choose(np.array([0.25, 1.0]), "greedy", 0) == ([0.25], 1.0)


@pytest.mark.parametrize(
    "space", [gym_spaces.Text(3), gym_spaces.Box(0, 9, (2,), np.int32), gym_spaces.MultiBinary(10**9)], ids=str
)
def test_action_spaces_that_no_policy_has_are_refused(space: gymnasium.Space) -> None:
    with pytest.raises(SpaceUnsupported, match="action space"):
        Spaces.from_gymnasium(OBSERVATION, space)


@pytest.mark.parametrize("mode", ["sample", "greedy"])
@pytest.mark.parametrize("name", CHOICES)
def test_many_rows_at_once_are_bit_for_bit_what_each_is_alone(name: str, mode: str) -> None:
    action, rng = choices_of(name), np.random.default_rng(5)
    distribution = Categorical(action)
    parameters_BP = distribution.parameters(3 * rng.standard_normal((300, sum(action.nvec))).astype(np.float32), None)
    seeds = [seed_of(f"d{row}") for row in range(300)]
    actions, propensities = distribution.choose_many(parameters_BP, mode, seeds)
    assert list(zip(actions, propensities)) == [distribution.choose(p, mode, s) for p, s in zip(parameters_BP, seeds)]
    expected = [distribution.propensity(a, p, mode) for a, p in zip(actions, parameters_BP)]
    assert distribution.propensity_many(actions, parameters_BP, mode) == expected == propensities


def test_the_last_draws_before_one_fall_on_the_last_choice_that_exists() -> None:
    """The cumulative sum can end below 1, and choices behind its end may be masked."""
    distribution = Categorical(choices_of("discrete"))
    rows = np.array([[0.5, 0.4999999999999999, 0.0], [0.1, 0.2, 0.7]])
    last = (1 << 53) - 1
    assert distribution.choose_many(rows, "sample", [last, last])[0] == [6, 7]
    assert [distribution.choose(row, "sample", last)[0] for row in rows] == [6, 7]


@pytest.mark.parametrize("mode", ["sample", "greedy"])
def test_many_real_actions_at_once_are_what_each_is_alone(mode: str) -> None:
    numbers = Numbers(np.array([-1, -2], np.float32), np.array([1, 2], np.float32))
    distribution, rng = Normal(numbers, Gaussian(squash="tanh")), np.random.default_rng(5)
    parameters_BP = distribution.parameters(rng.standard_normal((20, 4)).astype(np.float32), None)
    seeds = [seed_of(f"d{row}") for row in range(20)]
    actions, propensities = distribution.choose_many(parameters_BP, mode, seeds)
    assert list(zip(actions, propensities)) == [distribution.choose(p, mode, s) for p, s in zip(parameters_BP, seeds)]
    assert distribution.propensity_many(actions, parameters_BP, mode) == propensities


def test_a_decisions_seed_follows_from_its_name_for_ever() -> None:
    """The first eight bytes of SHA-256, or of many the index-th eight of SHAKE-256 of the batch's name; 53 bits of them."""
    assert seed_of("r-1.0123456789ab") == int.from_bytes(hashlib.sha256(b"r-1.0123456789ab").digest()[:8], "big") >> 11
    shake = hashlib.shake_256(b"r-1.0123456789ab").digest(8 * 5)
    expected = [int.from_bytes(shake[8 * row : 8 * row + 8], "big") >> 11 for row in range(5)]
    assert seeds_of_many("r-1.0123456789ab", 5) == expected
    assert [seed_of(f"r-1:{row}.0123456789ab") for row in range(5)] == expected
    assert seed_of("any text: 1") == int.from_bytes(hashlib.sha256(b"any text: 1").digest()[:8], "big") >> 11
