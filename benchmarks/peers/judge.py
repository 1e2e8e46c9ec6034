"""How every peer is judged: one clock, one greedy evaluation, one row of results.

Imports nothing but numpy and gymnasium, because it runs in each peer's own environment, and those pin very different
versions: Gymnasium 0.29 of Sample Factory and PufferLib as well as our 1.2.
"""

import importlib.metadata
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

TARGET_RETURN = 475.0
NUM_EPISODES = 20
MAX_ENV_STEPS = 500_000
TRAINING_LIMIT_S = 150.0  # RLlib needs 20 to 60 s on two quiet cores; a run that takes longer has not reached the target
EVALUATION_EVERY_STEPS = 4_000  # as often as RLlib's batch of 4,000 steps allows
LUNARLANDER_STEPS = 500_000

Act = Callable[[np.ndarray], np.ndarray]


class Judge:
    """Holds the clock of one run and says when it has reached the target.

    `start()` is called right before the first environment step. Evaluations happen inside the clock, so a peer pays for each.
    """

    def __init__(self) -> None:
        self.began_s = time.perf_counter()
        self.evaluated_at_step = 0
        self.row: dict[str, Any] = {"time_to_target_s": None, "env_steps": 0}

    def start(self) -> None:
        self.began_s = time.perf_counter()

    def is_due(self, env_steps: int) -> bool:
        return env_steps - self.evaluated_at_step >= EVALUATION_EVERY_STEPS

    def evaluate(self, act: Act, *, env_steps: int) -> bool:
        """Evaluate the policy as it is now; return True when training has to end: at the target or at a limit."""
        self.evaluated_at_step = env_steps
        return_mean = greedy_return(act, seed=env_steps)
        elapsed_s = time.perf_counter() - self.began_s
        reached = return_mean >= TARGET_RETURN
        self.row = {
            "time_to_target_s": elapsed_s if reached else None,
            "env_steps": env_steps,
            "env_steps_per_s": env_steps / elapsed_s,
            "evaluation_return_mean": return_mean,
        }
        return reached or env_steps >= MAX_ENV_STEPS or elapsed_s >= TRAINING_LIMIT_S


def greedy_return(act: Act, *, seed: int) -> float:
    """Return the mean return of 20 episodes of CartPole-v1 that run side by side."""
    # Not by `gymnasium.make_vec`: its arguments differ between 0.29 and 1.2.
    from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv

    return _first_episodes(CartPoleVectorEnv(num_envs=NUM_EPISODES, max_episode_steps=500), act, seed=seed)


def lunarlander_row(act: Act, *, env_steps: int, training_s: float) -> dict[str, Any]:
    """Return the row of a run on LunarLander-v3, whose speed counts: no target, and no evaluation inside the clock."""
    import gymnasium

    environments = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make("LunarLander-v3")] * NUM_EPISODES)
    return {
        "env_steps": env_steps,
        "training_s": training_s,
        "env_steps_per_s": env_steps / training_s,
        "evaluation_return_mean": _first_episodes(environments, act, seed=env_steps),
    }


def _first_episodes(environments: Any, act: Act, *, seed: int) -> float:
    """Return the mean return of each environment's first episode; what follows a reset does not count."""
    obs_BD, _ = environments.reset(seed=seed)
    running_B, returns_B = np.ones(NUM_EPISODES, bool), np.zeros(NUM_EPISODES)
    while running_B.any():
        obs_BD, rewards_B, terminateds_B, truncateds_B, _ = environments.step(act(obs_BD))
        returns_B += rewards_B * running_B
        running_B &= ~(terminateds_B | truncateds_B)
    environments.close()
    return float(returns_B.mean())


def print_row(row: dict[str, Any], *, distribution: str) -> None:
    """Print the one line of JSON that `benchmarks.train_cartpole` reads: the last line on stdout."""
    print(json.dumps({**row, "version": f"{distribution} {importlib.metadata.version(distribution)}"}), flush=True)
