"""How the monitor runs: a named process that refreshes itself, seals what it has read, and answers in between."""

import logging
import threading
import time
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle

from actors.detached import start_detached, start_heartbeat
from actors.log_sealer import SEAL_INTERVAL_S, LogSealer
from actors.monitor import Monitor
from policies.release import ReleaseConfig
from policies.storage import existing_storage
from policies.telemetry import monitor_name

logger = logging.getLogger(__name__)


class MonitorProcess:
    """A `Monitor` that refreshes itself each second, with the system's clock. Its methods may be called again at will."""

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        config = ReleaseConfig.model_validate(settings["config"])
        self._monitor = Monitor(**{**settings, "config": config, "now": time.time()})
        self._lock = threading.Lock()
        decisions = existing_storage(settings["storage_root"]).decisions(settings["policy"])
        self._sealer = LogSealer(decisions, may_seal=self._may_seal, note_error=self._note_error)
        start_heartbeat(self._refresh)
        start_heartbeat(self._seal, period_s=SEAL_INTERVAL_S)

    def settings(self) -> dict[str, Any]:
        return self._settings

    def report(self, report: dict[str, Any]) -> None:
        with self._lock:
            self._monitor.report(report, time.time())

    def release_evidence(self) -> dict[str, Any]:
        with self._lock:
            return self._monitor.release_evidence()

    def status(self) -> dict[str, Any]:
        with self._lock:
            return self._monitor.status(time.time())

    def _refresh(self) -> None:
        """Refresh step by step. Whatever goes wrong is shown, and ages the evidence, on which no release is then moved."""
        steps = self._monitor.refresh_steps(time.time())
        try:
            while True:
                with self._lock:
                    next(steps)
                time.sleep(0.001)  # a lock released and taken at once would keep the others out
        except StopIteration:
            return
        except Exception as error:
            logger.exception("event=refresh_failed")
            self._note_error(error)

    def _seal(self) -> None:
        """Seal what the monitor has read. It works without the lock, which it takes to ask and to report."""
        try:
            self._sealer.work(time.time())
        except Exception as error:
            logger.exception("event=sealing_failed")
            self._note_error(error)

    def _may_seal(self, path: Path) -> bool:
        with self._lock:
            return self._monitor.may_seal(path)

    def _note_error(self, error: Exception) -> None:
        with self._lock:
            self._monitor.note_error(error)


def start_monitor(
    policy: str, storage_root: str, *, outcome_range: tuple[float, float], reward_window_s: float, config: ReleaseConfig
) -> ActorHandle:
    """Return the policy's monitor, starting it when there is none. Raises `ClusterError`."""
    settings = {
        "policy": policy,
        "storage_root": str(storage_root),
        "outcome_range": tuple(outcome_range),
        "reward_window_s": reward_window_s,
        "config": config.model_dump(),
    }
    return start_detached(MonitorProcess, monitor_name(policy), settings)
