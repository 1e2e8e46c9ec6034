"""Sample Factory 2's APPO on CartPole-v1.

    .venv-bench/sample_factory/bin/python -m benchmarks.peers.sample_factory_appo [--seed 0]

Run in the repository's directory; `benchmarks.peers.environments` makes that interpreter.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from sample_factory.algo.runners.runner import AlgoObserver, Runner
from sample_factory.algo.utils.misc import ExperimentStatus
from sample_factory.cfg.arguments import parse_full_cfg, parse_sf_args
from sample_factory.envs.env_utils import register_env
from sample_factory.model.actor_critic import create_actor_critic
from sample_factory.model.model_utils import get_rnn_size
from sample_factory.train import make_runner
from signal_slot.signal_slot import EventLoopObject

from benchmarks.peers.judge import MAX_ENV_STEPS, TRAINING_LIMIT_S, Judge, print_row

# The command that Sample Factory's own example for CartPole-v1 gives (sf_examples/train_gym_env.py).
PUBLISHED = (
    "--algo=APPO --use_rnn=False --num_envs_per_worker=20 --policy_workers_per_policy=2 --recurrence=1 --with_vtrace=False "
    "--batch_size=512 --reward_scale=0.1 --save_every_sec=10 --experiment_summaries_interval=10"
)


class FirstStep(gymnasium.Wrapper):
    """Leaves the time of its first step in a file: environments run in processes of Sample Factory's own."""

    def __init__(self, environment: gymnasium.Env, file: Path) -> None:
        super().__init__(environment)
        self.file: Path | None = file

    def step(self, action: Any) -> Any:
        if self.file is not None:
            part = self.file.with_name(f"part_{self.file.name}")
            part.write_text(repr(time.perf_counter()))  # CLOCK_MONOTONIC: the same clock in all processes
            part.rename(self.file)  # so that nobody reads half of it
            self.file = None
        return self.env.step(action)


def make_environment(name: str, cfg: Any = None, env_config: Any = None, render_mode: str | None = None) -> gymnasium.Env:
    environment = gymnasium.make(name, render_mode=render_mode)
    if env_config is None or not hasattr(env_config, "env_id"):
        return environment
    return FirstStep(environment, Path(cfg.train_dir) / f"first_step_{env_config.env_id}")


class JudgeObserver(AlgoObserver):
    """Evaluates between training steps in the runner's process and ends the run at the target."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self.judge = Judge()
        self.started = False

    def on_connect_components(self, runner: Runner) -> None:
        self.receiver = WeightsReceiver(runner)
        runner.learners[0].model_initialized.connect(self.receiver.on_model_initialized)

    def on_training_step(self, runner: Runner, training_iteration_since_resume: int) -> None:
        if not self.started:
            self.judge.began_s = min(float(file.read_text()) for file in Path(self.cfg.train_dir).glob("first_step_*"))
            self.started = True
        env_steps = training_iteration_since_resume * self.cfg.batch_size * self.cfg.num_batches_per_epoch
        if not self.judge.is_due(env_steps):
            return
        self.receiver.copy_weights()
        if self.judge.evaluate(self.receiver.act, env_steps=env_steps):
            self.cfg.train_for_env_steps = 0  # the runner looks at this limit right after its observers


class WeightsReceiver(EventLoopObject):
    """Holds the learner's weights, which are in shared memory, and a copy of the network that acts with them."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner.event_loop, "judge")
        self.policy_lock = runner.learners[0].param_server.policy_lock
        self.actor_critic = create_actor_critic(runner.cfg, runner.env_info.obs_space, runner.env_info.action_space).eval()
        self.rnn_size = get_rnn_size(runner.cfg)
        self.shared_weights: dict[str, torch.Tensor] = {}

    def on_model_initialized(self, model: tuple[int, dict[str, torch.Tensor], torch.device, int]) -> None:
        self.shared_weights = model[1]

    def copy_weights(self) -> None:
        with self.policy_lock:
            self.actor_critic.load_state_dict(self.shared_weights)

    @torch.no_grad()
    def act(self, obs_BD: np.ndarray) -> np.ndarray:
        obs = self.actor_critic.normalize_obs({"obs": torch.from_numpy(np.ascontiguousarray(obs_BD))})
        logits = self.actor_critic(obs, torch.zeros(len(obs_BD), self.rnn_size), values_only=False)["action_logits"]
        return logits.argmax(dim=1).numpy()


def train_cartpole(seed: int) -> dict[str, Any]:
    """Train until 20 greedy episodes return the target, and return the row of results."""
    register_env("CartPole-v1", make_environment)
    with tempfile.TemporaryDirectory() as directory:
        argv = [*PUBLISHED.split(), "--env=CartPole-v1", "--device=cpu", f"--seed={seed}", f"--train_dir={directory}"]
        argv += [f"--train_for_env_steps={MAX_ENV_STEPS}", f"--train_for_seconds={int(TRAINING_LIMIT_S)}"]
        parser, _ = parse_sf_args(argv)
        cfg, runner = make_runner(parse_full_cfg(parser, argv))
        observer = JudgeObserver(cfg)
        runner.register_observer(observer)
        torch.set_num_threads(1)
        status = runner.init()
        if status == ExperimentStatus.SUCCESS:
            status = runner.run()
        if status != ExperimentStatus.SUCCESS:
            raise RuntimeError(f"Sample Factory ended with status {status}")
    return observer.judge.row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    print_row(train_cartpole(parser.parse_args().seed), distribution="sample-factory")


if __name__ == "__main__":
    main()
