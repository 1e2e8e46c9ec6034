"""The direct lane: a replica answers the same requests on a port of its own, with nothing between the socket and the batch.

Ray Serve's way leads through HAProxy and an HTTP server; each costs as much as a decision. This one is an HTTP/1.1 front of
httptools callbacks on the replica's event loop (`serve_app.connection`). What arrives within one turn of the loop is one batch,
as on the other way.
"""

import asyncio
import time
from typing import Protocol

from policies.errors import ServiceUnavailable
from serve_app.connection import CLOSE_TIMEOUT_S, Connection
from serve_app.http_api import HttpApi
from serve_app.ingress import Ingress

MAX_CONNECTIONS = 4096
SWEEP_INTERVAL_S = 1.0


class Held(Protocol):
    """An open connection, as far as the lane is concerned: it counts, is closed when it is slow, and ends with the lane."""

    def close_if_slow(self, now_s: float) -> None: ...

    def close_when_answered(self) -> None: ...

    def abort(self) -> None: ...


class DirectLane:
    """A listening socket and its connections. `start` returns the port, `stop` closes everything."""

    def __init__(self, api: HttpApi, ingress: Ingress, *, max_body_bytes: int) -> None:
        self.api = api
        self.ingress = ingress
        self.max_body_bytes = max_body_bytes
        self.connections: set[Held] = set()  # also those that came by another port (`serve_app.front`)
        self.port: int | None = None
        self._server: asyncio.Server | None = None
        self._sweep: asyncio.TimerHandle | None = None

    async def start(self, host: str, port: int = 0) -> int:
        """Listen; port 0 is any free one."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self, loop), host, port, backlog=MAX_CONNECTIONS)
        self.port = self._server.sockets[0].getsockname()[1]
        self.start_sweeping()
        return self.port

    def start_sweeping(self) -> None:
        """Close slow connections from now on."""
        if self._sweep is None:
            self._close_the_slow(asyncio.get_running_loop())

    def is_full(self, *, num_reserved: int = 0) -> bool:
        """Say whether as many connections are open as may be, and `num_reserved` more."""
        return len(self.connections) >= MAX_CONNECTIONS + num_reserved

    def require_room(self) -> None:
        """Raise `ServiceUnavailable` when as many connections are open as may be."""
        if self.is_full():
            raise ServiceUnavailable(f"{MAX_CONNECTIONS} connections are open, the limit; try again in a moment")

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._sweep is not None:
            self._sweep.cancel()
        for connection in list(self.connections):
            connection.close_when_answered()
        deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
        while self.connections and time.monotonic() < deadline_s:
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.abort()
        self._server = self.port = self._sweep = None

    def _close_the_slow(self, loop: asyncio.AbstractEventLoop) -> None:
        """One look at all connections each second instead of a timer for each request."""
        now_s = loop.time()
        for connection in list(self.connections):
            connection.close_if_slow(now_s)
        self._sweep = loop.call_later(SWEEP_INTERVAL_S, self._close_the_slow, loop)
