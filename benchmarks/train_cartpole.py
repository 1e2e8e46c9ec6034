"""How long does CartPole-v1 take to learn with our trainer and with other people's PPO on the same machine?

    python -m benchmarks.train_cartpole [--seeds 3] [--trainers trimtab cleanrl ...] [--output FILE]     needs the extra `bench`

Every run is a fresh process, and the trainers take turns seed by seed, so that a busy minute hits all of them. The clock runs
from the first environment step until 20 greedy episodes have a mean return of at least 475; evaluations are inside the clock.
All trainers are judged alike: greedy actions, 20 environments side by side, one episode each. Settings are each project's own
for this environment: RLlib's tuned example, RL Baselines3 Zoo's hyper-parameters, our `examples/cartpole.yaml`; those of the
peers in `benchmarks/peers/` stand in their files. A peer whose environment cannot be made is reported as absent, with the reason.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.environments import CARTPOLE_PEERS, REPOSITORY, EnvironmentUnavailable, command
from benchmarks.peers.judge import (
    EVALUATION_EVERY_STEPS,
    MAX_ENV_STEPS,
    NUM_EPISODES,
    TARGET_RETURN,
    TRAINING_LIMIT_S,
    Act,
    greedy_return,
)

PROCESS_TIMEOUT_S = 240.0
RESULT_FILE = REPOSITORY / "benchmarks" / "results" / "train_cartpole.json"


def train_trimtab(seed: int) -> dict[str, Any]:
    """Run `actors.controller.train` as `trimtab train` does: Ray actors, checkpoints and metrics included."""
    import ray

    from actors.controller import train
    from policies.storage import open_storage
    from training.config import TrainingConfig
    from trimtab.loop_file import load_loop_file

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    loop = load_loop_file(REPOSITORY / "examples" / "cartpole.yaml")
    judged = {"target_return": TARGET_RETURN, "evaluation_episodes": NUM_EPISODES, "max_env_steps": MAX_ENV_STEPS}
    settings = TrainingConfig(**{**loop.training.model_dump(), **judged, "seed": seed})
    with tempfile.TemporaryDirectory() as directory:
        result = train(loop.environment, settings, open_storage(Path(directory) / "storage"))
    ray.shutdown()
    return {
        "time_to_target_s": result.time_to_target_s,
        "env_steps": result.env_steps,
        "env_steps_per_s": result.env_steps_per_s,
        "evaluation_return_mean": result.evaluation_return_mean,
    }


def train_stable_baselines3(seed: int) -> dict[str, Any]:
    """Run stable-baselines3's PPO with RL Baselines3 Zoo's settings for CartPole-v1."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)  # faster than its default for networks of this size

    class StopAtTarget(BaseCallback):
        """Evaluates between an update and the next rollout."""

        def __init__(self) -> None:
            super().__init__()
            self.began_s = time.perf_counter()
            self.evaluated_at_step = 0
            self.outcome: dict[str, Any] = {}

        def _on_rollout_start(self) -> None:
            if self.num_timesteps - self.evaluated_at_step >= EVALUATION_EVERY_STEPS:
                self.evaluated_at_step = self.num_timesteps
                self.outcome = _outcome(lambda obs_BD: self.model.predict(obs_BD, deterministic=True)[0], self)

        def _on_step(self) -> bool:
            return self.outcome.get("time_to_target_s") is None

    model = PPO(
        "MlpPolicy",
        make_vec_env("CartPole-v1", n_envs=8, seed=seed),
        n_steps=32,
        batch_size=256,
        gae_lambda=0.8,
        gamma=0.98,
        n_epochs=20,
        learning_rate=lambda remaining: remaining * 1e-3,
        clip_range=lambda remaining: remaining * 0.2,
        seed=seed,
        device="cpu",
    )
    stop = StopAtTarget()
    stop.began_s = time.perf_counter()
    model.learn(100_000, callback=stop)
    return stop.outcome


def train_rllib(seed: int) -> dict[str, Any]:
    """Run RLlib's PPO (new API stack) with the settings of its tuned example for CartPole-v1, on two env runners."""
    import ray
    import torch
    from ray.rllib.algorithms.ppo import PPOConfig

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", num_cpus=4)
    config = (
        PPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=2)
        .training(gamma=0.99, lr=0.0003, num_epochs=6, vf_loss_coeff=0.01, use_kl_loss=True)
        .rl_module(model_config={"fcnet_hiddens": [32], "fcnet_activation": "linear", "vf_share_layers": True})
        .debugging(seed=seed)
    )
    algorithm = config.build_algo()
    module = algorithm.learner_group._learner.module["default_policy"]

    @torch.no_grad()
    def act(obs_BD: np.ndarray) -> np.ndarray:
        return module.forward_inference({"obs": torch.from_numpy(obs_BD)})["action_dist_inputs"].argmax(dim=1).numpy()

    class Clock:
        began_s = time.perf_counter()
        num_timesteps = 0

    outcome: dict[str, Any] = {}
    while outcome.get("time_to_target_s") is None and time.perf_counter() - Clock.began_s < TRAINING_LIMIT_S:
        result = algorithm.train()
        Clock.num_timesteps = int(result["num_env_steps_sampled_lifetime"])
        outcome = _outcome(act, Clock)
    algorithm.stop()
    ray.shutdown()
    return outcome


def _outcome(act: Act, clock: Any) -> dict[str, Any]:
    """Evaluate a foreign policy as we evaluate ours, and say how far its run is."""
    return_mean = greedy_return(act, seed=clock.num_timesteps)
    elapsed_s = time.perf_counter() - clock.began_s
    return {
        "time_to_target_s": elapsed_s if return_mean >= TARGET_RETURN else None,
        "env_steps": clock.num_timesteps,
        "env_steps_per_s": clock.num_timesteps / elapsed_s,
        "evaluation_return_mean": return_mean,
    }


TRAINERS_HERE = {"trimtab": train_trimtab, "stable_baselines3": train_stable_baselines3, "rllib": train_rllib}
TRAINERS = (*TRAINERS_HERE, *CARTPOLE_PEERS)


def absent_trainers(trainers: list[str]) -> dict[str, str]:
    """Make the environments that the trainers need, and return why the others cannot run."""
    absent = {}
    for trainer in trainers:
        try:
            trainer_command(trainer, seed=0)
        except EnvironmentUnavailable as error:
            absent[trainer] = str(error)
    return absent


def trainer_command(trainer: str, seed: int) -> list[str]:
    if trainer in CARTPOLE_PEERS:
        return command(CARTPOLE_PEERS[trainer], seed)
    return [sys.executable, "-m", "benchmarks.train_cartpole", "--only", trainer, "--seed", str(seed)]


def run_process(trainer: str, seed: int) -> dict[str, Any]:
    """Run one trainer in a process of its own and return its result with the time of the whole process."""
    arguments = trainer_command(trainer, seed)
    began_s = time.perf_counter()
    # A session of its own, so that what a trainer started ends with it: Ray's processes, Sample Factory's workers.
    with subprocess.Popen(arguments, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            output, _ = process.communicate(timeout=PROCESS_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return {
                "trainer": trainer,
                "seed": seed,
                "time_to_target_s": None,
                "process_s": PROCESS_TIMEOUT_S,
                "error": "timeout",
            }
        finally:
            _end_session(process.pid)
    process_s = time.perf_counter() - began_s
    if process.returncode != 0:
        return {"trainer": trainer, "seed": seed, "time_to_target_s": None, "process_s": process_s, "error": process.returncode}
    return {"trainer": trainer, "seed": seed, **json.loads(output.splitlines()[-1]), "process_s": process_s}


def _end_session(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # the usual case: everything has ended
        os.killpg(leader, signal.SIGKILL)


def summary(rows: list[dict[str, Any]], trainers: list[str]) -> dict[str, Any]:
    """Return each trainer's medians and how many times better ours are; times are of the runs that reached the target."""
    medians = {trainer: _medians([row for row in rows if row["trainer"] == trainer]) for trainer in trainers}
    ours = medians.get("trimtab")
    ratios = {
        peer: {
            "env_steps_per_s": _ratio(ours["env_steps_per_s"], medians[peer]["env_steps_per_s"]),
            "time_to_target_s": _ratio(medians[peer]["time_to_target_s"], ours["time_to_target_s"]),
            "process_s": _ratio(medians[peer]["process_s"], ours["process_s"]),
        }
        for peer in trainers
        if ours is not None and peer != "trimtab"
    }
    return {"medians": medians, "times_better_than": ratios}


def _medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    reached = [row for row in rows if row["time_to_target_s"] is not None]
    return {
        "num_runs": len(rows),
        "num_reached": len(reached),
        "env_steps_per_s": _median([row["env_steps_per_s"] for row in rows if "env_steps_per_s" in row]),
        **{key: _median([row[key] for row in reached]) for key in ("time_to_target_s", "env_steps", "process_s")},
    }


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b is not None else None


def machine() -> dict[str, Any]:
    models = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    return {
        "cpu_model": models[0] if models else platform.processor(),
        "num_cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
    }


def commit() -> str | None:
    """Return the commit that was measured, or None outside a repository or before its first commit."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, timeout=10)
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs per trainer")
    parser.add_argument("--output", type=Path, default=RESULT_FILE, help="where the JSON result goes")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS), help="which take part")
    parser.add_argument("--only", choices=TRAINERS_HERE, help="run one trainer in this process and print its result")
    parser.add_argument("--seed", type=int, default=0, help="seed of that run")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(TRAINERS_HERE[arguments.only](arguments.seed)))
        return

    absent = absent_trainers(arguments.trainers)  # before the clock of anything runs: installing keeps both cores busy
    for trainer, reason in absent.items():
        print(f"{trainer} is absent: {reason}", file=sys.stderr, flush=True)
    trainers = [trainer for trainer in arguments.trainers if trainer not in absent]
    began = machine()
    rows = []
    for seed in range(arguments.seeds):
        for trainer in trainers:
            rows.append(run_process(trainer, seed))
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "benchmark": "train_cartpole",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "machine": began,
        "python": platform.python_version(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("ray", "torch", "numpy", "gymnasium", "stable-baselines3")
        },
        "target_return": TARGET_RETURN,
        "num_episodes": NUM_EPISODES,
        **summary(rows, trainers),
        "absent": absent,
        "runs": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["medians"], indent=2), json.dumps(result["times_better_than"], indent=2), sep="\n")


if __name__ == "__main__":
    main()
