"""A real HTTP server on a real socket that answers as a test says: late, half, not at all, or well."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[["Exchange"], None]


class Exchange:
    """One request that came in, and the ways to answer it. `number` counts POSTs from 0; `stopped` is set when the test ends."""

    def __init__(self, handler: BaseHTTPRequestHandler, body: bytes, number: int, stopped: threading.Event) -> None:
        self.handler = handler
        self.path = handler.path
        self.body = json.loads(body) if body else None
        self.number = number
        self.stopped = stopped

    def answer(self, status: int, value: Any, **headers: str) -> None:
        data = json.dumps(value).encode()
        self._head(status, {"Content-Length": str(len(data)), **headers})
        self.handler.wfile.write(data)

    def refuse(self, status: int, message: str = "no", **headers: str) -> None:
        self.answer(status, {"error": {"status": status, "message": message}}, **headers)

    def answer_in_chunks(self, value: Any) -> None:
        self._head(200, {"Transfer-Encoding": "chunked"})
        for byte in json.dumps(value).encode():
            self.handler.wfile.write(b"1\r\n%c\r\n" % byte)
        self.handler.wfile.write(b"0\r\n\r\n")

    def half(self) -> None:
        """Begin an answer."""
        self._head(200, {"Content-Length": "1000"})
        self.handler.wfile.write(b'{"action": ')
        self.handler.wfile.flush()

    def hang_up(self) -> None:
        """Close the connection as a killed process does."""
        self.handler.close_connection = True
        with contextlib.suppress(OSError):
            self.handler.connection.shutdown(socket.SHUT_RDWR)

    def say_nothing(self) -> None:
        self.stopped.wait(60)
        self.hang_up()

    def drip(self) -> None:
        """Send a byte now and then: no piece is ever late, and the whole never comes."""
        self._head(200, {"Content-Length": "1000"})
        while not self.stopped.wait(0.05):
            self.handler.wfile.write(b" ")
            self.handler.wfile.flush()

    def drip_headers(self) -> None:
        """Begin an answer, and send its first header byte by byte."""
        self.handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while not self.stopped.wait(0.05):
            self.handler.wfile.write(b"x")
            self.handler.wfile.flush()

    def drip_chunk(self) -> None:
        """Send a chunk whose size is never said to its end."""
        self._head(200, {"Transfer-Encoding": "chunked"})
        while not self.stopped.wait(0.05):
            self.handler.wfile.write(b"0")
            self.handler.wfile.flush()

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.handler.send_response(status)
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.end_headers()


class ScriptedServer:
    """Answers POSTs with `behaviour`, and GET /v1/endpoints with `lanes` (None: 404). `posts` are the bodies that came."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.lanes: list[str] | None = None
        self.posts: list[Any] = []
        self._lock = threading.Lock()
        self.stopped = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                exchange = Exchange(self, b"", -1, outer.stopped)
                exchange.answer(404, {}) if outer.lanes is None else exchange.answer(200, {"endpoints": outer.lanes})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with contextlib.suppress(OSError):  # the client may be gone
                    outer.behaviour(outer.take_in(self, body))

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 512

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that hung up

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def take_in(self, handler: BaseHTTPRequestHandler, body: bytes) -> Exchange:
        with self._lock:
            exchange = Exchange(handler, body, len(self.posts), self.stopped)
            self.posts.append(exchange.body)
        return exchange

    def stop(self) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextlib.contextmanager
def serving(behaviour: Behaviour) -> Iterator[ScriptedServer]:
    """Run a server for the time of a test."""
    server = ScriptedServer(behaviour)
    try:
        yield server
    finally:
        server.stop()
