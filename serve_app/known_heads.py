"""Which requests need no parsing, because their head is, byte for byte, one that was parsed before on the same connection.

A client that keeps its connection sends the same head again and again; to parse it costs as much as the decision.
"""

from typing import NamedTuple

from serve_app.keys import ApiKey

MAX_HEAD_BYTES = 4 << 10
_REQUEST_ID = b"\r\nx-request-id: "  # a proxy writes another one into each request


class Received(NamedTuple):
    """A request that arrived whole."""

    method: str
    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes
    keeps_open: bool
    started_s: float
    key: ApiKey | None
    arm: bytes | None


class KnownHead(NamedTuple):
    """A head, and what it says; `hole` is where its request id's value is, `size` that of the request with its body.

    It is kept as long as the connection, so `received` is without the body.
    """

    head: bytes
    hole: slice
    size: int
    received: Received
    authorization: bytes | None


def learn_head(data: bytes, received: Received) -> KnownHead | None:
    """Return the head of a request that came in one piece, None unless it is an ordinary one for decisions."""
    head = data[: len(data) - len(received.body)]
    is_plain = received.path == "/v1/decide" and received.method == "POST" and received.keeps_open and received.body
    is_whole = head.find(b"\r\n\r\n") == len(head) - 4 and data.endswith(received.body)  # nothing before or behind the request
    if not (is_plain and len(head) <= MAX_HEAD_BYTES and is_whole):
        return None
    headers = dict(reversed(received.headers))
    if b"content-length" not in headers or b"expect" in headers:
        return None
    start = head.lower().find(_REQUEST_ID) + len(_REQUEST_ID)
    hole = slice(start, head.index(b"\r\n", start)) if start >= len(_REQUEST_ID) else slice(0, 0)
    return KnownHead(head, hole, len(data), received._replace(body=b""), headers.get(b"authorization"))


def has_head(data: bytes, known: KnownHead) -> bool:
    """Say whether data begins with a head, but for the value of its request id, in which no line may end."""
    head, hole = known.head, known.hole
    if hole.stop == 0:
        return data.startswith(head)
    if not (data.startswith(head[hole.stop :], hole.stop) and data.startswith(head[: hole.start])):
        return False
    value = data[hole]
    return b"\r" not in value and b"\n" not in value
