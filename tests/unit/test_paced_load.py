"""What the serving benchmarks make of what they measured, with numbers worked out by hand."""

import pytest

from benchmarks.paced_load import Request, percentile
from benchmarks.serve_swaps import delays, summary


def test_a_percentile_is_a_value_that_was_measured() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (50.0, 99.0, 100.0)
    assert percentile([7.0], 0.99) == 7.0 and percentile([], 0.5) is None


def test_a_swap_is_in_force_when_the_last_replica_decides_under_it_or_a_later_plan() -> None:
    decided = {"a": [(10.0, 1), (10.25, 2), (11.0, 3)], "b": [(10.0, 1), (10.5, 3)]}  # b never decided under 2, but after it
    found = delays(decided, [(2, 10.125, 0.0), (3, 10.375, 0.0)])
    assert found == {"swaps": 2, "p50": 0.375, "p99": 0.625, "max": 0.625}  # max(.125, .375) and max(.625, .125)


def test_a_replica_that_never_takes_a_plan_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="never decided under plan 2"):
        delays({"a": [(10.0, 2)], "b": [(10.0, 1)]}, [(2, 9.0, 0.0)])


def test_requests_near_a_swap_are_told_apart_and_failures_are_counted() -> None:
    before, across, late = Request(0.0, 0.01, 200, False), Request(4.9, 5.1, 200, False), Request(6.5, 6.51, 0, False)
    found = summary([before, across, late], [5.0])
    assert found["failed"] == 1 and found["within_1_s_after_a_swap_ms"]["max"] == 200.0 and found["otherwise_ms"]["max"] == 10.0
    assert found["share_slower_than_100_ms"] == {"after_a_swap": 1.0, "otherwise": 0.0}
