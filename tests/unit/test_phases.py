"""Do the time shares add up, and is machinery what no process computed?"""

import pytest

from training.phases import PHASES, time_shares

# 10 s: 3 s waiting for fragments that took 2.5, 5 s learning of which 4.5 in the learner, 1.5 s evaluating, 0.5 s saving
PHASES_S = {"collect_s": 3.0, "learn_s": 5.0, "evaluate_s": 1.5, "checkpoint_s": 0.5, "worker_s": 2.5, "learner_s": 4.5}


def test_the_parts_add_up_to_the_loop():
    shares = time_shares(PHASES_S, overlaps=False)
    assert shares.loop_s == 10.0
    assert shares.parts() == pytest.approx({"collecting": 0.3, "learning": 0.5, "evaluating": 0.15, "saving": 0.05})
    assert sum(shares.parts().values()) == pytest.approx(1.0)


def test_machinery_of_a_synchronous_run_is_what_neither_workers_nor_learner_computed():
    assert time_shares(PHASES_S, overlaps=False).machinery == pytest.approx((3.0 + 5.0 - 2.5 - 4.5) / 10)


def test_machinery_of_an_overlapping_run_is_what_the_longer_of_the_two_does_not_explain():
    overlapping = {**PHASES_S, "collect_s": 0.2, "learn_s": 5.0}  # 2.5 s of fragments, hidden behind 4.5 s of updates
    shares = time_shares(overlapping, overlaps=True)
    assert shares.machinery == pytest.approx((0.2 + 5.0 - 4.5) / shares.loop_s)
    # read as a synchronous run, whose workers cannot compute while the learner does, it would hide behind them
    assert time_shares(overlapping, overlaps=False).machinery < shares.machinery


def test_workers_that_computed_during_evaluations_do_not_make_machinery_negative():
    slow_workers = {**PHASES_S, "worker_s": 9.0}
    assert time_shares(slow_workers, overlaps=True).machinery == pytest.approx((5.0 - 4.5) / 10)


def test_a_run_that_had_ended_already_has_no_shares():
    assert time_shares(dict.fromkeys(PHASES, 0.0), overlaps=False) is None


def test_the_line_names_every_share():
    line = str(time_shares(PHASES_S, overlaps=False))
    expected = "10.0 s in the loop: collecting 30% · learning 50% · evaluating 15% · saving 5%; 10% of it is machinery"
    assert line == expected
