"""Write files so that a crash leaves the old or the new one, and recognise bytes that are neither."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from policies.errors import IntegrityError, StorageError

LOCK_PAUSE_S = 0.01  # between two tries for a lock that another process holds


def canonical_json(value: Any) -> bytes:
    """Return the one JSON spelling of a value that we hash: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def parse_json(data: bytes, source: str) -> Any:
    """Parse JSON and refuse what two readers could understand differently: duplicate keys, NaN, broken UTF-8."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{source} is not readable JSON: {error}") from error


def sha256_hex(data: bytes) -> str:
    """Return the SHA-256 of bytes as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace a file: readers see the old bytes or the new ones, also after a power cut."""
    temporary = _write_temporary(path, data, mode)
    os.replace(temporary, path)
    fsync_directory(path.parent)


def create_if_absent(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Create a file with its whole content or raise `FileExistsError`.

    A hard link is the atomic "create with content": `O_EXCL` alone would let a reader see the file before its bytes.
    """
    temporary = _write_temporary(path, data, mode)
    try:
        os.link(temporary, path)
    finally:
        os.unlink(temporary)
    fsync_directory(path.parent)


@contextlib.contextmanager
def exclusive_lock(path: Path, *, timeout_s: float) -> Iterator[None]:
    """Be the only one in this block, of all threads and processes that name the same file; a killed holder lets go.

    The file stays: who removed it would let two in, one with the old file and one with the new. Raises `StorageError` when
    another holds the lock for longer than `timeout_s`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline_s = time.monotonic() + timeout_s
    try:
        while not _try_lock(descriptor):
            if time.monotonic() >= deadline_s:
                raise StorageError(
                    f"another process has held {path} for {timeout_s:g} s; is one stopped? `fuser {path}` names it"
                )
            time.sleep(LOCK_PAUSE_S)
        yield
    finally:
        os.close(descriptor)


def commit_directory(temporary: Path, final: Path) -> None:
    """Make a finished directory visible under its final name, after everything in it has reached the disk.

    The order matters: file contents, then the directory's own entries, then the rename, then the parent. A rename that
    overtakes the data would show a complete-looking directory with empty files after a power cut.
    """
    for file in sorted(temporary.rglob("*")):
        if file.is_file():
            _fsync_file(file)
    temporary.chmod(0o755)  # `mkdtemp` made it for its owner only
    fsync_directory(temporary)
    os.rename(temporary, final)
    fsync_directory(final.parent)


def make_directory(path: Path) -> None:
    """Create a directory and those above it, also for after a power cut: each is an entry in its parent that must be flushed."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        fsync_directory(path.parent)


def temporary_directory(parent: Path) -> Path:
    """Return a new directory beside the final one; a leading dot keeps readers from taking it for a result."""
    make_directory(parent)
    return Path(tempfile.mkdtemp(prefix=".tmp-", dir=parent))


def remove_temporaries(parent: Path) -> None:
    """Remove the files and directories that killed writers left behind; only call it where there is one writer."""
    for leftover in parent.glob(".tmp-*"):
        remove(leftover)


def remove(path: Path) -> None:
    """Remove a file, a link, or a directory with all that is in it; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk."""
    _fsync_file(path)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_temporary(path: Path, data: bytes, mode: int) -> str:
    descriptor, temporary = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        os.unlink(temporary)
        raise
    return temporary


def _fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"key {repeated[0]!r} appears twice in one object")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
