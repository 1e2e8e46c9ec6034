"""Is every reward joined once, to the right decision, in whatever order the logs are read?"""

import numpy as np
import pytest

from policies import joining
from policies.joining import Joiner, Outcome
from policies.records import Decision, Feedback
from policies.traffic import champion_only, with_canary
from tests.simulators import START_S, Population, make_decision

WINDOW_S = 100.0


def episode(decision_id: str, *, second: float = 0, version: int = 1, **changes) -> Decision:
    return make_decision(decision_id, time_s=START_S + second, episode_id="e", version=version, **changes)


def feedback(decision_id: str, reward: float, *, second: float = 1, final: bool = False) -> Feedback:
    return Feedback(decision_id, START_S + second, reward, final)


def joined(decisions: list[Decision], rewards: list[Feedback], *, until: float = 50) -> tuple[Joiner, list[Outcome]]:
    joiner = Joiner(WINDOW_S)
    for decision in decisions:
        joiner.decision(decision, decision.version)
    for reward in rewards:
        joiner.feedback(reward)
    return joiner, joiner.settle(START_S + until)


def test_a_decision_without_episode_is_its_own_outcome():
    _, outcomes = joined([make_decision("a")], [feedback("a", 2.5)])
    assert outcomes == [Outcome(release=0, version=1, value=2.5, time_s=START_S + 1, is_mixed=False)]


def test_an_episode_adds_up_until_its_final_feedback():
    rewards = [feedback("a", 1), feedback("b", 2), feedback("c", 4, final=True)]
    _, outcomes = joined([episode("a"), episode("b"), episode("c")], rewards)
    assert [outcome.value for outcome in outcomes] == [7.0]
    _, outcomes = joined([episode("a"), episode("b"), episode("c")], rewards[:2])
    assert outcomes == []


def test_feedback_of_another_file_that_is_read_after_the_final_one_counts():
    joiner, outcomes = joined([episode("a"), episode("b")], [feedback("b", 2, final=True)], until=1)
    assert outcomes == []  # not settled yet
    joiner.feedback(feedback("a", 1))
    assert [outcome.value for outcome in joiner.settle(START_S + 1 + joining.SETTLE_S)] == [3.0]


def test_feedback_read_before_its_decision_waits():
    joiner = Joiner(WINDOW_S)
    joiner.feedback(feedback("a", 3))
    assert joiner.num_waiting == 1
    joiner.decision(make_decision("a"), 1)
    assert [outcome.value for outcome in joiner.settle(START_S)] == [3.0]
    assert (joiner.num_waiting, joiner.counts["joined"]) == (0, 1)


def test_a_second_feedback_counts_once_and_the_first_wins():
    joiner, outcomes = joined([make_decision("a")], [feedback("a", 3), feedback("a", 9)])
    assert [outcome.value for outcome in outcomes] == [3.0]
    assert joiner.counts["duplicate"] == 1
    joiner = Joiner(WINDOW_S)  # also while both wait
    joiner.feedback(feedback("b", 1))
    joiner.feedback(feedback("b", 2))
    assert joiner.counts["duplicate"] == 1


def test_a_repeated_request_that_was_logged_twice_counts_once():
    joiner, outcomes = joined([episode("a"), episode("a", second=0.2)], [feedback("a", 3, final=True)])
    assert not joiner.decision(episode("a", second=1), 1)
    assert [outcome.value for outcome in outcomes] == [3.0]
    assert joiner.counts["duplicate_decisions"] == 2


def test_feedback_of_no_decision_is_unknown_after_a_while():
    joiner, _ = joined([], [feedback("nobody", 1)], until=1 + joining.WAIT_S)
    assert (joiner.counts["unknown"], joiner.num_waiting) == (0, 1)
    joiner.settle(START_S + 2 + joining.WAIT_S)
    assert (joiner.counts["unknown"], joiner.num_waiting) == (1, 0)


def test_feedback_after_the_reward_window_is_late():
    joiner, outcomes = joined([make_decision("a"), make_decision("b")], [feedback("a", 1, second=WINDOW_S + 1)])
    assert outcomes == [] and joiner.counts["late"] == 1
    joiner.settle(START_S + WINDOW_S + 1)  # b is forgotten as a decision that waits
    joiner.feedback(feedback("b", 1, second=WINDOW_S + 2))
    assert joiner.counts["late"] == 2
    _, outcomes = joined([make_decision("c")], [feedback("c", 1, second=WINDOW_S)])
    assert len(outcomes) == 1


def test_feedback_after_its_episode_was_closed_is_late():
    joiner, _ = joined([episode("a"), episode("b")], [feedback("b", 1, final=True)])
    joiner.feedback(feedback("a", 1, second=60))
    assert joiner.counts["late"] == 1


def test_an_episode_of_two_versions_is_mixed():
    _, outcomes = joined([episode("a"), episode("b", version=2)], [feedback("b", 1, final=True)])
    assert [(outcome.is_mixed, outcome.version) for outcome in outcomes] == [(True, 1)]


def test_an_episode_with_a_fallback_is_mixed():
    joiner = Joiner(WINDOW_S)
    joiner.decision(episode("a", version=1, arm="canary", fallback="not loaded"), 2)
    joiner.feedback(feedback("a", 1, final=True))
    assert [(o.is_mixed, o.version) for o in joiner.settle(START_S + 9)] == [(True, 2)]


def test_an_episode_belongs_to_the_release_of_its_first_decision():
    _, outcomes = joined([episode("a", release=3), episode("b", release=0)], [feedback("b", 1, final=True)])
    assert [(outcome.release, outcome.is_mixed) for outcome in outcomes] == [(3, False)]


def test_an_abandoned_episode_is_counted_and_what_comes_later_is_not_an_outcome_of_its_own():
    joiner, _ = joined([episode("a")], [], until=WINDOW_S + 3)
    assert joiner.counts["abandoned"] == 1
    joiner.decision(episode("b", second=WINDOW_S + 4), 1)
    joiner.feedback(feedback("b", 1, second=WINDOW_S + 5, final=True))
    assert [outcome.is_mixed for outcome in joiner.settle(START_S + WINDOW_S + 20)] == [True]


def test_memory_is_bounded_and_what_is_forgotten_is_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(joining, "MAX_PENDING", 10)
    monkeypatch.setattr(joining, "MAX_OPEN_EPISODES", 10)
    joiner = Joiner(WINDOW_S)
    for number in range(100):
        joiner.decision(make_decision(f"d{number}", episode_id=f"e{number}"), 1)
        joiner.feedback(feedback(f"unknown{number}", 1))
        joiner.settle(START_S)
    assert joiner.counts["evicted"] == 180  # 90 decisions and 90 episodes
    assert joiner.counts["unknown"] == 90
    joiner.feedback(feedback("d0", 1))
    assert joiner.counts["joined"] == 0
    joiner.feedback(feedback("d99", 1))
    assert joiner.counts["joined"] == 1


def outcomes_in_order(decisions: list[Decision], rewards: list[Feedback], rng: np.random.Generator) -> list[Outcome]:
    """Take the records in a random order, as far as a reader may see one: anywhere before the next settle."""
    joiner = Joiner(WINDOW_S)
    records = [*decisions, *rewards]
    for index in rng.permutation(len(records)):
        record = records[index]
        if isinstance(record, Decision):
            joiner.decision(record, record.version)
        else:
            joiner.feedback(record)
    return sorted(joiner.settle(START_S + 90), key=lambda o: (o.time_s, o.version, o.value))


def test_the_order_of_reading_does_not_change_the_outcomes():
    rng = np.random.default_rng(5)
    population = Population(20, 5, lambda version, rng: round(version + rng.random(), 3), rng)
    decisions, rewards = [], []
    for second in range(20):
        plan = champion_only(1, 1) if second < 7 else with_canary(2, 1, champion=1, candidate=2, weight=0.5)
        new_decisions, new_rewards = population.tick(START_S + second, plan)
        decisions += new_decisions
        rewards += new_rewards
    results = [outcomes_in_order(decisions, rewards, np.random.default_rng(seed)) for seed in range(5)]
    assert len(results[0]) == 80  # 20 units, 4 episodes each
    assert len({(outcome.release, outcome.version) for outcome in results[0]}) == 3  # before, champion and canary during
    plain = [[(o.release, o.version, o.time_s, o.is_mixed, round(o.value, 9)) for o in result] for result in results]
    assert all(sorted(other) == sorted(plain[0]) for other in plain[1:])
    assert 0 < sum(o.is_mixed for o in results[0]) <= 20  # units that changed to the canary in the middle of an episode


def _cohort(num_episodes: int) -> tuple[list[Decision], list[Feedback]]:
    """One episode begins each second; odd ones last 1 s and earn 5, even ones last 60 s and earn 500."""
    decisions, rewards = [], []
    for k in range(num_episodes):
        lasts_s, value = (60.0, 500.0) if k % 2 == 0 else (1.0, 5.0)
        decisions.append(make_decision(f"d{k}", time_s=START_S + k, episode_id=f"e{k}", version=1))
        rewards.append(Feedback(f"d{k}", START_S + k + lasts_s, value, True))
    return decisions, sorted(rewards, key=lambda reward: reward.time_s)


def test_outcomes_come_in_the_order_in_which_episodes_began():
    """Else whoever looks after half a minute sees short episodes alone: a mean of 5, where the truth is 252.5."""
    decisions, rewards = _cohort(100)
    joiner = Joiner(WINDOW_S)
    for decision in decisions[:30]:
        joiner.decision(decision, 1)
    for reward in (reward for reward in rewards if reward.time_s <= START_S + 30):
        joiner.feedback(reward)
    assert joiner.counts["joined"] == 15  # fifteen short episodes are over, which is what a mean of the ended would see …
    assert joiner.settle(START_S + 30) == []  # … but the first one that began is not
    for decision in decisions[30:]:
        joiner.decision(decision, 1)
    for reward in (reward for reward in rewards if reward.time_s > START_S + 30):
        joiner.feedback(reward)
    values = [outcome.value for outcome in joiner.settle(START_S + 100)]
    # Over by second 98 (two seconds to settle): all that began by second 38, the 60 s ones of which ended at 98; then e39, which
    # is short. e40 ends at 100 and holds up what began after it.
    assert values == [500.0, 5.0] * 20


def test_an_abandoned_episode_is_worth_what_it_had_earned_and_nothing_without_any_reward():
    decisions = [episode("a"), make_decision("b", time_s=START_S, episode_id="f"), make_decision("c", time_s=START_S)]
    joiner, outcomes = joined(decisions, [feedback("a", 3)], until=WINDOW_S - 1)
    assert outcomes == []
    outcomes = joiner.settle(START_S + WINDOW_S + joining.SETTLE_S + 1)
    assert [outcome.value for outcome in outcomes] == [3.0]
    assert joiner.counts["abandoned"] == 2


def test_an_abandoned_episode_stops_holding_up_younger_ones():
    decisions = [episode("a"), make_decision("b", time_s=START_S + 5)]
    joiner, outcomes = joined(decisions, [feedback("b", 1, second=6)], until=20)
    assert outcomes == []
    assert [outcome.value for outcome in joiner.settle(START_S + WINDOW_S + joining.SETTLE_S + 1)] == [1.0]


def test_a_request_that_is_repeated_within_the_window_counts_once():
    joiner, _ = joined([make_decision("a")], [feedback("a", 1)])
    joiner.settle(START_S + 0.9 * WINDOW_S)
    assert joiner.decision(make_decision("a", time_s=START_S + 0.9 * WINDOW_S), 1) is False
    joiner.feedback(feedback("a", 1, second=0.9 * WINDOW_S))
    assert (joiner.counts["duplicate_decisions"], joiner.counts["duplicate"], joiner.counts["joined"]) == (1, 1, 1)
