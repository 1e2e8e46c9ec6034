"""CartPole that shows where cart and pole are, and not how fast they move: one observation is not enough to balance."""

import gymnasium
import numpy as np

POSITIONS = [0, 2]  # of the cart, in metres, and of the pole, in radians


def make() -> gymnasium.Env:
    """Return CartPole-v1 without its two velocities."""
    env = gymnasium.make("CartPole-v1", disable_env_checker=True)
    full = env.observation_space
    shown = gymnasium.spaces.Box(full.low[POSITIONS], full.high[POSITIONS], dtype=np.float32)
    return gymnasium.wrappers.TransformObservation(env, lambda obs: obs[POSITIONS], shown)
