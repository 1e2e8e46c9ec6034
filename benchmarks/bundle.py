"""How long does it take to load and verify a bundle, and to refuse one that was damaged or forged?

    python -m benchmarks.bundle [--repetitions 50] [--mutations 5000]

A bundle of 1 MB (a CartPole policy with 480 x 480 units, golden vectors, 20,000 steps of reference) is read again and again in
one process; then mutations of a small one are, of which the slowest refusal counts. Loading runs the golden vectors.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.train_cartpole import commit, machine
from policies.bundle import read_bundle, write_bundle
from policies.bundle_reader import FILES
from policies.errors import TrimtabError
from policies.reference import MAX_STEPS, choose_steps
from tests.bundles import golden_as_trained, make_bundle, make_policy, make_report
from tests.mutations import FAMILIES, mutate, read_contents

RESULT_FILE = Path(__file__).parent / "results" / "bundle.json"
LOAD_LIMIT_MS, REFUSAL_LIMIT_MS = 30, 100  # what was promised


def loading(directory: Path, *, repetitions: int) -> dict[str, Any]:
    """Return sizes and times of reading a bundle of about 1 MB of weights."""
    policy, rng = make_policy(hidden=(480, 480)), np.random.default_rng(0)
    reference = choose_steps(
        rng.standard_normal((MAX_STEPS, 4)).astype(np.float32),
        rng.integers(0, 2, MAX_STEPS),
        np.ones(MAX_STEPS, np.float32),
        np.arange(MAX_STEPS) // 200,
        seed=0,
    )
    options = {"golden": golden_as_trained(policy), "gate_report": make_report(policy), "mode": "sample", "origin": {}}
    bundle = write_bundle(directory, policy=policy, **options, created_at=1.0, reference=reference)
    times_ms = [_time_ms(lambda: read_bundle(bundle.path)) for _ in range(repetitions)]
    sizes = {name: (bundle.path / name).stat().st_size for name in FILES}
    return {"size_bytes": sizes, "median_ms": statistics.median(times_ms), "max_ms": max(times_ms), "limit_ms": LOAD_LIMIT_MS}


def refusing(directory: Path, *, mutations: int) -> dict[str, Any]:
    """Return the times of refusing mutated bundles, by family."""
    bundle = make_bundle(directory, make_policy(hidden=(4,)))
    contents, times_ms = read_contents(bundle.path), defaultdict(list)
    for number in range(mutations):
        mutation = mutate(list(FAMILIES)[number % len(FAMILIES)], contents, np.random.default_rng((3, number)))
        for name, data in mutation.changes.items():
            (bundle.path / name).unlink(missing_ok=True) if data is None else (bundle.path / name).write_bytes(data)
        times_ms[mutation.family].append(_time_ms(lambda mutation=mutation: _refused(bundle.path, mutation.digest)))
        for name in mutation.changes:
            (bundle.path / name).unlink(missing_ok=True)
            if name in contents:
                (bundle.path / name).write_bytes(contents[name])
    families = {name: {"median_ms": statistics.median(times), "max_ms": max(times)} for name, times in times_ms.items()}
    slowest_ms = max(family["max_ms"] for family in families.values())
    return {"mutations": mutations, "max_ms": slowest_ms, "limit_ms": REFUSAL_LIMIT_MS, "families": families}


def _refused(path: Path, digest: str) -> None:
    try:
        read_bundle(path, expected_digest=digest)
    except TrimtabError:
        return
    raise AssertionError(f"a mutated bundle was read: {path}")


def _time_ms(action: Any) -> float:
    began_s = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - began_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--mutations", type=int, default=5000)
    parser.add_argument("--output", type=Path, default=RESULT_FILE)
    arguments = parser.parse_args()
    began = machine()
    with tempfile.TemporaryDirectory() as directory:
        result = {
            "benchmark": "bundle",
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": commit(),
            "machine": began,
            "load_and_verify": loading(Path(directory), repetitions=arguments.repetitions),
            "refuse": refusing(Path(directory), mutations=arguments.mutations),
        }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    for name in ("load_and_verify", "refuse"):
        print(f"{name}: {', '.join(f'{key} {value:.3g}' for key, value in result[name].items() if key.endswith('_ms'))}")


if __name__ == "__main__":
    main()
