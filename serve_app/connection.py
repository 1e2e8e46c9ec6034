"""One client's connection to a replica: HTTP/1.1 is read from it, and what was asked is answered in its order."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import httptools

from policies.errors import Overloaded, RequestInvalid, RequestRefused, ServiceUnavailable
from serve_app.asgi import JSON, Request, Response, require_plain, too_large
from serve_app.http_api import error_response
from serve_app.ingress import ARM_HEADER
from serve_app.keys import ApiKey
from serve_app.known_heads import KnownHead, Received, has_head, learn_head
from serve_app.wire import encode

if TYPE_CHECKING:  # it imports this module
    from serve_app.direct import DirectLane

MAX_HEADER_BYTES = 32 << 10
MAX_PIPELINED = 64  # requests of one connection that wait for their turn; then it is not read from any more
PARSE_BYTES = 8 << 10  # at once: one read brings up to 256 kB, of 18 bytes a request; what is not parsed costs its bytes only
REQUEST_TIMEOUT_S = 10.0  # for a request to arrive whole, once its first byte has
IDLE_TIMEOUT_S = 75.0
CLOSE_TIMEOUT_S = 2.0  # for a client to read its last answers
# How long a refusal for a full queue waits before it is sent. One that comes back at once costs as much as a decision: of 2,000
# connections that did so 73 % were refused, and goodput was 28 % of the peak; held it is 83 %. Shorter than our Retry-After.
HOLD_REFUSAL_S = 0.5

_NOTHING = memoryview(b"")
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
_OK_JSON = _STATUS_LINES[200] + b"content-type: application/json\r\ncontent-length: "


class Connection(asyncio.Protocol):
    """Reads requests and answers them one after the other.

    A client that keeps its connection sends the same head again and again. One that is equal in every byte, with a body of the
    length it says, is not parsed again: that would cost as much as the decision.
    """

    def __init__(self, lane: "DirectLane", loop: asyncio.AbstractEventLoop) -> None:
        self._lane = lane
        self._loop = loop
        self._parser = httptools.HttpRequestParser(self)
        self._known: KnownHead | None = None
        self._last: Received | None = None
        self._num_completed = 0
        self._waiting: deque[Received | Response] = deque()  # a Response is a refusal: the last there is on this connection
        self._unparsed = _NOTHING  # came together with more requests than may wait
        self._is_parsing = False
        self._is_answering = False
        self._is_taking = False
        self._is_refused = False
        self._is_stopping = False
        self._is_in_head = False
        self._num_unfinished = 0  # bytes that came for a request after those with which it began
        self._closing_since_s: float | None = None
        self._is_paused = False
        self._is_unread = False  # the client does not read its answers
        self._when_read: list[Callable[[], None]] = []
        self._since_s: float | None = None  # the first byte of a request that is not whole yet
        self._idle_since_s = loop.time()
        self._begin()

    # --- asyncio's side ---

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        try:
            self._lane.require_room()
        except ServiceUnavailable as full:
            self._refuse(self._lane.api.failure_response(full, ""))
        self._lane.connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        known = self._known
        is_next = self._since_s is None and not self._unparsed
        if known is not None and len(data) == known.size and is_next and has_head(data, known):
            return self._receive_known(known, data)
        unfinished_since_s, num_completed = self._since_s, self._num_completed
        self._unparsed = memoryview(self._unparsed.tobytes() + data if self._unparsed else data)
        self._parse()
        is_whole = unfinished_since_s is self._since_s is None and not (self._unparsed or self._is_refused)
        if is_whole and self._num_completed == num_completed + 1:
            self._learn_head(data)
        self._last = None  # its body may be large, and the connection be kept for hours

    def _parse(self) -> None:
        """Parse what came, as far as requests may wait; the rest when they were answered."""
        self._is_parsing = True
        try:
            while self._unparsed and not self._is_refused and len(self._waiting) < MAX_PIPELINED:
                piece, self._unparsed = self._unparsed[:PARSE_BYTES], self._unparsed[PARSE_BYTES:]
                self._parse_piece(piece)
        finally:
            self._is_parsing = False

    def _parse_piece(self, data: memoryview) -> None:
        unfinished_since_s = self._since_s
        try:
            self._parser.feed_data(data)
            if unfinished_since_s is not None and unfinished_since_s == self._since_s:
                self._count_unfinished(len(data))
        except httptools.HttpParserUpgrade:
            self._is_refused = True  # it was answered as if it had not asked for another protocol, and is the last one
        except httptools.HttpParserError as error:
            cause = error.__context__  # httptools wraps what its callbacks raise
            is_ours = isinstance(cause, RequestRefused)
            self._refuse(
                self._lane.api.failure_response(cause, _path_of(self._url))
                if is_ours
                else error_response(400, f"this is not HTTP/1.1: {error}")
            )

    def _receive_known(self, known: KnownHead, data: bytes) -> None:
        method, path, headers, _, keeps_open, _, _, arm = known.received
        try:
            key = self._lane.api.keys.recognise(known.authorization)  # it may have been revoked since
        except RequestRefused as error:
            return self._refuse(self._lane.api.failure_response(error, path))
        received = Received(method, path, headers, data[len(known.head) :], keeps_open, time.perf_counter(), key, arm)
        if self._is_answering or self._waiting or self._is_unread:
            self._waiting.append(received)
            return self._pause_or_resume()
        self._is_answering = True
        self._decide(received)

    def _learn_head(self, data: bytes) -> None:
        assert self._last is not None
        self._known = learn_head(data, self._last) or self._known

    def connection_lost(self, error: Exception | None) -> None:
        self._is_refused = True
        self._waiting.clear()
        self._unparsed = _NOTHING
        self._lane.connections.discard(self)
        self._note_read()

    def pause_writing(self) -> None:
        self._is_unread = True
        self._pause_or_resume()

    def resume_writing(self) -> None:
        self._is_unread = False
        self._note_read()
        self._answer_next()
        self._pause_or_resume()

    # --- httptools' side ---

    def on_message_begin(self) -> None:
        self._since_s = self._loop.time()
        self._num_unfinished = 0
        self._is_in_head = True

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count_header_bytes(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_header_bytes(len(name) + len(value))
        if self._is_in_head:  # a trailer comes behind the body: too late to say who asks, or for what
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Refuse what will be refused before its body is read: a body is only read for who has the key."""
        self._is_in_head = False
        headers = dict(reversed(self._headers))  # of several, the first one counts
        length = int(headers.get(b"content-length", 0))
        if length > self._lane.max_body_bytes:
            raise too_large(self._lane.max_body_bytes)
        require_plain(headers.get(b"content-encoding"))
        if length or b"transfer-encoding" in headers or self._parser.get_method() == b"POST":
            self._key = self._lane.api.keys.recognise(headers.get(b"authorization"))
        if headers.get(b"expect", b"").lower() == b"100-continue":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_size += len(body)
        if self._body_size > self._lane.max_body_bytes:
            raise too_large(self._lane.max_body_bytes)
        self._body.append(body)

    def on_message_complete(self) -> None:
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        path = _path_of(self._url)
        keeps_open = self._parser.should_keep_alive() and not self._parser.should_upgrade()
        method = self._parser.get_method().decode()
        arm = next((value for name, value in self._headers if name == ARM_HEADER), None)
        self._last = Received(method, path, self._headers, body, keeps_open, time.perf_counter(), self._key, arm)
        self._num_completed += 1
        self._waiting.append(self._last)
        self._since_s = None
        self._begin()
        self._answer_next()
        self._pause_or_resume()

    # --- answering ---

    def _answer_next(self) -> None:
        """Take requests until one is being answered; those that are refused at once are over before this returns.

        None is taken while the client does not read: a page is a thousand times as large as the request for it.
        """
        if self._is_taking:
            return
        self._is_taking = True
        try:
            while self._waiting and not self._is_answering and not self._is_unread:
                self._take(self._waiting.popleft())
        finally:
            self._is_taking = False

    def _take(self, received: Received | Response) -> None:
        if isinstance(received, Response):
            self._write(received, closes=True)
            self._close()
        elif received.path == "/v1/decide" and received.method == "POST":
            self._is_answering = True
            self._decide(received)
        else:
            self._is_answering = True
            task = self._loop.create_task(self._lane.api.respond(received.path, received.method, _as_request(received)))
            task.add_done_callback(lambda done: self._answered(done, received))

    def _decide(self, received: Received) -> None:
        """The short way for the one request that matters: no task, no coroutine."""
        key = received.key
        assert key is not None, "it was looked for before the body was read"
        try:
            self._lane.api.keys.admit(key, "decide")
            key.usage.begin()
        except RequestRefused as error:
            return self._send_counted(self._lane.api.failure_response(error, received.path), received)
        try:
            ask = self._lane.ingress.ask(received.body, key, started_s=received.started_s, arm=received.arm)
            self._lane.ingress.batcher.submit(ask, lambda result: self._decided(result, received), num_rows=ask.num_rows)
        except Exception as error:
            key.usage.end()
            response = self._lane.api.failure_response(error, received.path)
            if isinstance(error, Overloaded):
                self._loop.call_later(HOLD_REFUSAL_S, self._send_counted, response, received)
                return
            self._send_counted(response, received)

    def _answered(self, done: "asyncio.Task[Response]", received: Received) -> None:
        try:
            self._send(done.result(), received)
        except BaseException:
            self._transport.abort()  # its client would wait for ever
            raise

    def _decided(self, result: Any, received: Received) -> None:
        assert received.key is not None
        received.key.usage.end()
        try:
            if isinstance(result, Exception):
                response = self._lane.api.failure_response(result, received.path)
            else:
                response = Response(200, encode(result))
            self._send_counted(response, received)
        except BaseException:
            self._transport.abort()  # its client would wait for ever
            raise

    def _send_counted(self, response: Response, received: Received) -> None:
        self._lane.api.counters.count_response(response.status)
        self._send(response, received)

    def _send(self, response: Response, received: Received) -> None:
        if response.left is not None:
            self._when_read.append(response.left)
        if self._transport.is_closing():
            return self._note_read()
        closes = self._is_stopping or not received.keeps_open or (b"connection", b"close") in response.headers
        self._write(response, closes=closes, has_body=received.method != "HEAD")
        if self._when_read and not self._is_unread:
            self._note_read()
        if closes:
            self._waiting.clear()
            return self._close()
        self._is_answering = False
        self._idle_since_s = self._loop.time()
        if self._waiting:
            self._answer_next()
        if self._is_paused:
            self._pause_or_resume()

    def _note_read(self) -> None:
        when_read, self._when_read = self._when_read, []
        for left in when_read:
            left()

    def _write(self, response: Response, *, closes: bool, has_body: bool = True) -> None:
        body = response.body
        if response.status == 200 and response.content_type is JSON and not response.headers and not closes and has_body:
            return self._transport.write(b"%b%d\r\n\r\n%b" % (_OK_JSON, len(body), body))  # nearly every answer
        headers = [(b"content-type", response.content_type), (b"content-length", b"%d" % len(body)), *response.headers]
        if closes and (b"connection", b"close") not in headers:
            headers.append((b"connection", b"close"))
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        self._transport.write(_STATUS_LINES[response.status] + lines + b"\r\n" + (body if has_body else b""))

    def _refuse(self, response: Response) -> None:
        """Answer what is no request, after those before it, and close: where the next one would begin is not known."""
        self._is_refused = True
        self._since_s = None
        self._unparsed = _NOTHING
        self._lane.api.counters.count_response(response.status)
        self._waiting.append(response)
        self._answer_next()

    # --- bounds ---

    def close_if_slow(self, now_s: float) -> None:
        if self._closing_since_s is not None:
            if now_s - self._closing_since_s > CLOSE_TIMEOUT_S:
                self._transport.abort()  # closing waits until all answers are read, by a client that does not read
        elif self._since_s is not None and now_s - self._since_s > REQUEST_TIMEOUT_S and not self._is_answering:
            self._refuse(error_response(408, f"the request did not arrive within {REQUEST_TIMEOUT_S:g} s"))
        elif self._since_s is None and not self._is_answering and now_s - self._idle_since_s > IDLE_TIMEOUT_S:
            self._close()

    def close_when_answered(self) -> None:
        """Answer what is being answered, and nothing after it."""
        self._waiting.clear()
        self._is_refused = self._is_stopping = True
        if not self._is_answering:
            self._close()

    def abort(self) -> None:
        self._transport.abort()

    def _close(self) -> None:
        self._closing_since_s = self._loop.time()
        self._transport.close()

    def _begin(self) -> None:
        self._url = b""
        self._key: ApiKey | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._body_size = self._header_size = 0

    def _count_unfinished(self, num_bytes: int) -> None:
        """Bound what the parser collects before it says so: a header that never ends, or chunks that hold hardly anything."""
        self._num_unfinished += num_bytes
        limit = MAX_HEADER_BYTES if self._is_in_head else MAX_HEADER_BYTES + 8 * self._lane.max_body_bytes
        if self._num_unfinished > limit:
            status = 431 if self._is_in_head else 413
            self._refuse(error_response(status, f"the request goes on after {limit} bytes, the limit"))

    def _count_header_bytes(self, num_bytes: int) -> None:
        self._header_size += num_bytes
        if self._header_size > MAX_HEADER_BYTES:
            raise RequestInvalid(f"the headers are larger than {MAX_HEADER_BYTES} bytes, the limit", 431)

    def _pause_or_resume(self) -> None:
        """Read no more from a client that sends without waiting, or does not read its answers."""
        if self._unparsed and not (self._is_parsing or self._must_wait() or self._transport.is_closing()):
            self._parse()
            self._last = None
        pauses = self._must_wait()
        if pauses == self._is_paused or self._transport.is_closing():
            return
        self._is_paused = pauses
        if pauses:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _must_wait(self) -> bool:
        return self._is_unread or len(self._waiting) >= MAX_PIPELINED


def _path_of(url: bytes) -> str:
    return url.partition(b"?")[0].decode("latin-1")


def _as_request(received: Received) -> Request:
    """Return a request as the application takes it from Serve; its body is there already."""
    messages = iter([{"type": "http.request", "body": received.body, "more_body": False}])

    async def receive() -> dict[str, Any]:
        return next(messages, {"type": "http.disconnect"})

    return Request({"type": "http", "path": received.path, "method": received.method, "headers": received.headers}, receive)
