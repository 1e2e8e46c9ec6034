"""Which fragments are collected when, and when a run ends: the rules, run through every schedule of a few hundred updates."""

from collections.abc import Callable
from dataclasses import asdict

import pytest

from training.config import TrainingConfig
from training.pacing import Evaluations, StopReason, fragments_due, is_evaluated, next_restart, stop_reason

NUM_UPDATES = 40
SCHEDULES = [(staleness, every) for staleness in (0, 1, 2, 3, 7, 16) for every in (1, 2, 3, 5, 10, 50)]


def settings(max_staleness: int = 0, every: int = 50, **changes) -> TrainingConfig:
    return TrainingConfig(max_staleness=max_staleness, checkpoint_every_updates=every, **changes)


def synchronous(version: int, *, restarted_at: int, training: TrainingConfig) -> range:
    """The loop that takes turns."""
    return range(version, version + 1)


def versions_used(training: TrainingConfig, *, first: int = 0, due: Callable[..., range] = fragments_due) -> dict[int, int]:
    """Run the loop from a checkpoint as the controller does; return for each update the version its fragment was made with.

    Raises AssertionError as soon as a rule is broken.
    """
    used: dict[int, int] = {}
    restarted_at = first
    for version in range(first, NUM_UPDATES):
        if version > first and next_restart(version - 1, training) == version:
            restarted_at = version
            assert all(update < version for update in used), "a fragment reaches over the restart of its environments"
        for update in due(version, restarted_at=restarted_at, training=training):
            assert update not in used, f"fragment {update} is collected twice"
            assert not used or update == max(used) + 1, f"fragment {update} does not follow {max(used)}: environments go on"
            used[update] = version
        # DESIGN.md: admission by (max_staleness + version + 1) * batch - (accepted + running); here in fragments per shard.
        assert len(used) <= training.max_staleness + (version - first) + 1, "more is under way than the budget allows"
        assert version in used, f"update {version} waits for a fragment that nobody was asked for"
        assert version - used[version] <= training.max_staleness, f"fragment {version} is too old"
    return used


@pytest.mark.parametrize(("max_staleness", "every"), SCHEDULES)
def test_each_fragment_is_collected_once_in_time_and_within_the_budget(max_staleness: int, every: int) -> None:
    used = versions_used(settings(max_staleness, every))
    assert set(range(NUM_UPDATES)) <= set(used)
    # As far ahead as is allowed, and always the same: the version depends on the update alone, not on who was faster.
    assert all(version == max(update - max_staleness, update - update % every) for update, version in used.items())


@pytest.mark.parametrize("every", [1, 3, 50])
def test_without_staleness_it_is_the_synchronous_loop(every: int) -> None:
    training = settings(0, every)
    assert versions_used(training) == versions_used(training, due=synchronous) == {u: u for u in range(NUM_UPDATES)}
    ahead = settings(1, 50)
    assert versions_used(ahead) != versions_used(ahead, due=synchronous)  # negative control


@pytest.mark.parametrize(("max_staleness", "every"), SCHEDULES)
def test_a_run_resumed_from_any_checkpoint_makes_the_same_fragments(max_staleness: int, every: int) -> None:
    training = settings(max_staleness, every)
    whole = versions_used(training)
    for first in range(0, NUM_UPDATES, every):
        assert versions_used(training, first=first) == {update: v for update, v in whole.items() if update >= first}


def test_a_run_resumed_between_two_checkpoints_is_in_step_again_after_the_next() -> None:
    """The last generation of a run that ended is at any update; with a higher limit it goes on from there."""
    training = settings(3, 10)
    used = versions_used(training, first=17)
    assert used[17] == used[18] == used[19] == 17
    assert {update: v for update, v in used.items() if update >= 20} == versions_used(training, first=20)


def always_ahead(version: int, *, restarted_at: int, training: TrainingConfig) -> range:
    """Wrong: it does not stop at the next restart."""
    first = version if version == restarted_at else version + training.max_staleness
    return range(first, version + training.max_staleness + 1)


def greedy(version: int, *, restarted_at: int, training: TrainingConfig) -> range:
    """Wrong: one fragment too many at the start."""
    ahead = training.max_staleness + 1
    return range(version, version + ahead + 1) if version == restarted_at else range(version + ahead, version + ahead + 1)


@pytest.mark.parametrize(("due", "message"), [(always_ahead, "over the restart"), (greedy, "budget")])
def test_a_wrong_rule_is_noticed(due: Callable[..., range], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        versions_used(settings(2, 10), due=due)


@pytest.mark.parametrize(("version", "every", "expected"), [(0, 1, 1), (0, 5, 5), (4, 5, 5), (5, 5, 10), (6, 5, 10)])
def test_environments_restart_at_every_checkpoint(version: int, every: int, expected: int) -> None:
    assert next_restart(version, settings(every=every)) == expected


def test_evaluations_keep_the_best_and_count_those_since() -> None:
    evaluations = Evaluations()
    seen = []
    for update, return_mean in ((5, 10.0), (10, 30.0), (15, 30.0), (20, 20.0), (25, 31.0)):
        evaluations = evaluations.after_update().after_evaluation(update, return_mean)
        seen.append((evaluations.best_return, evaluations.best_update, evaluations.num_without_better))
        assert evaluations.last_return == return_mean
    assert seen == [(10, 5, 0), (30, 10, 0), (30, 10, 1), (30, 10, 2), (31, 25, 0)]  # as good is not better
    after = evaluations.after_update()
    assert after.last_return is None and (after.best_return, after.best_update) == (31, 25)
    assert Evaluations(**asdict(after)) == after  # as a checkpoint keeps it


LIMITS = {"target_return": 100.0, "patience": 3, "max_env_steps": 1_000}
STOPS: list[tuple[Evaluations, int, StopReason | None]] = [
    (Evaluations(), 0, None),
    (Evaluations(), 2_000, None),  # nobody has evaluated it, so it is not the last one yet
    (Evaluations(None, 200.0, 5, 9), 2_000, None),
    (Evaluations(99.9, 99.9, 5), 999, None),
    (Evaluations(100.0, 100.0, 5), 0, "target"),
    (Evaluations(99.0, 150.0, 5, 1), 999, None),  # an earlier version reached it; this one does not
    (Evaluations(50.0, 60.0, 5, 2), 999, None),
    (Evaluations(50.0, 60.0, 5, 3), 999, "patience"),
    (Evaluations(50.0, 60.0, 5, 0), 1_000, "max_env_steps"),
    (Evaluations(100.0, 120.0, 5, 3), 1_000, "target"),
    (Evaluations(50.0, 120.0, 5, 3), 1_000, "patience"),
]


@pytest.mark.parametrize(("evaluations", "env_steps", "reason"), STOPS)
def test_a_run_ends_for_the_first_reason_that_holds(evaluations: Evaluations, env_steps: int, reason: StopReason | None) -> None:
    assert stop_reason(settings(**LIMITS), env_steps, evaluations) == reason


def test_limits_that_are_not_set_do_not_end_a_run() -> None:
    training = settings(max_env_steps=1_000)
    assert stop_reason(training, 999, Evaluations(1e9, 1e9, 5, 99)) is None
    assert stop_reason(training, 1_000, Evaluations(0.0, 1e9, 5, 99)) == "max_env_steps"


def test_every_nth_version_is_evaluated_and_the_last() -> None:
    training = settings(evaluation_every_updates=4, max_env_steps=1_000)
    assert [update for update in range(1, 12) if is_evaluated(training, update, env_steps=update * 100)] == [4, 8, 10, 11]
