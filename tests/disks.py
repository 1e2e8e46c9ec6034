"""A disk as Linux shows it to a program, as far as an fsync is concerned: what would be left after a power cut?"""

import errno
import os
import threading
import time
from pathlib import Path


class Disk:
    """Stands in for `os.fsync`. It notes what of the real files would survive, and can fail, hang or be slow.

    Modelled on what Linux does since 4.13 (man 2 fsync, lwn.net/Articles/752063): a failed write-back is reported once per open
    file; the pages are then clean, so that a later fsync succeeds without having written them. A file that is in no flushed
    directory is lost as a whole.
    """

    def __init__(self, *, duration_s: float = 0.0) -> None:
        self.duration_s = duration_s
        self.num_syncs = 0
        self.fails_next = False
        self.can_go_on = threading.Event()
        self.can_go_on.set()
        self._good: dict[int, list[tuple[int, int]]] = {}  # per inode: the ranges that are on the disk
        self._clean: dict[int, int] = {}  # per inode: up to where its pages are clean, written or not
        self._names: set[Path] = set()

    def fsync(self, descriptor: int) -> None:
        self.num_syncs += 1
        stat = os.fstat(descriptor)  # as it begins: what is written while it runs it need not take along
        self.can_go_on.wait()
        time.sleep(self.duration_s)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            self._names |= set(path.iterdir())
            return
        begin, end = self._clean.get(stat.st_ino, 0), stat.st_size
        self._clean[stat.st_ino] = end
        if self.fails_next:
            self.fails_next = False
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._good.setdefault(stat.st_ino, []).append((begin, end))

    def is_flushed(self, path: Path) -> bool:
        """Say whether all of a file's bytes are on the disk."""
        size = path.stat().st_size
        return sum(end - begin for begin, end in self._good.get(path.stat().st_ino, [])) == size

    def after_power_cut(self, directory: Path) -> bytes:
        """Return the bytes of all files that would be there again, lost ranges as zeros."""
        contents = b""
        for path in sorted(self._names):
            if path.parent == directory and path.exists():
                data = path.read_bytes()
                kept = bytearray(len(data))
                for begin, end in self._good.get(path.stat().st_ino, []):
                    kept[begin:end] = data[begin:end]
                contents += bytes(kept)
        return contents
