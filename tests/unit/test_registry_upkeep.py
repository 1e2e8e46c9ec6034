"""Does `verify` find every changed byte and missing file, and does `gc` leave what anything still needs?"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from policies.errors import NotFound
from policies.integrity import create_if_absent
from policies.journal import entry_name
from policies.registry import Registry, change_release, start_release
from policies.registry_entries import collect_version, set_alias
from policies.registry_gc import DAY_S, Garbage, bundle_ages_s, collect, find_garbage
from policies.registry_verify import verify
from policies.storage import open_storage
from policies.trust import SigningKey, TrustStore, create_key, signature_path
from tests.bundles import make_bundle, make_policy, make_registry

OLD = 400 * DAY_S
NO_KEYS = TrustStore(Path("no-such-directory"))


def test_a_whole_registry_has_no_problem(tmp_path: Path) -> None:
    found = verify(make_registry(tmp_path, num_versions=2), NO_KEYS)
    assert (found.num_entries, found.num_bundles, found.problems, found.remarks) == (3, 2, (), ())


def test_one_changed_byte_anywhere_is_found(tmp_path: Path) -> None:
    """Each file of the registry, at 40 places chosen by a seed and at both ends."""
    registry = make_registry(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2 + 5
    rng = np.random.default_rng(1)
    for path in files:
        original = path.read_bytes()
        for position in {0, len(original) - 1, *rng.integers(len(original), size=40).tolist()}:
            flipped = original[position] ^ (1 << int(rng.integers(8)))
            path.write_bytes(original[:position] + bytes([flipped]) + original[position + 1 :])
            assert verify(Registry(tmp_path), NO_KEYS).problems, (path, position)
        path.write_bytes(original)
    assert verify(registry, NO_KEYS).problems == ()  # the control


@pytest.mark.parametrize("name", ["manifest.json", "gates.json", "golden.npz", "policy.safetensors", "reference.parquet"])
def test_a_missing_or_additional_file_of_a_bundle_is_found(tmp_path: Path, name: str) -> None:
    registry = make_registry(tmp_path)
    path = registry.bundles / registry.state().version(1).digest
    data = (path / name).read_bytes()
    (path / name).unlink()
    assert len(verify(registry, NO_KEYS).problems) == 1
    (path / name).write_bytes(data)
    (path / "more.txt").write_text("x")
    assert len(verify(registry, NO_KEYS).problems) == 1


def test_a_missing_bundle_is_a_problem_and_an_unknown_one_a_remark(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, num_versions=2)
    digest = registry.state().version(2).digest
    shutil.rmtree(registry.bundles / digest)
    extra = make_bundle(registry.bundles, make_policy(77))
    (registry.bundles / ".tmp-abc").mkdir()
    found = verify(registry, NO_KEYS)
    assert found.problems == (f"version 2: its bundle {digest} is missing",)
    assert found.remarks == (
        "bundles/.tmp-abc is no bundle: a writer was killed; `registry gc` removes it",
        f"bundle {extra.digest} was never registered",
    )


def test_a_torn_end_is_a_problem_until_another_entry_stands_in_for_it(tmp_path: Path) -> None:
    registry = make_registry(tmp_path)
    (tmp_path / entry_name(3)).write_bytes(b"")
    (tmp_path / entry_name(3, 1)).write_bytes(b"{")
    assert [text.split(" is torn")[0] for text in verify(registry, NO_KEYS).problems] == [entry_name(3), entry_name(3, 1)]
    registry.append(lambda state: set_alias(state, "eu", 1, "test"), now=200.0)
    found = verify(registry, NO_KEYS)
    assert found.problems == () and len(found.remarks) == 2
    assert all("retry-2.json stands in for it" in remark for remark in found.remarks)


def test_files_that_are_no_entries_are_found(tmp_path: Path) -> None:
    """A second attempt beside a whole entry would be a fork, and an entry after a gap one that nobody reads."""
    registry = make_registry(tmp_path)
    for name in (entry_name(2, 1), entry_name(4), "journal/notes.txt"):
        create_if_absent(tmp_path / name, (tmp_path / entry_name(2)).read_bytes())
    assert sorted(verify(registry, NO_KEYS).problems) == [
        f"{name} is no entry of the chain" for name in sorted((entry_name(2, 1), entry_name(4), "journal/notes.txt"))
    ]


def test_an_exchanged_bundle_is_found_although_it_is_whole(tmp_path: Path) -> None:
    """The entry says which policy the bundle holds. Here it lies, as an entry by hand would."""
    registry = make_registry(tmp_path)
    bundle = make_bundle(registry.bundles, make_policy(5))
    entry = {"kind": "register", "version": 2, "digest": bundle.digest, "policy_sha256": "0" * 64, "gate_verdict": "pass"}
    registry.append(lambda state: {**entry, "override_gates": None}, now=150.0)
    (problem,) = verify(registry, NO_KEYS).problems
    assert problem.startswith("version 2: its entry says ('0000")


def _key(root: Path) -> tuple[SigningKey, TrustStore]:
    storage = open_storage(root)
    trust = TrustStore(storage.trust)
    trust.trust(create_key(storage, "alice")[1].read_bytes(), name="alice", expires_at=None, now=1.0)
    return SigningKey.load(storage, "alice", now=2.0), trust


@pytest.mark.parametrize("is_required", [False, True])
def test_a_signature_that_does_not_count_is_a_problem_where_signatures_are_required(tmp_path: Path, is_required: bool) -> None:
    """Version 1 is signed, version 2 is not; without the key in the trust store neither counts."""
    make_registry(tmp_path / "r", num_versions=2)
    key, trust = _key(tmp_path / "storage")
    registry = Registry(tmp_path / "r", trust=trust if is_required else None)
    signature = registry.sign(1, key)
    assert signature == signature_path(registry.bundles / registry.state().version(1).digest)
    digests = [version.digest for version in registry.state().versions.values()]
    for keys, refused in [(trust, {digests[1]}), (NO_KEYS, set(digests))]:
        found = verify(registry, keys)
        if is_required:
            assert {problem.split(":")[0].removeprefix("bundle ") for problem in found.problems} == refused
        else:
            assert (found.problems, len(found.remarks)) == ((), int(keys is NO_KEYS))
    data = signature.read_bytes()
    signature.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    changed = verify(registry, trust)
    assert any(digests[0] in finding for finding in (changed.problems if is_required else changed.remarks))


def test_a_signature_goes_with_its_bundle(tmp_path: Path) -> None:
    registry = _registry(tmp_path / "r")
    signature = registry.sign(6, _key(tmp_path / "storage")[0])
    garbage = find_garbage(registry.state(), bundle_ages_s(registry), keep_s=30 * DAY_S, now=OLD)
    assert sorted(item.versions for item in garbage) == [(1,), (6,)]
    collect(registry, garbage, now=OLD)
    assert not signature.exists() and len(list(registry.bundles.iterdir())) == 4


def _promote(registry: Registry, candidate: int, now: float) -> None:
    registry.append(lambda state: start_release(state, candidate, weights=(0.5,), override_gates=None, reason="better"), now=now)
    registry.append(lambda state: change_release(state, "promote", reason="proven"), now=now + 1)


def _registry(root: Path) -> Registry:
    """Version 1 was champion until 10 s, 2 until 20 s, 3 is; 4 is being released, 5 has an alias, 6 was never used."""
    registry = make_registry(root, num_versions=6)
    _promote(registry, 2, 10.0)
    _promote(registry, 3, 20.0)
    registry.append(lambda state: start_release(state, 4, weights=(0.5,), override_gates=None, reason="better"), now=30.0)
    registry.append(lambda state: set_alias(state, "eu", 5, "test"), now=40.0)
    return registry


def test_only_versions_that_nothing_needs_are_garbage(tmp_path: Path) -> None:
    registry = _registry(tmp_path)
    state = registry.state()
    ages_s = {version.digest: 1.0 for version in state.versions.values()}
    found = find_garbage(state, ages_s, keep_s=30 * DAY_S, now=OLD)
    assert sorted(item.versions for item in found) == [(1,), (6,)]
    assert {item.reason for item in found} == {"was last used 400 days ago"}
    assert find_garbage(state, ages_s, keep_s=401 * DAY_S, now=OLD) == []
    # Version 1 was used until 11 s, version 6 until it was registered at 5 s.
    assert [item.versions for item in find_garbage(state, ages_s, keep_s=30 * DAY_S, now=30 * DAY_S + 8)] == [(6,)]


def test_a_bundle_without_an_entry_is_given_time(tmp_path: Path) -> None:
    """It may be one whose entry is just being written."""
    state = make_registry(tmp_path).state()
    ages_s = {"a" * 64: 2 * DAY_S, ".tmp-b": 9 * DAY_S}
    assert find_garbage(state, ages_s, keep_s=3 * DAY_S, now=OLD) == [Garbage(".tmp-b", (), "was never registered, 9 days old")]
    assert len(find_garbage(state, ages_s, keep_s=DAY_S, now=OLD)) == 2


def test_collecting_leaves_a_registry_that_verifies_and_knows_what_went(tmp_path: Path) -> None:
    registry = _registry(tmp_path)
    extra = make_bundle(registry.bundles, make_policy(77))
    garbage = find_garbage(registry.state(), bundle_ages_s(registry) | {extra.digest: OLD}, keep_s=30 * DAY_S, now=OLD)
    gone = collect(registry, garbage, now=OLD)
    assert gone == garbage and len(gone) == 3
    state = registry.state()
    assert [number for number, version in state.versions.items() if version.collected_at == OLD] == [1, 6]
    found = verify(registry, NO_KEYS)
    assert (found.problems, found.remarks, found.num_bundles) == ((), (), 4)
    with pytest.raises(NotFound, match="there is no bundle"):
        registry.bundle(6)
    assert all(registry.bundle(number) for number in (2, 3, 4, 5))


def test_what_came_into_use_meanwhile_stays(tmp_path: Path) -> None:
    registry = _registry(tmp_path)
    garbage = find_garbage(registry.state(), bundle_ages_s(registry), keep_s=30 * DAY_S, now=OLD)
    registry.append(lambda state: set_alias(state, "us", 6, "test"), now=OLD)
    assert [item.versions for item in collect(registry, garbage, now=OLD)] == [(1,)]
    assert registry.bundle(6)


def test_an_interrupted_removal_is_finished_by_the_next(tmp_path: Path) -> None:
    registry = _registry(tmp_path)
    registry.append(lambda state: collect_version(state, 6, "old"), now=OLD)  # and then the process was killed
    digest = registry.state().version(6).digest
    garbage = find_garbage(registry.state(), bundle_ages_s(registry), keep_s=10_000 * DAY_S, now=OLD)
    assert [item.name for item in garbage] == [digest]
    collect(registry, garbage, now=OLD)
    assert digest not in bundle_ages_s(registry) and verify(registry, NO_KEYS).problems == ()
