"""What a batch is answered: all at once is what one by one is, and every step of the ladder leaves the right propensity."""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from policies.distributions import Categorical, Mode, Normal, seed_of
from policies.errors import ConfigError, ServiceUnavailable
from policies.log_reader import LogTail
from policies.network import Gaussian
from policies.observations import Box
from policies.records import Decision
from policies.spaces import Choices, Numbers, Spaces
from policies.storage import open_storage
from policies.traffic import Arm, TrafficPlan, assign
from serve_app import rungs
from serve_app.answers import Answer
from serve_app.config import FallbackConfig, ServingConfig, ShieldConfig
from serve_app.deciding import Decider, Rows
from serve_app.variants import Snapshot, Variant
from tests.serving_helpers import NAME, decide_all, each, publish, random_policy, read_new, replica_of, snapshot_of, variant_of

OBSERVATION = Box(np.full(1, -1, np.float32), np.ones(1, np.float32))


def fixed(version: int, probabilities: list[float], *, mode: Mode = "sample", fails: bool = False) -> Variant:
    """Return a version that has the same distribution for every observation, or raises."""
    action = Choices("discrete", (len(probabilities),), (0,), ())

    def distributions(obs_BD: np.ndarray, mask_BA: np.ndarray | None) -> np.ndarray:
        if fails:
            raise RuntimeError("it is broken")
        return np.tile(np.array(probabilities), (len(obs_BD), 1))

    policy = SimpleNamespace(spaces=Spaces(OBSERVATION, action), distribution=Categorical(action), distributions=distributions)
    return Variant(version, f"digest-{version}", policy, mode)  # type: ignore[arg-type]


def plan_of(canary_weight: float) -> TrafficPlan:
    if canary_weight == 0:
        return TrafficPlan(4, 0, (Arm("champion", 1, 1.0),))
    return TrafficPlan(4, 1, (Arm("canary", 2, canary_weight), Arm("champion", 1, 1 - canary_weight)))


def rows_of(num: int, **changes: Any) -> Rows:
    names = [f"d{number}" for number in range(num)]
    seeds = [seed_of(name) for name in changes.get("decision_ids", names)]
    return Rows(names, seeds, [f"u{number}" for number in range(num)], np.zeros((num, 1), np.float32), None)._replace(**changes)


def decide(config: ServingConfig, snapshot: Snapshot, rows: Rows) -> list[Answer]:
    answers = each(Decider(config, now_s=lambda: 0.0).decide(rows, snapshot))
    assert all(isinstance(answer, Answer) for answer in answers), answers
    return answers  # type: ignore[return-value]


def assert_shares(answers: list[Answer], expected: dict[Any, float]) -> None:
    """Shares within four standard deviations: all of a few such checks fail by chance once in 5,000 runs; the seeds are fixed."""
    counts = Counter(answer.action for answer in answers)
    for action, p in expected.items():
        deviation = math.sqrt(p * (1 - p) / len(answers)) + 1e-12
        assert abs(counts[action] / len(answers) - p) < 4 * deviation, (action, counts[action] / len(answers), p)


# --- all at once, and one by one ---


@pytest.mark.parametrize("canary_weight", [0.0, 0.3])
@pytest.mark.parametrize("mode", ["sample", "greedy"])
def test_all_rows_at_once_are_what_each_is_alone_down_the_ladder(canary_weight: float, mode: Mode) -> None:
    policies = {version: random_policy(version, num_actions=5, start=3) for version in (1, 2)}
    champion, canary = (variant_of(version, policies[version], mode=mode) for version in (1, 2))
    snapshot = snapshot_of(plan_of(canary_weight), *([champion, canary] if canary_weight else [champion]))
    obs = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    rows = rows_of(64, obs_BD=obs)
    together = decide(ServingConfig(), snapshot, rows)
    one_by_one = decide(ServingConfig(), snapshot, rows._replace(modes=[mode] * 64))  # asked for: not the usual way
    for a, b in zip(together, one_by_one):
        assert a[:7] == b[:7] and a.rung == b.rung == "arm"
        assert a.mixture_propensity == pytest.approx(b.mixture_propensity, rel=1e-14)
    assert {answer.arm for answer in together} == ({"canary", "champion"} if canary_weight else {"champion"})


def test_a_distribution_is_kept_only_where_somebody_wants_to_see_it() -> None:
    snapshot = snapshot_of(plan_of(0), fixed(1, [0.5, 0.5]))
    assert decide(ServingConfig(), snapshot, rows_of(2))[0].parameters_P is None
    [answer, _] = decide(ServingConfig(), snapshot, rows_of(2, keeps_distributions=True))
    assert answer.parameters_P is not None and answer.parameters_P.tolist() == [0.5, 0.5]


# --- the ladder ---


def with_previous(snapshot: Snapshot, previous: Variant) -> Snapshot:
    return dataclasses.replace(snapshot, previous=previous)


def always_two(obs_D: np.ndarray, mask_A: np.ndarray | None) -> int:
    return 2


def never_right(obs_D: np.ndarray, mask_A: np.ndarray | None) -> Any:
    return 17


def raises(*_: Any) -> Any:
    raise ZeroDivisionError("a rule with a mistake")


RULE = "tests.unit.test_deciding:always_two"


def test_each_step_answers_when_all_above_it_fail() -> None:
    good, bad = [0.5, 0.3, 0.2], {"fails": True}
    fallback = FallbackConfig(rule=RULE, action=1)
    cases = [
        ((fixed(2, good), fixed(1, good), fixed(9, good)), ("arm", 2, None)),
        (
            (fixed(2, good, **bad), fixed(1, good), fixed(9, good)),
            ("champion", 1, "version 2 raised RuntimeError('it is broken')"),
        ),
        ((fixed(2, good, **bad), fixed(1, good, **bad), fixed(9, good)), ("previous", 9, "version 1 raised")),
        ((fixed(2, good, **bad), fixed(1, good, **bad), fixed(9, good, **bad)), ("rule", 0, "version 9 raised")),
    ]
    for (canary, champion, previous), (rung, version, reason) in cases:
        snapshot = with_previous(snapshot_of(plan_of(1.0), canary, champion), previous)
        [answer] = decide(ServingConfig(fallback=fallback), snapshot, rows_of(1))
        assert (answer.rung, answer.version, answer.arm) == (rung, version, "canary")
        assert (answer.fallback is None) if reason is None else reason in str(answer.fallback)
        assert answer.digest == (f"digest-{version}" if version else "")
    assert (answer.action, answer.propensity, answer.mixture_propensity) == (2, 1.0, 1.0)


@pytest.mark.parametrize(("rule", "reason"), [("never_right", "not in the action space"), ("raises", "ZeroDivisionError")])
def test_a_rule_that_is_wrong_is_passed_over_and_the_fixed_action_sent(rule: str, reason: str) -> None:
    config = ServingConfig(fallback=FallbackConfig(rule=f"tests.unit.test_deciding:{rule}", action=1))
    [answer] = decide(config, snapshot_of(plan_of(0), fixed(1, [0.5, 0.5, 0], fails=True)), rows_of(1))
    assert (answer.rung, answer.action, answer.propensity) == ("fixed", 1, 1.0) and reason in str(answer.fallback)


def test_with_no_step_left_there_is_no_answer_and_the_reasons_are_all_told() -> None:
    snapshot = with_previous(snapshot_of(plan_of(0), fixed(1, [1, 0], fails=True)), fixed(9, [math.nan, 1]))
    [error] = each(Decider(ServingConfig(), now_s=lambda: 0.0).decide(rows_of(1), snapshot))
    assert isinstance(error, ServiceUnavailable)
    assert "version 1 raised" in str(error) and "version 9 gave NaN" in str(error)


def test_a_step_that_the_mask_forbids_is_passed_over() -> None:
    action = Choices("discrete", (3,), (0,), ())
    champion = fixed(1, [1, 0, 0], fails=True)
    champion.policy.spaces = Spaces(OBSERVATION, action, True)  # type: ignore[misc]
    config = ServingConfig(fallback=FallbackConfig(rule=RULE, action=1))
    rows = rows_of(2, mask_BA=np.array([[True, True, False], [True, False, True]]))
    first, second = decide(config, snapshot_of(plan_of(0), champion), rows)
    assert (first.rung, first.action) == ("fixed", 1) and (second.rung, second.action) == ("rule", 2)


def test_the_mixture_counts_a_broken_canary_as_what_answers_for_it() -> None:
    """0.4 of the units have a canary that raises, so the champion answers all: the mixture is the champion's own 0.7."""
    snapshot = snapshot_of(plan_of(0.4), fixed(1, [0.3, 0.7]), fixed(2, [0.9, 0.1], fails=True))
    for answer in decide(ServingConfig(), snapshot, rows_of(50)):
        assert answer.mixture_propensity == pytest.approx([0.3, 0.7][answer.action], rel=1e-14)


# --- the shield ---

# Three actions, action 0 is forbidden. Canary (.5, .3, .2), champion (.2, .2, .6), then the fixed action 2. The canary draws
# something forbidden with v = .5, the champion with w = .2. So the canary's arm sends
#   1 with .3 + .5 * .2 = .4        2 with .2 + .5 * .6 + .5 * .2 * 1 = .6
# and the champion's arm 1 with .2, and 2 with .6 + .2 * 1 = .8; with a quarter of the units on the canary's arm
#   1 has .25 * .4 + .75 * .2 = .25,   2 has .25 * .6 + .75 * .8 = .75.
SHIELDED = ServingConfig(shield=ShieldConfig(low=1), fallback=FallbackConfig(action=2))
CANARY, CHAMPION = [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]


def test_a_forbidden_action_is_never_sent_and_what_is_sent_has_the_probability_that_is_logged() -> None:
    snapshot = snapshot_of(plan_of(0.25), fixed(1, CHAMPION), fixed(2, CANARY))
    answers = decide(SHIELDED, snapshot, rows_of(8_000))
    by_arm = {name: [a for a in answers if a.arm == name] for name in ("canary", "champion")}
    expected = {"canary": {0: 0.0, 1: 0.4, 2: 0.6}, "champion": {0: 0.0, 1: 0.2, 2: 0.8}}
    for name, shares in expected.items():
        assert_shares(by_arm[name], shares)
        assert all(a.propensity == pytest.approx(shares[a.action], rel=1e-12) for a in by_arm[name])
    assert_shares(answers, {0: 0.0, 1: 0.25, 2: 0.75})
    assert all(a.mixture_propensity == pytest.approx({1: 0.25, 2: 0.75}[a.action], rel=1e-12) for a in answers)
    assert {a.shield for a in answers} == {"", "limits"}
    assert all((a.rung == "arm") == (a.shield == "") for a in answers)
    assert any(a.rung == "fixed" for a in by_arm["champion"])


def test_steps_that_draw_with_one_number_would_not_send_what_the_log_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: given that the canary's draw was below .5, the champion's, with the same number, is not free any more."""
    monkeypatch.setattr(rungs, "seed_of", lambda name: seed_of(name.partition("/")[0]))
    answers = decide(SHIELDED, snapshot_of(plan_of(1.0), fixed(1, CHAMPION), fixed(2, CANARY)), rows_of(8_000))
    with pytest.raises(AssertionError):
        assert_shares(answers, {1: 0.4, 2: 0.6})


def is_positive(obs_D: np.ndarray, action: Any) -> bool:
    return action != 0 or obs_D[0] > 0.5


def test_a_constraint_sees_the_observation_and_one_that_raises_forbids() -> None:
    config = ServingConfig(
        shield=ShieldConfig(constraints=("tests.unit.test_deciding:is_positive",)), fallback=FallbackConfig(action=1)
    )
    snapshot = snapshot_of(plan_of(0), fixed(1, [1.0, 0.0], mode="greedy"))
    allowed, forbidden = decide(config, snapshot, rows_of(2, obs_BD=np.array([[1.0], [0.0]], np.float32)))
    assert (allowed.action, allowed.shield, allowed.propensity) == (0, "", 1.0)
    assert (forbidden.action, forbidden.shield, forbidden.rung) == (1, "tests.unit.test_deciding:is_positive", "fixed")
    assert "version 1 wanted an action that violates" in str(forbidden.fallback)
    broken = ServingConfig(shield=ShieldConfig(constraints=("tests.unit.test_deciding:raises",)))
    [error] = each(Decider(broken, now_s=lambda: 0.0).decide(rows_of(1), snapshot))
    assert isinstance(error, ServiceUnavailable) and "ZeroDivisionError" in str(error)


@pytest.mark.parametrize("squash", ["clip", "tanh"])
def test_limits_of_real_actions_leave_the_right_share_to_the_next_step(squash: Any) -> None:
    """One number in [-1, 1], limited to [-0.25, 0.5]; what is drawn beyond is replaced by the fixed action 0."""
    numbers = Numbers(np.array([-1], np.float32), np.array([1], np.float32))
    distribution = Normal(numbers, Gaussian(squash=squash))
    parameters_P = np.array([0.1, 0.6])
    config = ServingConfig(shield=ShieldConfig(low=-0.25, high=0.5), fallback=FallbackConfig(action=[0.0]))
    policy = SimpleNamespace(
        spaces=Spaces(OBSERVATION, numbers),
        distribution=distribution,
        distributions=lambda obs_BD, mask_BA: np.tile(parameters_P, (len(obs_BD), 1)),
    )
    answers = decide(config, snapshot_of(plan_of(0), Variant(1, "d", policy, "sample")), rows_of(6_000))  # type: ignore[arg-type]
    replaced = [a for a in answers if a.rung == "fixed"]
    within = distribution.probability_within(np.array([-0.25]), np.array([0.5]), parameters_P)
    assert abs(len(replaced) / 6_000 - (1 - within)) < 4 * math.sqrt(within * (1 - within) / 6_000)
    assert all(-0.25 <= a.action[0] <= 0.5 for a in answers)
    # The fixed action is sent with the probability of all that was replaced; that the version could draw it too has none.
    assert {round(a.propensity, 12) for a in replaced} == {round(1 - within, 12)}
    drawn = [a for a in answers if a.rung == "arm"]
    densities = [distribution.propensity(a.action, parameters_P, "sample") for a in drawn]
    assert [a.propensity for a in drawn] == pytest.approx(densities, rel=1e-12)


def test_a_shield_whose_probabilities_nobody_could_say_is_refused() -> None:
    numbers = Numbers(np.array([-1], np.float32), np.array([1], np.float32))
    policy: Any = SimpleNamespace(spaces=Spaces(OBSERVATION, numbers), distribution=Normal(numbers, Gaussian()))
    decider = Decider(
        ServingConfig(shield=ShieldConfig(constraints=("tests.unit.test_deciding:is_positive",))), now_s=lambda: 0.0
    )
    with pytest.raises(ConfigError, match=r"declare serving\.shield\.low and high, or serve greedily"):
        decider.ladder.check(Variant(1, "d", policy, "sample"))
    decider.ladder.check(Variant(1, "d", policy, "greedy"))


@pytest.mark.parametrize("is_real", [False, True])
def test_a_greedy_version_that_requests_may_sample_is_refused_as_one_that_samples(is_real: bool) -> None:
    """Else one such request gets a propensity that leaves the constraint out, or, of 40 x 40 choices, fails its whole batch."""
    action: Any = Choices("multi_discrete", (40, 40), (0, 0), (2,))
    distribution: Any = Categorical(action)
    if is_real:
        action = Numbers(np.array([-1], np.float32), np.array([1], np.float32))
        distribution = Normal(action, Gaussian())
    variant = Variant(1, "d", SimpleNamespace(spaces=Spaces(OBSERVATION, action), distribution=distribution), "greedy")  # type: ignore[arg-type]
    shield = ShieldConfig(constraints=("tests.unit.test_deciding:is_positive",))
    Decider(ServingConfig(shield=shield, request_modes=("greedy",)), now_s=lambda: 0.0).ladder.check(variant)
    with pytest.raises(ConfigError, match=r"serving\.request_modes"):
        Decider(ServingConfig(shield=shield, request_modes=("sample",)), now_s=lambda: 0.0).ladder.check(variant)


@pytest.mark.parametrize("action", [3, -1, 0.5, True, [0], "0", None])
def test_a_fixed_action_that_is_none_is_refused(action: Any) -> None:
    decider = Decider(ServingConfig(fallback=FallbackConfig(action=action)), now_s=lambda: 0.0)
    if action is None:
        return decider.ladder.check(fixed(1, [0.5, 0.3, 0.2]))
    with pytest.raises(ConfigError, match=r"serving\.fallback\.action is"):
        decider.ladder.check(fixed(1, [0.5, 0.3, 0.2]))


# --- the breaker, and a tester's choice ---


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_canary_that_fails_is_asked_five_times_and_then_left_alone_until_its_pause_is_over() -> None:
    clock, num_asked = Clock(), 0
    canary = fixed(2, [0.5, 0.5])

    def fails(obs_BD: np.ndarray, mask_BA: np.ndarray | None) -> np.ndarray:
        nonlocal num_asked
        num_asked += 1
        raise RuntimeError("broken")

    canary.policy.distributions = fails  # type: ignore[misc, method-assign]
    decider, snapshot = Decider(ServingConfig(), now_s=clock), snapshot_of(plan_of(0.5), fixed(1, [0.5, 0.5]), canary)
    for number in range(100):
        [answer] = each(decider.decide(rows_of(1, decision_ids=[f"x{number}"]), snapshot))
        assert isinstance(answer, Answer) and answer.version == 1 and 0 < answer.mixture_propensity <= 1
    assert num_asked == 5 and 2 in decider.open_breakers()
    clock.now_s = 1.5
    decider.decide(rows_of(1), snapshot)
    decider.decide(rows_of(1), snapshot)
    assert num_asked == 6, "tried once"


def test_observations_that_a_version_has_no_numbers_for_close_it_to_nobody_else() -> None:
    """Finite numbers near the largest float32 make most networks overflow: one request with five would stop all others."""
    version = fixed(1, [0.5, 0.5])
    version.policy.distributions = lambda obs_BD, mask_BA: np.where(obs_BD > 1e30, np.nan, [[0.5, 0.5]])  # type: ignore[method-assign]
    decider, snapshot = Decider(ServingConfig(), now_s=lambda: 0.0), snapshot_of(plan_of(0), version)
    extreme = each(decider.decide(rows_of(10, obs_BD=np.full((10, 1), 3e38, np.float32)), snapshot))
    assert all(isinstance(error, ServiceUnavailable) and "gave NaN" in str(error) for error in extreme)
    [other] = each(decider.decide(rows_of(1), snapshot))
    assert isinstance(other, Answer) and decider.open_breakers() == {}


def test_a_version_that_takes_too_long_is_left_alone_although_its_answers_are_sent() -> None:
    clock, canary = Clock(), fixed(2, [0.5, 0.5])

    def slow(obs_BD: np.ndarray, mask_BA: np.ndarray | None) -> np.ndarray:
        clock.now_s += 0.3
        return np.full((len(obs_BD), 2), 0.5)

    canary.policy.distributions = slow  # type: ignore[misc, method-assign]
    decider, snapshot = Decider(ServingConfig(), now_s=clock), snapshot_of(plan_of(1.0), fixed(1, [0.5, 0.5]), canary)
    versions = [each(decider.decide(rows_of(1), snapshot))[0].version for _ in range(7)]  # type: ignore[union-attr]
    assert versions == [2] * 5 + [1] * 2 and "took 300 ms" in decider.open_breakers()[2]


def test_a_tester_chooses_the_arm_and_the_mixture_is_that_arm() -> None:
    snapshot = snapshot_of(plan_of(0.1), fixed(1, [0.3, 0.7]), fixed(2, [0.9, 0.1]))
    arms: list[str | None] = ["canary", "champion", None] * 40
    rows = rows_of(120, arms=arms)
    answers = decide(ServingConfig(), snapshot, rows)
    for answer, arm, unit in zip(answers, arms, rows.unit_ids):
        p = {"canary": [0.9, 0.1], "champion": [0.3, 0.7]}
        assert answer.arm == (arm or assign(unit, snapshot.plan).name)
        mixture = p[arm][answer.action] if arm else 0.1 * p["canary"][answer.action] + 0.9 * p["champion"][answer.action]
        assert answer.mixture_propensity == pytest.approx(mixture, rel=1e-12)
    [error] = each(Decider(ServingConfig(), now_s=lambda: 0.0).decide(rows_of(1, arms=["holdout"]), snapshot))
    assert isinstance(error, ServiceUnavailable) and "no arm 'holdout'; it has canary, champion" in str(error)


# --- repair ---


def test_declared_repairs_are_made_logged_and_nothing_else_is(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "storage")
    publish(storage, random_policy(1))
    replica = replica_of(storage, fallback={"repair": ["clip", "missing"], "fill": 0.25})
    bodies: list[Any] = [[9, 0, 0, 0], [-9, None, 0, 0], [0, 0, 0, 0], ["9", 0, 0, 0], [0, 0, 0]]
    replies = decide_all(storage, replica, *[{"observation": body, "request_id": f"r{i}"} for i, body in enumerate(bodies)])
    assert [reply.status for reply in replies] == [200, 200, 200, 422, 422]
    decisions = read_new(LogTail(storage.decisions(NAME), Decision))
    bound = float(np.float32(4.8))
    assert [d.observation for d in decisions] == [[bound, 0, 0, 0], [-bound, 0.25, 0, 0], [0, 0, 0, 0]]
    assert decisions[0].repair == "observation[0] = 9.0 was cut to 4.8" == replies[0].json()["repair"]
    assert "observation[1] was missing, 0.25 is taken" in str(decisions[1].repair) and decisions[2].repair is None
    assert all(d.fallback is None and d.rung == "arm" for d in decisions)
    [again] = decide_all(storage, replica, {"observation": bodies[0], "request_id": "r0"})
    assert again.json() == replies[0].json()
    strict = replica_of(storage)
    assert [reply.status for reply in decide_all(storage, strict, {"observation": [9, 0, 0, 0]})] == [422]
