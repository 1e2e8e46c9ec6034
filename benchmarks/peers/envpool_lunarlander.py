"""EnvPool's LunarLander-v3 under the PPO loop of `cleanrl.py`: environments in C++ threads, everything else in torch.

    .venv-bench/envpool/bin/python -m benchmarks.peers.envpool_lunarlander [--seed 0] [--steps 500000]

Run in the repository's directory; `benchmarks.peers.environments` makes that interpreter.
"""

import argparse
import dataclasses
import time
from types import SimpleNamespace
from typing import Any

from benchmarks.peers.cleanrl import Agent, Settings, train
from benchmarks.peers.judge import LUNARLANDER_STEPS, lunarlander_row, print_row

NUM_THREADS = 2
# Neither CleanRL nor EnvPool publishes settings for LunarLander. Of nine tried with one seed, these landed best after 500,000
# steps; gamma, lambda and the entropy coefficient are RL Baselines3 Zoo's. Larger minibatches make it faster than CleanRL's.
SETTINGS = Settings(
    num_envs=64,
    num_steps=64,
    learning_rate=1e-3,
    gamma=0.999,
    gae_lambda=0.98,
    num_minibatches=4,
    update_epochs=8,
    clip_vloss=False,
)


def make_environments(num_envs: int, seed: int) -> Any:
    """Return EnvPool's environments with the three members that the loop needs.

    EnvPool resets in the step after an episode's end, as Gymnasium's next-step mode does.
    """
    import envpool

    pool = envpool.make(
        "LunarLander-v3", env_type="gymnasium", num_envs=num_envs, num_threads=min(NUM_THREADS, num_envs), seed=seed
    )
    return SimpleNamespace(
        single_observation_space=pool.observation_space,
        single_action_space=pool.action_space,
        reset=lambda seed: pool.reset(),  # its seed is an argument of `make`
        step=pool.step,
    )


def train_lunarlander(seed: int, num_steps: int) -> dict[str, Any]:
    """Train for so many steps; one greedy evaluation in Gymnasium's environment at the end, outside the clock."""
    settings = dataclasses.replace(SETTINGS, total_timesteps=num_steps)
    began_s, trained_s, env_steps, agent = 0.0, 0.0, 0, None

    def start() -> None:
        nonlocal began_s
        began_s = time.perf_counter()

    def after(trained: Agent, steps: int) -> bool:
        nonlocal agent, env_steps, trained_s
        agent, env_steps, trained_s = trained, steps, time.perf_counter() - began_s
        return False

    train(make_environments(settings.num_envs, seed), settings, seed=seed, resets_on_next_step=True, start=start, after=after)
    return lunarlander_row(agent.act_greedily, env_steps=env_steps, training_s=trained_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=LUNARLANDER_STEPS)
    arguments = parser.parse_args()
    print_row(train_lunarlander(arguments.seed, arguments.steps), distribution="envpool")


if __name__ == "__main__":
    main()
