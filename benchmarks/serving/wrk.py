"""How many requests per second does an endpoint answer, when each connection sends the next one as soon as it can, or later?

With a think time each connection waits before its next request, for a time drawn anew: a closed loop of many such connections
comes near to requests that arrive at random, as long as answers take much less than the think time. A pause of the endpoint is
met by one request of each connection, not by all that would have come meanwhile: `benchmarks.serving.open_loop` counts those.
"""

import json
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

END_TIMEOUT_S = 30

_SCRIPT = """
local file = assert(io.open(%(body_path)s, "rb"))
wrk.method = "POST"
wrk.body = file:read("*a")
file:close()
%(headers)s
local think_ms = %(think_ms)g
if think_ms > 0 then
  delay = function() return math.floor(0.5 - think_ms * math.log(1 - math.random())) end
end
done = function(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '\\nRESULT {"requests": %%d, "duration_us": %%d, "p50_us": %%d, "p99_us": %%d, "not_2xx": %%d, "socket_errors": %%d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), errors.status,
    errors.connect + errors.read + errors.write + errors.timeout))
end
"""


class LoadFailed(Exception):
    """A load generator did not do what it was asked for, so there is nothing to report."""


@dataclass(frozen=True)
class Request:
    """What is sent again and again: a POST."""

    url: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def run_wrk(request: Request, *, connections: int, seconds: int, think_ms: float = 0.0) -> dict[str, Any]:
    """Load the endpoint and return the row of it; raises `LoadFailed` when wrk fails or nothing was answered.

    `think_ms` is the mean of how long a connection waits after an answer; the waits are exponential, in whole milliseconds.
    """
    with tempfile.TemporaryDirectory() as directory:
        body, script = Path(directory) / "body", Path(directory) / "post.lua"
        body.write_bytes(request.body)
        script.write_text(_script(body, request.headers, think_ms))
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(script), request.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + END_TIMEOUT_S)
    if done.returncode != 0:
        raise LoadFailed(f"{' '.join(command)} ended with code {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return parse_result(done.stdout)


def parse_result(output: str) -> dict[str, Any]:
    """Return the figures of wrk's output; only requests that were answered with 2xx count.

    Raises `LoadFailed` for output without them, and when no request was answered so.
    """
    _, found, rest = output.partition("RESULT ")
    if not found:
        raise LoadFailed(f"wrk's output has no result: {output.strip()[-300:]}")
    result = json.loads(rest.splitlines()[0])
    num_good = result["requests"] - result["not_2xx"]
    if num_good <= 0 or result["duration_us"] <= 0:
        raise LoadFailed(f"none of {result['requests']} requests was answered with 2xx: {result}")
    return {
        "requests_per_s": round(num_good / result["duration_us"] * 1e6, 1),
        "p50_ms": result["p50_us"] / 1000,
        "p99_ms": result["p99_us"] / 1000,
        "not_2xx": result["not_2xx"],
        "socket_errors": result["socket_errors"],
    }


def _script(body: Path, headers: dict[str, str], think_ms: float) -> str:
    lines = "\n".join(f"wrk.headers[{json.dumps(name)}] = {json.dumps(value)}" for name, value in headers.items())
    return _SCRIPT % {"body_path": json.dumps(str(body)), "headers": lines, "think_ms": think_ms}
