"""A replica of one policy on its direct lane, in this process and without Ray: what a client really talks to."""

import asyncio
import threading
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any

from policies.storage import Storage
from tests.serving_helpers import replica_of


class DirectReplica:
    """The replica, its event loop and its address; `stop_lane` and `start_lane` are a crash and a restart on the same port."""

    def __init__(self, storage: Storage, **config: Any) -> None:
        self.storage = storage
        self.key = storage.api_key_file.read_text().strip()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.replica = replica_of(storage, **config)
        self.port = self.run(self.replica._direct.start("127.0.0.1"))
        self.url = f"http://127.0.0.1:{self.port}"

    def run(self, work: Awaitable[Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def refresh(self) -> None:
        """Bring the registry's newest plan into force."""
        self.replica._variants.refresh(now=1e9)

    def stop_lane(self) -> None:
        self.run(self.replica._direct.stop())

    def start_lane(self) -> None:
        self.run(self.replica._direct.start("127.0.0.1", self.port))

    def close(self) -> None:
        self.run(self.replica._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextmanager
def direct_replica(storage: Storage, **config: Any) -> Iterator[DirectReplica]:
    """Run a replica for the time of a test."""
    replica = DirectReplica(storage, **config)
    try:
        yield replica
    finally:
        replica.close()
