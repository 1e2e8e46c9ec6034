"""Is a traffic split sticky, exact in expectation and the same in every process?"""

import hashlib
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from policies.errors import IntegrityError
from policies.traffic import (
    BUCKETS,
    HOLDOUT_SALT,
    Arm,
    TrafficPlan,
    assign,
    buckets_of,
    champion_only,
    with_canary,
    with_holdout,
    without,
)

UNITS = [f"user-{number}" for number in range(20_000)]


def plan(weight: float, *, release: int = 1, number: int = 5):
    return with_canary(number, release, champion=1, candidate=2, weight=weight)


def canary_units(weight: float, *, release: int = 1) -> set[str]:
    return {unit for unit in UNITS if assign(unit, plan(weight, release=release)).name == "canary"}


@pytest.mark.parametrize(("weight", "held_out"), [(0.00014, 0.0), (1 / 3, 0.0), (0.00025, 0.33333), (0.05, 0.1), (0.00004, 0.5)])
def test_weights_are_the_shares_of_buckets_that_units_are_assigned_by(weight: float, held_out: float):
    """A mixture propensity is a sum over weights: by a weight of 0.00014 the canary would count for 1.4 times what it gets."""
    split = plan(weight) if not held_out else with_holdout(plan(weight), 3, held_out)
    num_held = round(split.held_out * BUCKETS)  # as in `assign`, whose two buckets are independent
    canary, champion = split.arm("canary"), split.arm("champion")
    assert canary is not None and champion is not None
    num_canary = round(canary.weight / (1 - split.held_out) * BUCKETS)
    rest = 1 - num_held / BUCKETS
    assert split.held_out == num_held / BUCKETS
    assert math.isclose(canary.weight, rest * num_canary / BUCKETS, abs_tol=1e-15)
    assert math.isclose(champion.weight, rest * (1 - num_canary / BUCKETS), abs_tol=1e-15)


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
        counts[buckets_of([unit], "salt")[0] * 100 // BUCKETS] += 1
    expected = len(UNITS) / 100
    assert sum((count - expected) ** 2 / expected for count in counts) < 150


def test_the_first_bucket_is_pinned():
    # From `printf 'release-1\0user-0' | sha256sum`, first 16 hex digits as a number, modulo 10,000.
    assert buckets_of(["user-0"], "release-1") == [int("0cb8303f9d03af27", 16) % BUCKETS]


BUCKETS_IN_A_PROCESS = """
import sys
from policies.traffic import buckets_of
units = [f"user-{number}" for number in range(50)]
print(buckets_of(units, "release-1") if sys.argv[1] == "ours" else [hash(("release-1", unit)) % 10_000 for unit in units])
"""


def buckets_in_a_new_process(kind: str, seed: str) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    command = [sys.executable, "-c", BUCKETS_IN_A_PROCESS, kind]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout


def test_every_process_puts_a_unit_into_the_same_bucket():
    assert buckets_in_a_new_process("ours", "1") == buckets_in_a_new_process("ours", "2")


def test_python_hash_would_break_stickiness_across_processes():
    assert buckets_in_a_new_process("hash", "1") != buckets_in_a_new_process("hash", "2")


# --- what must not change ---

# Made at commit 2903688, before there were holdouts: release, weight, the canary's share of `UNITS` and a digest of all of them.
GOLDEN_ASSIGNMENTS = [
    (1, 0.05, 943, "2c7ce458352b559f"),
    (1, 0.25, 4921, "11fe6dd470d1db8f"),
    (2, 0.25, 4947, "9f00099a59eaa8d2"),
    (7, 0.3333, 6636, "a1b87fc174095a16"),
    (3, 1.0, 20000, "e7dfac8897878bfa"),
]


@pytest.mark.parametrize(("release", "weight", "num_canary", "digest"), GOLDEN_ASSIGNMENTS)
def test_plans_without_a_holdout_assign_as_they_always_did(release: int, weight: float, num_canary: int, digest: str):
    letters = "".join("c" if assign(unit, plan(weight, release=release)).name == "canary" else "." for unit in UNITS)
    assert (letters.count("c"), hashlib.sha256(letters.encode()).hexdigest()[:16]) == (num_canary, digest)


def test_one_arm_is_assigned_without_a_hash(monkeypatch: pytest.MonkeyPatch):
    def refuse(unit_id: str, salt: str) -> int:
        raise AssertionError("hashed")

    monkeypatch.setattr("policies.traffic.buckets_of", refuse)
    assert assign("user-1", champion_only(3, 7)).version == 7
    assert assign("user-1", without(with_holdout(champion_only(3, 7), 1, 0.5), "holdout")).version == 7
    with pytest.raises(AssertionError, match="hashed"):  # the control: two arms need it
        assign("user-1", plan(0.5))


# --- holdout ---


def held_out(share: float, within=None) -> set[str]:
    split = with_holdout(within or champion_only(5, 2), 1, share)
    return {unit for unit in UNITS if assign(unit, split).name == "holdout"}


def test_who_is_held_out_is_held_out_whatever_is_released():
    releases = [plan(0.05), plan(1.0), plan(0.25, release=2), with_canary(9, 3, champion=4, candidate=5, weight=0.5)]
    assert all(held_out(0.1, release) == held_out(0.1) for release in releases)


def test_growing_the_holdout_keeps_its_units():
    steps = [held_out(share) for share in (0.0001, 0.01, 0.05, 0.2, 0.5)]
    assert all(smaller < larger for smaller, larger in zip(steps, steps[1:]))


@pytest.mark.parametrize(("share", "weight"), [(0.05, 0.05), (0.05, 0.25), (0.3, 0.5), (0.5, 1.0), (0.1, 0.0)])
def test_shares_with_a_holdout_match_weights_within_binomial_error(share: float, weight: float):
    """The canary's weight is a share of those that are not held out: 25 % of 95 %. Four standard deviations, as above."""
    split = with_holdout(plan(weight), 3, share)
    assert sum(arm.weight for arm in split.arms) == pytest.approx(1.0)
    counts = Counter(assign(unit, split).name for unit in UNITS)
    expected = {"holdout": share, "canary": (1 - share) * weight, "champion": (1 - share) * (1 - weight)}
    for arm in split.arms:
        assert arm.weight == pytest.approx(expected[arm.name])
        error = (len(UNITS) * arm.weight * (1 - arm.weight)) ** 0.5
        assert abs(counts[arm.name] - len(UNITS) * arm.weight) <= 4 * error


def dependence(salt_of_holdout: str, salt_of_release: str) -> float:
    """Chi-square of a 2 × 10 table: held out (20 %) or not, by tenth of the release's buckets; 9 degrees of freedom."""
    table = Counter(
        (held < 2000, other // 1000)
        for held, other in zip(buckets_of(UNITS, salt_of_holdout), buckets_of(UNITS, salt_of_release))
    )
    rows, columns = Counter(), Counter()
    for (row, column), count in table.items():
        rows[row] += count
        columns[column] += count
    cells = [(r, c, rows[r] * columns[c] / len(UNITS)) for r in rows for c in columns]
    return sum((table[r, c] - expected) ** 2 / expected for r, c, expected in cells)


def test_holdout_and_canary_are_independent():
    """Above 33.7 has chance 0.0001 for independent buckets; three releases are looked at."""
    assert all(dependence(HOLDOUT_SALT, plan(0.5, release=release).salt) < 33.7 for release in (1, 2, 3))


def test_one_salt_for_both_would_take_the_holdout_out_of_the_canary():
    """The negative control: then the first tenths would all be held out, and the canary would be another population."""
    assert dependence("release-1", "release-1") > 10_000


def test_a_canary_keeps_its_other_units_when_a_holdout_begins():
    alone = canary_units(0.25)
    beside = {unit for unit in UNITS if assign(unit, with_holdout(plan(0.25), 3, 0.2)).name == "canary"}
    assert beside == alone - held_out(0.2)


def test_units_of_an_arm_that_is_switched_off_are_the_champions_and_nobody_elses():
    split = with_holdout(plan(0.25), 3, 0.2)
    for name in ("holdout", "canary"):
        off = without(split, name)
        assert off.arm(name) is None and sum(arm.weight for arm in off.arms) == pytest.approx(1.0)
        for unit in UNITS[:2000]:
            before, after = assign(unit, split), assign(unit, off)
            assert after.name == ("champion" if before.name == name else before.name)
    assert without(without(split, "canary"), "holdout").arms == (Arm("champion", 1, 1.0),)
    assert without(champion_only(1, 1), "canary") == champion_only(1, 1)


def test_forgetting_who_was_held_out_would_give_them_to_the_canary():
    """The negative control: a plan that only drops the arm exposes units that were promised the old version."""
    split = with_holdout(plan(0.25), 3, 0.2)
    dropped = plan(0.25)
    assert any(assign(unit, split).name == "holdout" and assign(unit, dropped).name == "canary" for unit in UNITS)


# --- as JSON ---


def test_a_plan_comes_back_from_json():
    halves = with_holdout(plan(0.1), 3, 0.5)
    plans = [champion_only(3, 7), plan(0.05), halves, without(halves, "holdout")]
    for made in [*plans, replace(plans[2], shadows=(4, 5))]:
        assert TrafficPlan.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"number": True}, "True is no integer"),
        ({"release": -1}, "-1 is no integer"),
        ({"surprise": 1}, "expected an object with the keys number"),
        ({"arms": []}, r"arms are \[\]"),
        ({"arms": {}}, "no list"),
        ({"arms": [{"name": "champion", "version": 1, "weight": 0.9}]}, "add up to 0.9"),
        ({"arms": [{"name": "champion", "version": 0, "weight": 1.0}]}, "no integer from 1"),
        ({"arms": [{"name": "champion", "version": 1, "weight": float("nan")}]}, "no share"),
        ({"arms": [{"name": "king", "version": 1, "weight": 1.0}]}, "'king' is no arm"),
        ({"arms": [{"name": "champion", "version": 1}]}, "keys name, version, weight"),
        ({"arms": [{"name": "champion", "version": v, "weight": 0.5} for v in (1, 2)]}, "each at most once"),
        ({"arms": [{"name": n, "version": 1, "weight": 0.5} for n in ("champion", "canary")]}, "the champion last"),
        ({"shadows": ["2"]}, "'2' is no integer"),
        ({"held_out": 0.6}, "at most 0.5"),
        ({"arms": [{"name": n, "version": 1, "weight": 0.5} for n in ("holdout", "champion")]}, "expected the holdout's weight"),
    ],
)
def test_what_is_no_plan_is_refused(changes: dict, message: str):
    with pytest.raises(IntegrityError, match=message):
        TrafficPlan.from_json(champion_only(3, 7).to_json() | changes)
    assert TrafficPlan.from_json(champion_only(3, 7).to_json()).number == 3  # the control


@pytest.mark.parametrize("value", [None, [], "plan", {}])
def test_what_is_no_object_is_no_plan(value):
    with pytest.raises(IntegrityError, match="this is no traffic plan"):
        TrafficPlan.from_json(value)
