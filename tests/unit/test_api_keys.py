"""Are keys made, followed by new ones and revoked as the rules say, and kept so that nobody can read or lose one?"""

import contextlib
import dataclasses
import json
import multiprocessing
import stat
from pathlib import Path

import pytest

from policies import api_keys as rules
from policies.api_keys import KEPT_S, OWNER, SCOPES, ApiKeyStore, KeyRecord, Keys, parse_keys
from policies.errors import ConfigError, IntegrityError, NotFound, StorageError
from policies.integrity import canonical_json, exclusive_lock, sha256_hex
from policies.storage import Storage, existing_storage, open_storage

GOLDEN = Path(__file__).parents[1] / "golden" / "api-keys-v1" / "api_keys.json"
DAY = 86_400.0
NOW = 1000 * DAY


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "data")


def one_key(**changes: object) -> Keys:
    """Return a list with the key "first", named shop."""
    fields = {"id": "K00000001", "name": "shop", "scopes": ["feedback", "decide"], "now": NOW} | changes
    return rules.create((), "first", **fields)


def rotated(keys: Keys, *, now: float, overlap_s: float, number: int = 2) -> Keys:
    return rules.rotate(keys, f"key {number}", id=f"K0000000{number}", name="shop", now=now, overlap_s=overlap_s)


def valid(keys: Keys, now: float) -> list[str]:
    return [record.id for record in keys if record.why_refused(now) is None]


# --- the rules ---


def test_a_key_is_kept_as_its_sha256_with_its_scopes_in_one_order() -> None:
    (record,) = one_key(requests_per_s=100, max_concurrent=20)
    # printf first | sha256sum
    assert record.sha256 == "a7937b64b8caa58f03721bb6bacf5c78cb235febe0e70b1b84cd99541461a08e"
    assert record.scopes == ("decide", "feedback")
    assert (record.requests_per_s, record.max_concurrent, record.created_at) == (100.0, 20, NOW)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "Shop"}, "start with a letter"),
        ({"name": "7up"}, "start with a letter"),
        ({"name": "shop\n"}, "start with a letter"),
        ({"name": "s" * 64}, "start with a letter"),
        ({"scopes": []}, "opens nothing"),
        ({"scopes": ["decide", "admin"]}, "no scope 'admin'; the scopes are decide, feedback, read, operate, approve"),
        ({"expires_at": NOW}, "expired 0 s ago; name a later --expires"),
        ({"expires_at": float("inf")}, "cannot be made"),
        ({"requests_per_s": 0}, "cannot be made"),
        ({"requests_per_s": float("nan")}, "cannot be made"),
        ({"max_concurrent": 0}, "cannot be made"),
    ],
)
def test_what_no_key_can_be_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("expired 0 s", "would have expired 0 s")):
        one_key(**changes)


def test_a_name_is_free_again_when_its_key_is_over() -> None:
    keys = one_key()
    with pytest.raises(ConfigError, match=r"there is a key 'shop' \(K00000001\) already.*rotate shop"):
        rules.create(keys, "other", id="K00000002", name="shop", scopes=["read"], now=NOW)
    keys = rules.revoke(keys, "shop", now=NOW + 1)
    keys = rules.create(keys, "other", id="K00000002", name="shop", scopes=["read"], now=NOW + 2)
    assert valid(keys, NOW + 2) == ["K00000002"]


def test_rotation_leaves_the_old_key_valid_for_the_overlap_and_not_a_moment_longer() -> None:
    keys = rotated(one_key(requests_per_s=5, max_concurrent=2), now=NOW + 10, overlap_s=3600)
    old, new = keys
    assert (new.scopes, new.requests_per_s, new.max_concurrent, new.name) == (("decide", "feedback"), 5.0, 2, "shop")
    assert new.sha256 != old.sha256 and new.expires_at is None
    assert valid(keys, NOW + 10 + 3599.9) == ["K00000001", "K00000002"]
    assert valid(keys, NOW + 10 + 3600) == ["K00000002"]


def test_at_every_moment_of_three_rotations_the_newest_key_is_valid() -> None:
    keys = one_key()
    for number in (2, 3, 4):  # each within the overlap of the one before
        keys = rotated(keys, now=NOW + number, overlap_s=100.0, number=number)
        assert valid(keys, NOW + number)[-1] == f"K0000000{number}"
    # Rotated 2, 3 and 4 s after NOW, they end at 102, 103 and 104: no later rotation moves an end.
    assert [len(valid(keys, NOW + seconds)) for seconds in (101, 102, 103, 104)] == [4, 3, 2, 1]


def test_the_overlap_never_prolongs_a_key_and_its_follower_lasts_as_long_as_it_was_made_to() -> None:
    keys = rotated(one_key(expires_at=NOW + 10 * DAY), now=NOW + 9.5 * DAY, overlap_s=DAY)
    assert keys[0].expires_at == NOW + 10 * DAY, "half a day before the overlap would end"
    assert keys[1].expires_at == NOW + 19.5 * DAY, "made for ten days, like the first"


def test_a_key_that_is_over_cannot_be_rotated_back_to_life() -> None:
    expired = one_key(expires_at=NOW + 1)
    for keys, now in ((expired, NOW + 1), (rules.revoke(one_key(), "shop", now=NOW), NOW + 1), ((), NOW)):
        with pytest.raises(NotFound, match=r"no valid key is named 'shop'.*apikey create shop"):
            rotated(keys, now=now, overlap_s=0)


@pytest.mark.parametrize("overlap_s", [-1.0, KEPT_S + 1, float("inf"), float("nan")])
def test_an_overlap_that_is_none_is_refused(overlap_s: float) -> None:
    with pytest.raises(ConfigError, match="the overlap is"):
        rotated(one_key(), now=NOW, overlap_s=overlap_s)


def test_a_name_revokes_the_old_key_of_a_rotation_too_and_an_id_only_that_one() -> None:
    keys = rotated(one_key(), now=NOW, overlap_s=DAY)
    assert valid(rules.revoke(keys, "shop", now=NOW + 1), NOW + 1) == []
    assert valid(rules.revoke(keys, "K00000001", now=NOW + 1), NOW + 1) == ["K00000002"]
    with pytest.raises(NotFound, match=r"no key has the name or id 'K0' \(there are: shop\)"):
        rules.revoke(keys, "K0", now=NOW)


def test_revoking_twice_keeps_the_first_time_and_there_is_no_way_back() -> None:
    keys = rules.revoke(rules.revoke(one_key(), "shop", now=NOW + 1), "shop", now=NOW + 9)
    assert keys[0].revoked_at == NOW + 1 and "revoked 8 s ago" in (keys[0].why_refused(NOW + 9) or "")
    assert valid(keys, 0.0) == [], "a clock that is behind does not bring it back"


def test_keys_that_have_been_over_for_a_year_are_forgotten_and_no_others() -> None:
    keys = rotated(one_key(), now=NOW, overlap_s=0)
    assert len(rules.without_long_over(keys, now=NOW + KEPT_S)) == 2
    assert [record.id for record in rules.without_long_over(keys, now=NOW + KEPT_S + 1)] == ["K00000002"]


# --- reading ---


def test_the_format_of_version_1_is_still_read() -> None:
    owner, old, new = parse_keys(GOLDEN.read_bytes(), "golden")
    assert (owner.name, owner.scopes, owner.sha256) == (OWNER, SCOPES, sha256_hex(b"tt-golden-owner-key-not-in-use"))
    assert (old.name, old.expires_at, old.requests_per_s, old.max_concurrent) == ("shop", 1_800_086_400.0, 100.0, 20)
    assert (new.name, new.expires_at, new.revoked_at) == ("shop", None, 1_800_000_500.0)


DAMAGE = [
    (lambda file: file | {"schema_version": 2}, "schema version 2, this Trimtab reads 1"),
    (lambda file: file["keys"], "schema version None"),
    (lambda file: file | {"more": 1}, "unknown field"),
    (lambda file: file | {"keys": {}}, "Expected `array`"),
    (lambda file: file | {"keys": [file["keys"][0] | {"admin": True}]}, "unknown field `admin`"),
    (lambda file: file | {"keys": [_without(file["keys"][0], "revoked_at")]}, "missing required field `revoked_at`"),
    (lambda file: file | {"keys": [file["keys"][0] | {"scopes": ["root"]}]}, "root"),
    (lambda file: file | {"keys": [file["keys"][0] | {"scopes": []}]}, "length >= 1"),
    (lambda file: file | {"keys": [file["keys"][0] | {"scopes": ["read", "decide"]}]}, "out of order"),
    (lambda file: file | {"keys": [file["keys"][0] | {"sha256": "ab"}]}, "matching regex"),
    (lambda file: file | {"keys": [file["keys"][0] | {"expires_at": "never"}]}, "Expected `float | null`"),
    (lambda file: file | {"keys": [file["keys"][0] | {"max_concurrent": True}]}, "Expected `int | null`"),
    (lambda file: file | {"keys": [file["keys"][0]] * 2}, "two keys have the same id"),
    (lambda file: file | {"keys": [file["keys"][0], file["keys"][1] | {"sha256": file["keys"][0]["sha256"]}]}, "same sha256"),
]


def _without(fields: dict, name: str) -> dict:
    return {key: value for key, value in fields.items() if key != name}


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_a_damaged_file_is_refused_as_a_whole(damage, words: str) -> None:
    with pytest.raises(IntegrityError, match=words):
        parse_keys(canonical_json(damage(json.loads(GOLDEN.read_bytes()))), "golden")


@pytest.mark.parametrize(
    "data", [b"", b"{", b'{"schema_version":1,"schema_version":1,"keys":[]}', b'{"schema_version":1,"keys":[NaN]}']
)
def test_what_is_no_json_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="not readable JSON"):
        parse_keys(data, "file")


def test_every_truncation_of_the_file_is_refused() -> None:
    data = GOLDEN.read_bytes().rstrip()
    for length in range(len(data)):
        with pytest.raises(IntegrityError):
            parse_keys(data[:length], "file")


# --- the file ---


def test_a_new_root_has_the_owners_key_with_every_scope(storage: Storage) -> None:
    (owner,) = storage.api_keys.read()
    assert (owner.name, owner.scopes, owner.expires_at) == (OWNER, SCOPES, None)
    assert owner.sha256 == sha256_hex(storage.api_key_file.read_bytes())
    assert storage.api_keys.owner_key() == storage.api_key_file.read_text()
    assert stat.S_IMODE(storage.api_keys.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(storage.api_key_file.stat().st_mode) == 0o600


def test_a_root_made_before_there_were_scopes_is_taken_over_with_the_key_it_has(storage: Storage) -> None:
    key = storage.api_key_file.read_text()
    storage.api_keys.path.unlink()
    (owner,) = open_storage(storage.root).api_keys.read()
    assert storage.api_key_file.read_text() == key and owner.sha256 == sha256_hex(key.encode())


def test_a_root_is_taken_over_once_so_that_a_revoked_owner_stays_revoked(storage: Storage) -> None:
    storage.api_keys.revoke(OWNER, now=NOW)
    (owner,) = open_storage(storage.root).api_keys.read()
    assert owner.revoked_at == NOW


def test_a_key_that_somebody_could_guess_is_not_taken_over(storage: Storage) -> None:
    storage.api_keys.path.unlink()
    for weak in ("", "\n", "hunter2"):
        storage.api_key_file.write_text(weak)
        with pytest.raises(StorageError, match="at least 20 are needed; delete it"):
            open_storage(storage.root)
    assert not storage.api_keys.path.exists()


def test_a_process_of_the_cluster_makes_no_keys(storage: Storage) -> None:
    storage.api_keys.path.unlink()
    opened = existing_storage(storage.root)
    with pytest.raises(StorageError, match=r"api_keys\.json is missing"):
        opened.api_keys.read()
    with pytest.raises(StorageError, match="missing"):
        opened.api_keys.create("shop", ["decide"], now=NOW)
    assert not storage.api_keys.path.exists()


def test_keys_are_hashed_at_rest(storage: Storage) -> None:
    """The owner's own copy is the one place where a key's text may be found."""
    owner = storage.api_keys.owner_key()
    _, shop = storage.api_keys.create("shop", ["decide"], now=NOW)
    _, after = storage.api_keys.rotate("shop", now=NOW)
    storage.api_keys.revoke("shop", now=NOW)
    assert _files_with(storage, shop) == [] and _files_with(storage, after) == []
    assert _files_with(storage, owner) == ["api_key"], "the control: the search finds what is there"


def _files_with(storage: Storage, text: str) -> list[str]:
    files = [path for path in storage.root.rglob("*") if path.is_file()]
    return [path.name for path in files if text.encode() in path.read_bytes()]


def test_the_owners_copy_follows_a_rotation_and_can_be_made_anew_after_a_revocation(storage: Storage) -> None:
    _, second = storage.api_keys.rotate(OWNER, now=NOW)
    assert storage.api_keys.owner_key() == second
    storage.api_keys.revoke(OWNER, now=NOW)
    _, third = storage.api_keys.create(OWNER, SCOPES, now=NOW)
    assert storage.api_keys.owner_key() == third
    storage.api_keys.create("shop", ["read"], now=NOW)
    assert storage.api_keys.owner_key() == third, "only the owner's key is copied"


def test_an_owners_copy_that_was_taken_away_is_not_made_again_behind_their_back(storage: Storage) -> None:
    storage.api_key_file.unlink()
    opened = open_storage(storage.root)
    with pytest.raises(NotFound, match="apikey rotate owner"):
        opened.api_keys.owner_key()
    assert opened.api_keys.rotate(OWNER, now=NOW)[1] == opened.api_keys.owner_key()


def test_a_change_to_a_damaged_file_is_refused_and_leaves_it_alone(storage: Storage) -> None:
    storage.api_keys.path.write_bytes(b"{}")
    for change in (
        lambda store: store.create("shop", ["read"], now=NOW),
        lambda store: store.rotate(OWNER, now=NOW),
        lambda store: store.revoke(OWNER, now=NOW),
    ):
        with pytest.raises(IntegrityError):
            change(storage.api_keys)
    assert storage.api_keys.path.read_bytes() == b"{}"
    open_storage(storage.root)  # what does not need the keys goes on


# --- two at once ---

NUM_KEYS_EACH = 20


class Unlocked(ApiKeyStore):
    """The broken store: reads, changes and writes without keeping others out."""

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def _create_many(store: ApiKeyStore, prefix: str, barrier) -> None:
    barrier.wait(30)
    for number in range(NUM_KEYS_EACH):
        store.create(f"{prefix}{number}", ["read"], now=NOW)


@pytest.mark.parametrize("kind", [ApiKeyStore, Unlocked])
def test_two_processes_that_make_keys_at_once_lose_none(storage: Storage, kind: type[ApiKeyStore]) -> None:
    """The store without a lock is the negative control: it loses some."""
    context = multiprocessing.get_context("fork")
    barrier, store = context.Barrier(2), kind(**dataclasses.asdict(storage.api_keys))
    writers = [context.Process(target=_create_many, args=(store, prefix, barrier)) for prefix in ("a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    names = {record.name for record in storage.api_keys.read()}
    expected = {OWNER, *(f"{prefix}{number}" for prefix in "ab" for number in range(NUM_KEYS_EACH))}
    assert (names == expected) == (kind is ApiKeyStore)


def _open_once(root: Path, barrier, results) -> None:
    barrier.wait(30)
    results.put(open_storage(root).api_keys.owner_key())


def test_processes_that_open_a_new_root_at_once_agree_on_one_key(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    openers = [context.Process(target=_open_once, args=(tmp_path / "new", barrier, results)) for _ in range(4)]
    for opener in openers:
        opener.start()
    keys = {results.get(timeout=30) for _ in openers}
    for opener in openers:
        opener.join(30)
    (owner,) = open_storage(tmp_path / "new").api_keys.read()
    assert {sha256_hex(key.encode()) for key in keys} == {owner.sha256}


def test_whoever_comes_second_to_a_new_root_keeps_what_the_first_made(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.api_keys.path.unlink()

    def lock_after_a_faster_process(path: Path, *, timeout_s: float) -> contextlib.AbstractContextManager[None]:
        monkeypatch.setattr(rules, "exclusive_lock", exclusive_lock)
        open_storage(storage.root).api_keys.create("shop", ["read"], now=NOW)
        return exclusive_lock(path, timeout_s=timeout_s)

    monkeypatch.setattr(rules, "exclusive_lock", lock_after_a_faster_process)
    storage.api_keys.ensure_owner(now=NOW)
    assert [record.name for record in storage.api_keys.read()] == [OWNER, "shop"]


def test_a_lock_that_another_holds_is_waited_for_and_then_named(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with (
        exclusive_lock(path, timeout_s=1.0),
        pytest.raises(StorageError, match=r"has held .*lock for 0\.05 s"),
        exclusive_lock(path, timeout_s=0.05),
    ):
        raise AssertionError("two are in at once")
    with exclusive_lock(path, timeout_s=0.0):  # it was let go
        pass


def test_a_key_can_be_told_apart_from_a_name() -> None:
    """Else `revoke` could mean two keys."""
    (record,) = one_key()
    assert isinstance(record, KeyRecord) and record.id.startswith("K")
    with pytest.raises(ConfigError, match="start with a letter"):
        one_key(name=record.id)
