"""What names, tags, approvals and time make of a journal, and what may not be written into it."""

from dataclasses import replace
from pathlib import Path

import pytest

from policies.errors import IntegrityError, NotFound, RegistryConflict, ReleaseRefused, UsageError
from policies.registry import Registry, RegistryState, change_release, start_release
from policies.registry_entries import (
    approve_version,
    collect_version,
    remove_alias,
    set_alias,
    switch_arm,
    tag_version,
)
from policies.registry_state import Approval, apply, crowning, fold, until
from tests.bundles import make_registry


def _append(registry: Registry, entry, *arguments, now: float = 200.0, **keywords) -> RegistryState:
    return registry.append(lambda state: entry(state, *arguments, **keywords), now=now)


def _release(registry: Registry, candidate: int, action: str | None, *, now: float) -> RegistryState:
    state = _append(registry, start_release, candidate, weights=(0.5,), override_gates=None, reason="better", now=now)
    return state if action is None else _append(registry, change_release, action, reason="proven", now=now + 50)


def _bodies(registry: Registry) -> list[dict]:
    return [entry.body for entry in registry.entries()]


def test_an_alias_moves_and_goes(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, num_versions=2)
    assert _append(registry, set_alias, "eu", 1, "first").aliases == {"champion": 1, "eu": 1}
    assert _append(registry, set_alias, "eu", 2, "better there").aliases == {"champion": 1, "eu": 2}
    assert _append(registry, remove_alias, "eu", "closed").aliases == {"champion": 1}


def test_champion_challenger_and_previous_follow_from_releases(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, num_versions=3)
    assert _release(registry, 2, None, now=300.0).aliases == {"champion": 1, "challenger": 2}
    assert _append(registry, change_release, "promote", reason="proven").aliases == {"champion": 2, "previous": 1}
    assert _release(registry, 3, "abort", now=400.0).aliases == {"champion": 2, "previous": 1}


@pytest.mark.parametrize("name", ["champion", "challenger", "previous", "", "7", "Über", "a b", "../x", "a" * 64])
def test_names_that_mean_something_else_are_not_set(tmp_path: Path, name: str) -> None:
    registry = make_registry(tmp_path)
    with pytest.raises(UsageError, match=r"cannot be set|must be 1-63"):
        _append(registry, set_alias, name, 1, "test")
    with pytest.raises(UsageError, match=r"cannot be set|must be 1-63"):
        _append(registry, remove_alias, name, "test")


def test_what_is_not_there_is_not_named_tagged_approved_or_taken_away(tmp_path: Path) -> None:
    registry = make_registry(tmp_path)
    for entry, arguments in [
        (set_alias, ("eu", 2, "test")),
        (tag_version, (2, "key", "value")),
        (collect_version, (2, "test")),
    ]:
        with pytest.raises(NotFound, match=r"version 2 does not exist; registered: \[1\]"):
            _append(registry, entry, *arguments)
    with pytest.raises(NotFound, match="version 2 does not exist"):
        _append(registry, approve_version, 2, approver="ann", reason="test")
    with pytest.raises(NotFound, match="alias 'eu' does not exist; set: none"):
        _append(registry, remove_alias, "eu", "test")
    with pytest.raises(NotFound, match="version 1 has no tag 'key'; it has: none"):
        _append(registry, tag_version, 1, "key", None)


def test_tags_are_replaced_and_removed_and_leave_other_versions_alone(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, num_versions=2)
    _append(registry, tag_version, 1, "region", "eu")
    _append(registry, tag_version, 1, "ticket", "RL-7")
    state = _append(registry, tag_version, 1, "region", "us")
    assert (state.version(1).tags, state.version(2).tags) == ({"region": "us", "ticket": "RL-7"}, {})
    assert _append(registry, tag_version, 1, "region", None).version(1).tags == {"ticket": "RL-7"}


@pytest.mark.parametrize("value", ["", " ", "two\nlines", "x" * 1001])
def test_texts_that_would_spoil_the_journal_are_refused(tmp_path: Path, value: str) -> None:
    registry = make_registry(tmp_path)
    with pytest.raises(UsageError, match=r"1-1000 printable characters"):
        _append(registry, tag_version, 1, "note", value)
    with pytest.raises(UsageError, match=r"1-1000 printable characters"):
        _append(registry, approve_version, 1, approver="ann", reason=value)
    assert _append(registry, tag_version, 1, "note", "x" * 1000).version(1).tags == {"note": "x" * 1000}  # the control


def test_one_approver_counts_once(tmp_path: Path) -> None:
    registry = make_registry(tmp_path)
    _append(registry, approve_version, 1, approver="ann", reason="read the card", now=201.0)
    state = _append(registry, approve_version, 1, approver="bob", reason="ran it", now=202.0)
    assert state.version(1).approvals == (Approval("ann", "read the card", 201.0), Approval("bob", "ran it", 202.0))
    with pytest.raises(RegistryConflict, match="ann approved version 1 already"):
        _append(registry, approve_version, 1, approver="ann", reason="again")


def test_a_version_is_found_by_number_alias_and_digest(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, num_versions=2)
    state = _append(registry, set_alias, "eu", 2, "test")
    for name in ("2", "eu", state.version(2).digest, state.version(2).digest[:8]):
        assert state.resolve(name).number == 2
    assert state.resolve("champion").number == 1
    for name in ("9", "challenger", state.version(2).digest[:5], ""):
        with pytest.raises(NotFound, match="names no version; registered"):
            state.resolve(name)


def test_a_beginning_that_two_digests_share_names_neither() -> None:
    bodies = [_register(number, digest) for number, digest in [(1, "abcdef01"), (2, "abcdef02"), (3, "777777aa")]]
    state = fold(bodies)
    with pytest.raises(NotFound, match=r"versions \[1, 2\] start with 'abcdef'"):
        state.resolve("abcdef")
    assert (state.resolve("abcdef02").number, state.resolve("777777").number) == (2, 3)


def test_the_state_of_a_moment_is_the_fold_of_what_was_written_before(tmp_path: Path) -> None:
    """Champion 1 at 100 s; 2 is released at 300 s and promoted at 350 s; 3 at 400 and 450 s; rolled back at 500 s."""
    registry = make_registry(tmp_path, num_versions=3)
    _release(registry, 2, "promote", now=300.0)
    _release(registry, 3, "promote", now=400.0)
    _append(registry, change_release, "rollback", reason="complaints", now=500.0)
    bodies = _bodies(registry)
    moments = [99.9, 100.0, 349.9, 350.0, 450.0, 499.9, 500.0, 1e12]
    assert [fold(until(bodies, moment)).champion for moment in moments] == [None, 1, 1, 2, 3, 3, 2, 2]
    made_by = [crowning(until(bodies, moment)) for moment in moments]
    assert [entry and entry["number"] for entry in made_by] == [None, 4, 4, 6, 8, 8, 9, 9]
    assert (made_by[-1]["kind"], made_by[-1]["reason"]) == ("release_change", "complaints")
    assert fold(bodies) == replace(registry.state(), last_sha256="")


def test_an_entry_takes_effect_after_those_before_it_whatever_its_clock_said() -> None:
    """A fast clock wrote entry 2, a right one entry 3: at 15 s neither was there, and 3 without 2 never was a state."""
    bodies = [_register(1, "a" * 8, 10.0), _register(2, "b" * 8, 20.0), _register(3, "c" * 8, 12.0)]
    assert [len(until(bodies, moment)) for moment in (9.0, 10.0, 15.0, 20.0)] == [0, 1, 1, 3]


def test_only_what_nothing_asks_for_is_given_up(tmp_path: Path) -> None:
    """Versions 1 and 2 were champions before 3: 2 is previous and what a rollback brings back; 4 waits, 5 has a name."""
    registry = make_registry(tmp_path, num_versions=6)
    _release(registry, 2, "promote", now=300.0)
    _release(registry, 3, "promote", now=400.0)
    _release(registry, 4, None, now=500.0)
    state = _append(registry, set_alias, "eu", 5, "test")
    assert [state.in_use(number) for number in range(1, 7)] == [None, "previous", "champion", "challenger", "eu", None]
    for number in (2, 3, 4, 5):
        with pytest.raises(ReleaseRefused, match="its bundle stays"):
            _append(registry, collect_version, number, "old")
    state = _append(registry, collect_version, 1, "old", now=600.0)
    assert state.version(1).collected_at == 600.0


def test_after_a_rollback_the_champion_before_stays_and_what_was_taken_back_need_not(tmp_path: Path) -> None:
    """After 1 → 2 → 3 and a rollback the champion is 2, the previous one 1; the next rollback goes there too."""
    registry = make_registry(tmp_path, num_versions=3)
    _release(registry, 2, "promote", now=300.0)
    _release(registry, 3, "promote", now=400.0)
    state = _append(registry, change_release, "rollback", reason="complaints", now=500.0)
    assert (state.aliases, state.rollback_target()) == ({"champion": 2, "previous": 1}, 1)
    with pytest.raises(ReleaseRefused, match="version 1 is previous"):
        _append(registry, collect_version, 1, "old")
    assert _append(registry, collect_version, 3, "old").version(3).collected_at is not None


def test_a_champion_that_is_back_is_never_its_own_stand_in(tmp_path: Path) -> None:
    """After 1 → 2 → 1 → 2 and a rollback version 1 is champion and was it before too: then there is no other to stand in."""
    registry = make_registry(tmp_path, num_versions=2)
    for candidate, now in [(2, 300.0), (1, 400.0), (2, 500.0)]:
        _release(registry, candidate, "promote", now=now)
    state = _append(registry, change_release, "rollback", reason="complaints", now=600.0)
    assert (state.champion, state.previous_champion) == (1, None)
    with pytest.raises(ReleaseRefused):
        _append(registry, switch_arm, "champion", enabled=False, reason="complaints")


def test_a_version_that_was_given_up_is_not_used_again(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, num_versions=3)
    _release(registry, 2, "promote", now=300.0)
    _release(registry, 3, "promote", now=400.0)
    again = registry.bundle(1)
    _append(registry, collect_version, 1, "old", now=600.0)
    for entry, arguments in [(set_alias, ("eu", 1, "test")), (collect_version, (1, "test"))]:
        with pytest.raises(ReleaseRefused, match="version 1 was given up by `registry gc`"):
            _append(registry, entry, *arguments)
    with pytest.raises(ReleaseRefused, match="given up"):
        _release(registry, 1, None, now=700.0)
    _append(registry, change_release, "rollback", reason="complaints", now=800.0)
    assert registry.state().aliases == {"champion": 2}  # nobody can load what was given up
    with pytest.raises(ReleaseRefused, match="version 1 was given up"):  # 1 is what the rollback before last would bring back
        _append(registry, change_release, "rollback", reason="complaints", now=900.0)
    assert registry.register(again, now=1000.0).version(4).policy_sha256 == again.policy.sha256()


def test_a_version_counts_as_used_until_its_last_release_changed(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, num_versions=3)
    state = _release(registry, 2, "promote", now=300.0)
    assert [state.last_used_at(number) for number in (1, 2, 3)] == [350.0, 350.0, 2.0]


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "alias", "alias": "eu", "version": 9},
        {"kind": "tag", "version": 9, "key": "k", "value": "v"},
        {"kind": "approve", "version": 9, "approver": "ann", "reason": "r"},
        {"kind": "collect", "version": 9},
        {"kind": "holdout", "version": 9, "weight": 0.1},
        {"kind": "shadows", "versions": [9]},
        {"kind": "arm_switch", "arm": "king", "enabled": False},
        {"kind": "arm_switch", "arm": "champion", "enabled": False},  # there is no previous champion
        {"kind": "alias"},
        {"kind": "surprise"},
    ],
)
def test_entries_that_cannot_follow_are_refused_before_they_are_written(tmp_path: Path, entry: dict) -> None:
    registry = make_registry(tmp_path)
    with pytest.raises(IntegrityError, match=r"malformed|unknown kind"):
        registry.append(lambda state: {"reason": "test", **entry}, now=1.0)
    assert Registry(tmp_path).state().num_entries == 2
    assert apply(registry.state(), {"kind": "tag", "version": 1, "key": "k", "value": "v"}).version(1).tags  # the control


def _register(number: int, digest: str, time_s: float = 1.0) -> dict:
    what = {"kind": "register", "version": number, "digest": digest, "policy_sha256": digest, "gate_verdict": "pass"}
    return {**what, "override_gates": None, "number": number, "time_s": time_s}
