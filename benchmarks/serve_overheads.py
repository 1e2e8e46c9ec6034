"""What do the log, a second version on an arm, a shadow and a holdout cost?

    python -m benchmarks.serve_overheads [--policies small,large] [--repetitions 5] [--seconds 10]

Each repetition starts a replica afresh for each setting, in turn, loads its own port at 64 connections, and requires that what
was logged shows the setting: `plain`, `log_off` (a replica of the benchmark's own that writes nothing), `canary` (a second
version answers half of the units), `shadow` (it answers behind every answer), `holdout` (it answers half of the units, kept from
releases). A ratio is that of one repetition's throughputs, setting to plain; the result has their median. Needs `wrk` on the
PATH.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.serving.arguments import names
from benchmarks.serving.policies import SIZES, as_json, draw_observations
from benchmarks.serving.results import RESULTS, machine, medians, write_result
from benchmarks.serving.servers import APPS, running
from benchmarks.serving.settings import SETTINGS
from benchmarks.serving.wrk import run_wrk
from policies.storage import existing_storage
from tests.serving_helpers import NAME

APP = "trimtab_direct"
CONNECTIONS = 64
WARM_UP_S = 3
RESULT_FILE = RESULTS / "serve_overheads.json"


def measure(setting: str, size: str, *, seconds: int, warm_up_s: int = WARM_UP_S) -> dict[str, Any]:
    """Start ours with the setting, load it, require that the setting was in force, and return the row."""
    with running(APP, size, setting=setting) as endpoint:
        request = APPS[APP].request(endpoint.url, endpoint.key, as_json(draw_observations(size, 1, seed=1)[0]))
        run_wrk(request, connections=CONNECTIONS, seconds=warm_up_s)
        figures = run_wrk(request, connections=CONNECTIONS, seconds=seconds)
        storage = existing_storage(endpoint.storage)
        SETTINGS[setting].require_in_force(storage.decisions(NAME), storage.shadows(NAME))
        return {"setting": setting, "policy": size, "connections": CONNECTIONS, **figures}


def ratios_to_plain(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return for each setting and policy the ratios of its throughput to the plain one's of the same repetition."""
    plain = {(row["repetition"], row["policy"]): row["requests_per_s"] for row in rows if row["setting"] == "plain"}
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["setting"] != "plain":
            ratio = row["requests_per_s"] / plain[row["repetition"], row["policy"]]
            found.setdefault(f"{row['setting']}_{row['policy']}", []).append(ratio)
    return {
        name: {"median": round(statistics.median(values), 3), "values": [round(value, 3) for value in values]}
        for name, values in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", type=names(SIZES), default=list(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument(
        "--settings", type=names(SETTINGS), default=list(SETTINGS), help="besides plain, of " + ", ".join(SETTINGS)
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=10, help="of each load")
    parser.add_argument("--output", type=Path, default=RESULT_FILE, help="where the JSON result goes")
    arguments = parser.parse_args()
    settings = list(dict.fromkeys(("plain", *arguments.settings)))
    result = {"benchmark": "serve_overheads", "machine": machine(), "seconds": arguments.seconds, "rows": []}
    for repetition in range(arguments.repetitions):
        for size in arguments.policies:
            for setting in settings:
                row = measure(setting, size, seconds=arguments.seconds)
                result["rows"].append({"repetition": repetition, **row})
                print(json.dumps(result["rows"][-1]), file=sys.stderr, flush=True)
    result["medians"] = medians(result["rows"], ("setting", "policy"), ("requests_per_s", "p50_ms", "p99_ms"))
    result["requests_per_s_ratios"] = ratios_to_plain(result["rows"])
    write_result(arguments.output, result)
    print(json.dumps(result["requests_per_s_ratios"], indent=1))


if __name__ == "__main__":
    main()
