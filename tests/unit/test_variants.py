"""The variant store follows the registry and never has less than what worked."""

import re
from pathlib import Path

import pytest

from policies.registry import Registry, change_release
from policies.registry_entries import end_holdout, set_holdout, set_shadows, switch_arm
from policies.storage import Storage, open_storage
from serve_app.variants import FIRST_RETRY_S, VariantStore
from tests.serving_helpers import NAME, publish, random_policy, release, spoil


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "storage")


def store_of(storage: Storage) -> VariantStore:
    return VariantStore(Registry(storage.registry(NAME)))


def change(storage: Storage, action: str) -> None:
    Registry(storage.registry(NAME)).append(lambda state: change_release(state, action, reason="test"), now=1.0)


def bundle_path(storage: Storage, version: int) -> Path:
    registry = Registry(storage.registry(NAME))
    return registry.bundles / registry.state().version(version).digest


def weights(store: VariantStore) -> dict[int, float]:
    assert store.snapshot is not None
    return {arm.version: arm.weight for arm in store.snapshot.plan.arms}


def test_an_empty_registry_is_not_ready_and_says_why(storage: Storage) -> None:
    store = store_of(storage)
    store.refresh(now=0.0)
    assert store.snapshot is None
    assert "publish" in store.why_not_ready()


def test_a_plan_comes_into_force_as_a_whole_and_stays_the_same_object_without_news(storage: Storage) -> None:
    publish(storage, random_policy(1))
    store = store_of(storage)
    store.refresh(now=0.0)
    first = store.snapshot
    store.refresh(now=1.0)
    assert store.snapshot is first and weights(store) == {1: 1.0}
    publish(storage, random_policy(2))
    release(storage, 2, weights=(0.25, 1.0))
    store.refresh(now=2.0)
    assert weights(store) == {2: 0.25, 1: 0.75}
    assert store.snapshot is not None and set(store.snapshot.variants) == {1, 2}
    assert first is not None and set(first.variants) == {1}, "a batch that still holds the old plan is not disturbed"


def test_both_champions_stay_loaded_after_a_promotion_and_a_rollback_needs_no_disk(storage: Storage) -> None:
    publish(storage, random_policy(1))
    publish(storage, random_policy(2))
    release(storage, 2, weights=(0.5,))
    store = store_of(storage)
    store.refresh(now=0.0)
    change(storage, "promote")
    store.refresh(now=1.0)
    assert weights(store) == {2: 1.0} and store.versions == [1, 2]
    spoil(bundle_path(storage, 1))
    change(storage, "rollback")
    store.refresh(now=2.0)
    assert weights(store) == {1: 1.0} and store.load_failures == {}


def test_a_version_that_does_not_load_keeps_the_last_plan_and_is_reported_with_both_hashes(storage: Storage) -> None:
    publish(storage, random_policy(1))
    publish(storage, random_policy(2))
    store = store_of(storage)
    store.refresh(now=0.0)
    spoil(bundle_path(storage, 2))
    release(storage, 2, weights=(0.25,))
    store.refresh(now=1.0)
    assert weights(store) == {1: 1.0}
    assert list(store.load_failures) == [2]
    assert "sha256 is" in store.load_failures[2] and "manifest says" in store.load_failures[2]


def test_a_failed_load_is_retried_after_its_pause_and_not_before(storage: Storage) -> None:
    publish(storage, random_policy(1))
    publish(storage, random_policy(2))
    path = bundle_path(storage, 2)
    hidden = path.with_name("hidden")
    path.rename(hidden)
    release(storage, 2, weights=(0.25,))
    store = store_of(storage)
    store.refresh(now=0.0)
    hidden.rename(path)
    store.refresh(now=FIRST_RETRY_S / 2)
    assert weights(store) == {1: 1.0} and 2 in store.load_failures
    store.refresh(now=FIRST_RETRY_S)
    assert weights(store) == {2: 0.25, 1: 0.75} and store.load_failures == {}


def test_the_pause_between_retries_doubles(storage: Storage) -> None:
    publish(storage, random_policy(1))
    publish(storage, random_policy(2))
    spoil(bundle_path(storage, 2))
    release(storage, 2, weights=(0.25,))
    store = store_of(storage)
    tries = []
    load = store.registry.bundle

    def counting(version: int):
        tries.append((version, now))
        return load(version)

    store.registry.bundle = counting  # type: ignore[method-assign]
    for now in range(16):  # 1 s, 2 s, 4 s and 8 s between tries: at 0, 1, 3, 7, 15
        store.refresh(now=float(now))
    assert [at for version, at in tries if version == 2] == [0, 1, 3, 7, 15]


def test_an_unreadable_registry_keeps_the_last_plan_and_recovers(storage: Storage) -> None:
    publish(storage, random_policy(1))
    store = store_of(storage)
    store.refresh(now=0.0)
    broken = storage.registry(NAME) / "journal" / "00000003.json"
    broken.write_bytes(b"{half an ent")
    store.refresh(now=1.0)
    assert weights(store) == {1: 1.0}
    assert store.registry_error is not None and "00000003.json" in store.registry_error
    broken.unlink()
    publish(storage, random_policy(2))
    store.refresh(now=2.0)
    assert store.registry_error is None


def test_a_replica_that_starts_during_a_release_of_a_broken_version_serves_the_champion(storage: Storage) -> None:
    publish(storage, random_policy(1))
    publish(storage, random_policy(2))
    spoil(bundle_path(storage, 2))
    release(storage, 2, weights=(0.25,))
    store = store_of(storage)
    store.refresh(now=0.0)
    assert weights(store) == {1: 1.0} and list(store.load_failures) == [2]


def test_a_broken_champion_is_not_served(storage: Storage) -> None:
    """Negative control of all the above: falling back never means answering with bytes that were not verified."""
    publish(storage, random_policy(1))
    spoil(bundle_path(storage, 1))
    store = store_of(storage)
    store.refresh(now=0.0)
    assert store.snapshot is None and "sha256" in store.why_not_ready()


def test_a_version_with_another_interface_is_refused(storage: Storage) -> None:
    publish(storage, random_policy(1))
    publish(storage, random_policy(2, num_features=5))
    release(storage, 2, weights=(0.25,))
    store = store_of(storage)
    store.refresh(now=0.0)
    assert weights(store) == {1: 1.0}
    assert re.search(r"version 2 takes.*'shape': \[5\].*version 1 .*'shape': \[4\]", store.load_failures[2])


# --- holdout, shadows, switches ---


def append(storage: Storage, entry, *arguments, **keywords) -> None:
    registry = Registry(storage.registry(NAME))
    registry.append(lambda state: entry(state, *arguments, reason="test", **keywords), now=1.0)


def hold_out(storage: Storage, version: int) -> None:
    append(storage, set_holdout, version, weight=0.1, override_gates=None)


def shadow(storage: Storage, *versions: int) -> None:
    append(storage, set_shadows, versions, override_gates=None)


def switch(storage: Storage, arm: str, *, enabled: bool) -> None:
    append(storage, switch_arm, arm, enabled=enabled)


def shadows_of(store: VariantStore) -> list[int]:
    assert store.snapshot is not None
    return [variant.version for variant in store.snapshot.shadows]


def publish_many(storage: Storage, number: int) -> None:
    for seed in range(1, number + 1):
        publish(storage, random_policy(seed))


def test_a_holdout_is_an_arm_and_a_shadow_never_becomes_an_answer(storage: Storage) -> None:
    publish_many(storage, 3)
    hold_out(storage, 2)
    shadow(storage, 3)
    store = store_of(storage)
    store.refresh(now=0.0)
    assert weights(store) == {2: 0.1, 1: 0.9} and shadows_of(store) == [3]
    assert store.snapshot is not None and set(store.snapshot.variants) == {1, 2}
    assert store.versions == [1, 2, 3]
    release(storage, 3, weights=(0.5,))  # the control: as canary it may answer
    store.refresh(now=1.0)
    assert set(store.snapshot.variants) == {1, 2, 3} and shadows_of(store) == []


def test_a_shadow_that_does_not_load_holds_nothing_back_and_is_reported(storage: Storage) -> None:
    publish_many(storage, 3)
    spoil(bundle_path(storage, 3))
    store = store_of(storage)
    store.refresh(now=0.0)
    shadow(storage, 3, 2)
    hold_out(storage, 2)
    store.refresh(now=1.0)
    assert weights(store) == {2: 0.1, 1: 0.9} and shadows_of(store) == []
    assert list(store.load_failures) == [3] and "sha256 is" in store.load_failures[3]
    shadow(storage, 2)
    append(storage, end_holdout)
    store.refresh(now=2.0)
    assert shadows_of(store) == [2] and store.load_failures == {}


def test_a_shadow_with_another_interface_is_left_out(storage: Storage) -> None:
    publish_many(storage, 2)
    publish(storage, random_policy(3, num_features=5))
    shadow(storage, 3, 2)
    store = store_of(storage)
    store.refresh(now=0.0)
    assert shadows_of(store) == [2] and "publish it under another policy name" in store.load_failures[3]


@pytest.mark.parametrize("arm", ["canary", "holdout"])
def test_an_arm_that_does_not_load_is_the_champions_and_keeps_no_switch_from_force(storage: Storage, arm: str) -> None:
    """Version 3 is broken. Whatever comes after it in the journal has to reach this replica all the same."""
    publish_many(storage, 3)
    release(storage, 2, weights=(1.0,))
    change(storage, "promote")
    store = store_of(storage)
    store.refresh(now=0.0)
    spoil(bundle_path(storage, 3))
    if arm == "canary":
        release(storage, 3, weights=(0.1,))
    else:
        hold_out(storage, 3)
    switch(storage, "champion", enabled=False)
    store.refresh(now=1.0)
    assert weights(store) == {1: 1.0} and list(store.load_failures) == [3]
    assert store.snapshot is not None and store.snapshot.champion.version == 1
    assert store.snapshot.previous is None, "nobody falls back on a champion that is switched off"
    switch(storage, "champion", enabled=True)
    store.refresh(now=2.0)
    assert weights(store) == {2: 1.0} and store.snapshot.previous.version == 1


def test_the_previous_champion_is_at_hand(storage: Storage) -> None:
    publish_many(storage, 2)
    store = store_of(storage)
    store.refresh(now=0.0)
    assert store.snapshot is not None and store.snapshot.previous is None
    release(storage, 2, weights=(1.0,))
    change(storage, "promote")
    store.refresh(now=1.0)
    assert (store.snapshot.champion.version, store.snapshot.previous.version) == (2, 1)
    first = store.snapshot
    store.refresh(now=2.0)
    assert store.snapshot is first


def test_a_previous_champion_that_does_not_load_is_no_step_of_the_ladder(storage: Storage) -> None:
    publish_many(storage, 2)
    release(storage, 2, weights=(1.0,))
    change(storage, "promote")
    spoil(bundle_path(storage, 1))
    store = store_of(storage)
    store.refresh(now=0.0)
    assert store.snapshot is not None and store.snapshot.previous is None and weights(store) == {2: 1.0}


def test_arms_that_are_switched_off_come_back_without_a_load(storage: Storage) -> None:
    publish_many(storage, 3)
    hold_out(storage, 3)
    release(storage, 2, weights=(0.5,))
    for arm in ("canary", "holdout"):
        switch(storage, arm, enabled=False)
    store = store_of(storage)
    store.refresh(now=0.0)
    assert weights(store) == {1: 1.0} and store.versions == [1, 2, 3]
    for version in (2, 3):
        spoil(bundle_path(storage, version))
    for arm in ("canary", "holdout"):
        switch(storage, arm, enabled=True)
    store.refresh(now=1.0)
    assert weights(store) == pytest.approx({3: 0.1, 2: 0.45, 1: 0.45}) and store.load_failures == {}


def test_nothing_is_loaded_that_nobody_wants_any_more(storage: Storage) -> None:
    publish_many(storage, 3)
    hold_out(storage, 2)
    shadow(storage, 3)
    store = store_of(storage)
    store.refresh(now=0.0)
    append(storage, end_holdout)
    append(storage, set_shadows, (), override_gates=None)
    for now in (1.0, 2.0):  # what the last snapshot holds goes with the one after it
        store.refresh(now=now)
    assert store.versions == [1]
