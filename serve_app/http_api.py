"""Which paths the endpoint has, and how an error looks on the wire."""

import logging
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any, NamedTuple
from urllib.parse import unquote

from policies.errors import Overloaded, RequestInvalid, RequestRefused, ServiceUnavailable, Unauthorized
from serve_app.asgi import ClientGone, Receive, Request, Response, Scope, Send
from serve_app.feedback import FeedbackIntake
from serve_app.ingress import Ingress
from serve_app.keys import ApiKey, KeyRing
from serve_app.local_decisions import LocalDecisions
from serve_app.metrics import TEXT_FORMAT, ReplicaMetrics
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
BUNDLES = "/v1/bundles/"

logger = logging.getLogger(__name__)

Handler = Callable[[Request, ApiKey | None], Awaitable[Response]]


class Route(NamedTuple):
    """One path's method, the scopes of which a key needs one (none: everybody may), and what answers."""

    method: str
    scopes: tuple[str, ...]
    handler: Handler


class HttpApi:
    """The ASGI application. `files` are the dashboard's: path below /dashboard/ to content type and bytes.

    `keys` are also for a front that has to know who asks before it reads a body. `own_endpoint` returns the URL of this replica's
    direct lane, if it has one. `start` and `stop` are awaited with the application's own, on the loop that answers requests.
    """

    def __init__(
        self,
        policy: str,
        *,
        ingress: Ingress,
        feedback: FeedbackIntake,
        status: StatusView,
        variants: VariantStore,
        keys: KeyRing,
        counters: Counters,
        files: dict[str, tuple[bytes, bytes]],
        open_inference: OpenInference,
        overrides: OverrideIntake,
        local: LocalDecisions,
        metrics: ReplicaMetrics,
        own_endpoint: Callable[[], str | None],
        start: Callable[[], Awaitable[None]],
        stop: Callable[[], Awaitable[None]],
    ) -> None:
        self._policy = policy
        self._ingress = ingress
        self._feedback = feedback
        self._status = status
        self._variants = variants
        self.keys = keys
        self.counters = counters
        self._own_endpoint = own_endpoint
        self._start = start
        self._stop = stop
        self._open_inference = open_inference
        self._overrides = overrides
        self._local = local
        self._metrics = metrics
        self.routes: dict[str, Route] = {
            "/v1/decide": Route("POST", ("decide",), self._decide),
            "/v1/feedback": Route("POST", ("feedback",), self._accept_feedback),
            "/v1/status": Route("GET", ("read",), self._show_status),
            "/v1/endpoints": Route("GET", ("decide", "read"), self._show_endpoints),
            "/v1/plan": Route("GET", ("decide",), self._show_plan),
            "/v1/decisions": Route("POST", ("decide",), self._accept_decisions),
            "/v2": Route("GET", ("decide", "read"), self._describe_server),
            "/v2/health/live": Route("GET", (), self._is_alive),
            "/v2/health/ready": Route("GET", (), self._is_ready),
            "/openapi.json": Route("GET", ("decide", "read"), self._describe_api),
            "/metrics": Route("GET", ("read",), self._show_metrics),
            "/healthz": Route("GET", (), self._is_alive),
            "/readyz": Route("GET", (), self._is_ready),
        }
        pages = {f"/dashboard/{name}": content for name, content in files.items()}
        pages |= {path: files[name] for path, name in PAGES.items() if name in files}
        self.routes |= {path: Route("GET", (), _page(*content)) for path, content in pages.items()}

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
            response = await self._answer(self.route(path, method), method, request)
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
        return error_response(500, f"internal error: {type(error).__name__}; the replica's log has the details")

    def route(self, path: str, method: str) -> Route:
        """Return who answers a path; raises `RequestInvalid` with 404."""
        if path in self.routes:
            return self.routes[path]
        if path.startswith(MODELS):
            is_post = method == "POST"
            return Route("POST", ("decide",), self._infer) if is_post else Route("GET", ("decide", "read"), self._describe_model)
        if path.startswith(DECISIONS) and path.endswith(OVERRIDE):
            return Route("POST", ("operate",), self._override)
        if path.startswith(BUNDLES):
            return Route("GET", ("decide",), self._send_bundle_file)
        raise RequestInvalid(f"there is no {path:.200}; /docs lists what there is", 404)

    async def _answer(self, route: Route, method: str, request: Request) -> Response:
        """Let a route answer whoever may ask, and count the request as its key's for as long as that takes."""
        if method != route.method:
            return error_response(405, f"this path takes {route.method}", [(b"allow", route.method.encode())])
        if not route.scopes:
            return await route.handler(request, None)
        key = self.keys.check(request.header(b"authorization"), *route.scopes)  # before a byte of the body is read
        with key.in_flight():
            return await route.handler(request._replace(receive=self._while_in_force(key, request.receive)), key)

    def _while_in_force(self, key: ApiKey, receive: Receive) -> Receive:
        """Return what reads a body, and refuses it if the key is revoked before it is there whole."""

        async def checked() -> dict[str, Any]:
            message = await receive()
            self.keys.require_in_force(key)
            return message

        return checked

    async def _decide(self, request: Request, key: ApiKey | None) -> Response:
        assert key is not None
        return Response(200, await self._ingress.decide(request, key))

    async def _accept_feedback(self, request: Request, key: ApiKey | None) -> Response:
        return Response(200, await self._feedback.accept(request))

    async def _override(self, request: Request, key: ApiKey | None) -> Response:
        assert key is not None
        decision_id = unquote(request.scope["path"].removeprefix(DECISIONS).removesuffix(OVERRIDE))
        return Response(200, await self._overrides.accept(decision_id, request, key_name=key.name))

    async def _show_plan(self, request: Request, key: ApiKey | None) -> Response:
        return Response(200, self._local.plan())

    async def _send_bundle_file(self, request: Request, key: ApiKey | None) -> Response:
        digest, _, name = request.scope["path"].removeprefix(BUNDLES).partition("/")
        return await self._local.bundle_file(digest, name)

    async def _accept_decisions(self, request: Request, key: ApiKey | None) -> Response:
        return Response(200, await self._local.accept(request))

    async def _show_status(self, request: Request, key: ApiKey | None) -> Response:
        return Response(200, encode(await self._status.read()))

    async def _show_metrics(self, request: Request, key: ApiKey | None) -> Response:
        return Response(200, self._metrics.text(), TEXT_FORMAT)

    async def _show_endpoints(self, request: Request, key: ApiKey | None) -> Response:
        """Say where replicas answer directly: this one, and those that the monitor has heard of within seconds."""
        replicas = (await self._status.read()).get("replicas", [])
        urls = [self._own_endpoint(), *(replica.get("endpoint") for replica in replicas)]
        return Response(200, encode({"endpoints": list(dict.fromkeys(url for url in urls if url))}))

    async def _describe_api(self, request: Request, key: ApiKey | None) -> Response:
        snapshot = self._variants.snapshot
        spaces = snapshot.champion.policy.spaces if snapshot is not None else None
        return Response(200, encode(openapi_document(self._policy, spaces, version=version("trimtab"))))

    async def _describe_server(self, request: Request, key: ApiKey | None) -> Response:
        return self._open_inference.server_metadata()

    async def _describe_model(self, request: Request, key: ApiKey | None) -> Response:
        return self._open_inference.model(request.scope["path"])

    async def _infer(self, request: Request, key: ApiKey | None) -> Response:
        assert key is not None
        return await self._open_inference.infer(request.scope["path"], request, key)

    async def _is_alive(self, request: Request, key: ApiKey | None) -> Response:
        return Response(200, encode({"status": "alive"}))

    async def _is_ready(self, request: Request, key: ApiKey | None) -> Response:
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


def _page(content_type: bytes, body: bytes) -> Handler:
    headers = [(b"cache-control", b"no-cache"), (b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY")]

    async def show(request: Request, key: ApiKey | None) -> Response:
        return Response(200, body, content_type, headers)

    return show


def _refusal(refusal: RequestRefused, path: str) -> Response:
    headers = []
    if refusal.status in (429, 503):
        retry_after_s = refusal.retry_after_s if isinstance(refusal, Overloaded) else RETRY_AFTER_S
        headers.append((b"retry-after", b"%d" % retry_after_s))
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refusal.status in (408, 413, 415):  # the rest of the body is not read: the connection cannot be used again
        headers.append((b"connection", b"close"))
    if path.startswith("/v2"):  # the protocol says how an error looks
        return Response(refusal.status, encode({"error": str(refusal)}), headers=headers)
    return error_response(refusal.status, str(refusal), headers)


def error_response(status: int, message: str, headers: list[tuple[bytes, bytes]] | None = None) -> Response:
    return Response(status, encode({"error": {"status": status, "message": message}}), headers=headers or ())
