"""Is a traffic split sticky, exact in expectation and the same in every process?"""

import os
import subprocess
import sys

import pytest

from policies.traffic import BUCKETS, assign, bucket_of, champion_only, with_canary

UNITS = [f"user-{number}" for number in range(20_000)]


def plan(weight: float, *, release: int = 1, number: int = 5):
    return with_canary(number, release, champion=1, candidate=2, weight=weight)


def canary_units(weight: float, *, release: int = 1) -> set[str]:
    return {unit for unit in UNITS if assign(unit, plan(weight, release=release)).name == "canary"}


def test_same_unit_same_arm():
    assert all(assign(unit, plan(0.25)) == assign(unit, plan(0.25, number=9)) for unit in UNITS[:1000])


def test_growing_the_canary_keeps_its_units():
    steps = [canary_units(weight) for weight in (0.01, 0.05, 0.25, 0.5, 1.0)]
    assert all(smaller < larger for smaller, larger in zip(steps, steps[1:]))


def test_the_next_release_burdens_other_units():
    # Independent buckets: of the 5 % of the first release about 5 % are in the second one too, not all of them.
    first, second = canary_units(0.05, release=1), canary_units(0.05, release=2)
    assert len(first & second) < 0.15 * len(first)


@pytest.mark.parametrize("weight", [0.0001, 0.05, 0.25, 0.5])
def test_shares_match_weights_within_binomial_error(weight: float):
    # Four standard deviations of a binomial: a right split fails with chance 6e-5 per case; the units are fixed anyway.
    expected = weight * len(UNITS)
    assert abs(len(canary_units(weight)) - expected) <= 4 * (expected * (1 - weight)) ** 0.5


def test_a_canary_of_everything_leaves_nobody_to_the_champion():
    assert len(canary_units(1.0)) == len(UNITS)
    assert canary_units(0.0) == set()


def test_without_a_release_the_champion_answers():
    assert {assign(unit, champion_only(3, 7)).version for unit in UNITS[:100]} == {7}


def test_buckets_are_even():
    # Chi-square over 100 groups of buckets, 99 degrees of freedom: above 150 has chance 0.0007 for even buckets.
    counts = [0] * 100
    for unit in UNITS:
        counts[bucket_of(unit, "salt") * 100 // BUCKETS] += 1
    expected = len(UNITS) / 100
    assert sum((count - expected) ** 2 / expected for count in counts) < 150


def test_the_first_bucket_is_pinned():
    # From `printf 'release-1\0user-0' | sha256sum`, first 16 hex digits as a number, modulo 10,000.
    assert bucket_of("user-0", "release-1") == int("0cb8303f9d03af27", 16) % BUCKETS


BUCKETS_IN_A_PROCESS = """
import sys
from policies.traffic import bucket_of
bucket = bucket_of if sys.argv[1] == "ours" else lambda unit, salt: hash((salt, unit)) % 10_000
print([bucket(f"user-{number}", "release-1") for number in range(50)])
"""


def buckets_in_a_new_process(kind: str, seed: str) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    command = [sys.executable, "-c", BUCKETS_IN_A_PROCESS, kind]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout


def test_every_process_puts_a_unit_into_the_same_bucket():
    assert buckets_in_a_new_process("ours", "1") == buckets_in_a_new_process("ours", "2")


def test_python_hash_would_break_stickiness_across_processes():
    assert buckets_in_a_new_process("hash", "1") != buckets_in_a_new_process("hash", "2")
