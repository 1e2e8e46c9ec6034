"""Do the gates decide by evidence: pass and fail where it is clear, inconclusive where it is not?"""

from dataclasses import dataclass

import numpy as np
import pytest

from policies.errors import ConfigError
from policies.verdicts import GateResult, Verdict
from tests.bundles import make_policy
from training.gates import Incumbent, run_gates
from training.gates.config import GatesConfig, PerformanceConfig, RobustnessConfig, SafetyConfig
from training.gates.intervals import mean_interval
from training.gates.performance import judge_performance
from training.gates.robustness import judge_robustness
from training.gates.safety import judge_safety, load_constraint


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


def _performance(returns: list[float], incumbent: list[float] | None = None) -> Verdict:
    incumbent_E = None if incumbent is None else np.array(incumbent)
    config = PerformanceConfig(max_regression=0.05)
    return judge_performance(np.array(returns), incumbent_E, min_return=475, config=config, confidence=0.95).verdict


def test_performance_is_three_valued() -> None:
    assert _performance([500.0] * 50) is Verdict.PASS
    assert _performance([9.0, 10.0] * 25) is Verdict.FAIL
    assert _performance([500.0, 440.0] * 5) is Verdict.INCONCLUSIVE  # 470 ± 23: neither above nor below 475


def test_performance_compares_with_the_incumbent_on_the_same_initial_states() -> None:
    # Differences of exactly +1 have no spread, although returns spread by 200: pairing finds what an unpaired test cannot.
    rng = np.random.default_rng(0)
    incumbent = rng.uniform(800, 1000, 10)
    assert _performance(list(incumbent + 1), list(incumbent)) is Verdict.PASS
    assert _performance(list(incumbent * 0.9), list(incumbent)) is Verdict.FAIL  # 10 % less; 5 % are allowed
    noisy = incumbent - 45 + rng.normal(0, 60, 10)  # about the allowed 5 % less, with noise: not decidable
    assert _performance(list(noisy), list(incumbent)) is Verdict.INCONCLUSIVE


def _safety(bad_episodes: int, episodes: int, *, share: float = 1.0, max_rate: float = 0.05, steps: int = 100) -> GateResult:
    """Judge episodes of equal length; in the first `bad_episodes` of them `share` of the decisions violate."""
    obs_ESD = np.zeros((episodes, steps, 2), np.float32)
    obs_ESD[:bad_episodes, : round(share * steps), 0] = 1
    episode_N = np.repeat(np.arange(episodes), steps)
    config = SafetyConfig(constraint="tests:x", max_violation_rate=max_rate)
    actions_N = np.zeros(episodes * steps, int)

    def constraint(obs_D: np.ndarray, action: int) -> bool:
        return bool(obs_D[0] == 0)

    return judge_safety(constraint, obs_ESD.reshape(-1, 2), actions_N, episode_N, config=config, confidence=0.95)


@pytest.mark.parametrize(
    ("actions_N", "forbidden"), [(np.array([5, 6]), 6), (np.array([[0, 0.5], [1, -1]], np.float32), [1, -1])]
)
def test_the_constraint_is_asked_about_the_environments_own_actions(actions_N: np.ndarray, forbidden: object) -> None:
    asked = []

    def constraint(obs_D: np.ndarray, action: object) -> bool:
        asked.append(action)
        return not np.array_equal(action, forbidden)

    config = SafetyConfig(constraint="tests:x")
    result = judge_safety(constraint, np.zeros((2, 1)), actions_N, np.arange(2), config=config, confidence=0.95)
    assert [np.asarray(action).tolist() for action in asked] == actions_N.tolist()
    assert all(type(action) is int for action in asked) == (actions_N.ndim == 1)  # a Discrete action is a plain integer
    assert result.numbers["first_violations"] == [{"observation": [0.0], "action": forbidden}]


def test_safety_is_three_valued_and_shows_the_first_violations() -> None:
    # Without a violation in n episodes the gambler who stakes everything, with a quarter of the capital, has 0.25 / (1 - m)^n. A
    # rate m is excluded when that reaches 2 / 0.05: from 1 - (0.25 * 0.025)^(1/n) = 0.0495 on for n = 100, so 0.05 is proven.
    assert _safety(0, 100).verdict is Verdict.PASS
    assert _safety(0, 100, max_rate=0.01).verdict is Verdict.INCONCLUSIVE
    failed = _safety(30, 100)
    assert failed.verdict is Verdict.FAIL and failed.numbers["violations"] == 3000
    assert failed.numbers["violation_rate"] == pytest.approx(0.3) and len(failed.numbers["first_violations"]) == 3


def test_safety_counts_episodes_not_decisions() -> None:
    """One bad episode in thirty: 100 of 3,000 decisions would prove a rate below 5 % if they were independent. They are not."""
    result = _safety(1, 30)
    assert result.verdict is Verdict.INCONCLUSIVE and result.numbers["violation_rate_high"] > 0.1
    as_if_independent = mean_interval(np.repeat([1.0, 0.0], [100, 2900]), 0.95)
    assert as_if_independent.high < 0.05  # the negative control: this interval would have passed it


def test_safety_without_a_constraint_is_inconclusive_and_says_what_to_do() -> None:
    nothing = np.zeros(9, int)
    result = judge_safety(None, np.zeros((9, 2)), nothing, nothing, config=SafetyConfig(), confidence=0.95)
    assert result.verdict is Verdict.INCONCLUSIVE and "gates.safety.constraint" in result.reason


@pytest.mark.parametrize(
    ("reference", "message"),
    [("nothing", "expected"), ("no_such_module:f", "cannot import"), ("math:nope", "no function 'nope'")],
)
def test_a_constraint_that_cannot_be_imported_is_named(reference: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_constraint(reference)


def _robustness(levels: dict[float, list[float]], clean: float = 500.0) -> Verdict:
    config = RobustnessConfig(noise_levels=(0.1, 0.2), min_return_ratio=0.8)
    returns = {level: np.array(values) for level, values in levels.items()}
    return judge_robustness(clean, returns, config=config, confidence=0.95).verdict


def test_a_good_but_fragile_policy_fails_robustness() -> None:
    assert _robustness({0.1: [500.0] * 20, 0.2: [480.0] * 20}) is Verdict.PASS
    assert _robustness({0.1: [500.0] * 20, 0.2: [60.0, 70.0] * 10}) is Verdict.FAIL
    assert _robustness({0.1: [500.0] * 20, 0.2: [420.0, 360.0] * 3}) is Verdict.INCONCLUSIVE
    assert _robustness({0.1: [500.0] * 20}) is Verdict.INCONCLUSIVE  # a level that was not measured


def test_robustness_of_negative_returns_asks_for_a_lower_number() -> None:
    # 80 % of -100 must not ask for -80 (better than clean): it allows 20 % worse, -120.
    assert _robustness({0.1: [-110.0] * 20, 0.2: [-119.0] * 20}, clean=-100.0) is Verdict.PASS
    assert _robustness({0.1: [-110.0] * 20, 0.2: [-121.0] * 20}, clean=-100.0) is Verdict.FAIL


@dataclass(frozen=True)
class _Rows:
    returns_E: np.ndarray
    obs_ND: np.ndarray
    actions_N: np.ndarray
    episode_N: np.ndarray


def test_all_gates_share_seeds_and_the_report_names_the_policy() -> None:
    policy, asked, modes = make_policy(), [], []

    def evaluate(candidate, *, mode, num_episodes, seed, noise_std_D, keep_steps):
        asked.append((seed, None if noise_std_D is None else noise_std_D.tolist()))
        modes.append(mode)
        obs_ND = np.random.default_rng(seed).normal(0, 2.0, (5000, 4)).astype(np.float32)
        return _Rows(np.full(num_episodes, 500.0), obs_ND, np.zeros(5000, int), np.arange(5000) // 50)

    config = GatesConfig(seed=11, safety=SafetyConfig(constraint="training.gates.safety:no_constraint"))
    report, clean = run_gates(
        policy,
        mode="greedy",
        incumbent=Incumbent(1, make_policy(1), "sample"),
        evaluate=evaluate,
        config=config,
        min_return=475.0,
        conditions_sha256="c",
        now=5.0,
    )
    assert modes == ["greedy", "sample", "greedy", "greedy"]  # each in the mode in which it is served
    assert report.verdict is Verdict.PASS and report.policy_sha256 == policy.sha256() and report.incumbent_version == 1
    assert [seed for seed, _ in asked[:2]] == [11, 11]  # candidate and incumbent start from the same states
    spread_D = clean.obs_ND.std(axis=0)
    np.testing.assert_allclose(asked[2][1], 0.05 * spread_D, rtol=1e-5)  # noise is a share of each feature's spread
