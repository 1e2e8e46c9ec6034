"""How well policies learn: the return after a fixed number of environment steps, over several seeds, with an interval.

    python -m benchmarks.learning [--only NAME] [--seeds N]      the whole of it takes about 40 minutes on two cores

Scores are of what `trimtab publish` would take, the weights of the best evaluation during training, over 100 new episodes with
the greedy policy. Per environment: the interquartile mean over seeds with a bootstrap interval (arXiv:2108.13264). Results and
curves go to benchmarks/results/learning.json and learning.svg. How fast the machine was does not change a number here.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.train_cartpole import commit, machine
from training.config import EnvironmentConfig, TrainingConfig

RESULT_FILE = Path(__file__).parent / "results" / "learning.json"
NUM_EPISODES = 100
SCORE_SEED = 777_777  # initial states that neither training nor its evaluations have seen
BOOTSTRAP_SAMPLES = 10_000


@dataclass(frozen=True)
class Task:
    """One environment, with the settings that learn it and the score that was asked for."""

    environment: str
    num_seeds: int
    goal: float
    training: dict[str, Any]


# Also those of the throughput with learning in benchmarks/throughput.py: one fragment ahead, so that both cores have work.
LANDING: dict[str, Any] = {
    "max_env_steps": 1_000_000,
    "lr": [[0, 1e-3], [1_000_000, 1e-4]],
    "num_epochs": 4,
    "minibatch_size": 256,
    "entropy_coeff": 0.01,
    "num_envs_per_shard": 32,
    "rollout_fragment_length": 64,
    "activation": "relu",
    "normalize_rewards": True,  # a landing or a crash is worth 100: its value's gradient would drown the policy's
    "max_staleness": 1,
    "evaluation_every_updates": 10,
}
TASKS = {
    "cartpole": Task("CartPole-v1", 10, 495, {"max_env_steps": 100_000}),  # else the defaults
    "acrobot": Task(
        "Acrobot-v1",
        5,
        -82,
        # RL Zoo's settings for PPO but for the network and the learning rate, which is larger and falls; 16 environments, as
        # two shards
        {
            "max_env_steps": 500_000,
            "lambda_": 0.94,
            "lr": [[0, 1e-3], [500_000, 2e-5]],
            "num_epochs": 4,
            "minibatch_size": 128,
            "num_envs_per_shard": 8,
            "rollout_fragment_length": 256,
            "normalize_observations": True,
            "normalize_rewards": True,
            "evaluation_episodes": 100,  # good policies differ by less than what 20 episodes can tell
        },
    ),
    "mountain_car_continuous": Task(
        "MountainCarContinuous-v0",
        5,
        90,
        {
            "max_env_steps": 300_000,
            "gamma": 0.999,
            "lr": 3e-4,
            "num_epochs": 10,
            "minibatch_size": 512,
            "num_envs_per_shard": 16,
            "rollout_fragment_length": 512,
            "normalize_observations": True,
            "normalize_rewards": True,
            "initial_log_std": 0.5,  # the hill is found by strong pushes, and only by those
        },
    ),
    "lunar_lander": Task("LunarLander-v3", 5, 242, LANDING),
    "pendulum": Task(
        "Pendulum-v1",
        5,
        -172,
        # gamma is RL Zoo's. Its evaluations begin all over the circle and differ by 20 with 20 episodes, hence more of them.
        {
            "max_env_steps": 100_000,
            "gamma": 0.9,
            "lr": [[0, 1e-3], [100_000, 1e-4]],
            "num_epochs": 10,
            "minibatch_size": 128,
            "num_envs_per_shard": 4,
            "rollout_fragment_length": 256,
            "activation": "relu",
            "initial_log_std": 0.3,
            "evaluation_episodes": 100,
        },
    ),
}


def train_once(task: Task, seed: int) -> dict[str, Any]:
    """Train with one seed and return its score, its curve and the steps it took."""
    from actors.controller import Progress, train
    from actors.worker_pool import WorkerPool
    from policies.storage import open_storage
    from training.checkpoint import load_policy
    from training.evaluation import EvaluationRequest

    environment, training = EnvironmentConfig(id=task.environment), TrainingConfig(**task.training, seed=seed)
    curve: list[tuple[int, float]] = []

    def note(progress: Progress) -> None:
        if progress.evaluation_return_mean is not None:
            curve.append((progress.env_steps, progress.evaluation_return_mean))

    began_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        storage = open_storage(directory)
        result = train(environment, training, storage, on_progress=note)
        policy, _ = load_policy(storage.run(result.run_id))
    with WorkerPool(environment, training) as pool:
        score = pool.evaluate(EvaluationRequest(policy, NUM_EPISODES, SCORE_SEED))[0].return_mean
    return {"seed": seed, "score": score, "env_steps": result.env_steps, "wall_s": time.perf_counter() - began_s, "curve": curve}


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Return the mean of the middle half along the last axis."""
    ordered = np.sort(scores, axis=-1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1)


def summary(task: Task, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the interquartile mean with its 95 % bootstrap interval, and the goal beside it."""
    scores = np.array([row["score"] for row in rows])
    resampled = np.random.default_rng(0).choice(scores, (BOOTSTRAP_SAMPLES, len(scores)))
    low, high = np.percentile(interquartile_mean(resampled), (2.5, 97.5))
    iqm = float(interquartile_mean(scores))
    return {
        "environment": task.environment,
        "goal": task.goal,
        "interquartile_mean": iqm,
        "low": float(low),
        "high": float(high),
        "min": float(scores.min()),
        "is_reached": iqm >= task.goal,
        "num_seeds": len(rows),
        "training": task.training,
        "runs": rows,
    }


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the evaluation curves of every seed, one panel per environment, with the goal as a line."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "trimtab"  # the same numbers are the same file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 3.2), layout="constrained", squeeze=False)
    for axis, (name, result) in zip(axes[0], results.items()):
        for row in result["runs"]:
            axis.plot(*zip(*row["curve"]), color="#0072b2", alpha=0.4, linewidth=1)
        axis.axhline(result["goal"], color="#d55e00", linestyle="--", linewidth=1)
        axis.set_title(f"{result['environment']}: {result['interquartile_mean']:.1f}")
        axis.set_xlabel("environment steps")
        axis.set_ylabel("greedy return" if name == next(iter(results)) else "")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=TASKS, action="append", help="only this task; may be given several times")
    parser.add_argument("--seeds", type=int, help="fewer (or more) seeds than the task asks for")
    parser.add_argument("--output", type=Path, default=RESULT_FILE, help="where the JSON result goes; the curves go beside it")
    arguments = parser.parse_args()
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    results = json.loads(arguments.output.read_text())["tasks"] if arguments.output.exists() else {}
    for name in arguments.only or TASKS:
        task = TASKS[name]
        rows = []
        for seed in range(arguments.seeds or task.num_seeds):
            rows.append(train_once(task, seed))
            print(name, json.dumps({key: value for key, value in rows[-1].items() if key != "curve"}), flush=True)
            results[name] = {**summary(task, rows), "date": time.strftime("%Y-%m-%d", time.gmtime()), "commit": commit()}
            document = {"benchmark": "learning", "machine": machine(), "tasks": results}
            arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    ray.shutdown()
    plot(results, arguments.output.with_suffix(".svg"))
    print(json.dumps({name: {k: v for k, v in result.items() if k != "runs"} for name, result in results.items()}, indent=2))


if __name__ == "__main__":
    main()
