"""How probable a real-valued action is when one arm sends a single point and another draws from a density."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from policies.distributions import Mode, Normal, Propensity, mixed, seed_of
from policies.network import Gaussian
from policies.observations import Box
from policies.spaces import Numbers, Spaces
from policies.traffic import Arm, TrafficPlan
from serve_app.answers import Answer
from serve_app.config import ServingConfig
from serve_app.deciding import Decider, Rows
from serve_app.variants import Variant
from tests.serving_helpers import each, snapshot_of
from trimtab.local_plan import LocalPlan, LocalVersion, draw

OBSERVATION = Box(np.zeros(1, np.float32), np.ones(1, np.float32))
PHI_0 = 0.3989422804014327  # of N(0, 1): 1 / sqrt(2 pi) at 0
PHI_HALF = 0.3520653267642995  # and exp(-1/8) / sqrt(2 pi) at 0.5
BEYOND_1 = 0.15865525393145707  # the probability that N(0, 1) is above 1


def numbers(low: list[float], high: list[float]) -> Numbers:
    return Numbers(np.array(low, np.float32), np.array(high, np.float32))


UNBOUNDED, CUT = numbers([-np.inf], [np.inf]), numbers([-1], [1])


def version(number: int, mode: Mode, action: Numbers, mean: list[float]) -> Variant:
    """Return a version whose actions are normal with these means and deviation 1, whatever it sees."""
    parameters_P = np.array(mean + [1.0] * len(mean))
    policy: Any = SimpleNamespace(
        spaces=Spaces(OBSERVATION, action),
        distribution=Normal(action, Gaussian(squash="clip", greedy="clip")),
        distributions=lambda obs_BD, mask_BA: np.tile(parameters_P, (len(obs_BD), 1)),
    )
    return Variant(number, f"digest-{number}", policy, mode)


PLAN = TrafficPlan(4, 1, (Arm("canary", 2, 0.3), Arm("champion", 1, 0.7)))


def decided(action: Numbers, mean: list[float], *, one_by_one: bool, num: int = 400) -> list[Answer]:
    """Return decisions of 0.7 sampled from N(0, 1), and 0.3 greedy at its own mean."""
    snapshot = snapshot_of(PLAN, version(1, "sample", action, [0.0] * len(mean)), version(2, "greedy", action, mean))
    names = [f"d{number}" for number in range(num)]
    rows = Rows(names, [seed_of(n) for n in names], [f"u{i}" for i in range(num)], np.zeros((num, 1), np.float32), None)
    if one_by_one:  # a row that asks for something goes down the ladder
        rows = rows._replace(modes=[None] * num)
    answers = each(Decider(ServingConfig(), now_s=lambda: 0.0).decide(rows, snapshot))
    assert {answer.arm for answer in answers} == {"canary", "champion"}  # type: ignore[union-attr]
    return answers  # type: ignore[return-value]


def test_a_point_has_the_weight_of_its_arm_and_densities_count_everywhere_else() -> None:
    point, density = Propensity(1.0), Propensity(PHI_HALF, 1)
    assert mixed([(0.3, point), (0.7, density)]) == (0.3, 0)
    assert mixed([(0.3, Propensity(0.0)), (0.7, density)]) == (0.7 * PHI_HALF, 1)
    # Two points in one place add up; so do two densities: 0.3 + 0.2 and 0.5 * 0.4 + 0.5 * 0.1.
    assert mixed([(0.3, point), (0.2, point), (0.5, density)]) == (0.5, 0)
    assert mixed([(0.5, Propensity(0.4, 1)), (0.5, Propensity(0.1, 1))]).value == pytest.approx(0.25, rel=1e-15)
    assert mixed([]) == (0.0, 0)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_greedy_arm_beside_a_sampling_one_has_its_weight_and_no_density(one_by_one: bool) -> None:
    """At 0.5 the sum of both would be 0.3 + 0.7 * 0.352 = 0.546; as a number of millimetres in place of metres, 0.3002."""
    for answer in decided(UNBOUNDED, [0.5], one_by_one=one_by_one):
        x = answer.action[0]
        if answer.arm == "canary":
            assert (x, answer.propensity) == (0.5, 1.0)
            assert answer.mixture_propensity == pytest.approx(0.3, rel=1e-15)
        else:
            density = math.exp(-0.5 * x * x) * PHI_0
            assert answer.propensity == pytest.approx(density, rel=1e-12)
            assert answer.mixture_propensity == pytest.approx(0.7 * density, rel=1e-12)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_what_is_cut_to_the_bound_has_a_probability_there_as_the_greedy_point_has(one_by_one: bool) -> None:
    """On the bound both arms send a point: 0.3 * 1 + 0.7 * P(N(0, 1) > 1) = 0.411."""
    answers = decided(CUT, [3.0], one_by_one=one_by_one)
    cut = [answer for answer in answers if answer.action == [1.0]]
    assert {answer.arm for answer in cut} == {"canary", "champion"}
    assert all(a.mixture_propensity == pytest.approx(0.3 + 0.7 * BEYOND_1, rel=1e-12) for a in cut)
    # Both points and what lies between them are all there is: 0.411 + 0.7 * P(N < -1) + 0.7 * P(-1 < N < 1) = 1.
    assert 0.3 + 0.7 * (2 * BEYOND_1 + math.erf(1 / math.sqrt(2))) == pytest.approx(1.0, rel=1e-12)


def test_on_a_face_of_the_bounds_two_densities_of_one_number_add_up_and_those_of_two_do_not_count() -> None:
    """Two numbers, the first on its bound: a line, on which a sampled action has P(N > 1) times the density of the second."""
    action = numbers([-1, -1], [1, 1])
    normal = Normal(action, Gaussian(squash="clip"))
    on_a_face, parameters_P = [1.0, 0.5], np.array([0.0, 0.0, 1.0, 1.0])
    assert normal.num_densities(on_a_face, "sample") == 1 and normal.num_densities([0.5, 0.5], "sample") == 2
    assert normal.num_densities([1.0, -1.0], "sample") == normal.num_densities(on_a_face, "greedy") == 0
    value = normal.propensity(on_a_face, parameters_P, "sample")
    assert value == pytest.approx(BEYOND_1 * PHI_HALF, rel=1e-12)
    line = Propensity(value, 1)
    assert mixed([(0.5, line), (0.25, line), (0.25, Propensity(9.0, 2))]).value == pytest.approx(0.75 * value, rel=1e-12)
    # A greedy point on that face is a point of it: the line does not count there.
    assert mixed([(0.3, Propensity(normal.propensity(on_a_face, np.array([2.0, 0.5, 1, 1]), "greedy"))), (0.7, line)]) == (0.3, 0)


def test_the_inverse_propensities_of_a_point_add_up_to_one() -> None:
    """Negative control: the sum of both gives the greedy point more than all of the units that get it."""
    answers = decided(UNBOUNDED, [0.5], one_by_one=False, num=4_000)

    # What an action's inverse propensity adds up to is the size of the set it is counted on: of one point 1. The standard
    # deviation of this mean of 4,000 is sqrt(0.7 / 0.3 / 4,000) = 0.024; four of them are 0.097.
    def size_of_the_point(propensity: Any) -> float:
        return sum(1 / propensity(answer) for answer in answers if answer.action == [0.5]) / len(answers)

    assert abs(size_of_the_point(lambda answer: answer.mixture_propensity) - 1) < 0.097
    assert abs(size_of_the_point(lambda answer: answer.mixture_propensity + 0.7 * PHI_HALF) - 1) > 0.4


class Row:
    """What a local client asks of a version of fixed numbers."""

    def __init__(self, variant: Variant) -> None:
        self._distribution = variant.policy.distribution
        self._parameters_P = variant.policy.distributions(np.zeros((1, 1), np.float32), None)[0]

    def distribution(self, features: list[float], mask_A: Any) -> np.ndarray:
        return self._parameters_P

    def choose(self, distribution: np.ndarray, mode: Mode, seed: int) -> Any:
        return self._distribution.choose(distribution, mode, seed)

    def propensity(self, action: Any, distribution: np.ndarray, mode: Mode) -> Propensity:
        value = self._distribution.propensity(action, distribution, mode)
        return Propensity(value, self._distribution.num_densities(action, mode))


@pytest.mark.parametrize(("action", "mean"), [(UNBOUNDED, 0.5), (CUT, 3.0)])
def test_a_local_client_logs_the_same_mixture(action: Numbers, mean: float) -> None:
    variants = version(1, "sample", action, [0.0]), version(2, "greedy", action, [mean])
    local = {v.version: LocalVersion(v.version, v.digest, v.mode, v.policy.spaces, Row(v)) for v in variants}
    plan = LocalPlan(PLAN, local, local[1])
    for index, answer in enumerate(decided(action, [mean], one_by_one=False)):
        drawn = draw(plan, f"u{index}", [0.0], None, answer.seed)
        assert (drawn.action, drawn.arm) == (answer.action, answer.arm)
        assert drawn.mixture_propensity == pytest.approx(answer.mixture_propensity, rel=1e-15)
