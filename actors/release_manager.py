"""Who moves releases on: a process that asks the pure rule each second and writes its answer into the journal.

It holds no rule and no state: what it knows is in the registry's journal and in the monitor's evidence.
"""

import logging
import time
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.detached import start_detached, start_heartbeat
from policies.errors import GateRefused, RegistryConflict, ReleaseRefused, TrimtabError
from policies.registry import Registry, RegistryState, Release, change_release
from policies.release import ReleaseConfig, ReleaseDecision, ReleaseEvidence, judge
from policies.storage import existing_storage
from policies.telemetry import ACTOR_NAMESPACE, monitor_name, release_manager_name
from policies.verdicts import Verdict

logger = logging.getLogger(__name__)

MONITOR_TIMEOUT_S = 5.0
MAX_EVIDENCE_AGE_S = 10.0  # the monitor refreshes each second; older means that it stands still or re-reads the log


class ReleaseManager:
    """Moves the open release of one policy. Plain: `tick` takes the clock and the monitor's evidence."""

    def __init__(self, policy: str, storage_root: str, config: ReleaseConfig) -> None:
        self._policy = policy
        self._registry = Registry(existing_storage(storage_root).registry(policy))
        self._config = config
        self.num_refused = 0  # moves that somebody else made impossible in between

    def has_open_release(self) -> bool:
        release = self._registry.state().release
        return release is not None and release.is_open

    def tick(self, now: float, evidence: dict[str, Any] | None) -> ReleaseDecision | None:
        """Decide, act, and return the decision; None without an open release. `evidence` is the monitor's answer, if any."""
        state = self._registry.state()
        release = state.release
        if release is None or not release.is_open:
            return None
        if not _is_usable(evidence, release, now):
            return ReleaseDecision("hold", Verdict.INCONCLUSIVE, "no current evidence of this release from the monitor", {})
        assert evidence is not None
        decision = judge(
            release,
            ReleaseEvidence.from_json(evidence["evidence"]),
            gate_verdict=state.version(release.candidate).gate_verdict,
            config=self._config,
            now=now,
            switched_off=state.switched_off,
        )
        if decision.action != "hold":
            self._act(state, release, decision, now)
        return decision

    def _act(self, seen: RegistryState, judged: Release, decision: ReleaseDecision, now: float) -> None:
        def entry(state: RegistryState) -> dict[str, Any]:
            if state.release != judged or state.switched_off != seen.switched_off:
                raise ReleaseRefused(f"release {judged.number} was changed by somebody else meanwhile")
            return change_release(state, decision.action, reason=decision.reason, numbers=decision.numbers)

        try:
            self._registry.append(entry, now=now)
        except (RegistryConflict, ReleaseRefused, GateRefused) as error:
            self.num_refused += 1
            logger.warning(
                "event=release_move_refused policy=%s release=%d action=%s num_refused=%d error=%s",
                *(self._policy, judged.number, decision.action, self.num_refused, error),
            )
            return
        logger.info(
            "event=release_moved policy=%s release=%d action=%s reason=%s",
            *(self._policy, judged.number, decision.action, decision.reason),
        )


def _is_usable(evidence: dict[str, Any] | None, release: Release, now: float) -> bool:
    return (
        evidence is not None
        and evidence["release"] == release.number
        and evidence["refreshed_at"] is not None
        and now - evidence["refreshed_at"] <= MAX_EVIDENCE_AGE_S
    )


class ReleaseManagerProcess:
    """A `ReleaseManager` that ticks each second, with the system's clock and the policy's monitor."""

    def __init__(self, policy: str, storage_root: str, config: dict[str, Any]) -> None:
        self._settings = {"policy": policy, "storage_root": storage_root, "config": config}
        self._policy = policy
        self._manager = ReleaseManager(policy, storage_root, ReleaseConfig.model_validate(config))
        start_heartbeat(self._tick)

    def settings(self) -> dict[str, Any]:
        return self._settings

    def _tick(self) -> None:
        try:
            if self._manager.has_open_release():
                self._manager.tick(time.time(), self._ask_monitor())
        except (TrimtabError, OSError):  # a broken journal, a full disk: the release stays as it is until that is mended
            logger.exception("event=release_tick_failed policy=%s", self._policy)

    def _ask_monitor(self) -> dict[str, Any] | None:
        """Return the monitor's evidence, None when it is away: it comes back by itself, and until then the release holds."""
        try:
            monitor = ray.get_actor(monitor_name(self._policy), namespace=ACTOR_NAMESPACE)
            return ray.get(monitor.release_evidence.remote(), timeout=MONITOR_TIMEOUT_S)
        except (ValueError, RayError) as error:  # ValueError: no actor of that name
            logger.warning("event=monitor_away policy=%s error=%r", self._policy, error)
            return None


def start_release_manager(policy: str, storage_root: str, config: ReleaseConfig) -> ActorHandle:
    """Return the policy's release manager, starting it when there is none. Raises `ClusterError`."""
    settings = {"policy": policy, "storage_root": str(storage_root), "config": config.model_dump()}
    return start_detached(ReleaseManagerProcess, release_manager_name(policy), settings)
