"""Append records to a log directory so that a killed process or a full disk never spoils what was acknowledged."""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

import msgspec

from policies.integrity import make_directory
from policies.records import SCHEMA_VERSION, SegmentHeader, SegmentKind

SEGMENT_BYTES = 64 << 20  # a reader that lost its place re-reads at most this much
NO_LOCKS_HERE = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)  # what file systems without `flock` say


class SegmentWriter:
    """Writes one writer's segments `<writer>-000001.jsonl`, `-000002` …, in a directory it shares with other writers.

    `append` is one `write` system call: once it returned, the kernel has the lines and they survive this process, though not a
    power cut: for that see `serve_app.group_commit`. A segment whose write failed is given up where it is and never touched
    again: a reader may have read its complete lines already, so neither cutting them off nor writing behind a half line would be
    safe. `writer` must be new for each start of a process.

    An open segment is locked. The lock ends with the process, however that ends: who gets it knows that the segment is finished.
    """

    def __init__(self, directory: Path, kind: SegmentKind, writer: str, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._directory = directory
        self._header = msgspec.json.encode(SegmentHeader(SCHEMA_VERSION, kind, writer)) + b"\n"
        self._writer = writer
        self._segment_bytes = segment_bytes
        self.num_segments = 0  # begun
        self.num_bytes = 0  # written, also of lines that were not written whole
        self._descriptor: int | None = None
        self._size_bytes = 0
        self._path = directory
        self._keeps_unflushed = False
        self._is_unflushed = False  # the open segment has lines that nobody took to flush
        self._unflushed: list[int] = []  # finished segments of which that is true, as descriptors of their own
        self._others_unflushed: set[Path] = set()
        self._has_new_name = False

    def append(self, lines: bytes) -> tuple[Path, int]:
        """Write whole lines and return where they begin; raises `OSError` when they, or part of them, did not reach the file."""
        if self._descriptor is None or self._size_bytes + len(lines) > self._segment_bytes:
            self._open_next()
        try:
            self._write(lines)
        except OSError:
            self.close()
            raise
        self._is_unflushed = True
        return self._path, self._size_bytes - len(lines)

    def close(self) -> None:
        """Close the current segment; a later `append` opens the next one."""
        if self._descriptor is None:
            return
        if self._keeps_unflushed and self._is_unflushed:
            self._unflushed.append(os.dup(self._descriptor))
        self._is_unflushed = False
        os.close(self._descriptor)
        self._descriptor = None

    def keep_unflushed(self) -> None:
        """From now on keep what is to be flushed of finished segments, for somebody who takes it."""
        self._keeps_unflushed = True

    def take_unflushed(self) -> list[int]:
        """Return descriptors, the caller's to close: an fsync of each makes durable all that was appended since the last call.

        The directory's comes last when it has a new name in it: a segment without a name is lost.
        """
        more = []
        if self._descriptor is not None and self._is_unflushed:
            more.append(os.dup(self._descriptor))
        if self._has_new_name:
            try:
                more.append(os.open(self._directory, os.O_RDONLY))
            except OSError:  # too many open files: what was taken before would be lost, and open for ever
                for descriptor in more:
                    os.close(descriptor)
                raise
        taken, self._unflushed = [*self._unflushed, *more], []
        self._others_unflushed.clear()
        self._is_unflushed = self._has_new_name = False
        return taken

    def flush_too(self, path: Path) -> None:
        """Have another writer's segment flushed with our own next time: what it appended may be in the page cache alone."""
        if path in self._others_unflushed:
            return
        with contextlib.suppress(FileNotFoundError):  # it was sealed meanwhile, and that is flushed
            self._unflushed.append(os.open(path, os.O_RDONLY))
            self._others_unflushed.add(path)

    def give_up(self) -> None:
        """Never write to the current segment again, nor flush what was not taken to be flushed."""
        self._is_unflushed = False
        self.close()
        for descriptor in self._unflushed:
            os.close(descriptor)
        self._unflushed = []
        self._others_unflushed.clear()

    def _open_next(self) -> None:
        """Start the next segment; it gets its name, and with it readers, only when it is locked and its header is complete."""
        self.close()
        make_directory(self._directory)
        self.num_segments += 1  # also when it fails: a name is used once
        self._path = path = self._directory / f"{self._writer}-{self.num_segments:06d}.jsonl"
        temporary = path.with_name(f".tmp-{path.name}")
        self._descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._size_bytes = 0
        try:
            _lock(self._descriptor)
            self._write(self._header)
            os.rename(temporary, path)
        except OSError:
            self.close()
            with contextlib.suppress(OSError):  # a full disk would otherwise collect one file per try
                temporary.unlink()
            raise
        self._has_new_name = True

    def _write(self, data: bytes) -> None:
        assert self._descriptor is not None
        num_written = os.write(self._descriptor, data)
        self._size_bytes += num_written
        self.num_bytes += num_written
        if num_written != len(data):
            raise OSError(f"only {num_written} of {len(data)} bytes were written: the disk is probably full")


def _lock(descriptor: int) -> None:
    """Lock a file that is ours alone so far. Where there are no locks nobody else gets one either, and nothing is sealed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise
