"""A breaker opens after at most ten bad answers, by itself, and closes again when the version is well."""

import pytest

from serve_app.breaker import FIRST_PAUSE_S, LAST_PAUSE_S, Breaker


def test_a_version_that_only_fails_is_out_after_five_answers() -> None:
    breaker = Breaker()
    num_bad = 0
    while breaker.allows(0.0):
        breaker.note(0, 1, 0.0, "it raised")
        num_bad += 1
    assert num_bad == 5 and breaker.reason == "it raised"


def test_after_a_long_good_life_too() -> None:
    breaker = Breaker()
    for _ in range(10_000):
        breaker.note(64, 0, 0.0, "")
    for _ in range(5):
        assert breaker.allows(0.0)
        breaker.note(0, 1, 0.0, "it raised")
    assert not breaker.allows(0.0)


def test_a_batch_that_fails_as_a_whole_opens_it_at_once() -> None:
    breaker = Breaker()
    breaker.note(0, 64, 0.0, "it raised")
    assert not breaker.allows(0.0)


@pytest.mark.parametrize("num_good_between", [10, 100])
def test_a_bad_answer_now_and_then_never_opens_it(num_good_between: int) -> None:
    breaker = Breaker()
    for _ in range(1000):
        breaker.note(num_good_between, 1, 0.0, "NaN")
        breaker.note(num_good_between, 0, 0.0, "")
    assert breaker.allows(0.0) and breaker.num_opened == 0


def test_it_is_tried_again_after_a_pause_that_doubles() -> None:
    breaker = Breaker()
    breaker.note(0, 5, 0.0, "it raised")
    now_s, pauses = 0.0, []
    for _ in range(10):
        opened_s = now_s
        while not breaker.allows(now_s):
            now_s += 0.25
        pauses.append(now_s - opened_s)
        breaker.note(0, 3, now_s, "it raised")
    assert pauses[:4] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S, 8 * FIRST_PAUSE_S]
    assert pauses[-1] == LAST_PAUSE_S


def test_a_good_answer_after_the_pause_closes_it_and_the_next_pause_is_short() -> None:
    breaker = Breaker()
    breaker.note(0, 5, 0.0, "it raised")
    breaker.note(0, 1, FIRST_PAUSE_S, "it raised")
    breaker.note(3, 0, 10.0, "")
    assert breaker.allows(10.0) and not breaker.is_open
    breaker.note(0, 5, 20.0, "it raised")
    assert not breaker.allows(20.0 + FIRST_PAUSE_S / 2) and breaker.allows(20.0 + FIRST_PAUSE_S)
