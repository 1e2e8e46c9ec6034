"""A replica that decides as ours does and writes nothing down: what the log costs is the difference. Never serve with it."""

from typing import Any

import serve_app.replica
from serve_app.replica import PolicyReplica


class DiscardingWriter:
    """Stands where a `SegmentWriter` stands, and keeps nothing."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        pass

    def append(self, lines: bytes) -> None:
        pass

    def close(self) -> None:
        pass


class UnloggedReplica(PolicyReplica):
    """Takes its writers from here instead of from `serve_app.decision_log`, in the process that it runs in."""

    def __init__(self, policy: str, storage_root: str, config: dict[str, Any]) -> None:
        serve_app.replica.SegmentWriter = DiscardingWriter
        super().__init__(policy, storage_root, config)
