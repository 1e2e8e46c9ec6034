"""Do the gates decide by evidence: pass and fail where it is clear, inconclusive where it is not?"""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from policies.errors import ConfigError
from policies.observations import Box
from policies.policy import Policy
from policies.spaces import Choices, Spaces
from policies.verdicts import GateResult, Verdict
from tests.bundles import make_policy, policy_on
from tests.unit.test_perturbations import threshold_policy
from training.config import EnvironmentConfig
from training.evaluation import Evaluation, EvaluationRequest, evaluate
from training.gates import Contender, GateContext, GateRun, drive, run_gates
from training.gates.budget import judge_budget
from training.gates.config import (
    BudgetConfig,
    ConstraintConfig,
    CostConfig,
    GatesConfig,
    ObjectiveConfig,
    PerformanceConfig,
    RegressionConfig,
    RobustnessConfig,
    SafetyConfig,
    ScenarioConfig,
)
from training.gates.edge_cases import answer_problems, edge_inputs, is_inside, refusal_problems
from training.gates.intervals import Interval, difference_interval, mean_interval, share_interval, worst_mean
from training.gates.objective import episodes_of, judge_objective
from training.gates.performance import judge_performance, look_sizes, performance
from training.gates.regression import judge_regression
from training.gates.robustness import judge_robustness
from training.gates.safety import judge_safety

SIGNS = EnvironmentConfig(id="tests.training_environments:Signs-v0")
NOTHING_FORBIDDEN = SafetyConfig(constraints=())


# --- intervals ---


def test_mean_interval_equals_the_hand_computed_one() -> None:
    # 1, 2, 3: mean 2, standard deviation 1, standard error 1/sqrt(3); t with 2 degrees of freedom at 97.5 % is 4.302653.
    interval = mean_interval(np.array([1.0, 2.0, 3.0]), 0.95)
    assert interval.mean == 2.0
    assert interval.high - 2.0 == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    # 2,000 repetitions at 95 %: the standard error of the coverage is 0.5 %, so 93.5 % is three of them below.
    rng = np.random.default_rng(0)
    means = [mean_interval(rng.normal(3.0, 2.0, 20), 0.95) for _ in range(2000)]
    assert np.mean([i.low <= 3.0 <= i.high for i in means]) >= 0.935
    shares = [share_interval(int(hits), 50, 0.95) for hits in rng.binomial(50, 0.03, 2000)]
    assert np.mean([i.low <= 0.03 <= i.high for i in shares]) >= 0.95  # exact: never less than it says
    normal = [mean_interval(rng.binomial(1, 0.03, 50).astype(float), 0.95) for _ in range(2000)]
    assert np.mean([i.low <= 0.03 <= i.high for i in normal]) < 0.9  # negative control: Student's t misses a rare event


def test_the_exact_interval_of_a_share_equals_the_hand_computed_one() -> None:
    # With no hit in n trials the upper end p has (1 - p)^n = 2.5 %: 1 - 0.025^(1/100) = 0.036217.
    assert share_interval(0, 100, 0.95).high == pytest.approx(0.036217, abs=1e-6)
    assert share_interval(100, 100, 0.95).low == pytest.approx(1 - 0.036217, abs=1e-6)
    assert (share_interval(0, 100, 0.95).low, share_interval(100, 100, 0.95).high) == (0, 1)


def test_the_mean_of_the_worst() -> None:
    assert worst_mean(np.arange(1.0, 101.0), 0.05) == 3  # of 1, 2, 3, 4, 5
    assert worst_mean(np.array([7.0, 9.0]), 0.05) == 7  # at least one


def test_a_number_that_is_none_decides_nothing() -> None:
    nothing = Interval(float("nan"), float("nan"), float("nan"))
    assert nothing.at_least(0.0) is nothing.at_most(0.0) is Verdict.INCONCLUSIVE
    assert Interval(1.0, 1.0, 1.0).at_least(float("nan")) is Verdict.INCONCLUSIVE
    for settings in ({"performance": {"min_return": "nan"}}, {"robustness": {"min_return_ratio": "nan"}}):
        with pytest.raises(ValueError, match="finite"):
            GatesConfig.model_validate(settings)


def test_welchs_interval_equals_the_hand_computed_one() -> None:
    # 2, 4 and 1, 1, 4: means 3 and 2, variances 2 / 2 = 1 and 3 / 3 = 1 of the means, so 1 ± t sqrt(2); degrees of freedom
    # 2^2 / (1 / 1 + 1 / 2) = 2.667, of which the 97.5 % quantile is 3.421.
    interval = difference_interval(np.array([2.0, 4.0]), np.array([1.0, 1.0, 4.0]), 0.95)
    assert interval.mean == 1 and interval.high - 1 == pytest.approx(3.421 * 2**0.5, rel=0.005)


# --- performance ---


def _performance(returns: list[float], incumbent: list[float] | None = None, **settings: float) -> GateResult:
    incumbent_E = None if incumbent is None else np.array(incumbent)
    config = PerformanceConfig(max_regression=0.05, **settings)
    return judge_performance(np.array(returns), incumbent_E, min_return=475, config=config, confidence=0.95)


def test_performance_is_three_valued() -> None:
    assert _performance([500.0] * 50).verdict is Verdict.PASS
    assert _performance([9.0, 10.0] * 25).verdict is Verdict.FAIL
    assert _performance([500.0, 440.0] * 5).verdict is Verdict.INCONCLUSIVE  # 470 ± 23: neither above nor below 475


def test_performance_compares_with_the_incumbent_on_the_same_initial_states() -> None:
    # Differences of exactly +1 have no spread, although returns spread by 200: pairing finds what an unpaired test cannot.
    rng = np.random.default_rng(0)
    incumbent = rng.uniform(800, 1000, 10)
    assert _performance(list(incumbent + 1), list(incumbent)).verdict is Verdict.PASS
    assert _performance(list(incumbent * 0.9), list(incumbent)).verdict is Verdict.FAIL  # 10 % less; 5 % are allowed
    noisy = incumbent - 45 + rng.normal(0, 60, 10)  # about the allowed 5 % less, with noise: not decidable
    assert _performance(list(noisy), list(incumbent)).verdict is Verdict.INCONCLUSIVE


def test_a_good_mean_does_not_hide_bad_episodes() -> None:
    """20 of 200 episodes are bad: between 6.2 and 15 % of all, exactly. 5 % are allowed."""
    returns = [570.0] * 180 + [20.0] * 20  # mean 515
    failed = _performance(returns, min_worst_return=100)
    assert failed.verdict is Verdict.FAIL and failed.numbers["bad_share_low"] == pytest.approx(0.0622, abs=0.001)
    assert _performance(returns, min_worst_return=100, worst_share=0.2).verdict is Verdict.PASS
    assert _performance(returns, min_worst_return=100, worst_share=0.1).verdict is Verdict.INCONCLUSIVE
    without = _performance(returns)
    assert without.numbers["worst_return_mean"] == 20 and without.numbers["return_quantiles"]["0.25"] == 570
    assert without.verdict is Verdict.PASS  # negative control: where nobody asks for it, it does not decide


def _answer(run: GateRun, draw) -> tuple[GateResult, list[int]]:
    """Let a gate run on returns that `draw(num_episodes)` makes up; return its result and how many episodes it asked for."""
    asked: list[int] = []
    chunks: list[int] = []

    def made_up(*requests: EvaluationRequest) -> list[Evaluation]:
        asked.extend(request.num_episodes for request in requests)
        chunks.extend(chunk.index for request in requests for chunk in request.chunks)
        assert chunks == list(range(len(chunks))), "a look repeats initial states that were looked at before"
        return [Evaluation(draw(r.num_episodes), np.ones(r.num_episodes, np.int64)) for r in requests]

    (result,), _ = drive({"gate": run}, made_up)
    return result, asked


def _context(config: GatesConfig, policy: Policy | None = None, **changes) -> GateContext:
    candidate = Contender(policy or make_policy(), "greedy")
    return replace(GateContext(candidate, None, SIGNS, config, min_return=0.0), **changes)


def test_performance_looks_at_more_episodes_until_it_knows() -> None:
    assert look_sizes(100, 1000) == [100, 200, 400, 800, 1000]
    config = GatesConfig(performance=PerformanceConfig(episodes=100, max_episodes=1000))
    rng = np.random.default_rng(0)
    clear, asked = _answer(performance(_context(config)), lambda n: rng.normal(1, 1, n))
    assert clear.verdict is Verdict.PASS and asked == [100]
    close, asked = _answer(performance(_context(config)), lambda n: rng.normal(0.15, 1, n))
    assert close.verdict is Verdict.PASS and close.numbers["episodes"] == sum(asked) > 200
    never, asked = _answer(performance(_context(config)), lambda n: np.arange(n) % 2 - 0.5)  # exactly on the threshold
    assert never.verdict is Verdict.INCONCLUSIVE and asked == [100, 100, 200, 400, 200]
    assert "raise gates.performance.max_episodes" in never.reason


def test_each_look_gets_a_part_of_the_allowed_error() -> None:
    """At the first of four looks a mean 2.2 standard errors above the threshold is proven at 95 %, not at 98.75 %."""
    standard = np.sort(np.random.default_rng(0).normal(0, 1, 200))
    returns_E = (standard - standard.mean()) / standard.std(ddof=1) + 2.2 / 200**0.5
    assert mean_interval(returns_E, 0.95).at_least(0.0) is Verdict.PASS
    config = GatesConfig(performance=PerformanceConfig(episodes=200, max_episodes=1600))
    _, asked = _answer(performance(_context(config)), lambda n: np.resize(returns_E, n))
    assert len(asked) > 1
    _, once = _answer(
        performance(_context(GatesConfig(performance=PerformanceConfig(episodes=200, max_episodes=200)))), lambda n: returns_E
    )
    assert once == [200]  # negative control: the only look decides by itself


def test_later_looks_are_at_new_initial_states() -> None:
    context = _context(GatesConfig(performance=PerformanceConfig(episodes=100, max_episodes=400)))
    first, second = (context.episodes(context.candidate, 100, first_chunk=chunk) for chunk in (0, 2))
    assert [chunk.index for chunk in (*first.chunks, *second.chunks)] == [0, 1, 2, 3]  # 64 and 36 episodes, twice


def test_looking_often_does_not_make_wrong_verdicts_more_likely() -> None:
    """A/A: the mean is exactly the threshold, so every verdict is a wrong one; 5 % are allowed, for all five looks together.

    1,000 repetitions: the standard error is 0.7 %. Negative control: the same looks, each with all of the allowed error.
    """
    rng = np.random.default_rng(0)
    looks = look_sizes(50, 800)

    def wrong(confidence: float) -> float:
        count = 0
        for _ in range(1000):
            returns_E = rng.normal(0, 1, 800)
            verdicts = {mean_interval(returns_E[:n], confidence).at_least(0.0) for n in looks}  # the gate's rule at each look
            count += verdicts != {Verdict.INCONCLUSIVE}
        return count / 1000

    assert wrong(1 - 0.05 / len(looks)) <= 0.05 + 3 * 0.007
    assert wrong(0.95) > 0.09


# --- safety ---


def _episodes(obs_ND: np.ndarray, actions_N: np.ndarray, episode_N: np.ndarray) -> Evaluation:
    num_episodes = int(episode_N.max()) + 1
    return Evaluation(
        np.zeros(num_episodes), np.bincount(episode_N), obs_ND=obs_ND, actions_N=actions_N, rewards_N=np.zeros(len(obs_ND)),
        episode_N=episode_N,
    )  # fmt: skip


def _spoiled(bad_episodes: int, episodes: int, share: float = 1.0, steps: int = 100) -> Evaluation:
    """Return episodes of equal length; in the first `bad_episodes` of them `share` of the observations are 1, all others 0."""
    obs_ESD = np.zeros((episodes, steps, 2), np.float32)
    obs_ESD[:bad_episodes, : round(share * steps), 0] = 1
    return _episodes(obs_ESD.reshape(-1, 2), np.zeros(episodes * steps, int), np.repeat(np.arange(episodes), steps))


def _is_zero(obs_D: np.ndarray, action: object) -> bool:
    return bool(obs_D[0] == 0)


def _safety(bad_episodes: int, episodes: int, *, max_rate: float = 0.05, **options) -> GateResult:
    config = ConstraintConfig(function="tests:x", max_violation_rate=max_rate)
    return judge_safety([(config, _is_zero)], [], _spoiled(bad_episodes, episodes, **options), confidence=0.95)


@pytest.mark.parametrize(
    ("actions_N", "forbidden"), [(np.array([5, 6]), 6), (np.array([[0, 0.5], [1, -1]], np.float32), [1, -1])]
)
def test_the_constraint_is_asked_about_the_environments_own_actions(actions_N: np.ndarray, forbidden: object) -> None:
    asked = []

    def constraint(obs_D: np.ndarray, action: object) -> bool:
        asked.append(action)
        return not np.array_equal(action, forbidden)

    episodes = _episodes(np.zeros((2, 1)), actions_N, np.arange(2))
    result = judge_safety([(ConstraintConfig(function="tests:x"), constraint)], [], episodes, confidence=0.95)
    assert [np.asarray(action).tolist() for action in asked] == actions_N.tolist()
    assert all(type(action) is int for action in asked) == (actions_N.ndim == 1)  # a Discrete action is a plain integer
    (row,) = result.numbers["constraints"]
    assert row["first_violations"] == [{"observation": [0.0], "action": forbidden, "episode": 1}]


def test_safety_is_three_valued_and_shows_the_first_violations() -> None:
    # Without a violation in n episodes the gambler who stakes everything, with a quarter of the capital, has 0.25 / (1 - m)^n. A
    # rate m is excluded when that reaches 2 / 0.05: from 1 - (0.25 * 0.025)^(1/n) = 0.0495 on for n = 100, so 0.05 is proven.
    assert _safety(0, 100).verdict is Verdict.PASS
    assert _safety(0, 100, max_rate=0.01).verdict is Verdict.INCONCLUSIVE
    failed = _safety(30, 100)
    (row,) = failed.numbers["constraints"]
    assert failed.verdict is Verdict.FAIL and row["violations"] == 3000
    assert row["violation_rate"] == pytest.approx(0.3) and len(row["first_violations"]) == 3


def test_safety_counts_episodes_not_decisions() -> None:
    """One bad episode in thirty: 100 of 3,000 decisions would prove a rate below 5 % if they were independent. They are not."""
    result = _safety(1, 30)
    assert result.verdict is Verdict.INCONCLUSIVE and result.numbers["constraints"][0]["violation_rate_high"] > 0.1
    as_if_independent = mean_interval(np.repeat([1.0, 0.0], [100, 2900]), 0.95)
    assert as_if_independent.high < 0.05  # the negative control: this interval would have passed it


def test_where_none_is_allowed_one_violation_fails_and_few_episodes_prove_nothing() -> None:
    # 1 - 0.025^(1/200) = 0.0183: 200 episodes without a violation prove less than 2 %, 100 (3.6 %) do not.
    assert _safety(0, 200, max_rate=0).verdict is Verdict.PASS
    assert _safety(0, 100, max_rate=0).verdict is Verdict.INCONCLUSIVE
    one = _safety(1, 200, max_rate=0, share=0.01)  # one decision of 20,000
    assert one.verdict is Verdict.FAIL and one.numbers["constraints"][0]["violations"] == 1
    assert _safety(1, 200, max_rate=0.05, share=0.01).verdict is Verdict.PASS  # negative control: within a budget it is fine


def test_costs_are_compared_with_their_limit() -> None:
    def judge(max_mean: float) -> GateResult:
        config = CostConfig(function="tests:x", largest=2.0, max_mean=max_mean)
        return judge_safety([], [(config, lambda obs_D, action: 2.0 * obs_D[0])], _spoiled(10, 200), confidence=0.95)

    # Ten of 200 episodes cost 2 at every step: 0.1 on average.
    assert judge(0.3).verdict is Verdict.PASS and judge(0.02).verdict is Verdict.FAIL
    assert judge(0.1).verdict is Verdict.INCONCLUSIVE
    (row,) = judge(0.3).numbers["costs"]
    assert row["cost_mean"] == pytest.approx(0.1) and row["dearest"][0]["cost"] == 2
    with pytest.raises(ConfigError, match=r"returned 3 for .* a cost is from 0 to `largest`, 2"):
        cost = CostConfig(function="tests:x", largest=2.0, max_mean=1)
        judge_safety([], [(cost, lambda obs_D, action: 3.0)], _spoiled(1, 2), confidence=0.95)


def test_safety_that_nobody_thought_about_is_inconclusive_and_says_what_to_do() -> None:
    result = judge_safety(None, [], _spoiled(0, 200), confidence=0.95)
    assert result.verdict is Verdict.INCONCLUSIVE and "set gates.safety.constraints" in result.reason
    assert judge_safety([], [], _spoiled(0, 200), confidence=0.95).verdict is Verdict.PASS  # [] was said on purpose


@pytest.mark.parametrize(
    ("reference", "message"),
    [("nothing", "expected"), ("no_such_module:f", "cannot import"), ("math:nope", "no function 'nope'")],
)
def test_a_function_that_cannot_be_imported_is_named_before_any_episode(reference: str, message: str) -> None:
    for config in (
        GatesConfig(safety=SafetyConfig(constraints=(ConstraintConfig(function=reference),))),
        GatesConfig(objective=ObjectiveConfig(true_metric=reference)),
        GatesConfig(own=(reference,)),
    ):
        with pytest.raises(ConfigError, match=message):
            run_gates(_context(config), evaluate=_never, conditions_sha256="c", now=0.0)


def _never(*requests: EvaluationRequest) -> list[Evaluation]:
    raise AssertionError("episodes were asked for")


# --- robustness ---


def _rows(returns: list[float]) -> Evaluation:
    return Evaluation(np.array(returns), np.ones(len(returns), np.int64), action_change_E=np.zeros(len(returns)))


def test_a_constraint_that_answers_neither_yes_nor_no_is_refused() -> None:
    for answer in (float("nan"), "no", None, 1):
        with pytest.raises(ConfigError, match="expected true or false"):
            config = ConstraintConfig(function="tests:x", max_violation_rate=0)
            judge_safety([(config, lambda obs_D, action, answer=answer: answer)], [], _spoiled(0, 9), confidence=0.95)


def test_an_offending_image_does_not_fill_the_report() -> None:
    episodes = _episodes(np.ones((2, 5000), np.float32), np.zeros(2, int), np.arange(2))
    result = judge_safety([(ConstraintConfig(function="tests:x"), lambda obs_D, action: False)], [], episodes, confidence=0.95)
    shown = result.numbers["constraints"][0]["first_violations"][0]
    assert len(shown["observation"]) == 64 and shown["features"] == 5000


def _robustness(levels: dict[float, list[float]], clean: float = 500.0, incumbent: list[float] | None = None) -> Verdict:
    config = RobustnessConfig(strengths={"noise": (0.1, 0.2)}, watched={"delay": (1.0,)}, min_return_ratio=0.8)
    candidate = {("noise", level): _rows(returns) for level, returns in levels.items()}
    theirs = None if incumbent is None else {strength: _rows(incumbent) for strength in candidate}
    return judge_robustness(np.full(20, clean), candidate, theirs, config=config, confidence=0.95).verdict


def test_robustness_is_three_valued() -> None:
    assert _robustness({0.1: [500.0] * 20, 0.2: [480.0] * 20}) is Verdict.PASS
    assert _robustness({0.1: [500.0] * 20, 0.2: [60.0, 70.0] * 10}) is Verdict.FAIL
    assert _robustness({0.1: [500.0] * 20, 0.2: [420.0, 360.0] * 3}) is Verdict.INCONCLUSIVE
    assert _robustness({0.1: [500.0] * 20}) is Verdict.INCONCLUSIVE  # a strength that was not measured


def test_robustness_of_negative_returns_asks_for_a_lower_number() -> None:
    # 80 % of -100 must not ask for -80 (better than clean): it allows 20 % worse, -120.
    assert _robustness({0.1: [-110.0] * 20, 0.2: [-119.0] * 20}, clean=-100.0) is Verdict.PASS
    assert _robustness({0.1: [-110.0] * 20, 0.2: [-121.0] * 20}, clean=-100.0) is Verdict.FAIL


def test_a_candidate_that_is_more_fragile_than_the_incumbent_fails() -> None:
    enough = {0.1: [450.0] * 20, 0.2: [420.0, 430.0] * 10}
    assert _robustness(enough) is Verdict.PASS
    assert _robustness(enough, incumbent=[440.0] * 20) is Verdict.PASS
    assert _robustness(enough, incumbent=[500.0] * 20) is Verdict.FAIL  # 425 is more than 10 % below 500


def test_what_is_only_watched_decides_nothing_and_is_written_down() -> None:
    config = RobustnessConfig(strengths={"noise": (0.1,)}, watched={"stuck": (0.1,)})
    candidate = {("noise", 0.1): _rows([500.0] * 20), ("stuck", 0.1): _rows([10.0] * 20)}
    incumbent = dict.fromkeys(candidate, _rows([500.0] * 20))
    result = judge_robustness(np.full(20, 500.0), candidate, incumbent, config=config, confidence=0.95)
    assert result.verdict is Verdict.PASS and result.numbers["disturbances"][1]["difference_mean"] == -490
    required = config.model_copy(update={"strengths": {"noise": (0.1,), "stuck": (0.1,)}})
    assert judge_robustness(np.full(20, 500.0), candidate, incumbent, config=required, confidence=0.95).verdict is Verdict.FAIL


def test_what_is_required_is_an_estimate_too() -> None:
    """420 is above 80 % of a mean of 500, but with few, varying undisturbed episodes that mean may as well be 560."""
    config = RobustnessConfig(strengths={"noise": (0.1,)}, watched={})
    measured = {("noise", 0.1): _rows([420.0] * 50)}
    judge = lambda clean_E: judge_robustness(clean_E, measured, None, config=config, confidence=0.95).verdict  # noqa: E731
    assert judge(np.full(200, 500.0)) is Verdict.PASS
    assert judge(np.array([380.0, 620.0] * 4)) is Verdict.INCONCLUSIVE


def _judge_on_signs(boundary: float, incumbent: Policy | None = None, **settings) -> tuple[GateResult, ...]:
    """Run all gates on an environment that shows -1 or 1 and wants the sign."""
    config = GatesConfig(
        performance=PerformanceConfig(episodes=128, max_episodes=128), safety=NOTHING_FORBIDDEN, seed=5, **settings
    )
    context = _context(config, threshold_policy(boundary), min_return=9.5)
    if incumbent is not None:
        context = replace(context, incumbent=Contender(incumbent, "greedy", 1))
    report, _ = run_gates(context, evaluate=lambda *rs: [evaluate(SIGNS, r) for r in rs], conditions_sha256="c", now=0.0)
    return report.results


def test_a_good_but_fragile_policy_fails_robustness() -> None:
    """Both policies are perfect on -1 and 1. One decides at 0, the other at 0.95, which is a twentieth of the spread from 1.

    Under noise of a tenth of the spread the fragile one takes 1 for less than 0.95 in 31 % of cases (normal, half a deviation),
    so it keeps 84.6 % of its return; an adversary with a tenth of the spread always gets 1 below 0.95: half of it is lost.
    """
    robust_config = RobustnessConfig(
        episodes=128, strengths={"noise": (0.1,), "worst_case": (0.1,)}, watched={}, min_return_ratio=0.9
    )
    robust, fragile = ({r.gate: r for r in _judge_on_signs(b, robustness=robust_config)} for b in (0.0, 0.95))
    assert robust["performance"].verdict is fragile["performance"].verdict is Verdict.PASS
    assert robust["performance"].numbers["return_mean"] == fragile["performance"].numbers["return_mean"] == 10
    assert robust["robustness"].verdict is Verdict.PASS and fragile["robustness"].verdict is Verdict.FAIL
    noise, worst = fragile["robustness"].numbers["disturbances"]
    assert noise["return_mean"] == pytest.approx(8.46, abs=0.15) and worst["return_mean"] == 5
    assert noise["action_change"] == pytest.approx(0.154, abs=0.015) and worst["action_change"] == 0.5
    flips = [gates["robustness"].numbers["smallest_flip"]["quantiles"]["0.05"] for gates in (robust, fragile)]
    np.testing.assert_allclose(flips, [1.0, 0.05], atol=0.02)


def test_all_gates_share_initial_states_and_the_report_names_the_policy() -> None:
    asked: list[EvaluationRequest] = []

    def noting(*requests: EvaluationRequest) -> list[Evaluation]:
        asked.extend(requests)
        return [evaluate(SIGNS, request) for request in requests]

    watched = {"watched": {}, "strengths": {"noise": (0.05,)}}
    config = GatesConfig(seed=11, safety=NOTHING_FORBIDDEN, robustness=RobustnessConfig(**watched))
    policy = threshold_policy(0)
    context = replace(_context(config, policy), incumbent=Contender(threshold_policy(0.1), "sample", 1), min_return=5.0)
    report, episodes = run_gates(context, evaluate=noting, conditions_sha256="c", now=5.0)
    assert report.verdict is Verdict.PASS and report.policy_sha256 == policy.sha256() and report.incumbent_version == 1
    assert [request.mode for request in asked] == ["greedy", "sample"] * 2  # each in the mode in which it is served
    first, theirs, noisy, their_noisy = asked
    assert noisy.seed == their_noisy.seed and noisy.perturbation.spread_D is their_noisy.perturbation.spread_D
    assert first.seed == theirs.seed == 11  # candidate and incumbent start from the same states, asked for once for all gates
    assert noisy.perturbation.strength == 0.05 and noisy.perturbation.spread_D == pytest.approx(episodes.obs_ND.std(axis=0))


# --- edge cases ---


def _masked_policy() -> Policy:
    bounded = Box(np.array([-1, 0], np.float32), np.array([1, np.inf], np.float32))
    return policy_on(Spaces(bounded, Choices("multi_discrete", (2, 3), (0, 5), (2,)), has_mask=True), make_policy().architecture)


def test_a_sound_policy_has_no_problems_at_the_edges() -> None:
    policy = _masked_policy()
    obs_ND, masks_NA = edge_inputs(policy.spaces, 0)
    assert {tuple(mask) for mask in masks_NA.tolist()} >= {
        (True, False, True, True, True), (False, True, True, True, True), (True, True, False, False, True), (True,) * 5
    }  # fmt: skip
    assert obs_ND[:3].tolist() == [[0, 0], [-1, 0], [1, 1000]] and obs_ND[:, 0].min() == -1 and obs_ND[:, 0].max() == 1
    assert list(answer_problems(policy, 0)) == list(refusal_problems(policy.spaces)) == []
    assert list(answer_problems(make_policy(), 0)) == []


def test_a_policy_that_overflows_at_the_edges_is_found() -> None:
    policy = make_policy()
    policy.tensors["policy.2.bias"][0], policy.tensors["policy.2.bias"][1] = 3e38, -3e38
    policy.tensors["policy.2.weight"][:] = 3e38
    assert any(
        "not finite" in problem for problem in answer_problems(Policy(policy.spaces, policy.architecture, policy.tensors), 0)
    )


def test_a_policy_that_ignores_its_masks_is_found() -> None:
    policy = _masked_policy()
    obeying = policy.distribution.parameters
    object.__setattr__(policy.distribution, "parameters", lambda outputs_BO, mask_BA: obeying(outputs_BO, None))
    problems = " ".join(answer_problems(policy, 0))
    assert "a choice that the mask forbids has a probability" in problems and "is not in the action space" in problems


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (lambda policy: setattr_(policy, "distributions", _with_the_batch_in_it(policy)), "the answer depends on the batch"),
        (
            lambda policy: setattr_(policy.distribution, "choose", lambda p, mode, seed: (next(_COUNTER) % 2, 1.0)),
            "not determined",
        ),
        (lambda policy: setattr_(policy.distribution, "choose", lambda p, mode, seed: (0, 0.0)), "has the propensity 0"),
    ],
)
def test_each_promise_of_an_answer_is_looked_at(breaks, words: str) -> None:
    policy = make_policy()
    assert list(answer_problems(policy, 0)) == []
    breaks(policy)
    assert any(words in problem for problem in answer_problems(policy, 0))


_COUNTER = itertools.count()


def setattr_(target: object, name: str, value: object) -> None:
    object.__setattr__(target, name, value)  # policies are frozen


def _with_the_batch_in_it(policy: Policy):
    usual = policy.distributions
    return lambda obs_BD, mask_BA=None: usual(obs_BD, mask_BA) + 1e-9 * (len(obs_BD) > 1)


@pytest.mark.parametrize(("low", "high"), [(2000.0, np.inf), (-np.inf, -5000.0), (-np.inf, np.inf), (0.0, 1e30)])
def test_edges_of_any_bounds_lie_within_them(low: float, high: float) -> None:
    box = Box(np.array([low], np.float32), np.array([high], np.float32))
    spaces = Spaces(box, Choices("discrete", (2,), (0,), ()))
    obs_ND, _ = edge_inputs(spaces, 0)
    assert (obs_ND >= spaces.low_D).all() and (obs_ND <= spaces.high_D).all() and np.isfinite(obs_ND).all()
    assert list(refusal_problems(spaces)) == []


def test_actions_outside_of_their_space_are_found() -> None:
    spaces = _masked_policy().spaces
    assert is_inside(spaces, [1, 7], None) and not is_inside(spaces, [1, 8], None) and not is_inside(spaces, [-1, 5], None)
    assert not is_inside(spaces, [1, 7], np.array([True, False, True, True, True]))


def test_spaces_that_let_bad_requests_through_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    spaces = _masked_policy().spaces
    monkeypatch.setattr(Spaces, "check_observation", lambda self, value: np.zeros(2, np.float32))
    assert "an observation with NaN in it is not refused" in list(refusal_problems(spaces))
    assert len(list(refusal_problems(spaces))) == 5


# --- scenarios that are kept ---


def test_a_forgotten_situation_fails_and_a_scenario_that_is_left_out_is_missing_evidence() -> None:
    """A policy with its boundary at 0.95 is perfect on 1 and on -1, but not on 0.9, which hardly ever comes."""
    scenarios = (
        ScenarioConfig(name="usual", min_return=10),
        ScenarioConfig(name="weak-signal", min_return=10, reset_options={"always": 0.9}),
        ScenarioConfig(name="weak-signal-made", min_return=10, kwargs={"always": 0.9}),
    )
    results = {
        boundary: next(
            r for r in _judge_on_signs(boundary, regression=RegressionConfig(scenarios=scenarios)) if r.gate == "regression"
        )
        for boundary in (0.0, 0.95)
    }
    assert results[0.0].verdict is Verdict.PASS and results[0.95].verdict is Verdict.FAIL
    assert [row["return_mean"] for row in results[0.95].numbers["scenarios"]] == [10, 0, 0]

    returns = {"usual": np.array([10.0])}
    config = RegressionConfig(scenarios=scenarios[:1])
    judge = lambda config: judge_regression(returns, ("usual", "weak-signal"), config=config, confidence=0.95)  # noqa: E731
    missing = judge(config)
    assert missing.verdict is Verdict.INCONCLUSIVE and "weak-signal: the incumbent had to pass" in missing.reason
    retired = judge(RegressionConfig(scenarios=scenarios[:1], retired={"weak-signal": "the sensor was replaced"}))
    assert retired.verdict is Verdict.PASS and retired.numbers["retired"] == {"weak-signal": "the sensor was replaced"}


# --- budget ---


def test_each_number_of_the_budget_has_its_limit() -> None:
    numbers = {"decision_ms": 1.0, "batch_ms": 5.0, "parameters": 1000, "bundle_bytes": 4000}
    assert judge_budget(dict(numbers), BudgetConfig()).verdict is Verdict.PASS
    for name, value in numbers.items():
        result = judge_budget(dict(numbers), BudgetConfig(**{f"max_{name}": int(value) - 1 or 0.5}))
        assert result.verdict is Verdict.FAIL and result.reason.startswith(f"{name} ")


# --- reward hacking ---


def _objective(proxy: np.ndarray, true: np.ndarray, incumbent: tuple[np.ndarray, np.ndarray] | None) -> GateResult:
    theirs = None if incumbent is None else np.stack(incumbent, axis=1)
    return judge_objective(
        np.stack([proxy, true], axis=1), theirs, config=ObjectiveConfig(true_metric="tests:x"), confidence=0.95
    )


def test_a_candidate_that_gains_the_proxy_and_loses_what_is_meant_fails() -> None:
    rng = np.random.default_rng(0)
    incumbent = rng.normal(100, 5, 50), rng.normal(50, 5, 50)
    hacking = _objective(incumbent[0] + 20, incumbent[1] - 20, incumbent)
    assert hacking.verdict is Verdict.FAIL and "the reward is being hacked" in hacking.reason
    assert _objective(incumbent[0] + 20, incumbent[1] + 1, incumbent).verdict is Verdict.PASS  # negative control: both gain
    worse = _objective(incumbent[0] - 20, incumbent[1] - 20, incumbent)
    assert worse.verdict is Verdict.FAIL and "hacked" not in worse.reason
    noise = _objective(incumbent[0], incumbent[1] - 2.5 + rng.normal(0, 10, 50), incumbent)
    assert noise.verdict is Verdict.INCONCLUSIVE


def test_without_an_incumbent_the_two_metrics_must_not_go_against_each_other() -> None:
    proxy = np.random.default_rng(0).normal(100, 5, 50)
    assert _objective(proxy, -proxy, None).verdict is Verdict.FAIL
    assert _objective(proxy, 2 * proxy, None).verdict is Verdict.PASS
    unrelated = np.random.default_rng(1).normal(0, 1, 50)  # by chance their rank correlation is a little below 0
    assert -0.25 < _objective(proxy, unrelated, None).numbers["rank_correlation"] < 0
    assert _objective(proxy, unrelated, None).verdict is Verdict.PASS
    constant = _objective(proxy, np.zeros(50), None)  # nothing is known of what is meant
    assert constant.verdict is Verdict.INCONCLUSIVE and "min_true" in constant.reason
    judge = lambda least: judge_objective(  # noqa: E731
        np.stack([proxy, np.zeros(50)], axis=1), None, config=ObjectiveConfig(true_metric="x:y", min_true=least), confidence=0.95
    )
    assert judge(-1.0).verdict is Verdict.PASS and judge(1.0).verdict is Verdict.FAIL


def no_number(episode: object) -> float:
    return float("nan")


def test_a_metric_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gates\.objective\.true_metric returned nan"):
        _judge_on_signs(0.0, objective=ObjectiveConfig(true_metric="tests.unit.test_gates:no_number"))


def test_metrics_get_whole_episodes_in_order() -> None:
    episodes = episodes_of(evaluate(SIGNS, EvaluationRequest(threshold_policy(0), 70, seed=0, keep_steps=True)))
    assert len(episodes) == 70 and all(episode.rewards_T.tolist() == [1] * 10 for episode in episodes)
    for episode in episodes:
        assert (episode.obs_TD[1:] == -episode.obs_TD[:-1]).all()  # they alternate; another episode's steps would not
        assert (episode.actions_T == (episode.obs_TD[:, 0] > 0)).all()


# --- own gates, and how gates run together ---


def balanced(context: GateContext) -> GateRun:
    """A gate of a user's own: both actions are used about equally often."""
    (episodes,) = yield [context.first_look(context.candidate)]
    share = float(episodes.actions_N.mean())
    verdict = Verdict.PASS if 0.4 < share < 0.6 else Verdict.FAIL
    return GateResult("", verdict, f"action 1 in {share:.0%}", {"share": share})


def careless(context: GateContext) -> GateRun:
    """A gate of a user's own that forgot its result."""
    yield [context.first_look(context.candidate)]


def sure_of_itself(context: GateContext) -> GateRun:
    yield []
    return GateResult("", "passed", "", {})  # type: ignore[arg-type]


def unreadable(context: GateContext) -> GateRun:
    yield []
    return GateResult("", Verdict.PASS, "", {"share": np.float32(1)})


def no_generator(context: GateContext) -> GateResult:
    return GateResult("", Verdict.PASS, "", {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sure_of_itself", "returned the verdict 'passed'"),
        ("unreadable", "no report can hold"),
        ("no_generator", "is no generator"),
    ],
)
def test_a_gate_of_ones_own_that_is_wrong_is_told_so(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _judge_on_signs(0.0, own=(f"tests.unit.test_gates:{name}",))


def test_a_gate_of_ones_own_has_the_same_record() -> None:
    name = "tests.unit.test_gates:balanced"
    results = {r.gate: r for r in _judge_on_signs(0.0, own=(name,))}
    assert results[name].verdict is Verdict.PASS and results[name].numbers == {"share": 0.5}
    always_zero = {r.gate: r for r in _judge_on_signs(5.0, own=(name,))}
    assert always_zero[name].verdict is Verdict.FAIL
    with pytest.raises(ConfigError, match=r"careless returned NoneType; expected a policies\.verdicts\.GateResult"):
        _judge_on_signs(0.0, own=("tests.unit.test_gates:careless",))


def test_what_several_gates_ask_for_is_evaluated_once_and_together() -> None:
    request = EvaluationRequest(make_policy(), 2, seed=0)
    rounds: list[int] = []

    def gate(num_rounds: int) -> GateRun:
        for _ in range(num_rounds):
            (same, other) = yield [request, EvaluationRequest(request.policy, 2, seed=1)]
            assert same.returns_E[0] == 0 and other.returns_E[0] == 1
        return GateResult("", Verdict.PASS, "", {})

    def counting(*requests: EvaluationRequest) -> list[Evaluation]:
        rounds.append(len(requests))
        return [Evaluation(np.full(2, float(r.seed)), np.ones(2, np.int64)) for r in requests]

    results, _ = drive({"short": gate(1), "long": gate(2)}, counting)
    assert rounds == [3, 1]  # one they share and one each, then one more
    assert [result.gate for result in results] == ["short", "long"]


def test_settings_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match="max_episodes 10 must be at least episodes 20"):
        PerformanceConfig(episodes=20, max_episodes=10)
    with pytest.raises(ValueError, match="scenario 'a' is there twice"):
        RegressionConfig(scenarios=(ScenarioConfig(name="a", min_return=0),), retired={"a": "old"})
    with pytest.raises(ValueError, match="wind"):
        RobustnessConfig(strengths={"wind": (0.1,)})
    for strengths in ({"noise": ()}, {"delay": (0.5,)}, {"dropout": (1.5,)}, {"noise": (float("inf"),)}):
        with pytest.raises(ValueError):
            RobustnessConfig(strengths=strengths)
