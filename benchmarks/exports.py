"""How long it takes to export a CartPole policy in all three formats, verification included.

    python -m benchmarks.exports [--repetitions N]      needs the extra `export`

Measured is `trimtab export` as a user runs it, once with `--format all` and once per format: start, loading and verifying the
bundle, exporting, and verifying the artifact in its own runtime. Nothing else may run on the machine meanwhile. The result goes
to benchmarks/results/exports.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.train_cartpole import commit, machine
from policies.exports import ARTIFACTS
from policies.storage import open_storage
from tests.serving_helpers import publish, random_policy

RESULT_FILE = Path(__file__).parent / "results" / "exports.json"
LOOP_FILE = Path(__file__).parents[1] / "examples" / "cartpole.yaml"
TIMEOUT_S = 120.0


def measure(directory: Path, repetition: int) -> dict[str, float]:
    """Return the seconds that all formats take together, and each by itself."""
    seconds = {}
    for name in ("all", *ARTIFACTS):
        target = directory / f"{name}-{repetition}"
        arguments = ["export", str(LOOP_FILE), "--storage", str(directory / "data"), "--format", name, "--output", str(target)]
        began_s = time.perf_counter()
        subprocess.run([sys.executable, "-m", "trimtab", *arguments], check=True, capture_output=True, timeout=TIMEOUT_S)
        seconds[name] = time.perf_counter() - began_s
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3, help="how often each is measured")
    parser.add_argument("--output", type=Path, default=RESULT_FILE, help="where the JSON result goes")
    arguments = parser.parse_args()
    began, rows = machine(), []
    with tempfile.TemporaryDirectory() as directory:
        publish(open_storage(Path(directory) / "data"), random_policy(1), name="cartpole")
        for repetition in range(arguments.repetitions):
            rows.append(measure(Path(directory), repetition))
            print(json.dumps(rows[-1]), flush=True)
    result: dict[str, Any] = {
        "benchmark": "exports",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "machine": began,
        "medians": {f"{name}_s": statistics.median(row[name] for row in rows) for name in ("all", *ARTIFACTS)},
        "runs": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["medians"]))


if __name__ == "__main__":
    main()
