"""Tell the monitor each second what this replica did, without ever making a request wait for it."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import ray

from policies.errors import ClusterError
from policies.telemetry import ACTOR_NAMESPACE, ReplicaReport, monitor_name

REPORT_INTERVAL_S = 1.0
REPORT_TIMEOUT_S = 5.0  # one report at a time: a monitor that hangs costs this replica one waiting call, not a queue
STATUS_TIMEOUT_S = 1.0

logger = logging.getLogger(__name__)


class Counters:
    """Totals since this replica started."""

    def __init__(self) -> None:
        self.responses: dict[int, int] = {}

    def count_response(self, status: int) -> None:
        """Count one HTTP answer."""
        self.responses[status] = self.responses.get(status, 0) + 1


class MonitorLink:
    """Reaches the policy's monitor actor by name, and finds it again after it was away."""

    def __init__(self, policy: str) -> None:
        self._name = monitor_name(policy)
        self._handle: Any = None  # None: not found yet, or lost

    async def report(self, report: ReplicaReport) -> None:
        """Hand a report to the monitor; raises when it is away."""
        await self._call("report", msgspec.to_builtins(report), timeout_s=REPORT_TIMEOUT_S)

    async def status(self) -> dict[str, Any]:
        """Return what the monitor knows; raises when it is away."""
        return await self._call("status", timeout_s=STATUS_TIMEOUT_S)

    async def _call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        if not ray.is_initialized():  # else Ray would start a cluster of its own for the look-up
            raise ClusterError("this process is not part of a Ray cluster")
        async with asyncio.timeout(timeout_s):
            try:
                if self._handle is None:  # in a thread: the look-up asks Ray's GCS and blocks
                    self._handle = await asyncio.to_thread(ray.get_actor, self._name, namespace=ACTOR_NAMESPACE)
                return await getattr(self._handle, method).remote(*arguments)
            except (ray.exceptions.RayActorError, ValueError):
                self._handle = None
                raise


async def report_for_ever(link: MonitorLink, make_report: Callable[[], ReplicaReport]) -> None:
    """Send a report each second; a report that is lost loses nothing, since the next one holds totals too."""
    is_lost = False
    while True:
        await asyncio.sleep(REPORT_INTERVAL_S)
        try:
            await link.report(make_report())
            is_lost = False
        except Exception as error:  # whatever is wrong over there must not end the reports, nor fill the log
            if not is_lost:
                logger.warning("event=monitor_away error=%r", str(error) or type(error).__name__)
            is_lost = True
