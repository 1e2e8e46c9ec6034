"""Environments for tests that need one to be slow or to hang; name them `tests.chaos.environments:hanging` and the like."""

import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

PATIENCE_S = 3600.0  # a hanging environment is ended with its process, never by itself


class Hanging(gymnasium.Wrapper):
    """Sleeps in its tenth step: always, or with `once` (a path) only while no file is there."""

    def __init__(self, env: gymnasium.Env, once: str | None) -> None:
        super().__init__(env)
        self._once = Path(once) if once else None
        self._num_steps = 0

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._num_steps += 1
        if self._num_steps == 10 and (self._once is None or not self._once.exists()):
            if self._once is not None:
                self._once.touch()
            time.sleep(PATIENCE_S)
        return super().step(action)


def hanging(once: str | None = None) -> gymnasium.Env:
    return Hanging(gymnasium.make("CartPole-v1"), once)
