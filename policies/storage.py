"""The storage root: one directory that holds runs, registry, logs and keys, and says that it is ours."""

import contextlib
import os
import re
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from policies.api_keys import ApiKeyStore
from policies.errors import StorageError
from policies.integrity import canonical_json, create_if_absent, parse_json, write_atomic

MARKER = "trimtab-storage.json"
SCHEMA_VERSION = 1
DEFAULT_LOCATION = "./trimtab-data"
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True)
class Storage:
    """The paths under one storage root. Create it with `open_storage`."""

    root: Path

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def run(self, run_id: str) -> Path:
        return self.runs / run_id

    def tuning(self, search_id: str) -> Path:
        return self.root / "tuning" / search_id

    def registry(self, policy: str) -> Path:
        return self.root / "registry" / policy

    def decisions(self, policy: str) -> Path:
        return self.root / "log" / policy / "decisions"

    def feedback(self, policy: str) -> Path:
        return self.root / "log" / policy / "feedback"

    def shadows(self, policy: str) -> Path:
        return self.root / "log" / policy / "shadows"

    def overrides(self, policy: str) -> Path:
        return self.root / "log" / policy / "overrides"

    @property
    def api_keys(self) -> ApiKeyStore:
        return ApiKeyStore(self.root / "secrets")

    @property
    def api_key_file(self) -> Path:
        """The owner's key in clear: the copy for the person on this machine."""
        return self.api_keys.owner_file

    @property
    def decision_secret_file(self) -> Path:
        return self.root / "secrets" / "decision_secret"

    def private_key_file(self, name: str) -> Path:
        return self.root / "secrets" / "keys" / f"{name}.pem"

    @property
    def trust(self) -> Path:
        """Which public keys signatures may be made with; see `policies.trust`."""
        return self.root / "trust"

    @property
    def session_file(self) -> Path:
        """Where a running `up` or `serve` says which process and which address it is."""
        return self.root / "session.json"


def open_storage(location: str | Path = DEFAULT_LOCATION) -> Storage:
    """Open a storage root and create it when it does not exist.

    Raises `StorageError` when the place is read-only, is not a directory, holds files of something else, was written by a
    newer version, or is a URL of a remote store (not supported yet).
    """
    text = str(location)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    elif "://" in text:
        raise StorageError(
            f"storage {text!r}: only a local or shared directory is supported, not {text.split('://')[0]!r} URLs yet"
        )
    root = Path(text).expanduser().absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
        _claim(root)
        storage = Storage(root)
        storage.api_keys.ensure_owner(now=time.time())
        _create_secret(storage.decision_secret_file, secrets.token_hex(32))
    except (NotADirectoryError, FileExistsError) as error:
        raise StorageError(f"storage {root} is not a directory: {error}; name another place with --storage") from error
    except OSError as error:
        raise StorageError(f"storage {root} cannot be written: {error.strerror}; name another place with --storage") from error
    return storage


def existing_storage(location: str | Path) -> Storage:
    """Open a storage root that must be there already; raises `StorageError` where this machine does not see it.

    Processes of a cluster use this: on a node without the shared directory `open_storage` would make a new root, with
    another key, and answer from its emptiness.
    """
    root = Path(location)
    if not (root / MARKER).exists():
        raise StorageError(f"{socket.gethostname()} does not see the storage {root}; put it on a directory that all nodes share")
    return Storage(root)


def _claim(root: Path) -> None:
    marker = root / MARKER
    if marker.exists():
        found = parse_json(marker.read_bytes(), str(marker)).get("schema_version")
        if found != SCHEMA_VERSION:
            raise StorageError(f"storage {root} has schema version {found}, this Trimtab reads {SCHEMA_VERSION}; upgrade Trimtab")
        if not os.access(root, os.W_OK):
            raise StorageError(f"storage {root} is read-only; name another place with --storage")
        return
    others = [path.name for path in root.iterdir() if not path.name.startswith(".tmp-")]
    if others:
        raise StorageError(
            f"storage {root} is not empty and has no {MARKER}: it holds {sorted(others)[0]!r} and {len(others) - 1} more; "
            "name an empty or a new directory with --storage"
        )
    write_atomic(marker, canonical_json({"schema_version": SCHEMA_VERSION}))


def _create_secret(path: Path, value: str) -> None:
    if path.exists():
        return
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):  # another process opened the same new root; its secret is as good
        create_if_absent(path, value.encode(), mode=0o600)
