"""Let the port that Serve's proxy speaks to read requests as the direct lane does.

Serve starts uvicorn in each replica and wraps every request in its own accounting: that costs ten times what a decision costs.
uvicorn looks up in a table which protocol class reads a connection; this replica's process gets another entry there. Connections
that ask for Serve's own pages below `/-/` (its health checks) get uvicorn's class as before. Where a later Ray or uvicorn does
not look there any more, everything goes Serve's usual way, slower and otherwise the same.

What Serve does not see are our requests: its own request metrics and its autoscaling by ongoing requests count none. Replicas
count theirs (`/v1/status`), and `num_replicas` is fixed.
"""

import asyncio
from typing import Any

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve_app.direct import IDLE_TIMEOUT_S, Connection, DirectLane

_SERVES_OWN = b"GET /-/"

_lane: DirectLane | None = None  # of the one replica in this process


def install(lane: DirectLane) -> None:
    """Have uvicorn servers that start in this process from now on hand connections to a lane."""
    global _lane
    _lane = lane
    uvicorn.config.HTTP_PROTOCOLS["auto"] = "serve_app.front:FrontProtocol"


class FrontConnection(Connection):
    """A connection of the lane that uvicorn knows of: it closes it when the server ends."""

    def __init__(self, lane: DirectLane, loop: asyncio.AbstractEventLoop, siblings: set[Any]) -> None:
        super().__init__(lane, loop)
        self._siblings = siblings

    def connection_made(self, transport: Any) -> None:
        self._siblings.add(self)
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._siblings.discard(self)
        super().connection_lost(error)

    def shutdown(self) -> None:
        """End in good order; uvicorn calls this by name."""
        self.close_when_answered()


class FrontProtocol(asyncio.Protocol):
    """Waits for a connection's first bytes and hands it over to who reads it from then on. uvicorn makes these by keyword."""

    def __init__(self, config: Any, server_state: Any, app_state: Any, _loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = _loop or asyncio.get_running_loop()
        self._uvicorns = {"config": config, "server_state": server_state, "app_state": app_state, "_loop": self._loop}
        self._siblings: set[Any] = server_state.connections
        self._first = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._siblings.add(self)
        self._timer = self._loop.call_later(IDLE_TIMEOUT_S, transport.close)

    def data_received(self, data: bytes) -> None:
        self._first += data
        if len(self._first) < len(_SERVES_OWN) and _SERVES_OWN.startswith(self._first):
            return
        assert _lane is not None, "install names it before a server starts"
        self._leave()
        is_serves_own = self._first.startswith(_SERVES_OWN)
        reader: Any = HttpToolsProtocol(**self._uvicorns) if is_serves_own else FrontConnection(_lane, self._loop, self._siblings)
        self._transport.set_protocol(reader)
        reader.connection_made(self._transport)
        reader.data_received(self._first)

    def connection_lost(self, error: Exception | None) -> None:
        self._leave()

    def shutdown(self) -> None:
        """End; nothing was asked for yet. uvicorn calls this by name."""
        self._transport.close()

    def _leave(self) -> None:
        self._timer.cancel()
        self._siblings.discard(self)
