"""What does a decision in the caller's own process cost, beside one that asks the endpoint?

    python -m benchmarks.local_client [--decisions 20000]

A replica without Ray (4 features, 64 and 64 units, 2 actions, sampled) answers on its direct lane. A local client of it decides
in blocks; the fastest block counts, in CPU time of the deciding thread, so that other processes on the machine count little.
The sending thread is in the process's CPU time. Beside it: the same process asking for one decision after the other over HTTP.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.train_cartpole import commit, machine
from policies.storage import open_storage
from tests.direct_replica import direct_replica
from tests.serving_helpers import publish, random_policy
from trimtab.client import Client

RESULT_FILE = Path(__file__).parent / "results" / "local_client.json"
LIMIT_US = 30.0  # what was promised
BLOCK = 500


def blocks_us(decide: Callable[[list[float]], Any], *, decisions: int, size: int) -> list[float]:
    """Return the thread's CPU microseconds per decision, of each block."""
    observations = np.random.default_rng(0).normal(size=(size, 4)).tolist()
    times_us = []
    for _ in range(max(decisions // size, 1)):
        started_ns = time.thread_time_ns()
        for observation in observations:
            decide(observation)
        times_us.append((time.thread_time_ns() - started_ns) / size / 1000)
    return times_us


def run(decisions: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        storage = open_storage(Path(directory) / "storage")
        publish(storage, random_policy(1))
        with direct_replica(storage) as replica:
            return measure(replica.url, replica.key, decisions)


def measure(url: str, key: str, decisions: int) -> dict[str, Any]:
    with Client.local(url, key, max_buffered=2 * decisions) as local:
        local_us = blocks_us(local.decide, decisions=decisions, size=BLOCK)
    counts = local.status().log
    with Client(url, key) as client:
        served_us = blocks_us(client.decide, decisions=min(decisions, 2000), size=100)
    return {
        "local_us": {"fastest": min(local_us), "median": float(np.median(local_us)), "limit": LIMIT_US},
        "served_us_of_the_client": {"fastest": min(served_us), "median": float(np.median(served_us))},
        "log": {"sent": counts.sent, "dropped": counts.dropped, "refused": counts.refused},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decisions", type=int, default=20_000)
    result = {**run(parser.parse_args().decisions), "machine": machine(), "commit": commit()}
    RESULT_FILE.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
