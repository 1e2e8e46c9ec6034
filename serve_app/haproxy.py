"""Which HAProxy processes on this machine belong to a cluster, and how none of them is left behind."""

import contextlib
import os
import signal
import time
from pathlib import Path

# Ray Serve starts each node's HAProxy with `-f <directory>/<node id>/haproxy.cfg`; node ids are unique to a cluster, so the
# command line tells ours from those of another cluster on the same machine.
QUIET_S = 1.0
CONFIG_NAME = "haproxy.cfg"


def haproxies(node_ids: set[str] | None = None) -> dict[int, str]:
    """Return pid to node id of the HAProxy processes that Ray Serve started here, for these nodes or for all."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            node_id = _node_id(entry)
            if node_id and (node_ids is None or node_id in node_ids):
                found[int(entry.name)] = node_id
    return found


def end_haproxies(node_ids: set[str], *, timeout_s: float) -> list[int]:
    """Wait until the HAProxy processes of these nodes have ended and kill those that do not; return whom we killed.

    None may be seen for `QUIET_S`: a reload that was under way when Serve was stopped starts its process after the old one
    ended (seen when a session was interrupted in the second it became ready).
    """
    deadline = time.monotonic() + timeout_s
    seen_s = time.monotonic()
    while time.monotonic() < min(deadline, seen_s + QUIET_S):
        if haproxies(node_ids):
            seen_s = time.monotonic()
        time.sleep(0.1)
    killed = list(haproxies(node_ids))
    for pid in killed:
        with contextlib.suppress(ProcessLookupError):  # it ended by itself in between
            os.kill(pid, signal.SIGKILL)
    return killed


def _node_id(process: Path) -> str | None:
    try:
        arguments = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # it ended while we looked, or is not ours to read
        return None
    if "haproxy" not in Path(arguments[0]).name or "-f" not in arguments[:-1]:
        return None
    config = Path(arguments[arguments.index("-f") + 1])
    return config.parent.name if config.name == CONFIG_NAME else None
