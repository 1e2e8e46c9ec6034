"""An HTTP session whose answers are read until the caller's time is over, and no longer.

A socket's own timeout is for each piece: an endpoint that sends a byte now and then, of its headers or its body, would hold a
caller for ever.
"""

import http.client
import io
import socket
import time
from functools import partial
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection


def timely_session() -> requests.Session:
    """Return a session that gives up on an answer when the request's read timeout is over, whatever came until then."""
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Adapter())
    return session


class _UntilDeadline(io.RawIOBase):
    """A socket's bytes; each piece may take what is left of the time for all."""

    def __init__(self, pieces: io.RawIOBase, sock: socket.socket, deadline_s: float) -> None:
        self._pieces, self._sock, self._deadline_s = pieces, sock, deadline_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        remaining_s = self._deadline_s - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError("the answer came too slowly")
        self._sock.settimeout(remaining_s)
        return self._pieces.readinto(buffer)

    def close(self) -> None:
        self._pieces.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, deadline_s: float, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_UntilDeadline(self.fp.detach(), sock, deadline_s))


class _TimelyConnection:
    """Of two connections: `timeout` is what is left of the request's time when its answer is read."""

    def getresponse(self) -> Any:
        self.response_class = partial(_Response, deadline_s=time.monotonic() + self.timeout)  # type: ignore[attr-defined]
        return super().getresponse()  # type: ignore[misc]


class _PlainConnection(_TimelyConnection, HTTPConnection):
    pass


class _TlsConnection(_TimelyConnection, HTTPSConnection):
    pass


class _PlainPool(HTTPConnectionPool):
    ConnectionCls = _PlainConnection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _PlainPool, "https": _TlsPool}
