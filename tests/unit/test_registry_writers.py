"""Do eight processes that publish, move aliases and release at once lose an entry, fork the journal or crown two champions?"""

import json
from pathlib import Path

import pytest

from policies.integrity import canonical_json, sha256_hex, write_atomic
from policies.registry import Registry, change_release, start_release
from policies.registry_entries import set_alias
from policies.registry_store import DirectoryStore
from tests.bundles import make_registry
from tests.journal_checker import find_faults
from tests.registry_writers import run_writers

NUM_WRITERS = 8
FIRST = "first version"


def _files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "journal").iterdir()}


@pytest.mark.parametrize("seconds", [5.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_eight_writers_lose_nothing_and_share_one_champion(tmp_path: Path, seconds: float) -> None:
    root = tmp_path / "registry"
    acknowledged = [make_registry(root).state().version(1).digest, FIRST]
    acknowledged += run_writers([root] * NUM_WRITERS, tmp_path, seconds=seconds)
    files = _files(root)
    assert find_faults(files, acknowledged) == []
    assert len(files) == len(acknowledged) > 2 * NUM_WRITERS
    assert Registry(root).state().num_entries == len(files)
    print(f"{len(files)} entries by {NUM_WRITERS} writers")


class _Overwrites(DirectoryStore):
    """The broken store: what is there is written over."""

    def create(self, name: str, data: bytes) -> None:
        write_atomic(self.root / name, data)


@pytest.mark.parametrize(("store", "faults"), [(_Overwrites, ["'faster'"]), (DirectoryStore, [])])
def test_a_store_that_overwrites_loses_the_faster_writers_entry(tmp_path: Path, store, faults: list[str]) -> None:
    """The negative control of create-if-absent, and its control: the same two writers decide on the same state."""
    digest = make_registry(tmp_path).state().version(1).digest
    slower, faster = Registry(tmp_path), Registry(tmp_path)
    slower.store = faster.store = store(tmp_path)

    def decide(state):
        if faster.state().num_entries == 2:
            faster.append(lambda state: set_alias(state, "eu", 1, "faster"), now=200.0)
        return set_alias(state, "us", 1, "slower")

    slower.append(decide, now=201.0)
    found = find_faults(_files(tmp_path), [digest, FIRST, "faster", "slower"])
    assert len(found) == len(faults) and all(part in fault for part, fault in zip(faults, found))


def _without(files: dict[str, bytes], number: int) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name != f"{number:08d}.json"}


def _rewritten(files: dict[str, bytes], number: int, **changes) -> dict[str, bytes]:
    """Change an entry and mend the chain behind it, as somebody would who knows how."""
    changed, previous = {}, None
    for name in sorted(files):
        entry = json.loads(files[name])
        if entry["number"] == number:
            entry |= changes
        if previous is not None:
            entry["previous_sha256"] = previous
        changed[name] = canonical_json(entry)
        previous = sha256_hex(changed[name])
    return changed


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (lambda files: _without(files, 3), "files are not 1 to"),
        (lambda files: _without(files, 7), "was acknowledged 1 times and is there 0 times"),
        (lambda files: files | {"00000005.json": files["00000004.json"]}, "does not follow the one before"),
        (lambda files: _rewritten(files, 4, reason="start"), "'start' was acknowledged 1 times and is there 2 times"),
        (lambda files: _rewritten(files, 4, kind="champion", version=2), "makes a second champion beside 1"),
        (lambda files: _rewritten(files, 2, version=1), "versions are [1, 1]"),
        (lambda files: _rewritten(files, 6, action="abort"), "changes release 1, which had ended"),
    ],
)
def test_the_checker_finds_each_kind_of_fault(tmp_path: Path, broken, fault: str) -> None:
    registry = make_registry(tmp_path, num_versions=2)
    registry.append(lambda state: set_alias(state, "eu", 1, "name"), now=200.0)
    registry.append(lambda state: _started(state), now=201.0)
    registry.append(lambda state: change_release(state, "pause", reason="pause"), now=202.0)
    registry.append(lambda state: change_release(state, "promote", reason="promote"), now=203.0)
    tokens = [version.digest for version in registry.state().versions.values()] + [FIRST, "name", "start", "pause", "promote"]
    assert find_faults(_files(tmp_path), tokens) == []
    assert any(fault in found for found in find_faults(broken(_files(tmp_path)), tokens))


def _started(state):
    return start_release(state, 2, weights=(0.5,), override_gates=None, reason="start")
