"""stable-baselines3's PPO on LunarLander-v3: how many environment steps a second it learns from, and how well it then lands.

    python -m benchmarks.peers.stable_baselines3_lunarlander [--seed 0] [--steps 500000]     needs the extra `bench`

Settings are RL Baselines3 Zoo's for LunarLander. The clock runs from the first environment step to the end of the last update.
"""

import argparse
import time
from typing import Any

from benchmarks.peers.judge import LUNARLANDER_STEPS, lunarlander_row, print_row


def train_lunarlander(seed: int, num_steps: int) -> dict[str, Any]:
    """Train with RL Baselines3 Zoo's settings for LunarLander; one greedy evaluation at the end, outside the clock."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)  # faster than its default for networks of this size

    class Clock(BaseCallback):
        began_s = 0.0

        def _on_training_start(self) -> None:
            self.began_s = time.perf_counter()

        def _on_step(self) -> bool:
            return True

    model = PPO(
        "MlpPolicy",
        make_vec_env("LunarLander-v3", n_envs=16, seed=seed),
        n_steps=1024,
        batch_size=64,
        gae_lambda=0.98,
        gamma=0.999,
        n_epochs=4,
        ent_coef=0.01,
        seed=seed,
        device="cpu",
    )
    clock = Clock()
    model.learn(num_steps, callback=clock)
    training_s = time.perf_counter() - clock.began_s
    return lunarlander_row(
        lambda obs_BD: model.predict(obs_BD, deterministic=True)[0], env_steps=model.num_timesteps, training_s=training_s
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=LUNARLANDER_STEPS)
    arguments = parser.parse_args()
    print_row(train_lunarlander(arguments.seed, arguments.steps), distribution="stable-baselines3")


if __name__ == "__main__":
    main()
