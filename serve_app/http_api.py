"""Which paths the endpoint has, and how an error looks on the wire."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from policies.errors import Overloaded, RequestInvalid, RequestRefused, ServiceUnavailable, Unauthorized
from serve_app.asgi import ClientGone, Receive, Request, Response, Scope, Send
from serve_app.feedback import FeedbackIntake
from serve_app.ingress import Ingress
from serve_app.keys import KeyRing
from serve_app.status import StatusView
from serve_app.telemetry import Counters
from serve_app.variants import VariantStore
from serve_app.wire import encode

RETRY_AFTER_S = 1

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]


class HttpApi:
    """The ASGI application. `files` are the dashboard's: path below /dashboard/ to content type and bytes.

    `keys` are also for a front that has to know who asks before it reads a body. `own_endpoint` returns the URL of this replica's
    direct lane, if it has one. `start` and `stop` are awaited with the application's own, on the loop that answers requests.
    """

    def __init__(
        self,
        *,
        ingress: Ingress,
        feedback: FeedbackIntake,
        status: StatusView,
        variants: VariantStore,
        keys: KeyRing,
        counters: Counters,
        files: dict[str, tuple[bytes, bytes]],
        own_endpoint: Callable[[], str | None],
        start: Callable[[], Awaitable[None]],
        stop: Callable[[], Awaitable[None]],
    ) -> None:
        self._ingress = ingress
        self._feedback = feedback
        self._status = status
        self._variants = variants
        self.keys = keys
        self.counters = counters
        self._own_endpoint = own_endpoint
        self._start = start
        self._stop = stop
        self._routes: dict[str, tuple[str, Handler]] = {
            "/v1/decide": ("POST", self._in_flight(self._decide)),
            "/v1/feedback": ("POST", self._in_flight(self._accept_feedback)),
            "/v1/status": ("GET", self._in_flight(self._show_status)),
            "/v1/endpoints": ("GET", self._in_flight(self._show_endpoints)),
            "/healthz": ("GET", self._is_alive),
            "/readyz": ("GET", self._is_ready),
        }
        pages = {f"/dashboard/{name}": _page(*content) for name, content in files.items()}
        if "index.html" in files:
            pages["/dashboard"] = pages["/dashboard/"] = _page(*files["index.html"])
        self._routes |= {path: ("GET", page) for path, page in pages.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever it is; nothing but a client that went away passes unanswered."""
        if scope["type"] == "lifespan":
            return await self._live(receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1003})
        try:
            response = await self.respond(scope["path"], scope["method"], Request(scope, receive))
        except ClientGone:
            return
        await response.send(send)

    async def respond(self, path: str, method: str, request: Request) -> Response:
        """Return the answer to one request, and count it; raises `ClientGone`."""
        try:
            response = await self._route(path, method)(request)
        except ClientGone:
            raise
        except Exception as error:
            response = self.failure_response(error, path)
        if path.startswith("/v1/"):
            self.counters.count_response(response.status)
        return response

    def failure_response(self, error: BaseException, path: str) -> Response:
        """Return how an exception looks on the wire."""
        if isinstance(error, RequestRefused):
            return _refusal(error)
        logger.error("event=request_failed path=%s", path, exc_info=error)
        return _error(500, f"internal error: {type(error).__name__}; the replica's log has the details")

    def _route(self, path: str, method: str) -> Handler:
        if path not in self._routes:
            raise RequestInvalid(f"there is no {path}; see /v1/decide, /v1/feedback, /v1/status, /v1/endpoints, /dashboard", 404)
        allowed, handler = self._routes[path]
        return handler if method == allowed else _wrong_method(path, allowed)

    async def _decide(self, request: Request) -> Response:
        return Response(200, await self._ingress.decide(request))

    async def _accept_feedback(self, request: Request) -> Response:
        return Response(200, await self._feedback.accept(request))

    def _in_flight(self, handler: Handler) -> Handler:
        """Count a request against its key's limit of concurrent ones for as long as the handler takes."""

        async def answer(request: Request) -> Response:
            with self.keys.recognise(request.header(b"authorization")).in_flight():
                return await handler(request)

        return answer

    async def _show_status(self, request: Request) -> Response:
        self.keys.check(request.header(b"authorization"), "read")
        return Response(200, encode(await self._status.read()))

    async def _show_endpoints(self, request: Request) -> Response:
        """Say where replicas answer directly: this one, and those that the monitor has heard of within seconds."""
        self.keys.check(request.header(b"authorization"), "decide", "read")
        replicas = (await self._status.read()).get("replicas", [])
        urls = [self._own_endpoint(), *(replica.get("endpoint") for replica in replicas)]
        return Response(200, encode({"endpoints": list(dict.fromkeys(url for url in urls if url))}))

    async def _is_alive(self, request: Request) -> Response:
        return Response(200, encode({"status": "alive"}))

    async def _is_ready(self, request: Request) -> Response:
        """Say whether this replica can decide; why it cannot is only for who may read the status."""
        if self._variants.snapshot is not None and self.keys.is_loaded:
            return Response(200, encode({"status": "ready"}))
        reason = {"reason": self._variants.why_not_ready()} if self._may_read(request) else {}
        return Response(503, encode({"status": "not ready"} | reason))

    def _may_read(self, request: Request) -> bool:
        try:
            return "read" in self.keys.recognise(request.header(b"authorization")).scopes
        except (Unauthorized, ServiceUnavailable):
            return False

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            event: dict[str, Any] = await receive()
            if event["type"] == "lifespan.startup":
                await self._start()
                await send({"type": "lifespan.startup.complete"})
            elif event["type"] == "lifespan.shutdown":
                await self._stop()
                return await send({"type": "lifespan.shutdown.complete"})


def _wrong_method(path: str, allowed: str) -> Handler:
    async def refuse(request: Request) -> Response:
        return _error(405, f"{path} takes {allowed}", [(b"allow", allowed.encode())])

    return refuse


def _page(content_type: bytes, body: bytes) -> Handler:
    headers = [(b"cache-control", b"no-cache"), (b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY")]

    async def show(request: Request) -> Response:
        return Response(200, body, content_type, headers)

    return show


def _refusal(refusal: RequestRefused) -> Response:
    headers = []
    if refusal.status in (429, 503):
        retry_after_s = refusal.retry_after_s if isinstance(refusal, Overloaded) else RETRY_AFTER_S
        headers.append((b"retry-after", b"%d" % retry_after_s))
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refusal.status in (408, 413):  # the rest of the body is not read: the connection cannot be used again
        headers.append((b"connection", b"close"))
    return _error(refusal.status, str(refusal), headers)


def _error(status: int, message: str, headers: list[tuple[bytes, bytes]] | None = None) -> Response:
    return Response(status, encode({"error": {"status": status, "message": message}}), headers=headers or ())
