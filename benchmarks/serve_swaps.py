"""Does a new traffic plan fail or slow any request, and how soon do all replicas answer under it?

    python -m benchmarks.serve_swaps [--swaps 100]

Two replicas answer moderate load through Serve's endpoint and on their own ports. Meanwhile releases of two versions in turn are
started, advanced, rolled back and promoted through the registry. The delay of a swap is from its journal entry until the last
replica's first decision under it or a later plan, as the decision log has it: with this load each replica decides every few
milliseconds.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.paced_load import PacedLoad, Request, percentile
from benchmarks.serving.ray_apps import stop
from benchmarks.serving.results import machine, write_result

RESULT_FILE = Path(__file__).parent / "results" / "serve_swaps.json"
NUM_REPLICAS = 2
CONNECTIONS, THINK_S = 4, 0.01  # of the endpoint and of each replica's own port
PAUSE_S = (1.0, 2.0)  # between swaps; replicas look twice a second, so every phase of their clock is met
WEIGHTS = (0.3, 0.7)
AFTER_S = 1.0  # what counts as shortly after a swap
SLOW_MS = 100.0
CYCLE = ("start", "advance", "rollback", "start", "advance", "promote", "start", "abort", "rollback", "start", "promote")


def swap(registry: Any, action: str) -> tuple[int, float, float]:
    """Change the plan; return its number and when its entry was in the journal, on the wall clock and the monotonic one."""
    from policies.registry import change_release, start_release

    def entry(state: Any) -> dict[str, Any]:
        if action != "start":
            return change_release(state, action, reason="benchmark")  # type: ignore[arg-type]
        candidate = 2 if state.champion == 1 else 1
        return start_release(state, candidate, weights=WEIGHTS, override_gates=None, reason="benchmark")

    state = registry.append(entry, now=time.time())
    return state.plan.number, time.time(), time.monotonic()


def measure(num_swaps: int, *, port: int) -> dict[str, Any]:
    """Start the endpoint, swap plans under load, stop it, and return the result."""
    from serve_app.profile import serve_profile_environment

    os.environ.update(serve_profile_environment())
    import ray
    import requests

    from policies.log_reader import LogTail
    from policies.records import Decision
    from policies.registry import Registry
    from policies.storage import open_storage
    from serve_app.app import start_serving
    from serve_app.config import ServingConfig
    from tests.serving_helpers import NAME, publish, random_policy, read_new

    storage = open_storage(tempfile.mkdtemp(prefix="serve-swaps-"))
    publish(storage, random_policy(1))
    publish(storage, random_policy(2))
    registry, key = Registry(storage.registry(NAME)), storage.api_key_file.read_text().strip()
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    loads: dict[str, list[PacedLoad]] = {}
    try:
        url = start_serving(NAME, str(storage.root), ServingConfig(port=port, num_replicas=NUM_REPLICAS))
        directs = wait_for_lanes(requests, url, key)
        loads = {"endpoint": [PacedLoad(url, key, connections=CONNECTIONS, think_s=THINK_S)]}
        loads["direct"] = [PacedLoad(direct, key, connections=CONNECTIONS, think_s=THINK_S) for direct in directs]
        time.sleep(3.0)
        rng, swaps = random.Random(0), []
        for index in range(num_swaps):
            swaps.append(swap(registry, CYCLE[index % len(CYCLE)]))
            time.sleep(rng.uniform(*PAUSE_S))
    finally:
        ended = {lane: [request for load in several for request in load.end()] for lane, several in loads.items()}
        stop()
    decided: dict[str, list[tuple[float, int]]] = {}
    for path in storage.decisions(NAME).glob("*.jsonl"):
        one = Path(tempfile.mkdtemp(prefix="serve-swaps-log-"))
        (one / path.name).symlink_to(path)
        records = read_new(LogTail(one, Decision))
        decided.setdefault(path.name.rsplit("-", 1)[0], []).extend((record.time_s, record.plan) for record in records)
    if len(decided) != NUM_REPLICAS:
        raise RuntimeError(f"{len(decided)} replicas wrote decisions, expected {NUM_REPLICAS}: one was replaced meanwhile")
    return {
        "lanes": {lane: summary(requests_, [at_s for _, _, at_s in swaps]) for lane, requests_ in ended.items()},
        "delay_s": delays(decided, swaps),
    }


def wait_for_lanes(requests: Any, url: str, key: str) -> list[str]:
    """Return the own ports of both replicas. The endpoint names the one that answers; it is asked until both have."""
    found: set[str] = set()
    deadline = time.monotonic() + 30
    while len(found) < NUM_REPLICAS and time.monotonic() < deadline:
        answer = requests.get(f"{url}/v1/endpoints", headers={"Authorization": f"Bearer {key}"}, timeout=10)
        found.update(answer.json()["endpoints"])
    if len(found) != NUM_REPLICAS:
        raise RuntimeError(f"own ports of the replicas: {found}, expected {NUM_REPLICAS}")
    return sorted(found)


def summary(requests: list[Request], swapped_s: list[float]) -> dict[str, Any]:
    """Return failures and latencies of one lane, overall and of requests that were under way within `AFTER_S` of a swap."""
    after, quiet = [], []
    for request in requests:
        is_after = any(at_s <= request.ended_s and request.began_s <= at_s + AFTER_S for at_s in swapped_s)
        (after if is_after else quiet).append(request)
    return {
        "requests": len(requests),
        "failed": sum(request.status != 200 for request in requests),
        "overall_ms": latencies(requests),
        "within_1_s_after_a_swap_ms": latencies(after),
        "otherwise_ms": latencies(quiet),
        "share_slower_than_100_ms": {
            "after_a_swap": round(sum(one.latency_ms > SLOW_MS for one in after) / max(1, len(after)), 6),
            "otherwise": round(sum(one.latency_ms > SLOW_MS for one in quiet) / max(1, len(quiet)), 6),
        },
    }


def latencies(requests: list[Request]) -> dict[str, float | None]:
    values = [round(request.latency_ms, 2) for request in requests]
    return {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99), "max": max(values, default=None)}


def delays(decided: dict[str, list[tuple[float, int]]], swaps: list[tuple[int, float, float]]) -> dict[str, Any]:
    """Return how long swaps took to be in force at every replica."""
    found = []
    for number, appended_s, _ in swaps:
        firsts = [min((at_s for at_s, plan in rows if plan >= number), default=None) for rows in decided.values()]
        if None in firsts:
            raise RuntimeError(f"a replica never decided under plan {number}")
        found.append(round(max(firsts) - appended_s, 3))
    return {"swaps": len(found), "p50": percentile(found, 0.5), "p99": percentile(found, 0.99), "max": max(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    where = machine()
    result = {
        "benchmark": "serve_swaps",
        "machine": where,
        "replicas": NUM_REPLICAS,
        **measure(arguments.swaps, port=arguments.port),
    }
    write_result(RESULT_FILE, result)
    print(json.dumps(result, indent=1), file=sys.stderr)


if __name__ == "__main__":
    main()
