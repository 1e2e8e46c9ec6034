"""The registry of one policy: its journal and its bundles, in the storage root or where `location.json` there says.

The shell around pure parts: what an entry may say is in `registry_entries`, what entries add up to in `registry_state`, how they
are chained in `journal`, and which places can hold them in `registry_store`. Their public names are importable from here.
"""

import contextlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from policies import journal
from policies.bundle import Bundle, read_bundle
from policies.errors import ConfigError, IntegrityError, RegistryConflict
from policies.integrity import canonical_json, commit_directory, make_directory, parse_json, remove, write_atomic
from policies.journal import Entry, Tail
from policies.registry_entries import change_release, register_version, set_champion, start_release
from policies.registry_state import (
    RegistryState,
    Release,
    ReleaseAction,
    ReleaseState,
    ReleaseStep,
    Version,
    apply,
)
from policies.registry_store import BUNDLES, DirectoryStore, ObjectStore, RegistryStore
from policies.trust import SigningKey, TrustStore, require_made_for, signature_path

__all__ = [
    "Registry",
    "RegistryState",
    "Release",
    "ReleaseAction",
    "ReleaseState",
    "ReleaseStep",
    "Version",
    "apply",
    "change_release",
    "locate_registry",
    "register_version",
    "set_champion",
    "start_release",
]

LOCATION = "location.json"
# A lost race means that somebody else's entry is in. The waits, up to a fifth of a second each, spread the writers out:
# 8 that do nothing but append lose at most some twenty in a row.
MAX_APPEND_TRIES = 100
MAX_WAIT_S = 0.2


class Registry:
    """The registry of one policy. Reading is incremental: a poll without news asks for one file that is not there.

    `bundles` is the local directory that bundles are written to and read from. For a registry elsewhere it is a cache.
    With a trust store, only versions come out whose signature counts: see `policies.trust`.
    """

    def __init__(self, root: Path, *, trust: TrustStore | None = None) -> None:
        self._policy, self._trust = root.name, trust
        self.store = _store(root)
        self._is_directory = isinstance(self.store, DirectoryStore)
        self.bundles = (self.store.root if isinstance(self.store, DirectoryStore) else root) / BUNDLES
        self._state = RegistryState()

    def state(self) -> RegistryState:
        """Return the state after all entries; raises `IntegrityError` when the chain is broken."""
        return self._follow()[0]

    def entries(self) -> list[Entry]:
        """Read all entries again from the first one; raises `IntegrityError` when the chain is broken."""
        return journal.read_all(self.store)[0]

    def append(self, decide: Callable[[RegistryState], dict[str, Any]], *, now: float) -> RegistryState:
        """Append the entry that `decide` returns for the current state, deciding again when another writer was faster.

        `decide` raises to refuse. Raises `RegistryConflict` after many lost races.
        """
        for attempt in range(MAX_APPEND_TRIES):
            state, tail = self._follow()
            data = journal.encode(tail, decide(state), now=now)
            _after(state, journal.decode(tail, data, f"{self.store}/{tail.name}"))  # what readers would refuse is not written
            if self._create(tail.name, data):
                return self.state()
            time.sleep(random.uniform(0, min(MAX_WAIT_S, 0.001 * 2**attempt)))
        raise RegistryConflict(f"lost {MAX_APPEND_TRIES} races for the next journal entry in {self.store}; try again")

    def register(self, bundle: Bundle, *, now: float) -> RegistryState:
        """Put a local bundle into the registry and give it the next version number: first the bytes, then the entry."""
        self.store.put_bundle(bundle.path)
        return self.append(lambda state: register_version(state, bundle), now=now)

    @property
    def requires_signatures(self) -> bool:
        return self._trust is not None

    def bundle(self, version: int) -> Bundle:
        """Read and verify the bundle of a version, after its signature where signatures are required."""
        digest = self.state().version(version).digest
        if self._trust is None:
            return self.bundle_of(digest)
        path = self._local(digest)
        if not self._is_directory:  # always the one in force: a version may be signed again
            self._fetch_signature(digest, path)
        signed = self._trust.verify(path, now=time.time())
        bundle = read_bundle(path, expected_digest=digest)
        require_made_for(signed, bundle, policy=self._policy, version=version)
        return bundle

    def sign(self, version: int, key: SigningKey) -> Path:
        """Sign a version as what it is, instead of the signature it may have; return where the signature is here."""
        bundle = self.bundle_of(self.state().version(version).digest)
        path = key.sign_version(bundle, policy=self._policy, version=version)
        self.store.replace(f"{BUNDLES}/{path.name}", path.read_bytes())
        return path

    def bundle_of(self, digest: str) -> Bundle:
        """Read and verify a bundle by its digest; one that is elsewhere is copied here first."""
        return read_bundle(self._local(digest), expected_digest=digest)

    @contextlib.contextmanager
    def kept_bundle(self, digest: str) -> Iterator[Path]:
        """Give the directory of a bundle as the registry keeps it, whatever copy is here: unverified, its signature beside it."""
        if self._is_directory:
            yield self.bundles / digest
            return
        with tempfile.TemporaryDirectory() as parent:
            path = Path(parent) / digest
            self.store.fetch_bundle(digest, path)
            self._fetch_signature(digest, path)
            yield path

    def remove_bundle(self, name: str) -> None:
        """Remove a bundle and its signature from the registry, and the copies of them that are here."""
        self.store.remove_bundle(name)
        for path in (self.bundles / name, signature_path(self.bundles / name)):
            remove(path)

    def _local(self, digest: str) -> Path:
        path = self.bundles / digest
        if not path.exists():
            self._fetch(digest)
        return path

    def _fetch_signature(self, digest: str, path: Path) -> None:
        beside = signature_path(path)
        data = self.store.read(f"{BUNDLES}/{signature_path(Path(digest)).name}")
        if data is None:
            remove(beside)
        else:
            write_atomic(beside, data)

    def _fetch(self, digest: str) -> None:
        make_directory(self.bundles)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=self.bundles) as parent:
            copy = Path(parent) / digest
            self.store.fetch_bundle(digest, copy)
            read_bundle(copy, expected_digest=digest)  # nothing unverified gets the name that says what it is
            try:
                commit_directory(copy, self.bundles / digest)
            except OSError:
                if not (self.bundles / digest).exists():  # else another process fetched it meanwhile, the same bytes
                    raise

    def _create(self, name: str, data: bytes) -> bool:
        """Create a file and say whether it is there now with these bytes.

        What is there is asked, not the answer to the creation: NFS and S3 clients send a request again when its answer was lost,
        and the second one then finds the name taken by the first.
        """
        with contextlib.suppress(FileExistsError):
            self.store.create(name, data)
        return self.store.read(name) == data

    def _follow(self) -> tuple[RegistryState, Tail]:
        while True:
            found = journal.read_next(self.store, self._state.num_entries + 1, self._state.last_sha256)
            if isinstance(found, Tail):
                return replace(self._state, torn=list(found.torn)[-1] if found.torn else None), found
            self._state = _after(self._state, found)


def locate_registry(root: Path, location: str) -> None:
    """Say in the storage root that its registry is at `location`: a directory, or an `s3://bucket/prefix`.

    All processes that open the registry find it there. Raises `ConfigError` when the root has another registry already,
    `StorageError` when the place cannot be used or does not keep two writers apart.
    """
    pointer = root / LOCATION
    if "://" not in location:
        location = str(Path(location).expanduser().absolute())
    elif not location.startswith("s3://") or not location.removeprefix("s3://").strip("/"):
        raise ConfigError(f"registry {location!r}: expected a directory or s3://bucket/prefix")
    if pointer.exists():
        found = _location(pointer)
        if found != location:
            raise ConfigError(f"{root} has its registry at {found}, not at {location}; use another storage root")
        return
    if (root / journal.FOLDER).exists():
        raise ConfigError(
            f"{root} has a registry of its own already, so it cannot be at {location}; leave `registry` out, or copy "
            f"{journal.FOLDER} and {BUNDLES} there and move them away from here"
        )
    if location.startswith("s3://"):
        ObjectStore(location).check()
    make_directory(root)
    write_atomic(pointer, canonical_json({"location": location}))


def _store(root: Path) -> RegistryStore:
    pointer = root / LOCATION
    location = _location(pointer) if pointer.exists() else str(root)
    return ObjectStore(location) if location.startswith("s3://") else DirectoryStore(Path(location))


def _location(pointer: Path) -> str:
    found = parse_json(pointer.read_bytes(), str(pointer))
    if not isinstance(found, dict) or not isinstance(found.get("location"), str):
        raise IntegrityError(f"{pointer} does not say where the registry is: expected an object with the key 'location'")
    return found["location"]


def _after(state: RegistryState, entry: Entry) -> RegistryState:
    number = entry.body["number"]
    try:
        folded = apply(state, entry.body)
    except (KeyError, IndexError, TypeError, ValueError, AssertionError) as error:
        raise IntegrityError(f"{entry.files[-1]} is malformed: {error!r}") from error
    return replace(folded, num_entries=number, last_sha256=entry.sha256)
