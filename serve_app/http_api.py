"""Which paths the endpoint has, and how an error looks on the wire."""

import logging
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any
from urllib.parse import unquote

from policies.errors import RequestInvalid, RequestRefused
from serve_app.asgi import ClientGone, Receive, Request, Response, Scope, Send
from serve_app.feedback import FeedbackIntake
from serve_app.ingress import Ingress
from serve_app.keys import ApiKey
from serve_app.local_decisions import LocalDecisions
from serve_app.open_inference import OpenInference
from serve_app.openapi import openapi_document
from serve_app.overrides import OverrideIntake
from serve_app.status import StatusView
from serve_app.telemetry import Counters
from serve_app.variants import VariantStore
from serve_app.wire import encode

RETRY_AFTER_S = 1
PAGES = {"/dashboard": "index.html", "/dashboard/": "index.html", "/docs": "docs.html"}
MODELS = "/v2/models/"
DECISIONS, OVERRIDE = "/v1/decisions/", "/override"
BUNDLES, BYTES = "/v1/bundles/", b"application/octet-stream"

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]


class HttpApi:
    """The ASGI application. `files` are the dashboard's: path below /dashboard/ to content type and bytes.

    `own_endpoint` returns the URL of this replica's direct lane, if it has one. `start` and `stop` are awaited with the
    application's own, on the event loop that answers requests.
    """

    def __init__(
        self,
        policy: str,
        *,
        ingress: Ingress,
        feedback: FeedbackIntake,
        status: StatusView,
        variants: VariantStore,
        key: ApiKey,
        counters: Counters,
        files: dict[str, tuple[bytes, bytes]],
        open_inference: OpenInference,
        overrides: OverrideIntake,
        local: LocalDecisions,
        own_endpoint: Callable[[], str | None],
        start: Callable[[], Awaitable[None]],
        stop: Callable[[], Awaitable[None]],
    ) -> None:
        self._policy = policy
        self._ingress = ingress
        self._feedback = feedback
        self._status = status
        self._variants = variants
        self._key = key
        self.counters = counters
        self._own_endpoint = own_endpoint
        self._start = start
        self._stop = stop
        self._routes: dict[str, tuple[str, Handler]] = {
            "/v1/decide": ("POST", self._decide),
            "/v1/feedback": ("POST", self._accept_feedback),
            "/v1/status": ("GET", self._show_status),
            "/v1/endpoints": ("GET", self._show_endpoints),
            "/v1/plan": ("GET", self._show_plan),
            "/v1/decisions": ("POST", self._accept_decisions),
            "/healthz": ("GET", self._is_alive),
            "/readyz": ("GET", self._is_ready),
            "/openapi.json": ("GET", self._describe_api),
            "/v2": ("GET", self._describe_server),
            "/v2/health/live": ("GET", self._is_alive),
            "/v2/health/ready": ("GET", self._is_ready),
        }
        pages = {f"/dashboard/{name}": _page(*content) for name, content in files.items()}
        for path, name in PAGES.items():
            if name in files:
                pages[path] = _page(*files[name])
        self._open_inference = open_inference
        self._overrides = overrides
        self._local = local
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
        if path.startswith(("/v1/", "/v2")):
            self.counters.count_response(response.status)
        return response

    def failure_response(self, error: BaseException, path: str) -> Response:
        """Return how an exception looks on the wire."""
        if isinstance(error, RequestRefused):
            return _refusal(error, path)
        logger.error("event=request_failed path=%s", path, exc_info=error)
        return _error(500, f"internal error: {type(error).__name__}; the replica's log has the details")

    def _route(self, path: str, method: str) -> Handler:
        if path.startswith(MODELS):
            return self._infer if method == "POST" else self._describe_model
        if path.startswith(DECISIONS) and path.endswith(OVERRIDE):
            return self._override if method == "POST" else _wrong_method(path, "POST")
        if path.startswith(BUNDLES):
            return self._send_bundle_file if method == "GET" else _wrong_method(path, "GET")
        if path not in self._routes:
            raise RequestInvalid(f"there is no {path}; /docs lists what there is", 404)
        allowed, handler = self._routes[path]
        return handler if method == allowed else _wrong_method(path, allowed)

    async def _decide(self, request: Request) -> Response:
        return Response(200, await self._ingress.decide(request))

    async def _accept_feedback(self, request: Request) -> Response:
        return Response(200, await self._feedback.accept(request))

    async def _override(self, request: Request) -> Response:
        self._key.check(request.header(b"authorization"))
        decision_id = unquote(request.scope["path"].removeprefix(DECISIONS).removesuffix(OVERRIDE))
        return Response(200, await self._overrides.accept(decision_id, request, key_name="owner"))

    async def _show_plan(self, request: Request) -> Response:
        self._key.check(request.header(b"authorization"))
        return Response(200, self._local.plan())

    async def _send_bundle_file(self, request: Request) -> Response:
        self._key.check(request.header(b"authorization"))
        digest, _, name = request.scope["path"].removeprefix(BUNDLES).partition("/")
        return Response(200, await self._local.bundle_file(digest, name), BYTES)

    async def _accept_decisions(self, request: Request) -> Response:
        self._key.check(request.header(b"authorization"))
        return Response(200, await self._local.accept(request))

    async def _show_status(self, request: Request) -> Response:
        self._key.check(request.header(b"authorization"))
        return Response(200, encode(await self._status.read()))

    async def _show_endpoints(self, request: Request) -> Response:
        """Say where replicas answer directly: this one, and those that the monitor has heard of within seconds."""
        self._key.check(request.header(b"authorization"))
        replicas = (await self._status.read()).get("replicas", [])
        urls = [self._own_endpoint(), *(replica.get("endpoint") for replica in replicas)]
        return Response(200, encode({"endpoints": list(dict.fromkeys(url for url in urls if url))}))

    async def _describe_api(self, request: Request) -> Response:
        self._key.check(request.header(b"authorization"))
        snapshot = self._variants.snapshot
        spaces = snapshot.champion.policy.spaces if snapshot is not None else None
        return Response(200, encode(openapi_document(self._policy, spaces, version=version("trimtab"))))

    async def _describe_server(self, request: Request) -> Response:
        self._key.check(request.header(b"authorization"))
        return self._open_inference.server_metadata()

    async def _describe_model(self, request: Request) -> Response:
        self._key.check(request.header(b"authorization"))
        return self._open_inference.model(request.scope["path"])

    async def _infer(self, request: Request) -> Response:
        self._key.check(request.header(b"authorization"))
        return await self._open_inference.infer(request.scope["path"], request)

    async def _is_alive(self, request: Request) -> Response:
        return Response(200, encode({"status": "alive"}))

    async def _is_ready(self, request: Request) -> Response:
        if self._variants.snapshot is None:
            return Response(503, encode({"status": "not ready", "reason": self._variants.why_not_ready()}))
        return Response(200, encode({"status": "ready"}))

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


def _refusal(refusal: RequestRefused, path: str) -> Response:
    headers = []
    if refusal.status in (429, 503):
        headers.append((b"retry-after", b"%d" % RETRY_AFTER_S))
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refusal.status in (408, 413):  # the rest of the body is not read: the connection cannot be used again
        headers.append((b"connection", b"close"))
    if path.startswith("/v2"):  # the protocol says how an error looks
        return Response(refusal.status, encode({"error": str(refusal)}), headers=headers)
    return _error(refusal.status, str(refusal), headers)


def _error(status: int, message: str, headers: list[tuple[bytes, bytes]] | None = None) -> Response:
    return Response(status, encode({"error": {"status": status, "message": message}}), headers=headers or ())
