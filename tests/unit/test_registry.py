"""Does the journal add up to one champion and one plan, whoever writes, and is every change to the past found?"""

import multiprocessing
from pathlib import Path

import pytest

from policies.errors import GateRefused, IntegrityError, NotFound, RegistryConflict, ReleaseRefused
from policies.registry import Registry, RegistryState, change_release, register_version, set_champion, start_release
from policies.verdicts import Verdict
from tests.bundles import make_bundle, make_policy, make_registry

WEIGHTS = (0.05, 0.25, 1.0)


def _start(registry: Registry, candidate: int, override_gates: str | None = None) -> RegistryState:
    return registry.append(
        lambda state: start_release(state, candidate, weights=WEIGHTS, override_gates=override_gates, reason="test"), now=200.0
    )


def _change(registry: Registry, action) -> RegistryState:
    return registry.append(lambda state: change_release(state, action, reason="test"), now=300.0)


def _shares(state: RegistryState) -> dict[int, float]:
    assert state.plan is not None
    return {arm.version: arm.weight for arm in state.plan.arms}


def test_a_release_walks_through_its_steps_to_a_new_champion(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, num_versions=2)
    assert _shares(_start(registry, 2)) == {2: 0.05, 1: 0.95}
    assert _shares(_change(registry, "advance")) == {2: 0.25, 1: 0.75}
    assert _shares(_change(registry, "advance")) == {2: 1.0, 1: 0.0}
    state = _change(registry, "promote")
    assert (state.champion, state.previous_champion, _shares(state)) == (2, 1, {2: 1.0})


@pytest.mark.parametrize("action", ["rollback", "abort"])
def test_taking_a_release_back_gives_all_traffic_to_the_champion(tmp_path: Path, action: str) -> None:
    registry = make_registry(tmp_path, num_versions=2)
    _start(registry, 2)
    state = _change(registry, action)
    assert (state.champion, _shares(state)) == (1, {1: 1.0})
    with pytest.raises(ReleaseRefused, match="nothing to advance"):
        _change(registry, "advance")


def test_a_rollback_after_the_promotion_restores_the_previous_champion(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, num_versions=2)
    _start(registry, 2)
    _change(registry, "promote")
    state = _change(registry, "rollback")
    assert (state.champion, _shares(state)) == (1, {1: 1.0})


def test_a_promotion_can_be_taken_back_after_a_later_release_was_aborted(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, num_versions=3)
    _start(registry, 2)
    _change(registry, "promote")
    _start(registry, 3)
    _change(registry, "abort")
    state = _change(registry, "rollback")
    assert (state.champion, _shares(state)) == (1, {1: 1.0})
    assert [release.state for release in state.releases] == ["rolled_back", "aborted"]
    with pytest.raises(ReleaseRefused, match="nothing to rollback"):
        _change(registry, "rollback")


def test_plan_numbers_only_grow_and_the_salt_stays_within_a_release(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, num_versions=2)
    plans = [
        _start(registry, 2).plan,
        _change(registry, "advance").plan,
        _change(registry, "abort").plan,
        _start(registry, 2).plan,
    ]
    numbers = [plan.number for plan in plans if plan]
    assert numbers == sorted(set(numbers)) and len(numbers) == 4
    assert plans[0].salt == plans[1].salt != plans[3].salt


def test_a_version_without_passing_gates_is_never_champion(tmp_path: Path) -> None:
    registry = make_registry(tmp_path)
    bad = make_bundle(registry.bundles, make_policy(5), verdict=Verdict.FAIL, override_gates="drill")
    registry.append(lambda state: register_version(state, bad), now=150.0)
    with pytest.raises(GateRefused, match="--override-gates"):
        _start(registry, 2)
    state = _start(registry, 2, override_gates="drill")
    assert _shares(state) == {2: 0.05, 1: 0.95} and state.release.override_gates == "drill"
    with pytest.raises(GateRefused, match="cannot be promoted"):
        _change(registry, "promote")
    assert registry.state().champion == 1


def test_a_passing_version_released_by_break_glass_is_not_promoted_either(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, num_versions=2)
    _start(registry, 2, override_gates="in a hurry")
    with pytest.raises(GateRefused, match="never promoted"):
        _change(registry, "promote")


def test_break_glass_never_gives_all_traffic_at_once(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, num_versions=2)
    with pytest.raises(GateRefused, match="not given all traffic at once"):
        registry.append(lambda state: start_release(state, 2, weights=(1.0,), override_gates="drill", reason="test"), now=200.0)


def test_the_same_policy_is_not_registered_twice(tmp_path: Path) -> None:
    registry = make_registry(tmp_path)
    again = registry.bundle(1)
    with pytest.raises(RegistryConflict, match="is version 1 already"):
        registry.append(lambda state: register_version(state, again), now=150.0)


def test_the_first_champion_needs_passing_gates_and_an_empty_seat(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    bad = make_bundle(registry.bundles, make_policy(), verdict=Verdict.INCONCLUSIVE, override_gates="drill")
    registry.append(lambda state: register_version(state, bad), now=1.0)
    with pytest.raises(GateRefused, match="cannot be champion"):
        registry.append(lambda state: set_champion(state, 1, "test"), now=2.0)
    with pytest.raises(ReleaseRefused, match="is champion; replace it"):
        make_registry(tmp_path / "other", num_versions=2).append(lambda state: set_champion(state, 2, "test"), now=3.0)


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, num_versions=2)
    with pytest.raises(NotFound, match=r"version 9 does not exist; registered: \[1, 2\]"):
        _start(registry, 9)
    with pytest.raises(ReleaseRefused, match="there has been no release"):
        _change(registry, "promote")
    _start(registry, 2)
    with pytest.raises(ReleaseRefused, match="still running"):
        _start(registry, 2)


def test_a_changed_entry_is_found_by_the_next_reader(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, num_versions=3)
    journal = sorted((tmp_path / "journal").iterdir())
    for path in journal:
        original = path.read_bytes()
        path.write_bytes(original.replace(b'"author":"', b'"author":"x'))
        with pytest.raises(IntegrityError, match="was changed"):
            Registry(tmp_path).state()
        path.write_bytes(original)
    assert Registry(tmp_path).state() == registry.state()  # the control


def test_an_entry_that_readers_would_refuse_never_reaches_the_disk(tmp_path: Path) -> None:
    registry = make_registry(tmp_path)
    before = sorted((tmp_path / "journal").iterdir())
    with pytest.raises(IntegrityError, match="unknown kind"):
        registry.append(lambda state: {"kind": "surprise"}, now=1.0)
    assert sorted((tmp_path / "journal").iterdir()) == before


def _register_many(root: Path, seed: int, count: int) -> None:
    registry = Registry(root)
    for index in range(count):
        bundle = make_bundle(registry.bundles, make_policy(1000 * seed + index, hidden=(4,)))
        registry.append(lambda state, bundle=bundle: register_version(state, bundle), now=float(index))


def test_many_writers_lose_no_entry_and_share_no_version_number(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_register_many, args=(tmp_path, seed, 10)) for seed in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=60)
        assert writer.exitcode == 0
    state = Registry(tmp_path).state()
    assert sorted(state.versions) == list(range(1, 41))
    assert len({version.digest for version in state.versions.values()}) == 40
