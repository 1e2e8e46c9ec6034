"""Is every reward joined once, to the right decision, in whatever order the logs are read?"""

import math

import numpy as np
import pytest

from policies import joining
from policies.joining import Joiner, Outcome
from policies.records import Decision, Feedback, Override
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


# --- whose account, and overrides ---


def overridden(decision_id: str, *, second: float = 0.5) -> Override:
    return Override(decision_id, START_S + second, action=1, reason="the nurse knew better", key="ward")


def test_outcomes_of_the_holdout_and_of_testers_are_told_apart_and_do_not_wait_for_each_other():
    """The plan's first episode stays open: only the outcome of its own account waits for it."""
    decisions = [
        make_decision("open", episode_id="open"),
        make_decision("held", arm="holdout", time_s=START_S + 1),
        make_decision("test", arm="canary", assigned="request", time_s=START_S + 2),
        make_decision("plan", time_s=START_S + 3),
    ]
    _, outcomes = joined(decisions, [feedback(name, 1, second=4) for name in ("held", "test", "plan")])
    assert [outcome.account for outcome in outcomes] == ["holdout", "request"]


@pytest.mark.parametrize("stranger", [{"arm": "holdout"}, {"assigned": "request"}, {"rung": "rule"}, {"fallback": "slow"}])
def test_an_episode_with_a_decision_of_another_account_or_of_a_stand_in_is_mixed(stranger: dict):
    rewards = [feedback("a", 1), feedback("b", 1, final=True)]
    _, outcomes = joined([episode("a"), episode("b", **stranger)], rewards)
    assert [(outcome.is_mixed, outcome.account) for outcome in outcomes] == [(True, "plan")]
    _, outcomes = joined([episode("a"), episode("b")], rewards)
    assert [outcome.is_mixed for outcome in outcomes] == [False]  # the control


def test_an_overridden_decision_makes_its_episode_mixed_whichever_is_read_first():
    for order in (("decision", "override"), ("override", "decision")):
        joiner = Joiner(WINDOW_S)
        takes = {"decision": lambda j: j.decision(episode("a"), 1), "override": lambda j: j.override(overridden("a"))}
        for what in order:
            takes[what](joiner)
        joiner.decision(episode("b", second=1), 1)
        joiner.feedback(feedback("b", 2, second=2, final=True))  # the overridden one has no feedback of its own
        assert [outcome.is_mixed for outcome in joiner.settle(START_S + 50)] == [True]
        assert joiner.counts["overridden"] == 1


def test_only_the_episode_of_the_override_is_mixed():
    joiner = Joiner(WINDOW_S)
    for name in "ab":
        joiner.decision(make_decision(name), 1)
    joiner.override(overridden("a"))
    joiner.override(overridden("a", second=0.7))  # said twice
    for name in "ab":
        joiner.feedback(feedback(name, 1))
    assert [outcome.is_mixed for outcome in joiner.settle(START_S + 50)] == [True, False]
    assert joiner.counts["overridden"] == 1


def test_an_override_after_the_outcome_is_late_and_one_of_a_stranger_is_unknown():
    joiner, outcomes = joined([make_decision("a")], [feedback("a", 1)])
    assert [outcome.is_mixed for outcome in outcomes] == [False]
    joiner.override(overridden("a", second=60))
    joiner.override(overridden("nobody", second=60))
    joiner.settle(START_S + 60 + joining.WAIT_S)
    assert (joiner.counts["override_late"], joiner.counts["override_unknown"]) == (1, 0)
    joiner.settle(START_S + 61 + joining.WAIT_S)
    assert (joiner.counts["override_late"], joiner.counts["override_unknown"], joiner.counts["overridden"]) == (1, 1, 0)


def test_overrides_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(joining, "MAX_PENDING", 3)
    joiner = Joiner(WINDOW_S)
    for number in range(10):
        joiner.override(overridden(f"stranger-{number}"))
    assert (len(joiner._waiting_overrides), joiner.counts["override_unknown"]) == (3, 7)


def a_day_of_overrides(rng: np.random.Generator) -> list[tuple[float, object]]:
    """Forty episodes of three decisions a second apart, feedback of most, and overrides at any time until long after."""
    records: list[tuple[float, object]] = []
    for number in range(40):
        start_s = START_S + number
        for step in range(3):
            name, at_s = f"{number}-{step}", start_s + step
            episode_id = None if number % 4 == 0 else f"episode-{number}"
            records.append((at_s, make_decision(name, time_s=at_s, episode_id=episode_id, version=1)))
            if rng.random() < 0.7:
                late_s = at_s + rng.uniform(0.01, 3)
                records.append((late_s, Feedback(name, late_s, 1.0, final=step == 2)))
            if rng.random() < 0.5:
                said_s = at_s + rng.choice([0.001, rng.uniform(0.01, 4), rng.uniform(10, 150)])
                records.append((said_s, Override(name, said_s, 1, "test", "key")))
    return sorted(records, key=lambda record: record[0])


def outcomes_in_steps(records: list[tuple[float, object]], step_s: float) -> tuple[dict[float, bool], dict[str, int]]:
    """Join as the monitor does: each refresh reads all new overrides, then the rest in the order of time.

    Returns which outcomes, by when they were over, are mixed.
    """
    joiner, outcomes = Joiner(WINDOW_S), []
    end_s = START_S + 400
    now = START_S
    while now < end_s:
        new = [record for at_s, record in records if now <= at_s < now + step_s]
        now += step_s
        for record in new:
            if isinstance(record, Override):
                joiner.override(record)
        for record in new:
            if isinstance(record, Decision):
                outcomes += joiner.settle(record.time_s)
                joiner.decision(record, 1)
            elif isinstance(record, Feedback):
                outcomes += joiner.settle(record.time_s)
                joiner.feedback(record)
        outcomes += joiner.settle(now)
    return {outcome.time_s: outcome.is_mixed for outcome in outcomes}, joiner.counts


@pytest.mark.parametrize("seed", range(5))
def test_overrides_count_the_same_live_and_after_a_restart(seed: int):
    records = a_day_of_overrides(np.random.default_rng(seed))
    live, live_counts = outcomes_in_steps(records, 1.0)
    whole, whole_counts = outcomes_in_steps(records, 400.0)
    assert live == whole and live_counts == whole_counts
    assert 0 < sum(live.values()) < len(live) and live_counts["override_late"] > 0


def test_without_the_rule_of_times_a_restart_would_count_other_overrides(monkeypatch: pytest.MonkeyPatch):
    """The negative control: whoever only asks whether the episode is still open depends on when it was read."""
    monkeypatch.setattr(Joiner, "_take_back_override", lambda self, episode, decision_id: None)
    records = a_day_of_overrides(np.random.default_rng(0))
    assert outcomes_in_steps(records, 1.0) != outcomes_in_steps(records, 400.0)


@pytest.mark.parametrize("chunk", [1, 3, 7, 50, 1000])
def test_two_files_read_in_chunks_of_any_size_give_the_same_outcomes_in_the_same_order(chunk: int):
    """A restarted monitor reads the furthest file first, a chunk at a time. Some episodes never end: they hold back only those
    that began after them."""
    rng = np.random.default_rng(3)
    files: list[list[tuple[Decision, Feedback | None]]] = [[], []]
    for number in range(400):
        decision = make_decision(f"d{number:03d}", time_s=START_S + number / 10, episode_id=None)
        feedback = (
            None if number == 330 else Feedback(decision.decision_id, decision.time_s + rng.uniform(0.01, 3.0), number, True)
        )
        files[int(rng.integers(2))].append((decision, feedback))
    now = START_S + 60
    expected = list(range(330))

    joiner, values = Joiner(reward_window_s=600.0), []
    places = [0, 0]
    feedbacks = sorted((f for file in files for _, f in file if f is not None), key=lambda f: f.time_s)
    while any(place < len(file) for place, file in zip(places, files)):
        heads = [file[place][0].time_s if place < len(file) else math.inf for place, file in zip(places, files)]
        which = heads.index(min(heads))
        for decision, _ in files[which][places[which] : places[which] + chunk]:
            joiner.decision(decision, decision.version)
        places[which] += chunk
        heads = [file[place][0].time_s if place < len(file) else math.inf for place, file in zip(places, files)]
        until_s = min(now, *heads)
        while feedbacks and feedbacks[0].time_s <= until_s:
            joiner.feedback(feedbacks.pop(0))
        values += [outcome.value for outcome in joiner.settle(min(until_s, feedbacks[0].time_s if feedbacks else math.inf))]
    values += [outcome.value for outcome in joiner.settle(now)]
    assert values == expected
