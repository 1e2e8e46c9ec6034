"""Does the confidence sequence keep its promise at every look, and how soon does it decide?"""

import math

import numpy as np
import pytest

from policies.confidence import CAPITAL_J, STAKES_J, ConfidenceSequence, log_wealth


def wealth(mean: float, values: list[float], counts: list[int]) -> float:
    return math.exp(log_wealth(np.array([mean]), np.array(values), np.array(counts))[0])


def test_wealth_of_two_equal_observations_by_hand():
    # At the candidate mean 1/2 the paper returns 1 / (1/2) = 2, so staking c multiplies wealth by 1 + c, twice: (1 + c)².
    by_hand = sum(capital * (1 + stake) ** 2 for capital, stake in zip(CAPITAL_J, STAKES_J))
    assert wealth(0.5, [1.0], [2]) == pytest.approx(by_hand, rel=1e-12)
    # The all-in gambler alone has 4 of his quarter, so the average is above 1 and below 4.
    assert 1 < by_hand < 4


def test_wealth_after_one_zero_and_two_quarters_by_hand():
    # At m = 1/4: the value 0 returns 0, so wealth is (1 - c); the value 1/4 returns 1, so wealth stays. In all 1 - c.
    by_hand = sum(capital * (1 - stake) for capital, stake in zip(CAPITAL_J, STAKES_J))
    assert wealth(0.25, [0.0, 0.25], [1, 2]) == pytest.approx(by_hand, rel=1e-12)


def test_gamblers_start_with_one_and_play_a_fair_game():
    # Fair: for x = 1 with chance m, else 0, expected wealth after one round is 1 at the candidate mean m, for every m.
    assert CAPITAL_J.sum() == pytest.approx(1)
    for mean in (0.01, 0.3, 0.9):
        expected = mean * wealth(mean, [1.0], [1]) + (1 - mean) * wealth(mean, [0.0], [1])
        assert expected == pytest.approx(1, rel=1e-12)


def test_wealth_falls_with_the_candidate_mean():
    means = np.linspace(0.01, 1, 50)
    logs = log_wealth(means, np.array([0.0, 0.4, 1.0]), np.array([3, 5, 2]))
    assert (np.diff(logs) <= 1e-12).all()


@pytest.mark.parametrize("num_observations", [26, 100, 1000])
def test_equal_values_at_the_upper_end_are_decided_by_the_all_in_gambler(num_observations: int):
    # He owns 1/4 · m^-n and alone excludes m when that reaches 2/alpha: m <= (alpha / 8)^(1/n). The others help.
    sequence = ConfidenceSequence(0, 500, alpha=0.025)
    sequence.update(500, num_observations)
    low, high = sequence.interval()
    assert high == 500
    assert 500 * (0.025 / 8) ** (1 / num_observations) - 0.01 <= low <= 500 * (0.025 / 2) ** (1 / num_observations)


def test_nothing_is_known_before_the_first_observation():
    sequence = ConfidenceSequence(-3, 5, alpha=0.05)
    assert sequence.interval() == (-3, 5)
    assert sequence.mean is None


def test_the_order_of_observations_does_not_matter():
    rng = np.random.default_rng(0)
    values = rng.random(200)
    one, other = (ConfidenceSequence(0, 1, alpha=0.05) for _ in range(2))
    for value in values:
        one.update(value)
    for value in np.sort(values):
        other.update(value)
    assert one.interval() == other.interval()


def test_counted_updates_equal_single_ones():
    single, counted = (ConfidenceSequence(0, 1, alpha=0.05, bins=1) for _ in range(2))
    for _ in range(500):
        single.update(0.0)
    single.update(1.0)
    counted.update(0.0, 500)
    counted.update(1.0)
    assert single.interval() == counted.interval()


def test_rounding_to_bins_only_widens():
    exact, rounded = ConfidenceSequence(0, 1, alpha=0.05, bins=1000), ConfidenceSequence(0, 1, alpha=0.05, bins=10)
    for value in np.random.default_rng(1).integers(0, 1001, 300) / 1000:
        exact.update(float(value))
        rounded.update(float(value))
    assert rounded.interval()[0] <= exact.interval()[0] < exact.interval()[1] <= rounded.interval()[1]
    assert rounded.mean == exact.mean


def test_a_value_outside_of_the_range_is_a_bug_of_the_caller():
    with pytest.raises(AssertionError, match="clip"):
        ConfidenceSequence(0, 1, alpha=0.05).update(1.5)


def false_alarm_rates(mean: float, *, num_streams: int, num_looks: int, alpha: float) -> tuple[float, float]:
    """Return how often the betting interval and the z-interval ever exclude the true mean, looking after every observation."""
    rng = np.random.default_rng(7)
    betting, naive = 0, 0
    for _ in range(num_streams):
        sums_T = np.cumsum(rng.random(num_looks) < mean)
        nums_T = np.arange(1, num_looks + 1)
        half_T = 1.96 * np.sqrt(mean * (1 - mean) / nums_T)
        naive += bool((np.abs(sums_T / nums_T - mean)[29:] > half_T[29:]).any())
        betting += excluded_at_any_time(sums_T, nums_T, mean, alpha)
    return betting / num_streams, naive / num_streams


def excluded_at_any_time(sums_T: np.ndarray, nums_T: np.ndarray, mean: float, alpha: float) -> bool:
    """The same test as `interval`, at one candidate mean and all times at once: wealth of both sides against 2 / alpha."""

    def log_wealth_T(ones_T: np.ndarray, m: float) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            won, lost = np.log(1 + STAKES_J * (1 / m - 1)), np.log(1 - STAKES_J)
            logs_TJ = ones_T[:, None] * won + np.where(nums_T[:, None] == ones_T[:, None], 0, (nums_T - ones_T)[:, None] * lost)
        return np.log(np.exp(logs_TJ) @ CAPITAL_J)

    up, down = log_wealth_T(sums_T, mean), log_wealth_T(nums_T - sums_T, 1 - mean)
    return bool((np.maximum(up, down) >= math.log(2 / alpha)).any())


def test_the_fast_test_of_all_times_is_the_interval():
    # The helper above must be the product's own rule, else the false-alarm test would prove something about the helper.
    ones = np.random.default_rng(3).random(60) < 0.8
    sums_T, nums_T = np.cumsum(ones), np.arange(1, 61)
    for mean in (0.5, 0.6, 0.7, 0.8, 0.9, 0.97):
        sequence = ConfidenceSequence(0, 1, alpha=0.05, bins=1)
        ever = False
        for one in ones:
            sequence.update(float(one))
            low, high = sequence.interval()
            ever = ever or not low <= mean <= high
        assert ever == excluded_at_any_time(sums_T, nums_T, mean, 0.05)


@pytest.mark.parametrize("mean", [0.5, 0.95])
def test_peeking_keeps_alpha_and_a_peeked_z_test_does_not(mean: float):
    # 400 streams at alpha 5 %: a sequence that is exactly at alpha would show more than 34 (8.5 %) with chance 0.2 %.
    betting, naive = false_alarm_rates(mean, num_streams=400, num_looks=2000, alpha=0.05)
    assert betting <= 0.05
    assert naive > 0.25


@pytest.mark.slow
@pytest.mark.parametrize("mean", [0.001, 0.05, 0.5, 0.95])
def test_peeking_keeps_alpha_over_many_streams(mean: float):
    betting, _ = false_alarm_rates(mean, num_streams=4000, num_looks=10_000, alpha=0.05)
    assert betting <= 0.05


def canary_observations_to_find(canary: float, champion: float, *, limit: int, runs: int, worse_is_low: bool) -> np.ndarray:
    """Return how many canary observations (5 % of the traffic) it takes to prove harm, looking every 1 % more; alpha .01."""
    rng = np.random.default_rng(11)
    found = []
    for _ in range(runs):
        num, ones_canary, ones_champion = 0, 0, 0
        while num < limit:
            step = max(1, num // 100)
            num += step
            ones_canary += rng.binomial(step, canary)
            ones_champion += rng.binomial(19 * step, champion)
            low_a, high_a = interval_of(num, ones_canary)
            low_b, high_b = interval_of(19 * num, ones_champion)
            if (high_a < low_b) if worse_is_low else (low_a > high_b):
                break
        found.append(num)
    return np.array(found)


def interval_of(num: int, ones: int) -> tuple[float, float]:
    sequence = ConfidenceSequence(0, 1, alpha=0.01, bins=1)
    sequence.update(1.0, ones)
    sequence.update(0.0, num - ones)
    return sequence.interval()


@pytest.mark.parametrize(
    ("canary", "champion", "floor_median", "floor_p95"),
    # An empirical-Bernstein sequence, from docs of others; error rows should at least be halved.
    [(0.30, 0.60, 190, 336), (0.50, 0.001, 61 / 2, 77 / 2), (0.05, 0.001, 825 / 2, 1058 / 2)],
)
def test_harm_is_found_sooner_than_by_empirical_bernstein(canary: float, champion: float, floor_median: float, floor_p95: float):
    num = canary_observations_to_find(canary, champion, limit=20_000, runs=20, worse_is_low=canary < champion and champion > 0.1)
    assert np.median(num) <= floor_median
    assert np.percentile(num, 95) <= floor_p95


@pytest.mark.slow
@pytest.mark.parametrize(
    ("canary", "champion", "floor_median", "floor_p95"),
    [(0.55, 0.60, 13_600, 20_000), (0.50, 0.60, 2720, 5051), (0.01, 0.001, 5021 / 2, 7413 / 2)],
)
def test_small_harm_is_found_sooner_than_by_empirical_bernstein(
    canary: float, champion: float, floor_median: float, floor_p95: float
):
    num = canary_observations_to_find(canary, champion, limit=20_000, runs=60, worse_is_low=champion > 0.1)
    assert np.median(num) <= floor_median
    assert np.percentile(num, 95) <= floor_p95


@pytest.mark.parametrize(("low", "high"), [(0, 0.7), (0, 5.1), (-0.7, 0.7), (-1200.3, -100.1)])
def test_both_ends_of_any_range_are_observations(low: float, high: float):
    """500 * (0.7 - 0) / 0.7 is 500.00000000000006."""
    sequence = ConfidenceSequence(low, high, alpha=0.05)
    sequence.update(low)
    sequence.update(high)
    assert sequence.num_observations == 2
    with pytest.raises(AssertionError, match="outside of the declared range"):
        sequence.update(high + 0.01 * (high - low))
