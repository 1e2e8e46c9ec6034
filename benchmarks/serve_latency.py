"""How fast is our endpoint next to the servers one would write otherwise, under the same load on the same machine?

    python -m benchmarks.serve_latency [--apps a,b] [--policies small,large] [--repetitions 3] [--seconds 10]

The same policy answers everywhere: `trimtab` (ours: key, arm, propensity, log line, HAProxy profile), `trimtab_direct` (the same
replica asked on its own port), `idiomatic` (Ray Serve as its documentation has it: router → policy with `@serve.batch`, default
proxy), `fastapi_1` and `fastapi_2` (FastAPI and ONNX Runtime, 1 and 2 workers), `bentoml` and `litserve` (with their batching; on
request `bentoml_unbatched`, `litserve_unbatched`). None but ours checks a key, draws from a distribution or writes a log. Two
answer a constant: `no_op` (a Serve app behind the same HAProxy profile) and `uvicorn` (a bare ASGI function). The peers' settings
are explained in benchmarks/serve_peers/.

Each repetition starts each app afresh, in turn, requires that it answers 50 observations as the policy does, and loads it with
`wrk` at 1 and at 64 connections; ours also at 70 % of what 64 connections got, twice: with requests at fixed times (`open`, by a
generator in Python that takes as much of the processor as the server does), and from 512 connections of `wrk` that wait between
their requests (`thinking`). Needs `wrk` on the PATH (`apt-get install wrk`).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import EnvironmentUnavailable
from benchmarks.serving.answers import ask_each, require_same_answers
from benchmarks.serving.arguments import names
from benchmarks.serving.open_loop import run_open_loop
from benchmarks.serving.policies import SIZES, as_json, clear_observations, draw_observations, export_onnx, policy_of
from benchmarks.serving.results import RESULTS, machine, medians, write_result
from benchmarks.serving.servers import APPS, Running, peer_command, post, running
from benchmarks.serving.wrk import LoadFailed, Request, run_wrk

OURS = ("trimtab", "trimtab_direct")
DEFAULT_APPS = (*OURS, "idiomatic", "no_op", "uvicorn", "fastapi_1", "fastapi_2", "bentoml", "litserve")
CONNECTIONS = (1, 64)
WARM_UP_S = 3
NUM_CHECKED = 50
OPEN_LOOP_SHARE = 0.7
NUM_THINKING = 512  # connections that together send as many requests per second
RESULT_FILE = RESULTS / "serve_latency.json"


def measure(name: str, size: str, *, onnx: Path, seconds: int, warm_up_s: int = WARM_UP_S) -> list[dict[str, Any]]:
    """Start the app, check it, load it in each way, stop it, and return one row per load."""
    app = APPS[name]
    with running(name, size, onnx=onnx) as endpoint:
        if app.has_policy:
            check(name, size, endpoint)
        request = app.request(endpoint.url, endpoint.key, as_json(draw_observations(size, 1, seed=1)[0]))
        rows = []
        for connections in CONNECTIONS:
            run_wrk(request, connections=connections, seconds=warm_up_s)
            figures = run_wrk(request, connections=connections, seconds=seconds)
            rows.append({"app": name, "policy": size, "load": str(connections), "connections": connections, **figures})
        if name in OURS:
            rate_per_s = OPEN_LOOP_SHARE * rows[-1]["requests_per_s"]
            figures = open_loop_figures(request, rate_per_s=rate_per_s, seconds=seconds)
            rows.append({"app": name, "policy": size, "load": "open", "connections": CONNECTIONS[-1], **figures})
            think_ms = 1000 * NUM_THINKING / rate_per_s
            figures = run_wrk(request, connections=NUM_THINKING, seconds=seconds, think_ms=think_ms)
            rows.append({"app": name, "policy": size, "load": "thinking", "connections": NUM_THINKING, **figures})
        return rows


def open_loop_figures(request: Request, *, rate_per_s: float, seconds: int) -> dict[str, Any]:
    """Return the figures at a fixed rate, or what is wrong: the peak that it is a share of may have been a lucky one."""
    try:
        return run_open_loop(request, rate_per_s=rate_per_s, connections=CONNECTIONS[-1], seconds=seconds)
    except LoadFailed as error:
        return {"asked_per_s": round(rate_per_s, 1), "error": str(error)}


def check(name: str, size: str, endpoint: Running) -> None:
    """Raise `WrongAnswers` unless the app answers as the policy does."""
    app, policy = APPS[name], policy_of(size)
    obs_ND = clear_observations(policy, draw_observations(size, 4 * NUM_CHECKED), NUM_CHECKED)
    requests = [app.request(endpoint.url, endpoint.key, as_json(obs_D)) for obs_D in obs_ND]
    require_same_answers(name, ask_each(post, requests, app.read), policy.distributions(obs_ND))


def absent_apps(apps: list[str]) -> dict[str, str]:
    """Make the environments that the apps need, and return why the others cannot run."""
    absent = {}
    for name in apps:
        try:
            peer_command(APPS[name], 0)
        except EnvironmentUnavailable as error:
            absent[name] = str(error)
    return absent


def ratios(values: dict[str, dict[str, float]], apps: list[str]) -> dict[str, float]:
    """Return how many times as many requests ours answer as each other app, under the same load."""
    return {
        f"{ours}_to_{other}_{size}_{connections}": round(
            values[f"{ours}_{size}_{connections}"]["requests_per_s"] / values[f"{other}_{size}_{connections}"]["requests_per_s"],
            2,
        )
        for ours in OURS
        for other in apps
        for size in SIZES
        for connections in CONNECTIONS
        if ours != other and {f"{app}_{size}_{connections}" for app in (ours, other)} <= set(values)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--apps", type=names(APPS), default=list(DEFAULT_APPS), help=f"of {', '.join(APPS)}")
    parser.add_argument("--policies", type=names(SIZES), default=list(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=10, help="of each load")
    parser.add_argument("--output", type=Path, default=RESULT_FILE, help="where the JSON result goes")
    arguments = parser.parse_args()
    absent = absent_apps(arguments.apps)
    for name, reason in absent.items():
        print(f"{name} takes no part: {reason}", file=sys.stderr)
    apps = [name for name in arguments.apps if name not in absent]
    result = {"benchmark": "serve_latency", "machine": machine(), "seconds": arguments.seconds, "absent": absent, "rows": []}
    with tempfile.TemporaryDirectory() as directory:
        exports = {size: export_onnx(size, Path(directory)) for size in arguments.policies}
        for repetition in range(arguments.repetitions):
            for size, onnx in exports.items():
                for name in apps:
                    for row in measure(name, size, onnx=onnx, seconds=arguments.seconds):
                        result["rows"].append({"repetition": repetition, **row})
                        print(json.dumps(result["rows"][-1]), file=sys.stderr, flush=True)
    result["medians"] = medians(result["rows"], ("app", "policy", "load"), ("requests_per_s", "p50_ms", "p99_ms"))
    result["requests_per_s_ratios"] = ratios(result["medians"], apps)
    write_result(arguments.output, result)
    print(json.dumps(result["requests_per_s_ratios"], indent=1))


if __name__ == "__main__":
    main()
