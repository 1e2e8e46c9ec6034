"""Small environments with known answers and known faults; importing this module registers them with Gymnasium.

Name them `tests.training_environments:Constant-v0`, so that processes started by Ray import this module first.
"""

import os
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces


class Constant(gymnasium.Env):
    """One observation, two actions that do nothing, reward 1 per step; ends by `terminate_after` or Gymnasium's time limit.

    Without termination the value is 1 / (1 - gamma), however short the time limit: a time limit is not the world's end.
    """

    def __init__(self, terminate_after: int | None = None) -> None:
        self.observation_space = spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = spaces.Discrete(2)
        self._terminate_after = terminate_after
        self._num_steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._num_steps = 0
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._num_steps += 1
        return self._observation(), 1.0, self._num_steps == self._terminate_after, False, {}

    def _observation(self) -> np.ndarray:
        return np.ones(1, np.float32)


class Counter(gymnasium.Env):
    """Shows how many steps its episode has had and pays the action's number, 5 or 6; terminates after `length` steps."""

    def __init__(self, length: int = 3) -> None:
        self.observation_space = spaces.Box(0, 100, (1,), np.float32)
        self.action_space = spaces.Discrete(2, start=5)
        self._length = length
        self._num_steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._num_steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._num_steps += 1
        return np.array([self._num_steps], np.float32), float(action), self._num_steps == self._length, False, {}


class Faulty(Constant):
    """Does `fault` in its third step: raise, exit, nan, shape or reward; with `once` (a path) only while no file is there."""

    def __init__(self, fault: str, once: str | None = None) -> None:
        super().__init__()
        self._fault = fault
        self._once = Path(once) if once else None

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward, *rest = super().step(action)
        if self._num_steps == 3 and self._is_due():
            if self._fault == "raise":
                raise ZeroDivisionError("the cart left the building")
            if self._fault == "exit":
                os._exit(1)
            observation = {"nan": observation * np.nan, "shape": np.ones(7, np.float32)}.get(self._fault, observation)
            reward = np.inf if self._fault == "reward" else reward
        return observation, reward, *rest

    def _is_due(self) -> bool:
        if self._once is None:
            return True
        try:
            self._once.touch(exist_ok=False)
            return True
        except FileExistsError:
            return False


class Picture(Constant):
    """Observes an image, which this version cannot encode."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Box(0, 255, (4, 4, 3), np.uint8)


class EndsInTheSameStep(gymnasium.vector.VectorEnv):
    """A vectorised environment of its own with another autoreset mode, which must not be used."""

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}

    def __init__(self, num_envs: int, **_: Any) -> None:
        self.num_envs = num_envs
        single = Constant()
        self.single_observation_space, self.single_action_space = single.observation_space, single.action_space


gymnasium.register("Constant-v0", Constant)
gymnasium.register("Counter-v0", Counter)
gymnasium.register("Faulty-v0", Faulty)
gymnasium.register("Picture-v0", Picture, disable_env_checker=True)
gymnasium.register("SameStep-v0", Constant, vector_entry_point=EndsInTheSameStep)
