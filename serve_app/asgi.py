"""The smallest HTTP request and response we need over ASGI, with bounds on what a client may send."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from policies.errors import RequestInvalid

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

# A client that drips its body holds memory. One that sends nothing at all is left to HAProxy's timeout (serve_app.profile):
# a timer on every request would cost more than parsing it.
BODY_TIMEOUT_S = 10.0

JSON, BYTES = b"application/json", b"application/octet-stream"


class ClientGone(Exception):
    """The client closed the connection before its request was complete; nobody is left to answer."""


class Request(NamedTuple):
    """One HTTP request; the body is read only when somebody asks for it."""

    scope: Scope
    receive: Receive

    def header(self, name: bytes) -> bytes | None:
        """Return the value of a header given in lower case."""
        for key, value in self.scope["headers"]:
            if key == name:
                return value
        return None

    async def body(self, max_bytes: int) -> bytes:
        """Read the body; raises `RequestInvalid` with 413 as soon as it is known to be too large, declared or not."""
        require_plain(self.header(b"content-encoding"))
        declared = self.header(b"content-length")
        if declared is not None and int(declared) > max_bytes:
            raise too_large(max_bytes)
        body, is_complete = self._checked(await self.receive(), 0, max_bytes)
        if is_complete:
            return body
        chunks, size = [body], len(body)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while not is_complete:
                    chunk, is_complete = self._checked(await self.receive(), size, max_bytes)
                    chunks.append(chunk)
                    size += len(chunk)
        except TimeoutError:
            raise RequestInvalid(f"the body did not arrive within {BODY_TIMEOUT_S:g} s", 408) from None
        return b"".join(chunks)

    @staticmethod
    def _checked(message: dict[str, Any], size: int, max_bytes: int) -> tuple[bytes, bool]:
        """Return the bytes of one message and whether it is the last."""
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        if size + len(chunk) > max_bytes:
            raise too_large(max_bytes)
        return chunk, not message.get("more_body", False)


class Response(NamedTuple):
    """One HTTP answer. `left` is called once it is out of this process's memory, or nobody is there to take it."""

    status: int
    body: bytes
    content_type: bytes = JSON
    headers: Sequence[tuple[bytes, bytes]] = ()
    left: Callable[[], None] | None = None

    async def send(self, send: Send) -> None:
        """Send status, headers and body."""
        length = b"%d" % len(self.body)
        headers = [(b"content-type", self.content_type), (b"content-length", length), *self.headers]
        try:
            await send({"type": "http.response.start", "status": self.status, "headers": headers})
            await send({"type": "http.response.body", "body": self.body})
        finally:
            if self.left is not None:
                self.left()


def require_plain(content_encoding: bytes | None) -> None:
    """Raise `RequestInvalid` with 415 for a compressed body: a few of its bytes may stand for gigabytes."""
    if content_encoding is not None and content_encoding.lower() != b"identity":
        raise RequestInvalid(f"content-encoding is {content_encoding[:40].decode('latin-1')!r}; send the body uncompressed", 415)


def too_large(max_bytes: int) -> RequestInvalid:
    """Return the refusal of a body beyond the limit."""
    return RequestInvalid(f"the body is larger than {max_bytes} bytes, the limit", 413)
