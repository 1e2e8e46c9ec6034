"""Join a running Ray cluster or start one in this process, and leave nothing behind."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from policies.errors import ClusterError
from policies.telemetry import ACTOR_NAMESPACE
from serve_app.haproxy import end_haproxies
from serve_app.profile import serve_profile_environment

CONNECT_TIMEOUT_S = 5.0  # a GCS that is up accepts within milliseconds, also on a busy machine
TOKEN_FILE = Path.home() / ".ray" / "auth_token"
CURRENT_CLUSTER_FILE = Path("/tmp/ray/ray_current_cluster")  # `ray start` writes it, `ray stop` removes it


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster this process is connected to; `is_local` when it ends with this process."""

    address: str
    is_local: bool


def prepare_environment() -> None:
    """Set what Ray and Serve read from the environment when they are imported; call it before anything imports them.

    That is Serve's profile, and the token that `ray.init` and `ray start` made on this machine: they show it themselves only
    to what they start, and a cluster without token authentication does not look at it.
    """
    os.environ.update(serve_profile_environment())
    if TOKEN_FILE.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@contextmanager
def connected(address: str | None = None, *, session_address: str | None = None) -> Iterator[Cluster]:
    """Connect to Ray for the time of the block.

    In this order: `address` (`local` starts a new one, `auto` takes what `ray start` made), RAY_ADDRESS, the cluster of a
    running `trimtab up` on the same storage (`session_address`), the cluster `ray start` made on this machine, a new local
    one. Raises `ClusterError` when the chosen one does not answer.
    """
    target = address or os.environ.get("RAY_ADDRESS") or _if_alive(session_address) or _current_cluster() or "local"
    if target == "auto":
        target = _current_cluster() or ""
        if not target:
            raise ClusterError("no cluster made by `ray start` was found on this machine; start one, or leave --address away")
    if target != "local":
        _require_answer(target)
    import ray  # here, not above: commands that need no cluster should not pay for it

    try:
        ray.init(
            address=target,
            namespace=ACTOR_NAMESPACE,
            log_to_driver=False,
            logging_level="ERROR",
            **({"include_dashboard": False} if target == "local" else {}),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"Ray at {target!r} cannot be used: {error}") from error
    terminate_as_interrupt()  # again: `ray.init` puts a handler of its own there, which prints a stack and exits with code 15
    node_ids = {node["NodeID"] for node in ray.nodes()}
    try:
        yield Cluster(ray.get_runtime_context().gcs_address, target == "local")
    finally:
        ray.shutdown()
        if target == "local":
            end_haproxies(node_ids, timeout_s=0)  # what an interrupted start left: with the cluster gone nobody else will


def terminate_as_interrupt() -> None:
    """Let SIGTERM and SIGHUP take the same clean way out as Ctrl-C, from now on in this process."""
    signal.signal(signal.SIGTERM, _raise_interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup: then a closed terminal is no reason to end
        signal.signal(signal.SIGHUP, _raise_interrupt)


@contextmanager
def first_interrupt_noted() -> Iterator[threading.Event]:
    """Let the first Ctrl-C, SIGTERM or SIGHUP only set an event, so that the block can end in good order; the next interrupts."""
    asked = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        restore()

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, ask)
    try:
        yield asked
    finally:
        restore()


def _raise_interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _current_cluster() -> str | None:
    try:
        return CURRENT_CLUSTER_FILE.read_text().strip() or None
    except OSError:
        return None


def _if_alive(address: str | None) -> str | None:
    return address if address and _answers(address) else None


def _require_answer(address: str) -> None:
    if "://" in address:
        raise ClusterError(f"cluster address {address!r}: Ray Client addresses are not supported; run on a node of the cluster")
    if not _answers(address):
        raise ClusterError(
            f"the Ray cluster at {address} does not answer within {CONNECT_TIMEOUT_S:g} s; start it with `ray start --head`, "
            "clean up a dead one with `ray stop`, or start a local one with --address local"
        )


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(f"cluster address {address!r}: expected host:port, `auto` or `local`")
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False
