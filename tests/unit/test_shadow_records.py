"""Does a shadow's record say what it would have sent, and how that compares with what was sent?"""

import math

import numpy as np
import pytest

from policies.distributions import Categorical, Mode, Normal
from policies.network import Gaussian
from policies.records import Decision, Shadow
from policies.shadowing import shadow_record
from policies.spaces import Choices, Numbers
from tests.simulators import START_S, make_decision

ACTIONS = Categorical(Choices("discrete", (3,), (10,), ()))  # 10, 11, 12
HALF = 1 << 52  # the seed that draws 0.5


def shadow(decision: Decision, probabilities: list[float], mode: Mode = "sample") -> Shadow:
    what = {"version": 2, "digest": "d" * 64, "mode": mode, "now": START_S + 1, "seed": decision.seed}
    p_A = np.array(probabilities)
    return shadow_record(decision.decision_id, decision.action, distribution=ACTIONS, parameters_P=p_A, **what)


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


def test_real_valued_actions_have_no_probability():
    bound = np.array([1.0], np.float32)
    normal = Normal(Numbers(-bound, bound), Gaussian())
    what = {"version": 2, "digest": "d", "mode": "sample", "now": START_S, "seed": HALF}
    record = shadow_record("a", [0.5], distribution=normal, parameters_P=np.array([0.0, 1.0]), **what)
    assert record.sent_propensity is None and record.agrees is False and record.propensity > 0
