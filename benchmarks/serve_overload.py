"""What becomes of the endpoint when far more is asked than it can carry?

    python -m benchmarks.serve_overload [--seconds 10]

First the peak: 64 connections that ask as fast as they are answered. Then 2,000 connections that do the same. `wrk` cannot offer
a rate (with its `delay` it looks through a list of 2,000 timers at each step, and carries a tenth of what the endpoint can), so
this is a closed loop; up to 2,000 requests wait at any moment, thirty times as many as at the peak. A few paced connections ask
before, during and after, and tell what a request that is accepted waits; their process shares the cores with everything else.
Needs `wrk` on the PATH.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.paced_load import OBSERVATION, PacedLoad, Request, percentile
from benchmarks.serving.ray_apps import stop
from benchmarks.serving.results import machine, write_result

RESULT_FILE = Path(__file__).parent / "results" / "serve_overload.json"
PEAK_CONNECTIONS, OVERLOAD_CONNECTIONS = 64, 2000
PROBE_CONNECTIONS, PROBE_THINK_S = 8, 0.02
BEFORE_S, AFTER_S = 4, 8
CALM_FACTOR, CALM_LEAST_MS = 2.0, 20.0  # calm: no slower than this, or than twice the p99 of before

LUA = """
wrk.method = "POST"
wrk.body = '%(body)s'
wrk.headers["Authorization"] = "Bearer %(key)s"
num_ok, num_refused, num_refused_with_retry_after, num_other = 0, 0, 0, 0
local counted
function setup(thread) counted = thread end
function response(status, headers, body)
  if status == 200 then num_ok = num_ok + 1
  elseif status == 429 or status == 503 then
    num_refused = num_refused + 1
    if headers["retry-after"] or headers["Retry-After"] then num_refused_with_retry_after = num_refused_with_retry_after + 1 end
  else num_other = num_other + 1 end
end
done = function(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '\\nRESULT {"duration_us": %%d, "p99_us": %%d, "lost": %%d, "timeouts": %%d, ',
    summary.duration, latency:percentile(99), errors.connect + errors.read + errors.write, errors.timeout))
  io.write(string.format(
    '"ok": %%d, "refused": %%d, "with_retry_after": %%d, "other": %%d}\\n',
    counted:get("num_ok"), counted:get("num_refused"), counted:get("num_refused_with_retry_after"), counted:get("num_other")))
end
"""


def measure(seconds: int, *, port: int) -> dict[str, Any]:
    """Start the endpoint with one replica, overload each way in, stop it, and return the result per way."""
    from serve_app.profile import serve_profile_environment

    os.environ.update(serve_profile_environment())
    import ray
    import requests

    from policies.storage import open_storage
    from serve_app.app import start_serving
    from serve_app.config import ServingConfig
    from tests.serving_helpers import NAME, publish, random_policy

    storage = open_storage(tempfile.mkdtemp(prefix="serve-overload-"))
    publish(storage, random_policy(1), mode="sample")
    key = storage.api_key_file.read_text().strip()
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        url = start_serving(NAME, str(storage.root), ServingConfig(port=port))
        answer = requests.get(f"{url}/v1/endpoints", headers={"Authorization": f"Bearer {key}"}, timeout=10)
        [direct] = answer.json()["endpoints"]
        return {lane: overload(way, key, seconds=seconds) for lane, way in (("endpoint", url), ("direct", direct))}
    finally:
        stop()


def overload(url: str, key: str, *, seconds: int) -> dict[str, Any]:
    """Load one way in, at its peak and far above, and return what came of it."""
    _wrk(url, key, connections=PEAK_CONNECTIONS, seconds=2)
    peak = _wrk(url, key, connections=PEAK_CONNECTIONS, seconds=seconds)
    peak_per_s = peak["ok"] / peak["duration_us"] * 1e6
    probe = PacedLoad(url, key, connections=PROBE_CONNECTIONS, think_s=PROBE_THINK_S)
    try:
        time.sleep(BEFORE_S)
        began_s = time.monotonic()
        above = _wrk(url, key, connections=OVERLOAD_CONNECTIONS, seconds=seconds)
        ended_s = time.monotonic()
        time.sleep(AFTER_S)
    finally:
        probes = probe.end()
    num_answers = above["ok"] + above["refused"] + above["other"]
    goodput_per_s = above["ok"] / above["duration_us"] * 1e6
    return {
        "peak_per_s": round(peak_per_s, 1),
        "peak_p99_ms": peak["p99_us"] / 1000,
        "answered_per_s": round(num_answers / above["duration_us"] * 1e6, 1),
        "goodput_per_s": round(goodput_per_s, 1),
        "goodput_share_of_peak": round(goodput_per_s / peak_per_s, 3),
        "refused_share": round(above["refused"] / max(1, num_answers), 4),
        "refused_with_retry_after_share": round(above["with_retry_after"] / max(1, above["refused"]), 4),
        "other_answers": above["other"],
        "lost": above["lost"],
        "timeouts": above["timeouts"],
        "all_p99_ms": above["p99_us"] / 1000,
        **_of_probes(probes, began_s, ended_s),
    }


def _of_probes(probes: list[Request], began_s: float, ended_s: float) -> dict[str, Any]:
    before = [one.latency_ms for one in probes if one.ended_s < began_s]
    during = [one for one in probes if began_s + 1 < one.began_s and one.ended_s < ended_s]
    accepted = [one.latency_ms for one in during if one.status == 200]
    calm_ms = max(CALM_LEAST_MS, CALM_FACTOR * (percentile(before, 0.99) or 0.0))
    after = [
        percentile([one.latency_ms for one in probes if second <= one.began_s - ended_s < second + 1], 0.99)
        for second in range(AFTER_S - 1)
    ]
    calm_s = next((second for second, p99_ms in enumerate(after) if p99_ms is not None and p99_ms <= calm_ms), None)
    return {
        "probe_p99_before_ms": _rounded(percentile(before, 0.99)),
        "accepted_probes": len(accepted),
        "accepted_p50_ms": _rounded(percentile(accepted, 0.5)),
        "accepted_p99_ms": _rounded(percentile(accepted, 0.99)),
        "refused_probes": len(during) - len(accepted),
        "calm_limit_ms": _rounded(calm_ms),
        "p99_by_second_after_ms": [_rounded(p99_ms) for p99_ms in after],
        "calm_after_s": calm_s,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _wrk(url: str, key: str, *, connections: int, seconds: int) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory) / "overload.lua"
        script.write_text(LUA % {"body": json.dumps({"observation": OBSERVATION}), "key": key})
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "5s", "--latency", "-s", str(script)]
        run = subprocess.run([*command, f"{url}/v1/decide"], capture_output=True, text=True, timeout=seconds + 60)
    if run.returncode != 0 or "RESULT " not in run.stdout:
        raise RuntimeError(f"wrk ended with code {run.returncode}: {run.stderr or run.stdout}")
    return json.loads(run.stdout.split("RESULT ", 1)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    where = machine()
    result = {
        "benchmark": "serve_overload",
        "machine": where,
        "seconds": arguments.seconds,
        "lanes": measure(arguments.seconds, port=arguments.port),
    }
    write_result(RESULT_FILE, result)
    print(json.dumps(result, indent=1), file=sys.stderr)


if __name__ == "__main__":
    main()
