"""What GET /v1/status says: what the monitor knows, or what this replica knows and why that is all."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from policies.telemetry import ReplicaReport, replica_row
from serve_app.variants import VariantStore

CACHE_S = 1.0  # the monitor's numbers are a second old anyway; any number of dashboards cost it one call per replica


class StatusView:
    """Asks the monitor at most once per second, however many callers there are."""

    def __init__(
        self,
        policy: str,
        variants: VariantStore,
        ask_monitor: Callable[[], Awaitable[dict[str, Any]]],
        own_report: Callable[[], ReplicaReport],
    ) -> None:
        self._policy = policy
        self._variants = variants
        self._ask_monitor = ask_monitor
        self._own_report = own_report
        self._lock = asyncio.Lock()
        self._asked_at = float("-inf")
        self._cached: dict[str, Any] = {}

    async def read(self) -> dict[str, Any]:
        """Return the monitor's status, or the replica's own with `monitor: null` and the reason."""
        async with self._lock:
            if time.monotonic() - self._asked_at >= CACHE_S:
                self._cached = await self._ask()
                self._asked_at = time.monotonic()
            return self._cached

    async def _ask(self) -> dict[str, Any]:
        try:
            return await self._ask_monitor()
        except Exception as error:  # away, restarting, slow or broken: the page must say so instead of failing
            reason = "does not answer within its time limit" if isinstance(error, TimeoutError) else f"is away: {error}"
            return {**self._own(), "monitor": None, "reason": f"the monitor {reason}"}

    def _own(self) -> dict[str, Any]:
        snapshot = self._variants.snapshot
        return {
            "policy": self._policy,
            "plan": snapshot.plan.to_json() if snapshot else None,
            "champion": snapshot.champion.version if snapshot else None,
            "versions_in_memory": self._variants.versions,
            "engines": self._variants.engines,
            "load_failures": self._variants.load_failures,
            "registry_error": self._variants.registry_error,
            "replicas": [replica_row(self._own_report(), 0.0)],  # of the others nobody knows
        }
