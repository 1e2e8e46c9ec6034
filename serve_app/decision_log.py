"""Append records to a log directory so that a killed process or a full disk never spoils what was acknowledged."""

import contextlib
import os
from pathlib import Path

import msgspec

from policies.records import SCHEMA_VERSION, SegmentHeader, SegmentKind

SEGMENT_BYTES = 64 << 20  # a reader that lost its place re-reads at most this much


class SegmentWriter:
    """Writes one writer's segments `<writer>-000001.jsonl`, `-000002` …, in a directory it shares with other writers.

    `append` is one `write` system call: once it returned, the kernel has the lines and they survive this process. A segment
    whose write failed is given up where it is and never touched again: a reader may have read its complete lines already, so
    neither cutting them off nor writing behind a half line would be safe. `writer` must be new for each start of a process.
    """

    def __init__(self, directory: Path, kind: SegmentKind, writer: str, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._directory = directory
        self._header = msgspec.json.encode(SegmentHeader(SCHEMA_VERSION, kind, writer)) + b"\n"
        self._writer = writer
        self._segment_bytes = segment_bytes
        self._num_segments = 0
        self._descriptor: int | None = None
        self._size_bytes = 0
        self._path = directory

    def append(self, lines: bytes) -> tuple[Path, int]:
        """Write whole lines and return where they begin; raises `OSError` when they, or part of them, did not reach the file."""
        if self._descriptor is None or self._size_bytes + len(lines) > self._segment_bytes:
            self._open_next()
        try:
            self._write(lines)
        except OSError:
            self.close()
            raise
        return self._path, self._size_bytes - len(lines)

    def close(self) -> None:
        """Close the current segment; a later `append` opens the next one."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open_next(self) -> None:
        """Start the next segment; it gets its name, and with it readers, only when its header is complete."""
        self.close()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._num_segments += 1  # also when it fails: a name is used once
        self._path = path = self._directory / f"{self._writer}-{self._num_segments:06d}.jsonl"
        temporary = path.with_name(f".tmp-{path.name}")
        self._descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._size_bytes = 0
        try:
            self._write(self._header)
            os.rename(temporary, path)
        except OSError:
            self.close()
            with contextlib.suppress(OSError):  # a full disk would otherwise collect one file per try
                temporary.unlink()
            raise

    def _write(self, data: bytes) -> None:
        assert self._descriptor is not None
        num_written = os.write(self._descriptor, data)
        self._size_bytes += num_written
        if num_written != len(data):
            raise OSError(f"only {num_written} of {len(data)} bytes were written: the disk is probably full")
