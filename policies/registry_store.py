"""Where a registry lives: a directory, or a prefix in an S3-compatible object store.

Both promise the two things that the journal needs of a place that many writers share: a file appears whole, under a name that
was free, or not at all (`create`); and who asks after that gets it (`read`).
"""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from policies.bundle_reader import MANIFEST, MAX_FILE_BYTES
from policies.errors import IntegrityError, NotFound, StorageError
from policies.integrity import commit_directory, create_if_absent, make_directory, remove, temporary_directory, write_atomic
from policies.trust import signature_path

BUNDLES = "bundles"
MAX_ENTRY_BYTES = 1 << 20  # an entry has a few hundred bytes; nobody's file makes readers run out of memory
MAX_BUNDLE_BYTES = sum(MAX_FILE_BYTES.values())


class RegistryStore(Protocol):
    """The files of one registry. Names are relative, with `/`; errors of the place itself are raised as `StorageError`."""

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes, None when there is no such file."""

    def create(self, name: str, data: bytes) -> None:
        """Create a file with its whole content or raise `FileExistsError`, whoever else tries at the same time."""

    def replace(self, name: str, data: bytes) -> None:
        """Write a file, instead of the one that may be there: signatures, which are no part of the journal."""

    def names(self, folder: str) -> list[str]:
        """Return the names directly below a folder, sorted; none when it does not exist."""

    def put_bundle(self, path: Path) -> None:
        """Keep the bundle in a local directory, under the directory's name."""

    def fetch_bundle(self, digest: str, into: Path) -> None:
        """Copy a bundle that is not in a local directory to the new one `into`, unverified; raises `NotFound` without one."""

    def bundle_age_s(self, name: str) -> float:
        """Return how long ago a bundle was put here."""

    def remove_bundle(self, name: str) -> None:
        """Remove a bundle and its signature: it disappears at once for readers, also when the removal is interrupted."""


class DirectoryStore:
    """A registry in a local or shared directory. Hard links make `create` atomic, on NFS as well."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def read(self, name: str) -> bytes | None:
        try:
            with open(self.root / name, "rb") as file:
                return _bounded(file.read(MAX_ENTRY_BYTES + 1), f"{self}/{name}")
        except FileNotFoundError:
            return None

    def create(self, name: str, data: bytes) -> None:
        path = self.root / name
        make_directory(path.parent)
        create_if_absent(path, data)

    def replace(self, name: str, data: bytes) -> None:
        write_atomic(self.root / name, data)

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(self.root / folder))
        except FileNotFoundError:
            return []

    def put_bundle(self, path: Path) -> None:
        final = self.root / BUNDLES / path.name
        if path == final or final.exists():
            return
        temporary = temporary_directory(final.parent)
        try:
            shutil.copytree(path, temporary, dirs_exist_ok=True)
            commit_directory(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def fetch_bundle(self, digest: str, into: Path) -> None:
        raise NotFound(f"there is no bundle {digest} in {self}")

    def bundle_age_s(self, name: str) -> float:
        return time.time() - (self.root / BUNDLES / name).stat().st_mtime

    def remove_bundle(self, name: str) -> None:
        path = self.root / BUNDLES / name
        doomed = path.with_name(f".tmp-removed-{secrets.token_hex(8)}")
        path.rename(doomed)
        remove(doomed)
        remove(signature_path(path))


class ObjectStore:
    """A registry below an `s3://bucket/prefix`; credentials and endpoint come from the AWS variables or files.

    `create` is a PUT with `If-None-Match: *`. Amazon S3, Cloudflare R2, MinIO and SeaweedFS honour it; a store that ignores
    it would let one writer overwrite another's entry, so `check` tries it out.
    """

    def __init__(self, url: str) -> None:
        try:
            import s3fs  # here, not above: only who has such a registry needs it
        except ImportError as error:
            raise StorageError(f"registry {url}: s3fs is not installed; pip install 'trimtab[s3]'") from error
        self._filesystem = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        self._url = url.rstrip("/")
        self._prefix = self._url.removeprefix("s3://")

    def __str__(self) -> str:
        return self._url

    def check(self) -> None:
        """Raise `StorageError` when the store cannot be used, or lets an object be created twice."""
        name = f"probe-{secrets.token_hex(8)}"
        self.create(name, b"first")
        try:
            self.create(name, b"second")
        except FileExistsError:
            return
        else:
            raise StorageError(
                f"{self} ignores `If-None-Match: *`: two writers would overwrite each other's journal entries; "
                "use a store or a version of it that honours conditional writes, or a shared directory"
            )
        finally:
            with self._errors("remove", name):
                self._filesystem.rm_file(self._path(name))

    def read(self, name: str) -> bytes | None:
        with self._errors("read", name):
            try:
                with self._filesystem.open(self._path(name), "rb", cache_type="none") as file:
                    return _bounded(file.read(MAX_ENTRY_BYTES + 1), f"{self}/{name}")
            except FileNotFoundError:
                return None

    def create(self, name: str, data: bytes) -> None:
        with self._errors("create", name):
            self._filesystem.pipe_file(self._path(name), data, mode="create")

    def replace(self, name: str, data: bytes) -> None:
        with self._errors("write", name):
            self._filesystem.pipe_file(self._path(name), data)

    def names(self, folder: str) -> list[str]:
        start = len(self._path(folder)) + 1
        with self._errors("list", folder):
            # Not `ls`: some stores go on to show a folder whose last object was removed.
            found = {path[start:].split("/")[0] for path in self._filesystem.find(self._path(folder))}
        return sorted(found - {""})

    def put_bundle(self, path: Path) -> None:
        """The manifest goes last: a bundle whose manifest is there is whole."""
        for file in sorted(path.iterdir(), key=lambda file: file.name == MANIFEST):
            with contextlib.suppress(FileExistsError):  # named by its content: what is there already is the same
                self.create(f"{BUNDLES}/{path.name}/{file.name}", file.read_bytes())

    def fetch_bundle(self, digest: str, into: Path) -> None:
        folder = f"{BUNDLES}/{digest}"
        with self._errors("list", folder):
            found = [entry for entry in self._ls(folder) if entry["type"] == "file"]
        if not any(_base(entry) == MANIFEST for entry in found):
            raise NotFound(f"there is no bundle {digest} in {self}")
        size_bytes = sum(entry["size"] for entry in found)
        if size_bytes > MAX_BUNDLE_BYTES:
            raise IntegrityError(f"bundle {digest} in {self} has {size_bytes} bytes, the limit is {MAX_BUNDLE_BYTES}")
        into.mkdir()
        for entry in found:
            with self._errors("read", entry["name"]):
                self._filesystem.get_file(entry["name"], str(into / _base(entry)))

    def bundle_age_s(self, name: str) -> float:
        with self._errors("list", f"{BUNDLES}/{name}"):
            times = [entry["LastModified"].timestamp() for entry in self._ls(f"{BUNDLES}/{name}") if entry["type"] == "file"]
        return time.time() - max(times, default=time.time())

    def remove_bundle(self, name: str) -> None:
        with self._errors("remove", f"{BUNDLES}/{name}"):
            for entry in sorted(self._ls(f"{BUNDLES}/{name}"), key=lambda entry: _base(entry) != MANIFEST):
                self._filesystem.rm_file(entry["name"])
            signature = self._path(f"{BUNDLES}/{signature_path(Path(name)).name}")
            if self._filesystem.exists(signature):
                self._filesystem.rm_file(signature)

    def _ls(self, folder: str) -> list[dict[str, Any]]:
        try:
            return self._filesystem.ls(self._path(folder), detail=True)
        except FileNotFoundError:
            return []

    def _path(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    @contextlib.contextmanager
    def _errors(self, verb: str, name: str) -> Iterator[None]:
        """Tell the lost race from the broken store; the two answers of a failed precondition are 412 and 409."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except FileExistsError:
            raise
        except (OSError, BotoCoreError, ClientError) as error:
            answer = error if isinstance(error, ClientError) else error.__cause__
            code = answer.response.get("Error", {}).get("Code") if isinstance(answer, ClientError) else None
            if verb == "create" and code in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
                raise FileExistsError(f"{self}/{name} exists") from error
            raise StorageError(f"registry {self}: cannot {verb} {name}: {error}") from error


def _base(entry: dict[str, Any]) -> str:
    return entry["name"].rpartition("/")[2]


def _bounded(data: bytes, source: str) -> bytes:
    if len(data) > MAX_ENTRY_BYTES:
        raise IntegrityError(f"{source} has more than {MAX_ENTRY_BYTES} bytes")
    return data
