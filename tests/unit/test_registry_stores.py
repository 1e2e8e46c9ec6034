"""Is a directory or an S3 bucket a place where many writers can share a registry, and is an unfit place refused?"""

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from policies.errors import ConfigError, IntegrityError, NotFound, SignatureRefused, StorageError
from policies.journal import entry_name
from policies.registry import Registry, locate_registry, register_version, set_champion
from policies.registry_entries import set_alias
from policies.registry_store import DirectoryStore, ObjectStore, RegistryStore
from policies.registry_verify import verify
from policies.storage import open_storage
from policies.trust import SigningKey, TrustStore, create_key
from serve_app.variants import VariantStore
from tests.bundles import make_bundle, make_policy, make_registry
from tests.journal_checker import find_faults
from tests.registry_writers import run_writers
from tests.s3_server import s3_server

NO_KEYS = TrustStore(Path("no-such-directory"))


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3")):
        yield "s3://registry"


@pytest.fixture(params=["directory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new place for a registry, as the loop file's key names it."""
    if request.param == "directory":
        return str(tmp_path / "shared")
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def _open(place: str) -> RegistryStore:
    return ObjectStore(place) if place.startswith("s3://") else DirectoryStore(Path(place))


def _registry_at(place: str, root: Path) -> Registry:
    locate_registry(root, place)
    return Registry(root)


def test_a_name_is_taken_once_and_keeps_its_first_content(place: str) -> None:
    store = _open(place)
    assert (store.read("journal/1.json"), store.names("journal")) == (None, [])
    store.create("journal/1.json", b"first")
    store.create("journal/2.json", b"")
    with pytest.raises(FileExistsError):
        store.create("journal/1.json", b"second")
    assert (store.read("journal/1.json"), store.read("journal/2.json")) == (b"first", b"")
    assert store.names("journal") == ["1.json", "2.json"]


def test_a_huge_file_is_refused_before_it_is_read_whole(place: str) -> None:
    store = _open(place)
    store.create("journal/1.json", b"x" * ((1 << 20) + 1))
    with pytest.raises(IntegrityError, match="has more than 1048576 bytes"):
        store.read("journal/1.json")


def _create(place: str, name: str, content: bytes, barrier, won) -> None:
    store = _open(place)
    for turn in range(4):
        barrier.wait(timeout=60)
        try:
            store.create(f"{name}-{turn}", content)
        except FileExistsError:
            continue
        won.put((turn, content))


def test_of_many_processes_one_creates_a_name(place: str) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, won = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_create, args=(place, "race", b"%d" % index, barrier, won)) for index in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    winners = dict(won.get(timeout=10) for _ in range(4))
    assert won.empty() and sorted(winners) == [0, 1, 2, 3]
    assert all(_open(place).read(f"race-{turn}") == content for turn, content in winners.items())


def test_a_second_machine_reads_what_the_first_one_published(place: str, tmp_path: Path) -> None:
    """Two storage roots, one registry: bundles are copied when they are asked for, and verified."""
    here, there = _registry_at(place, tmp_path / "here"), _registry_at(place, tmp_path / "there")
    bundle = make_bundle(here.bundles, make_policy())
    here.register(bundle, now=1.0)
    here.append(lambda state: set_champion(state, 1, "first version"), now=2.0)
    assert there.state() == here.state() and there.state().champion == 1
    assert there.bundle(1).policy.sha256() == bundle.policy.sha256()
    copies = {path.name: path.read_bytes() for path in (there.bundles / bundle.digest).iterdir()}
    assert copies == {path.name: path.read_bytes() for path in bundle.path.iterdir()}
    assert [path for path in there.bundles.iterdir() if path.name.startswith(".tmp-")] == []
    with pytest.raises(NotFound, match="there is no bundle 0000"):
        there.bundle_of("0" * 64)


def test_a_bundle_from_elsewhere_is_put_in_before_its_entry(place: str, tmp_path: Path) -> None:
    registry = _registry_at(place, tmp_path / "here")
    bundle = make_bundle(tmp_path / "elsewhere", make_policy())
    registry.register(bundle, now=1.0)
    assert registry.store.names("bundles") == [bundle.digest]
    assert _registry_at(place, tmp_path / "there").bundle(1).digest == bundle.digest


def test_half_a_bundle_in_a_bucket_is_a_remark_until_a_version_needs_it(bucket: str, tmp_path: Path) -> None:
    """An upload or a removal was interrupted: the manifest, which makes it whole, is not there."""
    registry = _registry_at(f"{bucket}/{tmp_path.name}", tmp_path / "here")
    bundle = make_bundle(registry.bundles, make_policy())
    _put(f"{bucket}/{tmp_path.name}/bundles/{bundle.digest}/gates.json", b"{}")
    assert [remark.split(" is not whole")[0] for remark in verify(registry, NO_KEYS).remarks] == [f"bundle {bundle.digest}"]
    registry.append(lambda state: register_version(state, bundle), now=1.0)  # as nobody should: without the bytes
    assert verify(registry, NO_KEYS).problems == (f"bundle {bundle.digest} has no manifest",)


def test_a_signature_counts_on_every_machine_until_it_is_replaced_or_gone(place: str, tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "keys")
    trust, keys = TrustStore(storage.trust), []
    for name in ("alice", "bob"):
        trust.trust(create_key(storage, name)[1].read_bytes(), name=name, expires_at=None, now=1.0)
        keys.append(SigningKey.load(storage, name, now=2.0))
    here = _registry_at(place, tmp_path / "p/here")
    here.register(make_bundle(here.bundles, make_policy()), now=1.0)
    locate_registry(tmp_path / "q/here", place)  # the same policy: the last part of a root is its name
    there = Registry(tmp_path / "q/here", trust=trust)
    with pytest.raises(SignatureRefused, match="has no signature"):
        there.bundle(1)
    here.sign(1, keys[0])
    assert there.bundle(1).digest == here.bundle(1).digest
    trust.revoke("alice", reason="left", now=3.0)
    with pytest.raises(SignatureRefused, match="was revoked: left"):
        there.bundle(1)
    here.sign(1, keys[1])
    assert there.bundle(1) and verify(there, trust).problems == ()
    here.remove_bundle(here.state().version(1).digest)
    assert here.store.names("bundles") == []


def test_writers_in_several_roots_share_one_journal(place: str, tmp_path: Path) -> None:
    roots = [tmp_path / f"root-{index}" for index in range(3)]
    registries = [_registry_at(place, root) for root in roots]
    bundle = make_bundle(registries[0].bundles, make_policy())
    registries[0].register(bundle, now=1.0)
    registries[0].append(lambda state: set_champion(state, 1, "first version"), now=2.0)
    acknowledged = [bundle.digest, "first version", *run_writers(roots, tmp_path, seconds=4.0)]
    store = _open(place)
    files = {name: store.read(f"journal/{name}") for name in store.names("journal")}
    assert find_faults(files, acknowledged) == []
    assert len(files) == len(acknowledged) > 2


def test_a_changed_byte_in_the_bucket_is_found_before_the_copy_gets_its_name(bucket: str, tmp_path: Path) -> None:
    place = f"{bucket}/{tmp_path.name}"
    here, there = _registry_at(place, tmp_path / "here"), _registry_at(place, tmp_path / "there")
    bundle = make_bundle(here.bundles, make_policy())
    here.register(bundle, now=1.0)
    assert verify(here, NO_KEYS).problems == ()
    data = (bundle.path / "policy.safetensors").read_bytes()
    _put(f"{place}/bundles/{bundle.digest}/policy.safetensors", data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(IntegrityError, match=r"policy\.safetensors: sha256 is"):
        there.bundle(1)
    assert list(there.bundles.iterdir()) == []
    assert here.bundle(1).digest == bundle.digest  # the control: the copy of the publisher is whole
    assert len(verify(here, NO_KEYS).problems) == 1  # but it is the bucket that is verified


def test_a_torn_entry_in_a_bucket_is_stood_in_for(bucket: str, tmp_path: Path) -> None:
    """S3 itself never shows one; a tool that copies a bucket may."""
    registry = _registry_at(f"{bucket}/{tmp_path.name}", tmp_path / "here")
    registry.register(make_bundle(registry.bundles, make_policy()), now=1.0)
    _put(f"{bucket}/{tmp_path.name}/{entry_name(2)}", b"")
    assert registry.state().torn == entry_name(2)
    state = registry.append(lambda state: set_alias(state, "eu", 1, "test"), now=2.0)
    assert (state.set_aliases, state.torn) == ({"eu": 1}, None)


def test_a_removed_bundle_is_gone_for_readers(place: str, tmp_path: Path) -> None:
    registry = _registry_at(place, tmp_path / "here")
    bundles = [make_bundle(registry.bundles, make_policy(seed)) for seed in range(2)]
    for bundle in bundles:
        registry.register(bundle, now=1.0)
    assert 0 <= registry.store.bundle_age_s(bundles[0].digest) < 3600
    registry.store.remove_bundle(bundles[0].digest)
    assert registry.store.names("bundles") == [bundles[1].digest]
    other = _registry_at(place, tmp_path / "other")
    with pytest.raises(NotFound, match="there is no bundle"):
        other.bundle(1)
    assert other.bundle(2).digest == bundles[1].digest


def test_a_replica_serves_from_a_bucket_and_goes_on_while_it_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    (tmp_path / "s3").mkdir()
    with s3_server(tmp_path / "s3"):
        publisher = _registry_at("s3://registry/team/p", tmp_path / "a/p")
        publisher.register(make_bundle(publisher.bundles, make_policy()), now=1.0)
        publisher.append(lambda state: set_champion(state, 1, "first version"), now=2.0)
        replica = VariantStore(_registry_at("s3://registry/team/p", tmp_path / "b/p"))
        replica.refresh(now=0.0)
        assert replica.registry_error is None
        snapshot = replica.snapshot
        assert snapshot is not None and snapshot.champion.version == 1
    replica.refresh(now=1.0)
    assert "cannot read journal/00000003.json" in replica.registry_error
    assert replica.snapshot is snapshot


class _IgnoresCondition(ObjectStore):
    """An S3-compatible store that knows no conditional writes: what the header would refuse is written over."""

    def create(self, name: str, data: bytes) -> None:
        self._filesystem.pipe_file(self._path(name), data)


def test_a_store_that_ignores_the_condition_is_refused(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="ignores `If-None-Match"):
        _IgnoresCondition(f"{bucket}/{tmp_path.name}").check()
    store = ObjectStore(f"{bucket}/{tmp_path.name}")
    store.check()  # the control
    assert ObjectStore(bucket).names(tmp_path.name) == []  # neither leaves its probe


def test_a_bucket_that_does_not_answer_is_said(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="cannot create probe-"):
        locate_registry(tmp_path / "a", "s3://no-such-bucket/prefix")
    monkeypatch.setitem(os.environ, "AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setitem(os.environ, "AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StorageError, match="cannot read journal"):
        ObjectStore(f"{bucket}/new-{tmp_path.name}").read("journal/1.json")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("location", ["gs://bucket/prefix", "s3://", "s3:///", "https://host/x"])
def test_other_places_are_refused(tmp_path: Path, location: str) -> None:
    with pytest.raises(ConfigError, match="expected a directory or s3://bucket/prefix"):
        locate_registry(tmp_path, location)


def test_a_root_has_one_registry(tmp_path: Path) -> None:
    locate_registry(tmp_path / "a", str(tmp_path / "shared"))
    locate_registry(tmp_path / "a", str(tmp_path / "shared"))  # saying the same again is fine
    with pytest.raises(ConfigError, match="has its registry at"):
        locate_registry(tmp_path / "a", str(tmp_path / "elsewhere"))
    make_registry(tmp_path / "b")
    with pytest.raises(ConfigError, match="has a registry of its own already"):
        locate_registry(tmp_path / "b", str(tmp_path / "shared"))


@pytest.mark.parametrize("data", [b"{}", b"[]", b'{"location": 3}', b"{"])
def test_a_broken_location_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "location.json").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"location\.json"):
        Registry(tmp_path)


def _put(url: str, data: bytes) -> None:
    import s3fs

    s3fs.S3FileSystem(use_listings_cache=False).pipe_file(url, data)
