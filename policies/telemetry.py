"""What a replica tells the monitor each second, and the names under which the named actors are found."""

from typing import Any

import msgspec

ACTOR_NAMESPACE = "trimtab"


def monitor_name(policy: str) -> str:
    """Return the name of the policy's monitor actor."""
    return f"monitor-{policy}"


def release_manager_name(policy: str) -> str:
    """Return the name of the policy's release manager actor."""
    return f"release-manager-{policy}"


# Upper edges in seconds; the last bucket is open. 1.4 between neighbours, so a percentile is known within 40 %.
LATENCY_BUCKETS_S = tuple(round(0.0001 * 1.4**k, 7) for k in range(32))


class ReplicaReport(msgspec.Struct, frozen=True):
    """Totals of one replica since it started, not deltas: a lost message loses nothing, and a monitor that was restarted
    is up to date after one second. `responses` counts HTTP answers by status code. What a replica decided, and how fast, is in
    the log.
    """

    replica: str
    time_s: float
    started_at_s: float
    plan: int
    versions: list[int]
    responses: dict[int, int]
    queue_depth: int
    load_failures: dict[int, str]
    endpoint: str | None = None  # URL of its direct lane, if it has one
    breakers: dict[int, str] = {}  # versions that it does not ask at the moment, and why
    registry_error: str | None = None
    keys_error: str | None = None
    shadows: dict[str, int] = {}  # decisions that shadows were asked about, left out of, and not logged for
    engines: dict[int, str] = {}  # what computes each version in memory: numpy, or a package and its version
    log: dict[str, Any] = {}  # `DecisionLog.status`: whether what it decides is written down


def replica_row(report: ReplicaReport, age_s: float) -> dict[str, Any]:
    """Return how the status document shows a report of that age; keys are texts, as JSON wants them."""
    document = msgspec.to_builtins(report, str_keys=True)
    return {"age_s": age_s, **{name: value for name, value in document.items() if name not in ("time_s", "started_at_s")}}
