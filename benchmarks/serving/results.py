"""What a serving benchmark writes down: where and when, every single value, and medians."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.environments import REPOSITORY

RESULTS = REPOSITORY / "benchmarks" / "results"


def machine() -> dict[str, Any]:
    """Say where and on what this was measured."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    commit = _git("rev-parse", "HEAD")
    return {
        "cpus": os.cpu_count(),
        "cpu_model": model,
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": (commit or "none") + (" with changes" if _git("status", "--porcelain") else ""),
        "equal_work_ms": equal_work_ms(),
    }


def equal_work_ms(seconds: float = 3.0) -> dict[str, float]:
    """Return how long equal pieces of work take on this machine while nothing else runs, each some ms of pure Python.

    On a machine that is shared their p99 is a multiple of the median. No server's tail is shorter than that of its own batches.
    """
    times_ms: list[float] = []
    ends_s = time.perf_counter() + seconds
    while time.perf_counter() < ends_s:
        began_s = time.perf_counter()
        sum(number * number % 7 for number in range(20_000))
        times_ms.append(1000 * (time.perf_counter() - began_s))
    figures = np.percentile(times_ms, (50, 99, 99.9, 100), method="higher").round(2).tolist()
    return dict(zip(("p50", "p99", "p999", "max"), figures))


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else ""


def medians(rows: Sequence[dict[str, Any]], by: Sequence[str], of: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the median of each figure over the rows that have the same values in `by`, under these values joined by `_`.

    Rows with an `error` have no figures.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "error" in row:
            continue
        groups.setdefault("_".join(str(row[key]) for key in by), []).append(row)
    return {name: {key: statistics.median(row[key] for row in group) for key in of} for name, group in groups.items()}


def write_result(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
