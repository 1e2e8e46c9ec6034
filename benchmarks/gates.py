"""How long it takes to judge a CartPole policy by every gate at default budgets, alone and against an incumbent.

    python -m benchmarks.gates [--repetitions N]

A policy is trained first (a few seconds, not counted). Counted is what `trimtab gate` does after Ray is there: the start of two
rollout workers, every gate's episodes, the report and the model card. Nothing else may run on the machine meanwhile. The result
goes to benchmarks/results/gates.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.train_cartpole import commit, machine

RESULT_FILE = Path(__file__).parent / "results" / "gates.json"
LOOP_FILE = Path(__file__).parents[1] / "examples" / "cartpole.yaml"
# Everything that can be judged: a cost beside the example's constraint, a second metric, a gate of one's own.
EVERYTHING = (
    "gates.safety.costs=[{function: 'benchmarks.gates:push', largest: 1, max_mean: 1}]",
    "gates.objective={true_metric: 'benchmarks.gates:upright', min_true: -0.2}",
    "gates.own=['benchmarks.gates:balanced']",
)


def push(obs_D: Any, action: int) -> float:
    """A cost: 1 for each push to the right."""
    return float(action)


def upright(episode: Any) -> float:
    """A second metric: how upright the pole was on average."""
    return -float(abs(episode.obs_TD[:, 2]).mean())


def balanced(context: Any) -> Any:
    """A gate of one's own."""
    from policies.verdicts import GateResult, Verdict

    (episodes,) = yield [context.first_look(context.candidate)]
    share = float(episodes.actions_N.mean())
    return GateResult("balanced", Verdict.PASS if 0.4 < share < 0.6 else Verdict.FAIL, f"right {share:.0%}", {"share": share})


def measure(repetitions: int) -> list[dict[str, Any]]:
    """Return one row per judgement; publish the policy in between, so that later ones are compared with it."""
    import ray

    from policies.storage import open_storage
    from trimtab.loop_file import load_loop_file
    from trimtab.pipeline import gate_run, publish_run, train_run

    rows = []
    with tempfile.TemporaryDirectory() as directory:
        loop = load_loop_file(LOOP_FILE, overrides=list(EVERYTHING), storage=directory)
        storage = open_storage(directory)
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        silent = {"on_progress": lambda progress: None, "on_message": lambda message: None}
        for run_id, seed in (("incumbent", 0), ("candidate", 1)):
            seeded = loop.model_copy(update={"training": loop.training.model_copy(update={"seed": seed})})
            train_run(seeded, storage, run_id=run_id, resume=False, **silent)
        for judged in ("incumbent", "candidate"):
            for _ in range(repetitions):
                began_s = time.perf_counter()
                report = gate_run(loop, storage, judged)
                row = {"against": report.incumbent_version, "wall_s": time.perf_counter() - began_s}
                rows.append({**row, "verdicts": {result.gate: str(result.verdict) for result in report.results}})
                print(json.dumps(rows[-1]), flush=True)
            if judged == "incumbent":
                publish_run(loop, storage, judged)
        ray.shutdown()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3, help="how often each is measured")
    parser.add_argument("--output", type=Path, default=RESULT_FILE, help="where the JSON result goes")
    arguments = parser.parse_args()
    began, rows = machine(), measure(arguments.repetitions)
    alone, against = ([row["wall_s"] for row in rows if (row["against"] is None) == is_alone] for is_alone in (True, False))
    result = {
        "benchmark": "gates",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "machine": began,
        "medians": {"alone_s": statistics.median(alone), "against_an_incumbent_s": statistics.median(against)},
        "runs": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["medians"]))


if __name__ == "__main__":
    main()
