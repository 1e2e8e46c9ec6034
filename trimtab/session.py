"""A serving session: monitor, release manager and Serve endpoint of one policy, from start to a clean end."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from policies.errors import ClusterError, NotFound, StorageError
from policies.integrity import canonical_json, parse_json, write_atomic
from policies.storage import Storage
from trimtab.loop_file import LoopConfig

START_TIMEOUT_S = 120.0  # a cold machine needs about 30 s for Ray, Serve and HAProxy
STOP_TIMEOUT_S = 90.0
POLL_S = 0.2


@dataclass(frozen=True)
class Session:
    """Where a running session answers. Kept in the storage root for the other commands."""

    policy: str
    version: int
    url: str
    api_key_file: str
    pid: int
    host: str
    ray_address: str


@contextmanager
def serving(loop: LoopConfig, storage: Storage, *, champion: int, ray_address: str) -> Iterator[Session]:
    """Serve the policy for the time of the block; Ray is connected already.

    Raises `StorageError` when another session serves from this storage, `ClusterError` when a port is taken or the endpoint
    does not get ready in time.
    """
    from actors.detached import end_detached
    from actors.monitor_process import start_monitor
    from actors.release_manager import start_release_manager
    from policies.telemetry import monitor_name, release_manager_name
    from serve_app.app import start_serving, stop_serving

    root = str(storage.root)
    with _locked(storage), ExitStack() as cleanup:
        # Registered before they are started: an interrupt in the middle of starting leaves nothing either.
        cleanup.callback(end_detached, monitor_name(loop.name), storage_root=root)
        cleanup.callback(end_detached, release_manager_name(loop.name), storage_root=root)
        cleanup.callback(stop_serving)
        cleanup.callback(storage.session_file.unlink, missing_ok=True)
        cleanup.callback(_ignore_interrupts)  # runs first: a second Ctrl-C must not cut the cleaning up short
        start_monitor(
            loop.name,
            root,
            outcome_range=loop.feedback.outcome_range,
            reward_window_s=loop.feedback.reward_window_s,
            config=loop.release,
        )
        start_release_manager(loop.name, root, loop.release)
        url = start_serving(loop.name, root, loop.serving)
        session = Session(loop.name, champion, url, str(storage.api_key_file), os.getpid(), socket.gethostname(), ray_address)
        write_atomic(storage.session_file, canonical_json(asdict(session)))
        yield session


def _ignore_interrupts() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def running_session(storage: Storage) -> Session | None:
    """Return the session that serves from this storage now, or None; a file left by a killed one does not count."""
    try:
        data = storage.session_file.read_bytes()
    except FileNotFoundError:
        return None
    return Session(**parse_json(data, str(storage.session_file))) if _is_locked(storage) else None


def require_session(storage: Storage) -> Session:
    """Return the running session; raises `NotFound` that says how to start one."""
    session = running_session(storage)
    if session is None:
        raise NotFound(f"nothing is serving from {storage.root}; start it with `trimtab up` or `trimtab serve`")
    return session


def start_detached(arguments: list[str], storage: Storage, log_file: Path) -> Session:
    """Start `trimtab ARGUMENTS` as a process of its own and wait until it serves; `stop_detached` ends it.

    Raises `ClusterError` with the end of its log when it ends before it serves.
    """
    if (session := running_session(storage)) is not None:
        raise StorageError(f"process {session.pid} already serves {session.policy} from {storage.root} at {session.url}")
    with open(log_file, "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "trimtab", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        session = running_session(storage)
        if session is not None and session.pid == process.pid:
            return session
        if process.poll() is not None:
            tail = log_file.read_text(errors="replace")[-2000:]
            raise ClusterError(f"the server ended with code {process.returncode}; the end of {log_file}:\n{tail}")
        time.sleep(POLL_S)
    process.terminate()
    process.wait(STOP_TIMEOUT_S)
    raise ClusterError(f"the server was not ready within {START_TIMEOUT_S:g} s; see {log_file}")


def stop_detached(storage: Storage) -> Session:
    """Ask the running session to end and wait until everything it started is gone."""
    session = require_session(storage)
    if session.host != socket.gethostname():
        raise ClusterError(f"{session.policy} is served by process {session.pid} of {session.host}; run this command there")
    with suppress(ProcessLookupError):  # it ended in this moment
        os.kill(session.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        if not _is_locked(storage) and _has_ended(session.pid):  # it ends Ray after it gave the lock back
            return session
        time.sleep(POLL_S)
    raise ClusterError(f"process {session.pid} did not end within {STOP_TIMEOUT_S:g} s")


def _has_ended(pid: int) -> bool:
    """Say whether a process is gone, or only waits for its parent to notice. Where there is no /proc nobody can tell: True."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _lock_file(storage: Storage) -> Path:
    return storage.root / "session.lock"


@contextmanager
def _locked(storage: Storage) -> Iterator[None]:
    """Hold the storage's serving lock. The kernel gives it back when the process dies, so it is never stale."""
    with open(_lock_file(storage), "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            session = running_session(storage)
            who = f"process {session.pid} at {session.url}" if session else "another process, which is starting or stopping,"
            raise StorageError(f"{who} already serves from {storage.root}; stop it with `trimtab down`") from None
        yield


def _is_locked(storage: Storage) -> bool:
    with open(_lock_file(storage), "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
