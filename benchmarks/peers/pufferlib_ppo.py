"""PufferLib 3's own trainer (`pufferl.PuffeRL`) on CartPole-v1.

    .venv-bench/pufferlib/bin/python -m benchmarks.peers.pufferlib_ppo [--seed 0]

Run in the repository's directory; `benchmarks.peers.environments` makes that interpreter.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from typing import Any

import numpy as np
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv

from benchmarks.peers.judge import MAX_ENV_STEPS, Act, Judge, print_row

with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):  # the import leaves a link in the working directory
    import pufferlib
    import pufferlib.models
    import pufferlib.vector
    from pufferlib import pufferl

# PufferLib publishes settings for its own CartPole only: 4,096 environments, an LSTM and 20 million steps on a GPU. These won a
# random search of 58 candidates (sizes, optimizer, lr, epochs, gamma, lambda, loss weights, clipping, priorities, network,
# evaluation interval) by median processor time to the target over four seeds that no benchmark uses, on a busy machine; 15 more,
# most of them variants of these, were no better. What is not named here stays at PufferLib's default, the optimizer Muon too.
NUM_ENVS = 64
HIDDEN_SIZE = 64
SETTINGS = {
    "bptt_horizon": 16,
    "minibatch_size": 128,
    "update_epochs": 1,
    "total_timesteps": MAX_ENV_STEPS,
    "learning_rate": 0.01,
    "gamma": 0.95,
    "gae_lambda": 0.9,
    "ent_coef": 0.01,
    "vf_coef": 0.5,
    "prio_alpha": 0.0,
}


class NativeCartPole(pufferlib.PufferEnv):
    """All environments in one numpy call, written into PufferLib's buffers: what it calls a native environment, its fastest kind.

    PufferLib's own CartPole in C is another game: its episodes end after 200 steps.
    """

    def __init__(self, num_envs: int) -> None:
        self.environments = CartPoleVectorEnv(num_envs=num_envs, max_episode_steps=500)
        self.single_observation_space = self.environments.single_observation_space
        self.single_action_space = self.environments.single_action_space
        self.num_agents = num_envs
        super().__init__()

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, list[dict[str, Any]]]:
        self.observations[:], _ = self.environments.reset(seed=seed)
        return self.observations, []

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        self.observations[:], self.rewards[:], terminateds, self.truncations[:], _ = self.environments.step(actions)
        # The trainer ignores truncations: without this it would take the next episode for the rest of the one cut off.
        self.terminals[:] = terminateds | self.truncations
        return self.observations, self.rewards, self.terminals, self.truncations, []

    def close(self) -> None:
        self.environments.close()


def train_cartpole(seed: int) -> dict[str, Any]:
    """Train until 20 greedy episodes return the target, and return the row of results."""
    torch.set_num_threads(1)  # faster than the default for networks of this size
    torch.manual_seed(seed)
    judge = Judge()
    with tempfile.TemporaryDirectory() as directory, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        trainer = _make_trainer(seed, directory)
        judge.start()
        try:
            done = False
            while not done and trainer.global_step < trainer.config["total_timesteps"]:
                trainer.evaluate()  # PufferLib's word for collecting a rollout
                trainer.train()
                if judge.is_due(trainer.global_step):
                    done = judge.evaluate(_greedy(trainer.policy), env_steps=trainer.global_step)
        finally:
            trainer.utilization.stop()  # a thread that would keep the process alive
            trainer.vecenv.close()
    return judge.row


def _make_trainer(seed: int, directory: str) -> pufferl.PuffeRL:
    sys.argv = sys.argv[:1]  # `load_config` parses the command line
    config = pufferl.load_config("default")["train"]
    config.update(device="cpu", seed=seed, data_dir=directory, env="CartPole-v1", use_rnn=False, **SETTINGS)
    environments = pufferlib.vector.make(NativeCartPole, env_kwargs={"num_envs": NUM_ENVS}, backend=pufferlib.PufferEnv)
    policy = pufferlib.models.Default(environments, hidden_size=HIDDEN_SIZE)
    return pufferl.PuffeRL(config, environments, policy)


def _greedy(policy: torch.nn.Module) -> Act:
    @torch.no_grad()
    def act(obs_BD: np.ndarray) -> np.ndarray:
        return policy.forward_eval(torch.from_numpy(np.ascontiguousarray(obs_BD)))[0].argmax(dim=1).numpy()

    return act


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    print_row(train_cartpole(parser.parse_args().seed), distribution="pufferlib")


if __name__ == "__main__":
    main()
