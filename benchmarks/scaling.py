"""How throughput grows with the number of rollout workers: with an environment that is slow, and with a learner that is.

    python -m benchmarks.scaling      about five minutes; the result goes to benchmarks/results/scaling.json

An environment step takes a millisecond in which the processor does nothing, as it would while a simulator or a network answers.
So two cores can show the shape of sixteen workers: what is measured is everything but the environment. Beside it stands what as
many processes reach that do nothing but step: waking up sixteen thousand times a second is work, too.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from benchmarks.train_cartpole import commit, machine
from training.config import EnvironmentConfig, TrainingConfig

RESULT_FILE = Path(__file__).parent / "results" / "scaling.json"
STEP_S = 0.001
BARE_S = 5.0
START_TIMEOUT_S = 120.0
NUM_WORKERS = (1, 2, 4, 8, 16)
SLOW = EnvironmentConfig(id="benchmarks.scaling:slow")
# One shard per worker, whose environments step one after the other: 1,000 steps/s per worker at most, by definition.
BASE = {
    "num_envs_per_shard": 16,
    "rollout_fragment_length": 64,
    "max_staleness": 1,
    "num_cpus_per_env_runner": 0.0,
    "evaluation_episodes": 1,
    "evaluation_every_updates": 10_000,
    "checkpoint_every_updates": 1_000,
    "num_epochs": 1,
}
STEPS_PER_FRAGMENT = BASE["num_envs_per_shard"] * BASE["rollout_fragment_length"]


class Slow(gymnasium.Env):
    """Waits a millisecond per step; episodes have 50."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1, 1, (4,), np.float32)
        self.action_space = spaces.Discrete(2)
        self._num_steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._num_steps = 0
        return np.zeros(4, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        time.sleep(STEP_S)
        self._num_steps += 1
        return np.full(4, self._num_steps / 50, np.float32), 1.0, self._num_steps == 50, False, {}


def slow() -> gymnasium.Env:
    return Slow()


def one_environment_steps_per_s(seconds: float = BARE_S) -> float:
    """Return how fast one environment really is here: a sleep of a millisecond takes a little longer."""
    env = Slow()
    env.reset()
    began_s, num_steps = time.perf_counter(), 0
    while time.perf_counter() - began_s < seconds:
        env.step(0)
        num_steps += 1
    return num_steps / (time.perf_counter() - began_s)


def bare_processes_steps_per_s(num_processes: int) -> float:
    """Return how fast so many processes step the environment when they do nothing else: what this machine allows."""
    context = multiprocessing.get_context("spawn")
    barrier, rates = context.Barrier(num_processes), context.Queue()
    processes = [context.Process(target=_step_together, args=(barrier, rates)) for _ in range(num_processes)]
    for process in processes:
        process.start()
    total = sum(rates.get(timeout=START_TIMEOUT_S + BARE_S) for _ in processes)
    for process in processes:
        process.join(START_TIMEOUT_S)
    return total


def _step_together(barrier: Any, rates: Any) -> None:
    barrier.wait(START_TIMEOUT_S)  # until all have been imported
    rates.put(one_environment_steps_per_s())


def measure(num_workers: int, *, num_updates: int, learner_s_per_step: float = 0.0) -> dict[str, Any]:
    """Train on `num_workers` workers; a learner that needs `learner_s_per_step` more is simulated by sleeping in its process."""
    from actors import controller
    from policies.storage import open_storage

    training = TrainingConfig(
        **BASE,
        num_env_runners=num_workers,
        num_shards=num_workers,
        minibatch_size=STEPS_PER_FRAGMENT,
        max_env_steps=num_workers * STEPS_PER_FRAGMENT * num_updates,
    )
    usual = controller.Learner
    controller.Learner = _slowed(usual, learner_s_per_step)
    try:
        with tempfile.TemporaryDirectory() as directory:
            rows: list[controller.Progress] = []
            controller.train(SLOW, training, open_storage(directory), on_progress=rows.append)
    finally:
        controller.Learner = usual
    # From the second update on: the first has nothing to overlap with.
    first, last = rows[0], rows[-2]  # the last one evaluates
    return {
        "num_workers": num_workers,
        "env_steps_per_s": (last.env_steps - first.env_steps) / (last.elapsed_s - first.elapsed_s),
        "learner_share": sum(row.learner_s for row in rows[1:-1]) / (last.elapsed_s - first.elapsed_s),
    }


def _slowed(learner_class: type, seconds_per_step: float) -> type:
    if not seconds_per_step:
        return learner_class

    class SlowLearner(learner_class):  # type: ignore[misc,valid-type]
        """Learns as usual and then sleeps as long as a larger network would have computed."""

        def update(self, *fragments: Any) -> Any:
            (report, compute_s), weights = super().update(*fragments)
            time.sleep(seconds_per_step * report.num_env_steps)
            return (report, compute_s + seconds_per_step * report.num_env_steps), weights

    return SlowLearner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULT_FILE, help="where the JSON result goes")
    arguments = parser.parse_args()
    import ray

    began = machine()
    single = one_environment_steps_per_s()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    environment_bound = [measure(n, num_updates=16) for n in NUM_WORKERS]
    # 250 microseconds of learning per step: 4,000 steps/s at most, so the curve must bend at four workers.
    learner_bound = [measure(n, num_updates=10, learner_s_per_step=250e-6) for n in NUM_WORKERS]
    ray.shutdown()
    for row in environment_bound:
        row["efficiency"] = row["env_steps_per_s"] / (row["num_workers"] * single)
        row["efficiency_of_bare_processes"] = bare_processes_steps_per_s(row["num_workers"]) / (row["num_workers"] * single)
    result = {
        "benchmark": "scaling",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "machine": began,
        "one_environment_steps_per_s": single,
        "environment_bound": environment_bound,
        "learner_bound": learner_bound,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
