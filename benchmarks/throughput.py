"""How many environment steps per second: collecting alone, and with learning; ours beside the limit and beside the peers.

    python -m benchmarks.throughput [--repetitions N]      every measurement in a process of its own, one after the other, N times

Nothing else may run on the machine meanwhile. The result goes to benchmarks/results/throughput.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning import LANDING
from benchmarks.peers.environments import LUNARLANDER_PEERS, REPOSITORY, Peer, command
from benchmarks.train_cartpole import commit, machine
from training.config import EnvironmentConfig, TrainingConfig
from training.phases import WALL_PHASES, time_shares

RESULT_FILE = Path(__file__).parent / "results" / "throughput.json"
PROCESS_TIMEOUT_S = 900.0
LABELS = {
    "learning_cartpole_defaults": "CartPole, defaults: collect and learn in turn",
    "learning_cartpole": "CartPole, large batches, one fragment ahead",
    "learning_lunar_lander": "LunarLander, one fragment ahead",
}
CARTPOLE = EnvironmentConfig(id="CartPole-v1")
LUNAR_LANDER = EnvironmentConfig(id="LunarLander-v3")
NUM_FRAGMENTS = 40
COLORS = ("#0072b2", "#d55e00", "#009e73", "#999999")

# 1,024 environments step in one call of the native vectorisation; a fragment is 65 ms of work and more. relu, because numpy's
# tanh alone costs more than all matrix products here (2.6 ns per number); the tanh figure stands beside it.
ROLLOUTS = TrainingConfig(num_envs_per_shard=1024, rollout_fragment_length=64, activation="relu", max_staleness=1)
# Large batches: 131,072 steps per update, each looked at once, collected while the update before is being learned.
LEARNING = TrainingConfig(
    num_envs_per_shard=1024,
    rollout_fragment_length=64,
    num_epochs=1,
    minibatch_size=8192,
    lr=3e-3,
    activation="relu",
    max_staleness=1,
    max_env_steps=6_000_000,
    evaluation_every_updates=1000,
)
FAST_LANDING = TrainingConfig(**{**LANDING, "max_env_steps": 500_000, "evaluation_every_updates": 1000})


def collect_beside_the_limit(activation: str, environment: EnvironmentConfig = CARTPOLE, **sizes: int) -> dict[str, Any]:
    """Time `Shard.collect` and, in turn with it, nothing but `env.step` and the batched forwards of policy and value."""
    from training.learner_state import LearnerState
    from training.network import Network
    from training.rollout import Shard
    from training.threads import use_one_thread

    use_one_thread()
    training = ROLLOUTS.model_copy(update={"activation": activation, **sizes})
    shard = Shard(environment, training, 0, update=0, attempt=0)
    weights = LearnerState.initial(shard._layout, 0).weights()
    network, vector_env, num_steps = (
        Network(shard._layout, weights.parameters_P),
        shard._environment,
        training.rollout_fragment_length,
    )

    drawn_TBK = shard.collect(weights, update=0).actions_TBK

    def limit() -> None:  # the actions were drawn before: what they cost is the same, and so are the episodes
        observations = []
        for t in range(num_steps):
            observations.append(vector_env.obs_BD)
            network.outputs(vector_env.obs_BD)
            vector_env._env.step(drawn_TBK[t, :, 0])
        network.values(np.concatenate(observations))

    times: dict[str, list[float]] = {"collect": [], "limit": []}
    for update in range(1, 21):
        for name, work in (("collect", lambda update=update: shard.collect(weights, update=update)), ("limit", limit)):
            began_s = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - began_s)
    steps = num_steps * training.num_envs_per_shard
    collect_s, limit_s = (statistics.median(times[name]) for name in ("collect", "limit"))
    return {
        "env_steps_per_s": steps / collect_s,
        "limit_env_steps_per_s": steps / limit_s,
        "share_of_limit": limit_s / collect_s,
        "fragment_ms": 1000 * collect_s,
    }


def rollouts_only(activation: str) -> dict[str, Any]:
    """Collect on two rollout workers, one fragment ahead, without a learner."""
    from actors.worker_pool import WorkerPool
    from training.environment import read_spaces
    from training.learner_state import LearnerState
    from training.network import layout_of

    ray = _started_ray()
    training = ROLLOUTS.model_copy(update={"activation": activation})
    weights = ray.put(LearnerState.initial(layout_of(read_spaces(CARTPOLE), training), 0).weights())
    with WorkerPool(CARTPOLE, training) as pool:
        pool.start(weights, update=0, reset=True)
        pool.start(weights, update=1, reset=False)
        pool.collect(0)
        began_s, num_steps = time.perf_counter(), 0
        for update in range(1, NUM_FRAGMENTS + 1):
            pool.start(weights, update=update + 1, reset=False)
            pool.collect(update)
            num_steps += training.batch_size
        wall_s = time.perf_counter() - began_s
    ray.shutdown()
    return {"env_steps_per_s": num_steps / wall_s}


def rllib_rollouts() -> dict[str, Any]:
    """Collect on two of RLlib's env runners, with its own tuned number of environments."""
    from ray.rllib.algorithms.ppo import PPOConfig

    ray = _started_ray()
    config = PPOConfig().environment("CartPole-v1").env_runners(num_env_runners=2, num_envs_per_env_runner=16)
    algorithm = config.build_algo()
    runners = algorithm.env_runner_group

    def sample() -> int:
        results = runners.foreach_env_runner(
            lambda runner: sum(map(len, runner.sample(num_timesteps=4000))), local_env_runner=False
        )
        return sum(results)

    sample()
    began_s, num_steps = time.perf_counter(), 0
    while time.perf_counter() - began_s < 20:
        num_steps += sample()
    wall_s = time.perf_counter() - began_s
    algorithm.stop()
    ray.shutdown()
    return {"env_steps_per_s": num_steps / wall_s}


def learning(environment: EnvironmentConfig, training: TrainingConfig) -> dict[str, Any]:
    """Train with the whole trainer and say where the time went."""
    from actors.controller import train
    from policies.storage import open_storage

    ray = _started_ray()
    with tempfile.TemporaryDirectory() as directory:
        result = train(environment, training, open_storage(directory))
    ray.shutdown()
    shares = time_shares(result.phases_s, overlaps=training.max_staleness > 0)
    return {
        "env_steps": result.env_steps,
        "env_steps_per_s": result.env_steps_per_s,
        "wall_s": shares.loop_s,
        "machinery_share": shares.machinery,
        "evaluation_return_mean": result.evaluation_return_mean,
        "phases_s": result.phases_s,
    }


def _started_ray() -> Any:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    return ray


MEASUREMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "collect_relu": lambda: collect_beside_the_limit("relu"),
    "collect_tanh": lambda: collect_beside_the_limit("tanh"),
    "collect_lunar_lander": lambda: collect_beside_the_limit("tanh", LUNAR_LANDER, num_envs_per_shard=32),
    "rollouts_relu": lambda: rollouts_only("relu"),
    "rollouts_tanh": lambda: rollouts_only("tanh"),
    "rollouts_rllib": rllib_rollouts,
    "learning_cartpole_defaults": lambda: learning(CARTPOLE, TrainingConfig(max_env_steps=200_000)),
    "learning_cartpole": lambda: learning(CARTPOLE, LEARNING),
    "learning_lunar_lander": lambda: learning(LUNAR_LANDER, FAST_LANDING),
    **{f"learning_lunar_lander_{name}": lambda peer=peer: _peer(peer) for name, peer in LUNARLANDER_PEERS.items()},
}


def _peer(peer: Peer) -> dict[str, Any]:
    done = subprocess.run(
        command(peer, 0), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, timeout=PROCESS_TIMEOUT_S, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def run_process(name: str) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    ours = [sys.executable, "-m", "benchmarks.throughput", "--only", name]
    done = subprocess.run(ours, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, timeout=PROCESS_TIMEOUT_S, check=True)
    return {"measurement": name, **json.loads(done.stdout.splitlines()[-1])}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw where the time of the runs with learning went: what the loop waited for, and what the processes computed meanwhile."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "trimtab"  # the same numbers are the same file
    import matplotlib.pyplot as plt

    phases = {row["measurement"]: row["phases_s"] for row in rows if row["measurement"] in LABELS}  # of the last repetition
    if not phases:
        return
    figure, axes = plt.subplots(len(phases), 1, figsize=(8, 1.5 * len(phases)), layout="constrained", squeeze=False)
    for axis, (name, phases_s) in zip(axes[:, 0], phases.items()):
        began_s = 0.0
        for phase, label, color in zip(WALL_PHASES, ("collecting", "learning", "evaluating", "saving"), COLORS):
            axis.barh("the loop waited", phases_s[phase], left=began_s, color=color, label=label)
            began_s += phases_s[phase]
        axis.barh("slowest worker", phases_s["worker_s"], color=COLORS[0], alpha=0.5)
        axis.barh("learner", phases_s["learner_s"], color=COLORS[1], alpha=0.5)
        axis.invert_yaxis()
        axis.set_title(LABELS[name], fontsize=9, loc="left")
    axes[-1, 0].set_xlabel("seconds")
    axes[0, 0].legend(ncols=4, fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3, help="how often each is measured, in turn with the others")
    parser.add_argument("--measurements", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS), help="only these")
    parser.add_argument("--output", type=Path, default=RESULT_FILE, help="where the JSON result goes")
    parser.add_argument("--only", choices=MEASUREMENTS, help="make one measurement in this process and print it")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(MEASUREMENTS[arguments.only]()))
        return
    began, rows = machine(), []
    for _ in range(arguments.repetitions):
        for name in arguments.measurements:
            rows.append(run_process(name))
            print(json.dumps(rows[-1]), flush=True)
    medians = {
        name: {
            key: statistics.median(row[key] for row in rows if row["measurement"] == name)
            for key, value in next(row for row in rows if row["measurement"] == name).items()
            if isinstance(value, float)
        }
        for name in arguments.measurements
    }
    result = {
        "benchmark": "throughput",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "machine": began,
        "medians": medians,
        "runs": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    plot(rows, arguments.output.with_name("time_shares.svg"))
    print(json.dumps(medians, indent=2))


if __name__ == "__main__":
    main()
