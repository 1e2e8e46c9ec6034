"""Let the port that Serve's proxy speaks to read requests as the direct lane does.

Serve starts uvicorn in each replica and wraps every request in its own accounting: that costs ten times what a decision costs.
uvicorn looks up in a table which protocol class reads a connection; this replica's process gets another entry there. Connections
that ask for Serve's own pages below `/-/` (its health checks) get uvicorn's class as before. Where a later Ray or uvicorn does
not look there any more, everything goes Serve's usual way, slower and otherwise the same.

All of them count towards the lane's limit of connections, and its sweep closes the slow ones. A connection on which no first
byte comes is closed after `REQUEST_TIMEOUT_S`: HAProxy opens one when it has a request for it, or for a health check. Those that
it keeps open (`http-reuse always`) have had a request: they may be silent for `IDLE_TIMEOUT_S`.

What Serve does not see are our requests: its own request metrics and its autoscaling by ongoing requests count none. Replicas
count theirs (`/v1/status`), and `num_replicas` is fixed.
"""

import asyncio
from typing import Any

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve_app.connection import MAX_HEADER_BYTES, REQUEST_TIMEOUT_S, Connection
from serve_app.direct import DirectLane

# Beyond the lane's limit, while it is not known yet what they ask for: a full replica whose health checks fail is replaced, and
# its clients come to the next one.
NUM_RESERVED = 64
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


class OwnPagesConnection(HttpToolsProtocol):
    """A connection on which Serve's own pages are asked for: uvicorn's, which would collect headers and requests without end."""

    def __init__(self, lane: DirectLane, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._lane = lane
        self._num_bytes = 0  # of what was not answered yet
        self._since_s = self.loop.time()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._lane.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._lane.connections.discard(self)
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        if self._num_bytes == 0:
            self._since_s = self.loop.time()
        self._num_bytes += len(data)
        if self._num_bytes <= MAX_HEADER_BYTES:
            super().data_received(data)
        elif self._is_answering():
            self.transport.close()
        else:
            self.send_400_response(f"what is asked for here is larger than {MAX_HEADER_BYTES} bytes, the limit")

    def on_response_complete(self) -> None:
        if not self.pipeline:
            self._num_bytes = 0
        super().on_response_complete()

    def close_if_slow(self, now_s: float) -> None:
        if self._is_answering() or now_s - self._since_s <= REQUEST_TIMEOUT_S:
            return
        if self.transport.is_closing():  # until a client that does not read has read its answers
            self.transport.abort()
        elif self._num_bytes:
            self.transport.close()

    def close_when_answered(self) -> None:
        self.shutdown()

    def abort(self) -> None:
        self.transport.abort()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete


class FrontProtocol(asyncio.Protocol):
    """Waits for a connection's first bytes and hands it over to who reads it from then on. uvicorn makes these by keyword."""

    def __init__(self, config: Any, server_state: Any, app_state: Any, _loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = _loop or asyncio.get_running_loop()
        self._uvicorns = {"config": config, "server_state": server_state, "app_state": app_state, "_loop": self._loop}
        self._siblings: set[Any] = server_state.connections
        self._first = b""

    def connection_made(self, transport: Any) -> None:
        assert _lane is not None, "install names it before a server starts"
        self._lane = _lane
        self._transport = transport
        if _lane.is_full(num_reserved=NUM_RESERVED):
            return self._hand_over(FrontConnection(_lane, self._loop, self._siblings))  # which refuses it
        self._since_s = self._loop.time()
        self._siblings.add(self)
        _lane.connections.add(self)

    def data_received(self, data: bytes) -> None:
        self._first += data
        if len(self._first) < len(_SERVES_OWN) and _SERVES_OWN.startswith(self._first):
            return
        self._leave()
        is_serves_own = self._first.startswith(_SERVES_OWN)
        self._hand_over(
            OwnPagesConnection(self._lane, **self._uvicorns)
            if is_serves_own
            else FrontConnection(self._lane, self._loop, self._siblings)
        ).data_received(self._first)

    def connection_lost(self, error: Exception | None) -> None:
        self._leave()

    def shutdown(self) -> None:
        """End; nothing was asked for yet. uvicorn calls this by name."""
        self._transport.close()

    def close_if_slow(self, now_s: float) -> None:
        if now_s - self._since_s > REQUEST_TIMEOUT_S:
            self._transport.close()

    def close_when_answered(self) -> None:
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def _hand_over(self, reader: Any) -> Any:
        self._transport.set_protocol(reader)
        reader.connection_made(self._transport)
        return reader

    def _leave(self) -> None:
        self._siblings.discard(self)
        self._lane.connections.discard(self)
