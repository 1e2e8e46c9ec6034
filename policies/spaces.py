"""Which observations and actions a policy takes, as JSON, and whether a value fits."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from policies.errors import IntegrityError, RequestInvalid, SpaceUnsupported

MAX_OBSERVATION_SIZE = 4096
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Spaces:
    """A vector of floats in, one of `num_actions` integers out.

    `low_D`, `high_D` are float32 bounds of each feature (infinite where open); actions are
    `action_start … action_start + num_actions - 1`.
    """

    low_D: np.ndarray
    high_D: np.ndarray
    num_actions: int
    action_start: int = 0
    # The bounds as Python floats, an open one being the largest float32: 1e39 is a finite float, but not a finite float32.
    _lows: list[float] = field(init=False, repr=False, compare=False)
    _highs: list[float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_lows", np.maximum(self.low_D, -LARGEST_FLOAT32).astype(np.float64).tolist())
        object.__setattr__(self, "_highs", np.minimum(self.high_D, LARGEST_FLOAT32).astype(np.float64).tolist())

    @property
    def num_features(self) -> int:
        return len(self.low_D)

    def to_json(self) -> dict[str, Any]:
        """Return the spaces as JSON values; an open bound is null, since JSON has no infinity."""
        return {
            "observation": {
                "kind": "box",
                "shape": [self.num_features],
                "low": [_finite_or_none(x) for x in self.low_D],
                "high": [_finite_or_none(x) for x in self.high_D],
            },
            "action": {"kind": "discrete", "n": self.num_actions, "start": self.action_start},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Spaces":
        """Read what `to_json` wrote; raises `IntegrityError` for anything else."""
        try:
            observation, action = value["observation"], value["action"]
            if observation["kind"] != "box" or action["kind"] != "discrete":
                raise ValueError(f"kinds {observation['kind']!r} and {action['kind']!r}")
            low_D = np.array([-np.inf if x is None else x for x in observation["low"]], np.float32)
            high_D = np.array([np.inf if x is None else x for x in observation["high"]], np.float32)
            if not (len(low_D) == len(high_D) == observation["shape"][0] <= MAX_OBSERVATION_SIZE):
                raise ValueError(f"shape {observation['shape']} with {len(low_D)} and {len(high_D)} bounds")
            return cls(low_D, high_D, int(action["n"]), int(action["start"]))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise IntegrityError(f"spaces cannot be read: {error}") from error

    @classmethod
    def from_gymnasium(cls, observation_space: Any, action_space: Any) -> "Spaces":
        """Read a Gymnasium environment's single spaces; raises `SpaceUnsupported` and names what is supported."""
        kinds = type(observation_space).__name__, type(action_space).__name__
        shape = getattr(observation_space, "shape", None)
        if kinds[0] != "Box" or shape is None or len(shape) != 1 or not 0 < shape[0] <= MAX_OBSERVATION_SIZE:
            raise SpaceUnsupported(
                f"observation space {observation_space} is not supported: it must be a Box with one dimension of at most "
                f"{MAX_OBSERVATION_SIZE} numbers; flatten it with gymnasium.wrappers.FlattenObservation"
            )
        if kinds[1] != "Discrete":
            raise SpaceUnsupported(f"action space {action_space} is not supported: it must be Discrete")
        low_D, high_D = observation_space.low.astype(np.float32), observation_space.high.astype(np.float32)
        # CartPole spells "no bound" as the largest float32; to a caller that is an open bound, not a limit.
        largest = np.finfo(np.float32).max
        low_D = np.where(low_D <= -largest, -np.inf, low_D).astype(np.float32)
        high_D = np.where(high_D >= largest, np.inf, high_D).astype(np.float32)
        return cls(low_D, high_D, int(action_space.n), int(action_space.start))

    def check_observation(self, value: Any) -> np.ndarray:
        """Return a request's observation as float32 of shape [D]; raises `RequestInvalid` saying what was expected."""
        expected = f"expected a list of {self.num_features} finite numbers"
        if not isinstance(value, list):
            raise RequestInvalid(f"observation is {type(value).__name__}; {expected}")
        if len(value) != self.num_features:
            raise RequestInvalid(f"observation has {len(value)} items; {expected}")
        for index, (item, low, high) in enumerate(zip(value, self._lows, self._highs)):
            if type(item) is not float and type(item) is not int:
                raise RequestInvalid(f"observation[{index}] is {type(item).__name__}; {expected}")
            if not low <= item <= high:  # NaN fails too
                limits = f"[{self.low_D[index]:g}, {self.high_D[index]:g}]"
                raise RequestInvalid(f"observation[{index}] = {item!s:.24} is outside {limits}; {expected} in range")
        return np.array(value, np.float64).astype(np.float32)


def _finite_or_none(value: np.float32) -> float | None:
    return float(value) if np.isfinite(value) else None
