"""How fast is our endpoint next to the app one would write with Ray Serve, under the same load on the same machine?

    python -m benchmarks.serve_latency [--repetitions 3] [--seconds 10]

Three apps answer with the same numpy policy: `trimtab` (ours: key, arm, propensity, log line, HAProxy profile), `trimtab_direct`
(the same replica asked on its own port) and `idiomatic` (router deployment → policy deployment with `@serve.batch`, default
proxy, no key, no log). Two answer a constant: `no_op` (a Serve app behind the same HAProxy profile) and `uvicorn` (a bare ASGI
function, one process, without Ray). Each repetition starts each app afresh, in turn, and loads it
with `wrk` at 1 and at 64 connections. Needs `wrk` on the PATH (`apt-get install wrk`).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

APPS = ("trimtab", "trimtab_direct", "idiomatic", "no_op", "uvicorn")
CONNECTIONS = (1, 64)
WARM_UP_S = 3
START_TIMEOUT_S = 120
RESULT_FILE = Path(__file__).parent / "results" / "serve_latency.json"
OBSERVATION = [0.01, -0.02, 0.03, -0.04]

LUA = """
wrk.method = "POST"
wrk.body = '%(body)s'
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer %(key)s"
done = function(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '\\nRESULT {"requests": %%d, "duration_us": %%d, "p50_us": %%d, "p99_us": %%d, "not_2xx": %%d, "socket_errors": %%d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), errors.status,
    errors.connect + errors.read + errors.write + errors.timeout))
end
"""


# --- the apps: each runs in a process of its own, since the profile is read when ray.serve is imported ---


def run_app(name: str, ready: Callable[[str, str], None]) -> None:
    """Serve the app on a local cluster, call `ready` with URL and key, and stop when standard input closes."""
    from serve_app.profile import serve_profile_environment

    if name == "uvicorn":
        return _run_uvicorn(ready)
    if name != "idiomatic":
        os.environ.update(serve_profile_environment())
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        {"trimtab": _start_trimtab, "trimtab_direct": _start_direct, "idiomatic": _start_idiomatic, "no_op": _start_no_op}[name](
            ready
        )
        sys.stdin.read()
    finally:
        _stop()


def _stop() -> None:
    import ray
    from ray import serve

    from serve_app.app import stop_serving
    from serve_app.haproxy import end_haproxies

    node_ids = {node["NodeID"] for node in ray.nodes()}
    stop_serving()
    serve.shutdown()
    end_haproxies(node_ids, timeout_s=5)
    ray.shutdown()


def _start_trimtab(ready: Callable[[str, str], None]) -> None:
    from policies.storage import open_storage
    from serve_app.app import start_serving
    from serve_app.config import ServingConfig
    from tests.serving_helpers import NAME, publish, random_policy

    storage = open_storage(tempfile.mkdtemp(prefix="serve-latency-"))
    publish(storage, random_policy(1), mode="sample")
    ready(start_serving(NAME, str(storage.root), ServingConfig()), storage.api_key_file.read_text())


def _start_direct(ready: Callable[[str, str], None]) -> None:
    import requests

    def ready_there(url: str, key: str) -> None:
        answer = requests.get(f"{url}/v1/endpoints", headers={"Authorization": f"Bearer {key}"}, timeout=10)
        ready(answer.json()["endpoints"][0], key)

    _start_trimtab(ready_there)


def _run_uvicorn(ready: Callable[[str, str], None]) -> None:
    import socket
    import threading

    import uvicorn

    body = b'{"action":0}'
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    ready(f"http://127.0.0.1:{listener.getsockname()[1]}", "none")
    sys.stdin.read()
    server.should_exit = True
    thread.join()


def _start_idiomatic(ready: Callable[[str, str], None]) -> None:
    import numpy as np
    from ray import serve
    from starlette.requests import Request

    from tests.serving_helpers import random_policy

    @serve.deployment(max_ongoing_requests=256)
    class PolicyDeployment:
        def __init__(self) -> None:
            self.policy = random_policy(1)

        @serve.batch(max_batch_size=64)
        async def act(self, observations: list[list[float]]) -> list[int]:
            return self.policy.distributions(np.array(observations, np.float32)).argmax(axis=1).tolist()

    @serve.deployment(max_ongoing_requests=256)
    class Router:
        def __init__(self, policy: Any) -> None:
            self.policy = policy

        async def __call__(self, request: Request) -> dict[str, int]:
            body = await request.json()
            return {"action": await self.policy.act.remote(body["observation"])}

    serve.run(Router.bind(PolicyDeployment.bind()))
    ready("http://127.0.0.1:8000", "none")


def _start_no_op(ready: Callable[[str, str], None]) -> None:
    from ray import serve
    from ray.serve.schema import LoggingConfig
    from starlette.requests import Request

    @serve.deployment(max_ongoing_requests=256, logging_config=LoggingConfig(enable_access_log=False))
    class NoOp:
        async def __call__(self, request: Request) -> dict[str, int]:
            return {"action": 0}

    serve.start(http_options={"host": "127.0.0.1"})
    serve.run(NoOp.bind())
    ready("http://127.0.0.1:8000", "none")


# --- the measurement ---


def measure(app: str, *, seconds: int) -> list[dict[str, Any]]:
    """Start the app, load it at each number of connections, stop it, and return one row per load."""
    command = [sys.executable, "-m", "benchmarks.serve_latency", "--app", app]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        url, key = _wait_until_ready(process)
        with tempfile.TemporaryDirectory() as directory:
            script = Path(directory) / "decide.lua"
            script.write_text(LUA % {"body": json.dumps({"observation": OBSERVATION}), "key": key})
            rows = []
            for connections in CONNECTIONS:
                _wrk(url, script, connections=connections, seconds=WARM_UP_S)
                rows.append(
                    {"app": app, "connections": connections, **_wrk(url, script, connections=connections, seconds=seconds)}
                )
            return rows
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=START_TIMEOUT_S)


def _wait_until_ready(process: "subprocess.Popen[str]") -> tuple[str, str]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("READY "):
            _, url, key = line.split()
            return url, key
    raise RuntimeError(f"the app ended with code {process.wait(timeout=START_TIMEOUT_S)} before it was ready")


def _wrk(url: str, script: Path, *, connections: int, seconds: int) -> dict[str, float]:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(script), f"{url}/v1/decide"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 30).stdout
    result = json.loads(output.split("RESULT ", 1)[1])
    return {
        "requests_per_s": round(result["requests"] / result["duration_us"] * 1e6, 1),
        "p50_ms": result["p50_us"] / 1000,
        "p99_ms": result["p99_us"] / 1000,
        "not_2xx": result["not_2xx"],
        "socket_errors": result["socket_errors"],
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians per app and load, and our ratio to the others at the same load."""
    medians: dict[str, dict[str, Any]] = {}
    for app in APPS:
        for connections in CONNECTIONS:
            mine = [row for row in rows if row["app"] == app and row["connections"] == connections]
            keys = ("requests_per_s", "p50_ms", "p99_ms")
            medians[f"{app}_{connections}"] = {key: statistics.median(row[key] for row in mine) for key in keys}
    ratios = {
        f"{ours}_to_{other}_{connections}": round(
            medians[f"{ours}_{connections}"]["requests_per_s"] / medians[f"{other}_{connections}"]["requests_per_s"], 2
        )
        for ours, others in (("trimtab", ("idiomatic", "no_op")), ("trimtab_direct", ("trimtab", "idiomatic", "uvicorn")))
        for other in others
        for connections in CONNECTIONS
    }
    return {"medians": medians, "requests_per_s_ratios": ratios}


def machine() -> dict[str, Any]:
    """Say where and on what this was measured."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    return {
        "cpus": os.cpu_count(),
        "cpu_model": model,
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": (commit if commit != "HEAD" else "none") + (" with changes" if changed else ""),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--app", choices=APPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.app:
        return run_app(arguments.app, lambda url, key: print("READY", url, key, flush=True))
    result = {"benchmark": "serve_latency", "machine": machine(), "seconds": arguments.seconds, "rows": []}
    for repetition in range(arguments.repetitions):
        for app in APPS:
            for row in measure(app, seconds=arguments.seconds):
                result["rows"].append({"repetition": repetition, **row})
                print(json.dumps(result["rows"][-1]), file=sys.stderr, flush=True)
    result |= summarise(result["rows"])
    RESULT_FILE.parent.mkdir(exist_ok=True)
    RESULT_FILE.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["requests_per_s_ratios"], indent=1))


if __name__ == "__main__":
    main()
