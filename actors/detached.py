"""How a named process that outlives its starter is found or started, and how it does its work once a second."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError

from policies.errors import ClusterError
from policies.telemetry import ACTOR_NAMESPACE

logger = logging.getLogger(__name__)

END_TIMEOUT_S = 10.0
START_TIMEOUT_S = 60.0  # a worker process that imports numpy and pydantic needs 1-3 s, on a busy laptop 20


def start_detached(process: type, name: str, settings: dict[str, Any]) -> ActorHandle:
    """Return the named process, starting it when it is not there; it restarts by itself for ever.

    One that was left by an earlier session with other settings is replaced: it holds nothing that is not on disk. Raises
    `ClusterError` when it works for another storage root, or does not answer.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    problem: Exception | None = None
    while time.monotonic() < deadline:
        handle = (
            ray.remote(process)
            .options(
                name=name,
                namespace=ACTOR_NAMESPACE,
                lifetime="detached",
                num_cpus=0,
                max_restarts=-1,
                get_if_exists=True,
            )
            .remote(**settings)
        )
        try:
            found = ray.get(handle.settings.remote(), timeout=max(0.1, deadline - time.monotonic()))
        except (RayActorError, GetTimeoutError) as error:
            problem = error
            time.sleep(0.2)
            continue
        if found == settings:
            return handle
        if found["storage_root"] != settings["storage_root"]:
            raise ClusterError(
                f"{name} already works on this cluster for the storage {found['storage_root']}, not {settings['storage_root']}; "
                "stop that session first, or give this policy another name"
            )
        ray.kill(handle, no_restart=True)
    raise ClusterError(f"{name} did not answer within {START_TIMEOUT_S:.0f} s: {problem}; see `ray list actors` and its log")


def end_detached(name: str, *, storage_root: str) -> None:
    """End the named process if it is there and works for this storage root; another one's is left alone."""
    try:
        handle = ray.get_actor(name, namespace=ACTOR_NAMESPACE)
        found = ray.get(handle.settings.remote(), timeout=END_TIMEOUT_S)
    except (ValueError, RayActorError):
        return  # it was never started, or refused to start
    except GetTimeoutError:
        logger.warning("event=detached_process_left name=%s reason='no answer within %s s'", name, END_TIMEOUT_S)
        return
    if found["storage_root"] == storage_root:
        ray.kill(handle, no_restart=True)


def start_heartbeat(beat: Callable[[], None], *, period_s: float = 1.0) -> None:
    """Call `beat` every `period_s` in a thread for as long as the process lives; `beat` handles its own errors."""

    def work() -> None:
        while True:
            started = time.monotonic()
            beat()
            time.sleep(max(0.05, period_s - (time.monotonic() - started)))

    threading.Thread(target=work, name="heartbeat", daemon=True).start()
