"""Does a shadow's record say what it would have sent, and how that compares with what was sent?"""

import math

import numpy as np
import pytest

from policies.distributions import Categorical, Mode, Normal
from policies.network import Gaussian
from policies.records import Decision, Shadow
from policies.shadowing import shadow_records
from policies.spaces import Choices, Numbers
from tests.simulators import START_S, make_decision

ACTIONS = Categorical(Choices("discrete", (3,), (10,), ()))  # 10, 11, 12
HALF = 1 << 52  # the seed that draws 0.5


def shadow(decision: Decision, probabilities: list[float], mode: Mode = "sample") -> Shadow:
    [record] = shadows([decision], [probabilities], mode)
    return record


def shadows(decisions: list[Decision], probabilities: list[list[float]], mode: Mode = "sample") -> list[Shadow]:
    ids, seeds, actions = zip(*((decision.decision_id, decision.seed, decision.action) for decision in decisions))
    what = {"version": 2, "digest": "d" * 64, "mode": mode, "now": START_S + 1, "distribution": ACTIONS}
    return shadow_records(list(ids), list(seeds), list(actions), np.array(probabilities), **what)


@pytest.mark.parametrize(
    ("sent", "mode", "action", "propensity", "sent_propensity"),
    [
        (11, "sample", 11, 0.6, 0.6),  # 0.5 is in 0.3 … 0.9
        (10, "sample", 11, 0.6, 0.3),
        (11, "greedy", 11, 1.0, 1.0),
        (12, "greedy", 11, 1.0, 0.0),
    ],
)
def test_a_shadow_draws_with_the_decisions_seed(sent: int, mode: Mode, action: int, propensity: float, sent_propensity: float):
    record = shadow(make_decision("a", action=sent, seed=HALF), [0.3, 0.6, 0.1], mode)
    assert (record.action, record.propensity, record.agrees) == (action, propensity, action == sent)
    assert record.sent_propensity == sent_propensity
    assert (record.decision_id, record.distribution, record.failure) == ("a", [0.3, 0.6, 0.1], None)


def test_another_seed_would_disagree_although_the_version_is_the_same():
    """The negative control: a shadow of the version that answered agrees always, because it draws the same number."""
    for seed in (0, HALF, (1 << 53) - 1):
        action, _ = ACTIONS.choose(np.array([0.3, 0.6, 0.1]), "sample", seed)
        assert shadow(make_decision("a", action=action, seed=seed), [0.3, 0.6, 0.1]).agrees
    assert not shadow(make_decision("a", action=10, seed=HALF), [0.3, 0.6, 0.1]).agrees  # 10 was drawn with seed 0


def test_a_shadow_that_gives_nan_failed():
    record = shadow(make_decision("a"), [math.nan, 0.5, 0.5])
    assert (record.failure, record.distribution, record.action, record.agrees) == ("version 2 gave NaN", None, None, None)


@pytest.mark.parametrize("mode", ["sample", "greedy"])
def test_many_are_what_each_is_alone_and_one_that_fails_takes_no_other_with_it(mode: Mode):
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1], 40)
    probabilities[[3, 39]] = math.nan
    decisions = [make_decision(f"d{n}", action=int(rng.integers(10, 13)), seed=int(rng.integers(1 << 53))) for n in range(40)]
    together = shadows(decisions, probabilities.tolist(), mode)
    assert together == [shadow(decision, p_A, mode) for decision, p_A in zip(decisions, probabilities.tolist())]
    assert [record.decision_id for record in together if record.failure] == ["d3", "d39"]


def test_real_valued_actions_have_no_probability():
    bound = np.array([1.0], np.float32)
    normal = Normal(Numbers(-bound, bound), Gaussian())
    what = {"version": 2, "digest": "d", "mode": "sample", "now": START_S}
    [record] = shadow_records(["a"], [HALF], [[0.5]], np.array([[0.0, 1.0]]), distribution=normal, **what)
    assert record.sent_propensity is None and record.agrees is False and record.propensity > 0
