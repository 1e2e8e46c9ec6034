"""A replica that answers on its own port, from a thread of this process: for clients that block."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from policies.storage import Storage
from serve_app.config import ServingConfig
from serve_app.replica import PolicyReplica
from tests.serving_helpers import NAME


@contextmanager
def served(storage: Storage, **config: Any) -> Iterator[tuple[PolicyReplica, str]]:
    """Yield a replica and the URL of its port."""
    loop = asyncio.new_event_loop()
    replica = PolicyReplica(NAME, str(storage.root), ServingConfig(**config).model_dump())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        port = asyncio.run_coroutine_threadsafe(replica._direct.start("127.0.0.1"), loop).result(10)
        yield replica, f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(replica._stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
