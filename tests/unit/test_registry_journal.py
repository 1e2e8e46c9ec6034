"""Is the chain whole whatever a crash, a lost answer or a changed byte does to it, and are old journals still read?"""

import json
import shutil
from pathlib import Path

import pytest

from policies.errors import IntegrityError
from policies.integrity import canonical_json, sha256_hex
from policies.journal import entry_name, is_torn
from policies.registry import Registry
from policies.registry_entries import set_alias
from policies.registry_store import DirectoryStore
from tests.bundles import make_registry

GOLDEN = Path(__file__).parents[1] / "golden"


def _name(registry: Registry, alias: str) -> None:
    registry.append(lambda state: set_alias(state, alias, 1, "test"), now=200.0)


def _journal(root: Path) -> list[Path]:
    return sorted((root / "journal").iterdir())


def test_a_journal_of_schema_1_adds_up_to_what_it_did_and_can_be_continued(tmp_path: Path) -> None:
    """Written by Trimtab 0.1.0: three versions; 2 is promoted and, after a release of 3 was aborted, rolled back."""
    shutil.copytree(GOLDEN / "journal-v1", tmp_path / "journal")
    registry = Registry(tmp_path)
    state = registry.state()
    assert (state.num_entries, state.last_sha256[:12]) == (12, "2bd27b521e34")
    assert (state.champion, state.previous_champion, state.plan.number) == (1, None, 12)
    assert [(release.candidate, release.incumbent, release.state) for release in state.releases] == [
        (2, 1, "rolled_back"),
        (3, 2, "aborted"),
    ]
    assert state.releases[0].history[4].numbers == {"candidate_mean": 481.25, "incumbent_mean": 440.0}
    _name(registry, "eu")
    assert Registry(tmp_path).state().aliases == {"champion": 1, "eu": 1}
    assert [entry.body["schema_version"] for entry in registry.entries()] == [1] * 12 + [2]


def test_every_changed_byte_of_a_journal_is_found(tmp_path: Path) -> None:
    """Also in the last entry, which no other names the digest of. Of a change that looks torn the state says so."""
    make_registry(tmp_path)
    whole = Registry(tmp_path).state()
    assert whole.torn is None
    for path in _journal(tmp_path):
        original = path.read_bytes()
        for position in range(len(original)):
            path.write_bytes(original[:position] + bytes([original[position] ^ 1]) + original[position + 1 :])
            with pytest.raises(IntegrityError):
                Registry(tmp_path).state()
        path.write_bytes(original)
    assert Registry(tmp_path).state() == whole  # the control


def test_without_its_own_digest_a_change_of_the_last_entry_would_not_be_found(tmp_path: Path) -> None:
    """The negative control: entries of schema 1 have none."""
    shutil.copytree(GOLDEN / "journal-v1", tmp_path / "journal")
    last = tmp_path / entry_name(12)
    last.write_bytes(last.read_bytes().replace(b"by the rule", b"by nobody"))
    assert Registry(tmp_path).state().champion == 1


@pytest.mark.parametrize("keep", [0, 1, 20, 150, -1])
@pytest.mark.parametrize("zeros", [0, 512])
def test_a_torn_last_entry_is_ignored_reported_and_stood_in_for(tmp_path: Path, keep: int, zeros: int) -> None:
    registry = make_registry(tmp_path)
    before = registry.state()
    _name(registry, "eu")
    torn = tmp_path / entry_name(3)
    torn.write_bytes(torn.read_bytes()[:keep] + b"\0" * zeros)  # what a power cut leaves of a file that was not flushed
    evidence = torn.read_bytes()

    reader = Registry(tmp_path)
    assert reader.state().torn == entry_name(3)
    assert (reader.state().num_entries, reader.state().last_sha256) == (2, before.last_sha256)
    _name(Registry(tmp_path), "us")
    _name(Registry(tmp_path), "asia")
    for state in (reader.state(), Registry(tmp_path).state()):  # who followed all along, and who starts now
        assert (state.num_entries, state.torn, state.set_aliases) == (4, None, {"us": 1, "asia": 1})
    assert torn.read_bytes() == evidence
    files = [path.name for path in _journal(tmp_path)]
    assert files == ["00000001.json", "00000002.json", "00000003.json", "00000003.retry-1.json", "00000004.json"]


def test_two_writers_that_see_the_same_torn_entry_both_get_a_place(tmp_path: Path) -> None:
    """Whoever would write over the torn file would write over the other's entry. Here one decides while the other writes."""
    make_registry(tmp_path)
    (tmp_path / entry_name(3)).write_bytes(b"")
    has_been_overtaken = []

    def decide(state):
        if not has_been_overtaken:
            has_been_overtaken.append(True)
            _name(Registry(tmp_path), "faster")
        return set_alias(state, "slower", 1, "test")

    state = Registry(tmp_path).append(decide, now=201.0)
    assert state.set_aliases == {"faster": 1, "slower": 1} and state.num_entries == 4


def test_a_torn_replacement_is_stood_in_for_as_well(tmp_path: Path) -> None:
    make_registry(tmp_path)
    (tmp_path / entry_name(3)).write_bytes(b"")
    (tmp_path / entry_name(3, 1)).write_bytes(b'{"auth')
    _name(Registry(tmp_path), "eu")
    assert Registry(tmp_path).state().set_aliases == {"eu": 1}
    assert (tmp_path / entry_name(3, 2)).exists()


def test_torn_in_the_middle_is_not_a_torn_end(tmp_path: Path) -> None:
    make_registry(tmp_path)
    path = tmp_path / entry_name(1)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(IntegrityError, match="another entry follows it"):
        Registry(tmp_path).state()


def test_a_torn_entry_that_was_stood_in_for_cannot_change_any_more(tmp_path: Path) -> None:
    make_registry(tmp_path)
    (tmp_path / entry_name(3)).write_bytes(b'{"author')
    _name(Registry(tmp_path), "eu")
    (tmp_path / entry_name(3)).write_bytes(b'{"autho')
    with pytest.raises(IntegrityError, match="replaces torn entries"):
        Registry(tmp_path).state()


def test_only_what_a_crash_leaves_counts_as_torn(tmp_path: Path) -> None:
    """A changed byte must not pass for a torn end: readers would ignore an entry that was acknowledged."""
    make_registry(tmp_path)
    whole = (tmp_path / entry_name(2)).read_bytes()
    for text in (whole, canonical_json({"a": ["é\x01", -1.5e-07, True, False, None, {"b": ""}]})):
        assert [length for length in range(len(text)) if not is_torn(text[:length])] == []
    assert not is_torn(whole)
    assert not is_torn(b'{"a":"b}')  # the last quote of an entry may have been changed
    looks_torn = [
        position
        for position in range(len(whole))
        for byte in b'\0 "{}[],:x\xff'
        if byte != whole[position] and is_torn(whole[:position] + bytes([byte]) + whole[position + 1 :])
    ]
    # `…:1}` that became `…:{}` or `…:1\0` is the beginning of an entry, as far as anybody could tell.
    assert looks_torn and set(looks_torn) <= {len(whole) - 2, len(whole) - 1}


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"number": 3}', b"[]", b"null", b"\xff\xfe", b'{"a":1,"a":2}'])
def test_other_files_at_an_entrys_place_are_refused(tmp_path: Path, data: bytes) -> None:
    make_registry(tmp_path)
    (tmp_path / entry_name(3)).write_bytes(data)
    with pytest.raises(IntegrityError, match="00000003"):
        Registry(tmp_path).state()


def test_a_rewritten_entry_breaks_the_chain_although_it_agrees_with_itself(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, num_versions=2)
    path = tmp_path / entry_name(1)
    body = json.loads(path.read_bytes()) | {"author": "mallory@elsewhere"}
    del body["sha256"]
    path.write_bytes(canonical_json({**body, "sha256": sha256_hex(canonical_json(body))}))
    with pytest.raises(IntegrityError, match="follows"):
        Registry(tmp_path).state()
    assert registry.state().num_entries == 3  # who had read it before has no reason to doubt


class _LostAnswers(DirectoryStore):
    """Creates, then answers that the name was taken: what an NFS or S3 client says that asked again after a lost answer."""

    def create(self, name: str, data: bytes) -> None:
        super().create(name, data)
        raise FileExistsError(name)


class _LosesRaces(DirectoryStore):
    """Lets another writer be faster for the first attempts."""

    def __init__(self, root: Path, num_races: int) -> None:
        super().__init__(root)
        self.num_races = num_races

    def create(self, name: str, data: bytes) -> None:
        if self.num_races > 0:
            self.num_races -= 1
            _name(Registry(self.root), f"rival-{self.num_races}")
        super().create(name, data)


def test_an_entry_whose_answer_was_lost_is_appended_once(tmp_path: Path) -> None:
    make_registry(tmp_path)
    registry = Registry(tmp_path)
    registry.store = _LostAnswers(tmp_path)
    _name(registry, "eu")
    assert [entry.body["kind"] for entry in registry.entries()] == ["register", "champion", "alias"]


def test_who_loses_races_decides_again_on_what_happened(tmp_path: Path) -> None:
    make_registry(tmp_path)
    registry = Registry(tmp_path)
    registry.store = _LosesRaces(tmp_path, 3)
    seen = []

    def decide(state):
        seen.append(sorted(state.set_aliases))
        return set_alias(state, "mine", 1, "test")

    state = registry.append(decide, now=201.0)
    assert seen == [[], ["rival-2"], ["rival-1", "rival-2"], ["rival-0", "rival-1", "rival-2"]]
    assert state.set_aliases == {"mine": 1, "rival-0": 1, "rival-1": 1, "rival-2": 1}


def test_a_journal_of_schema_2_with_arms_adds_up_to_what_it_did(tmp_path: Path) -> None:
    """1 is held out, 2 and 3 are shadows, 2 is promoted; then champion and holdout are switched off, and 1 answers all."""
    shutil.copytree(GOLDEN / "journal-v2", tmp_path / "journal")
    registry = Registry(tmp_path)
    state = registry.state()
    assert (state.num_entries, state.champion, state.previous_champion, state.shadows) == (12, 2, 1, (2, 3))
    assert (state.holdout.version, state.holdout.weight, set(state.switched_off)) == (1, 0.05, {"champion", "holdout"})
    assert state.plan.to_json() == {
        "number": 12,
        "release": 0,
        "arms": [{"name": "champion", "version": 1, "weight": 1.0}],
        "shadows": [3],
        "held_out": 0.05,
    }
    with_release = state.plan_numbered(7)
    assert [(arm.name, arm.version) for arm in with_release.arms] == [("holdout", 1), ("canary", 2), ("champion", 1)]
    assert [plan.number for plan in state.plans] == list(range(4, 13))
    _name(registry, "eu")
    assert Registry(tmp_path).state().set_aliases == {"eu": 1}
