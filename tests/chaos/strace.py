"""Which system calls a process makes, and how to kill it at one of them."""

import re
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Every call that can change what is on the disk or when it gets there. With `?` a name that this machine's kernel lacks is fine.
WRITING_CALLS = [
    *("open", "openat", "openat2", "creat", "mknod", "mknodat", "mkdir", "mkdirat", "symlink", "symlinkat", "link", "linkat"),
    *("write", "writev", "pwrite64", "pwritev", "pwritev2", "truncate", "ftruncate", "fallocate", "copy_file_range", "sendfile"),
    *("rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "chmod", "fchmod", "fchmodat", "fchmodat2"),
    *("chown", "fchown", "lchown", "fchownat", "utimensat", "setxattr", "fsetxattr"),
    *("fsync", "fdatasync", "sync_file_range", "syncfs", "sync", "msync"),
]
MARKER_CALLS = ["access", "faccessat", "faccessat2"]
# A call that does not return because the process was killed has no result; with several threads its line stays unfinished.
_LINE = re.compile(r"(?P<pid>\d+) +(?P<name>\w+)\((?P<arguments>.*)(\) += (?P<result>\S+)| <unfinished \.\.\.>$)")


@dataclass(frozen=True)
class Call:
    """One system call; `ordinal` counts the calls of this name since the process began."""

    name: str
    ordinal: int
    arguments: str
    result: str

    @property
    def strings(self) -> list[str]:
        """The quoted arguments: paths, and the beginning of written data."""
        return re.findall(r'"((?:[^"\\]|\\.)*)"', self.arguments)

    @property
    def only_reads(self) -> bool:
        """Say whether the call opens a file for reading, which changes nothing."""
        return self.name in ("open", "openat", "openat2") and not re.search("O_(WRONLY|RDWR|CREAT|TRUNC)", self.arguments)

    @property
    def has_failed(self) -> bool:
        return self.result.startswith("-")


def run_under_strace(command: list[str], log: Path, *, kill_at: Call | None = None, **options) -> int:
    """Run a command to its end, or kill -9 it when it makes the call; return the exit status.

    strace sends the signal when the call is entered, and Linux does not execute a call that is entered with a deadly signal
    waiting. So the disk is in the state before this call, that is after the one before it.
    """
    traced = ",".join(f"?{name}" for name in [*WRITING_CALLS, *MARKER_CALLS])
    tracer = ["strace", "-f", "-y", "-o", str(log), "-e", f"trace={traced}"]
    if kill_at is not None:
        tracer += ["-e", f"inject={kill_at.name}:signal={signal.SIGKILL.name}:when={kill_at.ordinal}"]
    return subprocess.run([*tracer, *command], timeout=120, **options).returncode


def read_calls(log: Path) -> list[Call]:
    """Return the calls of a process of which only one thread makes any, in their order."""
    matches = [match for match in map(_LINE.match, log.read_text().splitlines()) if match]
    assert len({match["pid"] for match in matches}) == 1, f"{log} has the calls of several threads or processes"
    num_calls: dict[str, int] = {}
    calls = []
    for match in matches:
        num_calls[match["name"]] = num_calls.get(match["name"], 0) + 1
        calls.append(Call(match["name"], num_calls[match["name"]], match["arguments"], match["result"] or "?"))
    return calls
