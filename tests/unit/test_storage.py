"""Is a storage root ours, writable and of a version we read, before anything is written into it?"""

import os
import stat
from pathlib import Path

import pytest

from policies.errors import IntegrityError, StorageError
from policies.integrity import canonical_json, commit_directory, create_if_absent, parse_json, temporary_directory, write_atomic
from policies.storage import MARKER, existing_storage, open_storage


def test_a_new_root_is_claimed_and_opens_again_with_the_same_key(tmp_path: Path) -> None:
    key = open_storage(tmp_path / "new").api_key_file.read_text()
    storage = open_storage(f"file://{tmp_path}/new")
    assert storage.api_key_file.read_text() == key and len(key) > 30
    assert stat.S_IMODE(storage.api_key_file.stat().st_mode) == 0o600


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError, match=r"thesis\.tex"):
        open_storage(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_a_remote_url_and_a_newer_schema_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="not a directory"):
        open_storage(tmp_path / "file")
    with pytest.raises(StorageError, match="only a local or shared directory"):
        open_storage("s3://bucket/prefix")
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / MARKER).write_bytes(canonical_json({"schema_version": 99}))
    with pytest.raises(StorageError, match="schema version 99"):
        open_storage(tmp_path / "newer")


def test_a_place_that_cannot_be_written_is_said_so() -> None:
    # /proc refuses directories to everybody, root included, which a read-only mode of a directory of ours would not.
    with pytest.raises(StorageError, match=r"cannot be written.*--storage"):
        open_storage("/proc/trimtab")


def test_create_if_absent_never_overwrites_and_leaves_nothing_behind(tmp_path: Path) -> None:
    create_if_absent(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        create_if_absent(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first" and os.listdir(tmp_path) == ["a"]


def test_write_atomic_leaves_the_old_file_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "a", b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_a_committed_directory_appears_whole(tmp_path: Path) -> None:
    temporary = temporary_directory(tmp_path)
    (temporary / "x").write_text("content")
    commit_directory(temporary, tmp_path / "final")
    assert (tmp_path / "final" / "x").read_text() == "content" and os.listdir(tmp_path) == ["final"]


@pytest.mark.parametrize("text", [b'{"a": 1, "a": 2}', b'{"a": NaN}', b"\xff", b"{", b"[" * 100_000])
def test_json_that_two_readers_could_read_differently_is_refused(text: bytes) -> None:
    with pytest.raises(IntegrityError, match="not readable JSON"):
        parse_json(text, "x")


def test_a_process_that_does_not_see_the_storage_says_so_and_makes_no_new_one(tmp_path: Path) -> None:
    """On a node without the shared directory, `open_storage` would make a new root with another key: the negative control."""
    with pytest.raises(StorageError, match=r"does not see the storage.*all nodes share"):
        existing_storage(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
    opened = open_storage(tmp_path / "elsewhere")
    assert existing_storage(opened.root) == opened
