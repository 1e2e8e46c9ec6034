"""Small environments with known answers and known faults; importing this module registers them with Gymnasium.

Name them `tests.training_environments:Constant-v0`, so that processes started by Ray import this module first.
"""

import os
import time
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space


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


class Paired(Constant):
    """Shows a Tuple: two numbers, and the second of two categories."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Tuple([spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(2)])

    def _observation(self) -> tuple[np.ndarray, int]:
        return np.ones(2, np.float32), 1


class Signs(gymnasium.Env):
    """Shows -1 or 1 with equal chance, as often as the other; action 1 is right for 1. Reward 1 for each of 10 right answers.

    Its feature has the spread 1. With `always` given it shows only that; `options={"always": x}` at reset does the same.
    """

    def __init__(self, always: float | None = None) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = spaces.Discrete(2)
        self._default = always

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._always = (options or {}).get("always", self._default)
        self._num_steps, self._first = 0, self.np_random.choice((-1.0, 1.0))
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        is_right = (self._observation()[0] > 0) == bool(action)
        self._num_steps += 1
        return self._observation(), float(is_right), self._num_steps == 10, False, {}

    def _observation(self) -> np.ndarray:
        shown = self._first * (-1) ** self._num_steps if self._always is None else self._always
        return np.array([shown], np.float32)


class StaysOpen(Constant):
    """Cannot be closed."""

    def close(self) -> None:
        raise OSError("the door is stuck")


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
    """Does `fault` in its third step: raise, raise_own, exit, hang, nan, shape or reward.

    With `once` (a path) it does so only while no file is there.
    """

    def __init__(self, fault: str, once: str | None = None) -> None:
        super().__init__()
        self._fault = fault
        self._once = Path(once) if once else None

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward, *rest = super().step(action)
        if self._num_steps == 3 and self._is_due():
            if self._fault == "raise":
                raise ZeroDivisionError("the cart left the building")
            if self._fault == "raise_own":
                raise Unpicklable("a", "b")
            if self._fault == "exit":
                os._exit(1)
            if self._fault == "hang":
                time.sleep(3600)
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


class Unpicklable(Exception):
    """Cannot be made again from its arguments in another process, as many libraries' exceptions cannot."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} at {where}")


class Unruly(Constant):
    """Breaks one of the rules that Gymnasium's checker knows."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self._rule = rule
        if rule == "no action space":
            del self.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if self._rule != "ignores the seed":
            gymnasium.Env.reset(self, seed=seed)
        self._num_steps = 0
        if self._rule == "no info":
            return self._observation()
        return self._observation() * (5 if self._rule == "outside at reset" else 1), {}

    def step(self, action: int) -> Any:
        observation, *rest = super().step(action)
        if self._rule == "raises":
            self.check_rules()
        if self._rule == "four values":
            return observation, *rest[:3]
        if self._rule == "random without the seed":
            observation = np.random.uniform(-1, 1, 1).astype(np.float32)
        return observation, *rest

    def check_rules(self) -> None:
        """Raise; its name looks like one of the checker's."""
        raise ZeroDivisionError("in check_rules")


class WithoutSeed(Constant):
    """Its reset takes no seed."""

    def reset(self) -> tuple[np.ndarray, dict[str, Any]]:  # type: ignore[override]
        return self._observation(), {}


class Shifted(gymnasium.ObservationWrapper):
    """Shows the observation plus a number, within bounds of its own."""

    def __init__(self, env: gymnasium.Env, by: float, bound: float) -> None:
        super().__init__(env)
        self._by = by
        self.observation_space = spaces.Box(-bound, bound, (1,), np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return (observation + self._by).astype(np.float32)


def shifted(rule: str, by: float, bound: float) -> gymnasium.Env:
    """Make an environment that breaks a rule, in a wrapper."""
    return Shifted(Unruly(rule), by, bound)


def no_environment() -> str:
    return "hello"


def broken_factory() -> gymnasium.Env:
    raise OSError("the simulator has no licence")


class Sentence(Constant):
    """Observes text, which no policy here can encode; with `acts` its action is text too."""

    def __init__(self, acts: bool = False) -> None:
        super().__init__()
        text = spaces.Text(10)
        self.observation_space, self.action_space = (self.observation_space, text) if acts else (text, self.action_space)

    def _observation(self) -> np.ndarray | str:
        return super()._observation() if self.observation_space.shape else "hello"


class Everything(gymnasium.Env):
    """Shows all kinds of parts, nested, and takes one kind of action; episodes have five steps."""

    ACTIONS: ClassVar[dict[str, gymnasium.Space]] = {
        "discrete": spaces.Discrete(3, start=4),
        "multi_discrete": spaces.MultiDiscrete([2, 3]),
        "multi_binary": spaces.MultiBinary((2, 2)),
        "box": spaces.Box(-2, 3, (2,), np.float32),
        "open": spaces.Box(-np.inf, np.inf, (1,), np.float64),
    }

    def __init__(self, action: str) -> None:
        self.observation_space = spaces.Dict(
            {
                "pair": spaces.Tuple([spaces.Box(-1, 1, (2, 2), np.float32), spaces.Discrete(3, start=-1)]),
                "inner": spaces.Dict({"bits": spaces.MultiBinary(2), "many": spaces.MultiDiscrete([2, 4], start=[1, 0])}),
            }
        )
        self.action_space = self.ACTIONS[action]
        self._num_steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self._num_steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if not self.action_space.contains(action):
            raise ValueError(f"{action!r} is not in {self.action_space}")
        self._num_steps += 1
        return self.observation_space.sample(), 1.0, self._num_steps == 5, False, {}


class Screen(Constant):
    """Observes an image of 8 by 8 pixels, in bytes."""

    def __init__(self, channels_first: bool = False) -> None:
        super().__init__()
        self.observation_space = spaces.Box(0, 255, (3, 8, 8) if channels_first else (8, 8, 3), np.uint8)

    def _observation(self) -> np.ndarray:
        return np.full(self.observation_space.shape, self._num_steps, np.uint8)


def wide(num_features: int) -> gymnasium.Env:
    """Make an environment that shows many ones."""
    env = Constant()
    env.observation_space = spaces.Box(-1, 1, (num_features,), np.float32)
    env._observation = lambda: np.ones(num_features, np.float32)  # type: ignore[method-assign]
    return env


class Warming(gymnasium.Env):
    """Pays nothing in an episode's first two steps and 1 in every later one; shows how many steps it has had, 2 at most.

    Without termination the values of 0, 1 and 2 are gamma^2, gamma and 1 times 1 / (1 - gamma), whatever the time limit. An
    episode that is cut off has seen 2 last; the next one begins with 0, which is worth less.
    """

    def __init__(self, terminate_after: int | None = None) -> None:
        self.observation_space = spaces.Box(0, 2, (1,), np.float32)
        self.action_space = spaces.Discrete(2)
        self._terminate_after = terminate_after
        self._num_steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._num_steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = float(self._num_steps >= 2)
        self._num_steps += 1
        observation = np.array([min(self._num_steps, 2)], np.float32)
        return observation, reward, self._num_steps == self._terminate_after, False, {}


class WarmingInTheSameStep(gymnasium.vector.VectorEnv):
    """Many `Warming`s at once, of which each resets in the very step in which its episode ends.

    Environment b's first episode has had b steps already, so that they do not all end together.
    """

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, num_envs: int, terminate_after: int | None = None, max_episode_steps: int | None = None) -> None:
        single = Warming()
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = single.observation_space, single.action_space
        self.observation_space = batch_space(single.observation_space, num_envs)
        self.action_space = batch_space(single.action_space, num_envs)
        self._terminate_after, self._max_episode_steps = terminate_after, max_episode_steps

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._num_steps_B = np.arange(self.num_envs) % (self._terminate_after or self._max_episode_steps or 1)
        return self._observations(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        rewards_B = (self._num_steps_B >= 2).astype(float)
        self._num_steps_B += 1
        terminateds_B, truncateds_B = self._num_steps_B == self._terminate_after, self._num_steps_B == self._max_episode_steps
        ended_B = terminateds_B | truncateds_B
        infos: dict[str, Any] = {}
        if ended_B.any():  # as Gymnasium's own vector environments: an array of objects
            final_obs = np.full(self.num_envs, None, object)
            for index in np.flatnonzero(ended_B):
                final_obs[index] = self._observations()[index]
            infos = {"final_obs": final_obs, "_final_obs": ended_B}
        self._num_steps_B[ended_B] = 0
        return self._observations(), rewards_B, terminateds_B, truncateds_B, infos

    def _observations(self) -> np.ndarray:
        return np.minimum(self._num_steps_B, 2).astype(np.float32)[:, None]


def allowed_choices(num_steps: int) -> np.ndarray:
    """Return which of the masked environments' six choices exist: all but one of each half, another one in each step."""
    mask_A = np.ones(6, np.int8)
    mask_A[[num_steps % 3, 3 + (num_steps + 1) % 3]] = 0
    return mask_A


class Masked(gymnasium.Env):
    """Four of six choices exist at any time; to take another one is an error. A step pays the number of the (first) choice.

    The mask is in `info`, or with `observed` in the observation. An action is one choice per half, and the mask has two rows;
    with `flat` it is one of all six. `last` says what stands in the place of a mask when the episode is over, after three
    steps: a mask, zeros, or (in `info`) nothing. `gives` breaks the promise in the second step: "nothing" allows nothing,
    "four" are too few choices, "none" is no mask at all; "list" keeps it, with Python's own lists.
    """

    def __init__(self, observed: bool = False, flat: bool = False, last: str = "mask", gives: str = "mask") -> None:
        place = spaces.Box(0, 3, (1,), np.float32)
        mask = spaces.MultiBinary(6 if flat else (2, 3))
        self.observation_space = spaces.Dict({"place": place, "action_mask": mask}) if observed else place
        self.action_space = spaces.Discrete(6, start=1) if flat else spaces.MultiDiscrete([3, 3], start=[10, 20])
        self._observed, self._flat, self._last, self._gives = observed, flat, last, gives
        self._shape = (6,) if flat else (2, 3)
        self._num_steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._num_steps = 0
        return self._observation(), self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        chosen = [int(action) - 1] if self._flat else [int(action[0]) - 10, 3 + int(action[1]) - 20]
        if not allowed_choices(self._num_steps)[chosen].all():
            raise ValueError(f"action {action} does not exist in step {self._num_steps}")
        self._num_steps += 1
        return self._observation(), float(chosen[0]), self._num_steps == 3, False, self._info()

    def _observation(self) -> Any:
        place = np.array([self._num_steps], np.float32)
        return {"place": place, "action_mask": self._mask()} if self._observed else place

    def _info(self) -> dict[str, Any]:
        mask_A = None if self._observed else self._mask()
        if mask_A is None:
            return {}
        return {"action_mask": mask_A.tolist() if self._gives == "list" else mask_A}

    def _mask(self) -> np.ndarray | None:
        mask = allowed_choices(self._num_steps).reshape(self._shape)
        if self._num_steps == 1:
            return {"nothing": mask * 0, "four": mask[..., :2], "none": None}.get(self._gives, mask)
        if self._num_steps == 3:
            return {"zeros": mask * 0, "absent": None}.get(self._last, mask)
        return mask


class MaskedByRows(gymnasium.Env):
    """Two of two and one of three choices exist; the mask is Gymnasium's own kind for MultiDiscrete, a tuple of rows."""

    observation_space = spaces.Box(0, 1, (1,), np.float32)
    action_space = spaces.MultiDiscrete([2, 3])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), self._info()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if action[1] != 1:
            raise ValueError(f"action {action} does not exist")
        return np.ones(1, np.float32), 1.0, False, False, self._info()

    def _info(self) -> dict[str, Any]:
        return {"action_mask": (np.ones(2, np.int8), np.array([0, 1, 0], np.int8))}


class MaskedInTheSameStep(gymnasium.vector.VectorEnv):
    """Many `Masked`s at once that reset in the very step in which their episodes end.

    Without `remembers` they do not say what exists in the first step of the next one.
    """

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, num_envs: int, remembers: bool = True, **kwargs: Any) -> None:
        self._env = gymnasium.vector.SyncVectorEnv([lambda: Masked(**kwargs)] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
        self.num_envs, self._remembers = num_envs, remembers
        self.single_observation_space, self.single_action_space = (
            self._env.single_observation_space,
            self._env.single_action_space,
        )
        self.observation_space, self.action_space = self._env.observation_space, self._env.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self._env.reset(seed=seed)

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        observations, rewards_B, terminateds_B, truncateds_B, infos = self._env.step(actions)
        if terminateds_B.any() and not self._remembers:
            infos["action_mask"][terminateds_B], infos["_action_mask"][terminateds_B] = 0, False
        return observations, rewards_B, terminateds_B, truncateds_B, infos


class WritesInPlace(WarmingInTheSameStep):
    """Returns the same arrays in every step, with other numbers in them."""

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        *arrays, infos = super().step(actions)
        self._arrays = getattr(self, "_arrays", arrays)
        for ours, theirs in zip(self._arrays, arrays):
            ours[...] = theirs
        return *self._arrays, infos


class CountsInPlace(Counter):
    """Returns the same array in every step, with another number in it."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        self._shown, info = super().reset(seed=seed, options=options)
        return self._shown, info

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._shown[...], *rest = super().step(action)
        return self._shown, *rest


class NeverResets(WarmingInTheSameStep):
    """A vectorised environment that leaves resetting to its caller, which must not be used."""

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": AutoresetMode.DISABLED}


gymnasium.register("Constant-v0", Constant)
gymnasium.register("Counter-v0", Counter)
gymnasium.register("CountsInPlace-v0", CountsInPlace)
gymnasium.register("StaysOpen-v0", StaysOpen)
gymnasium.register("Paired-v0", Paired)
gymnasium.register("Signs-v0", Signs)
gymnasium.register("Faulty-v0", Faulty)
gymnasium.register("Sentence-v0", Sentence)
gymnasium.register("Unruly-v0", Unruly)
gymnasium.register("Warming-v0", Warming)
gymnasium.register("WarmingInTheSameStep-v0", Warming, vector_entry_point=WarmingInTheSameStep)
gymnasium.register("Masked-v0", Masked)
gymnasium.register("MaskedInTheSameStep-v0", Masked, vector_entry_point=MaskedInTheSameStep)
gymnasium.register("WritesInPlace-v0", Warming, vector_entry_point=WritesInPlace)
gymnasium.register("NeverResets-v0", Warming, vector_entry_point=NeverResets)
