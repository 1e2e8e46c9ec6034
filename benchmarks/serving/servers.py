"""Which apps take part, how each is started and stopped, and how one speaks with it.

Every app runs in a session of its own and is ended as a whole: with it end the workers that it started.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.peers.environments import REPOSITORY, ready_python
from benchmarks.serving.answers import Answer
from benchmarks.serving.policies import SIZES
from benchmarks.serving.ports import free_ports
from benchmarks.serving.ray_apps import RAY_APPS
from benchmarks.serving.wrk import Request

START_TIMEOUT_S = 120.0  # Ray with Serve needs 10 s on an idle machine of two processors, LitServe 3
STOP_TIMEOUT_S = 60.0  # Serve's own shutdown takes 3 to 10 s
POLL_INTERVAL_S = 0.1
REQUEST_TIMEOUT_S = 30.0  # BentoML's first answers come when it has tuned its batching


class AppFailed(Exception):
    """An app did not start, or did not answer what it was asked."""


@dataclass(frozen=True)
class App:
    """How one speaks with an app. `body` and `read` are its JSON; without a policy it answers a constant.

    `arguments` are of a peer's command: `{port}` is replaced, the first is a module of `environment`'s interpreter.
    """

    path: str = "/decide"
    body: Callable[[list[float]], Any] = lambda observation: {"observation": observation}
    read: Callable[[Any], Answer] = lambda answer: Answer(answer["action"])
    has_policy: bool = True
    environment: str | None = None
    arguments: tuple[str, ...] = ()

    def request(self, url: str, key: str, observation: list[float]) -> Request:
        """Return what is sent to it."""
        headers = {"Content-Type": "application/json"}
        if self.path.startswith("/v1/"):
            headers["Authorization"] = f"Bearer {key}"
        return Request(url + self.path, json.dumps(self.body(observation)).encode(), headers)


def _uvicorn(module: str, workers: int) -> tuple[str, ...]:
    return (
        *("uvicorn", f"benchmarks.serve_peers.{module}:app", "--host", "127.0.0.1", "--port", "{port}"),
        *("--workers", str(workers), "--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"),
    )


def _ours() -> App:
    return App("/v1/decide", read=lambda answer: Answer(answer["action"], answer["propensity"]))


_BENTOML = (
    *("bentoml", "serve", "benchmarks.serve_peers.bentoml_service:PolicyService"),
    *("--working-dir", str(REPOSITORY), "--host", "127.0.0.1", "--port", "{port}"),
)
_LITSERVE = ("benchmarks.serve_peers.litserve_server", "--port", "{port}")

APPS = {
    "trimtab": _ours(),
    "trimtab_direct": _ours(),
    "idiomatic": App(),
    "no_op": App(has_policy=False),
    "uvicorn": App(has_policy=False, arguments=_uvicorn("constant_app", 1)),
    "fastapi_1": App(environment="fastapi", arguments=_uvicorn("fastapi_app", 1)),
    "fastapi_2": App(environment="fastapi", arguments=_uvicorn("fastapi_app", 2)),
    "bentoml": App(
        "/decide_batch",
        body=lambda observation: {"observation": [observation]},
        read=lambda answer: Answer(answer[0]),
        environment="bentoml",
        arguments=_BENTOML,
    ),
    "bentoml_unbatched": App(environment="bentoml", arguments=_BENTOML),
    "litserve": App(environment="litserve", arguments=(*_LITSERVE, "--batched")),
    "litserve_unbatched": App(environment="litserve", arguments=_LITSERVE),
}


@dataclass(frozen=True)
class Running:
    """An app that answers. `storage` is the root of ours."""

    url: str
    key: str
    storage: Path


@contextlib.contextmanager
def running(name: str, size: str, *, onnx: Path | None = None, setting: str = "plain") -> Iterator[Running]:
    """Start the app, wait until it answers, and end it with all that it started; raises `AppFailed`."""
    app, [port] = APPS[name], free_ports(1)
    with tempfile.TemporaryDirectory(prefix="serve-benchmark-", ignore_cleanup_errors=True) as directory:
        said, storage = Path(directory) / "said.txt", Path(directory) / "storage"
        command = (
            [sys.executable, "-m", "benchmarks.serving.ray_apps", name]
            + ["--size", size, "--port", str(port), "--storage", str(storage), "--setting", setting]
            if name in RAY_APPS
            else peer_command(app, port)
        )
        variables = {**os.environ, "BENTOML_DO_NOT_TRACK": "True", "POLICY_ONNX": str(onnx)}
        with open(said, "wb") as output, _process(command, variables, output) as process:
            if name in RAY_APPS:
                url, key = _wait_for_word(process, said)
            else:
                url, key = f"http://127.0.0.1:{port}", "none"
                _wait_for_answer(app.request(url, key, [0.0] * SIZES[size].num_features), process, said)
            yield Running(url, key, storage)


def peer_command(app: App, port: int) -> list[str]:
    """Return the command that serves a peer, making its environment where it has to; raises `EnvironmentUnavailable`."""
    python = sys.executable if app.environment is None else str(ready_python(app.environment))
    return [python, "-m", *(argument.replace("{port}", str(port)) for argument in app.arguments)]


def post(request: Request) -> Any:
    """Return the JSON that answers one request; raises `AppFailed`."""
    return json.loads(post_bytes(request)[0])


def post_bytes(request: Request) -> tuple[bytes, dict[str, str]]:
    """Return the answer's body and its headers in lower case; raises `AppFailed`."""
    asked = urllib.request.Request(request.url, request.body, request.headers, method="POST")
    try:
        with urllib.request.urlopen(asked, timeout=REQUEST_TIMEOUT_S) as response:
            return response.read(), {name.lower(): value for name, value in response.headers.items()}
    except urllib.error.HTTPError as error:
        raise AppFailed(f"{request.url} answered {error.code}: {error.read()[:300]!r}") from error
    except OSError as error:
        raise AppFailed(f"{request.url} did not answer: {error}") from error


@contextlib.contextmanager
def _process(command: list[str], variables: dict[str, str], output: IO[bytes]) -> "Iterator[subprocess.Popen[bytes]]":
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=variables,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _end(process, is_asked_by_input="benchmarks.serving.ray_apps" in command)


def _end(process: "subprocess.Popen[bytes]", *, is_asked_by_input: bool) -> None:
    """Ask first: Ray's processes have sessions of their own, and only their driver ends them in order."""
    assert process.stdin is not None
    process.stdin.close()
    if not is_asked_by_input:
        _signal(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=STOP_TIMEOUT_S)
    finally:
        _signal(process.pid, signal.SIGKILL)  # also what outlived its leader
        process.wait(timeout=STOP_TIMEOUT_S)


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # the usual case: everything has ended
        os.killpg(group, number)


def _wait_for_word(process: "subprocess.Popen[bytes]", said: Path) -> tuple[str, str]:
    """Return URL and key of the line that says so."""
    for _ in _while_starting(process, said):
        for line in said.read_text(errors="replace").splitlines(keepends=True):
            if line.startswith("READY ") and line.endswith("\n"):
                _, url, key = line.split()
                return url, key
    raise AssertionError("the wait ends with an answer or an error")


def _wait_for_answer(request: Request, process: "subprocess.Popen[bytes]", said: Path) -> None:
    for _ in _while_starting(process, said):
        with contextlib.suppress(AppFailed):  # not yet; the deadline is the caller's patience
            post(request)
            return


def _while_starting(process: "subprocess.Popen[bytes]", said: Path) -> Iterator[None]:
    """Give turns until the time is up; raises `AppFailed` then, and when the process ends."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline_s:
        yield
        time.sleep(POLL_INTERVAL_S)
    last_words = " | ".join(said.read_text(errors="replace").splitlines()[-10:])
    code = process.poll()
    how = f"did not answer within {START_TIMEOUT_S:g} s" if code is None else f"ended with code {code} before it answered"
    raise AppFailed(f"{process.args} {how}; its last words: {last_words}")
