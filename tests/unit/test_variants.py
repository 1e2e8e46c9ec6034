"""The variant store follows the registry and never has less than what worked."""

import re
from pathlib import Path

import pytest

from policies.registry import Registry, change_release
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
