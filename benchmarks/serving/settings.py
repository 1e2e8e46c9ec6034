"""What is switched on or off while our endpoint is measured, and how the log shows that it was.

Each setting has two sides: `prepare` makes it in a storage root before serving starts, `require_in_force` raises
`SettingNotInForce` unless what was logged under load shows it.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policies.log_reader import LogTail
from policies.records import Decision, Record, Shadow
from policies.storage import Storage

CANARY_WEIGHT = HOLDOUT_WEIGHT = 0.5
SHARE_TOLERANCE = 0.1  # of 200 and more units; the standard error is 0.035
MIN_DECISIONS = 200
MAX_RECORDS = 5_000  # enough to see a share, and little enough to read after each load
CANDIDATE_SEED = 2


class SettingNotInForce(Exception):
    """What was measured is not what the row would say."""


@dataclass(frozen=True)
class Setting:
    prepare: Callable[[Storage, str], None]
    require_in_force: Callable[[Path, Path], None]


def require_logged(decisions: Path, shadows: Path) -> None:
    """Raise unless decisions were logged, all of the champion."""
    _require_share("champion", 1.0, logged(decisions, Decision))


def require_nothing_logged(decisions: Path, shadows: Path) -> None:
    """Raise when a decision was logged."""
    if found := len(logged(decisions, Decision)):
        raise SettingNotInForce(f"{found} or more decisions were logged in {decisions}; the log was to be off")


def require_canary(decisions: Path, shadows: Path) -> None:
    """Raise unless the canary answered about its share."""
    _require_share("canary", CANARY_WEIGHT, logged(decisions, Decision))


def require_holdout(decisions: Path, shadows: Path) -> None:
    """Raise unless the holdout answered about its share."""
    _require_share("holdout", HOLDOUT_WEIGHT, logged(decisions, Decision))


def require_shadows(decisions: Path, shadows: Path) -> None:
    """Raise unless shadows were logged beside the champion's decisions."""
    require_logged(decisions, shadows)
    if (found := len(logged(shadows, Shadow))) < MIN_DECISIONS:
        raise SettingNotInForce(f"{found} shadow answers were logged in {shadows}, expected at least {MIN_DECISIONS}")


def logged(directory: Path, record_type: type[Record]) -> list[Any]:
    """Return the first records in a log directory that may not exist."""
    tail, records = LogTail(directory, record_type), []
    tail.look()
    while len(records) < MAX_RECORDS and (more := tail.read()):
        records += more
    return records


def _require_share(arm: str, weight: float, decisions: list[Decision]) -> None:
    counts = Counter(decision.arm for decision in decisions)
    total = sum(counts.values())
    if total < MIN_DECISIONS or abs(counts[arm] / total - weight) > SHARE_TOLERANCE:
        raise SettingNotInForce(f"the {arm} was to answer {weight:.0%} of the decisions; the log has {dict(counts)}")


def _nothing(storage: Storage, size: str) -> None:
    pass


def _without_log(storage: Storage, size: str) -> None:
    """Have this process start a replica of the benchmark's own: the product has no such switch."""
    import serve_app.app
    from benchmarks.serving.unlogged_replica import UnloggedReplica

    serve_app.app.PolicyReplica = UnloggedReplica


def _with_canary(storage: Storage, size: str) -> None:
    from benchmarks.serving.policies import publish_policy
    from tests.serving_helpers import release

    release(storage, publish_policy(storage, size, seed=CANDIDATE_SEED), weights=(CANARY_WEIGHT, 1.0))


def _with_shadow(storage: Storage, size: str) -> None:
    from policies.registry_entries import set_shadows

    _append(storage, size, lambda state, version: set_shadows(state, (version,), override_gates=None, reason="benchmark"))


def _with_holdout(storage: Storage, size: str) -> None:
    from policies.registry_entries import set_holdout

    _append(
        storage,
        size,
        lambda state, version: set_holdout(state, version, weight=HOLDOUT_WEIGHT, override_gates=None, reason="benchmark"),
    )


def _append(storage: Storage, size: str, entry: Callable[[Any, int], dict[str, Any]]) -> None:
    """Register a second version and give it its place in the traffic."""
    from benchmarks.serving.policies import publish_policy
    from policies.registry import Registry
    from tests.serving_helpers import NAME

    version = publish_policy(storage, size, seed=CANDIDATE_SEED)
    Registry(storage.registry(NAME)).append(lambda state: entry(state, version), now=1000.0)


SETTINGS = {
    "plain": Setting(_nothing, require_logged),
    "log_off": Setting(_without_log, require_nothing_logged),
    "canary": Setting(_with_canary, require_canary),
    "shadow": Setting(_with_shadow, require_shadows),
    "holdout": Setting(_with_holdout, require_holdout),
}
