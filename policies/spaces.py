"""Which observations and actions a policy takes, as JSON, and whether a value fits."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from policies import observations
from policies.errors import IntegrityError, RequestInvalid, SpaceUnsupported
from policies.observations import LARGEST_FLOAT32, MAX_FEATURES, Bits, Box, Categories, Group, Observation

MAX_ACTION_SIZE = 4096
MAX_HISTORY = 64
MAX_STATE_BYTES = 1 << 16  # of the frames that a caller keeps and sends with each observation, see `policies/history.py`
ACTION_MASK = "action_mask"  # the key of an observation or of `info` in which an environment says which actions exist now


@dataclass(frozen=True)
class Choices:
    """One or more integers, each from a range of its own: Discrete (shape ()), MultiDiscrete or MultiBinary.

    `nvec` and `starts` are flat: component k takes `starts[k] … starts[k] + nvec[k] - 1`.
    """

    kind: str
    nvec: tuple[int, ...]
    starts: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def num_components(self) -> int:
        return len(self.nvec)

    def to_json(self) -> dict[str, Any]:
        if self.kind == "discrete":
            return {"kind": self.kind, "n": self.nvec[0], "start": self.starts[0]}
        shape = list(self.shape)
        if self.kind == "multi_binary":
            return {"kind": self.kind, "shape": shape}
        return {"kind": self.kind, "nvec": list(self.nvec), "starts": list(self.starts), "shape": shape}

    def to_environment(self, index_BK: np.ndarray) -> np.ndarray:
        """Return what `env.step` takes, for indices that start at 0: int64 [B] or [B, *shape]."""
        value_BK = index_BK + np.array(self.starts) if any(self.starts) else index_BK.copy()
        return value_BK.reshape(len(index_BK), *self.shape)

    def to_answer(self, index_K: np.ndarray) -> Any:
        """Return one action as a JSON value: a number, or nested lists of the space's shape."""
        return self.to_environment(np.asarray(index_K)[None])[0].tolist()


@dataclass(frozen=True, eq=False)
class Numbers:
    """Real numbers between `low` and `high` (float32 of the space's shape, infinite where open): a Box."""

    low: np.ndarray
    high: np.ndarray

    @property
    def num_components(self) -> int:
        return self.low.size

    def to_json(self) -> dict[str, Any]:
        return {**Box(self.low, self.high).to_json(), "kind": "box"}

    def to_environment(self, action_BK: np.ndarray) -> np.ndarray:
        """Return what `env.step` takes: float32 [B, *shape]."""
        return action_BK.astype(np.float32).reshape(len(action_BK), *self.low.shape)

    def to_answer(self, action_K: np.ndarray) -> Any:
        """Return one action as nested lists of the space's shape."""
        return np.asarray(action_K, np.float64).reshape(self.low.shape).tolist()


Action = Choices | Numbers


@dataclass(frozen=True, eq=False)
class Spaces:
    """What goes in, what comes out, and whether each request says which choices exist at the moment (`has_mask`).

    A policy with `history` k above 1 looks at the last k observations, its frames, oldest first: `observation` is a Box of all.
    Raises ValueError for one that is not.
    """

    observation: Observation
    action: Action
    has_mask: bool = False
    history: int = 1
    low_D: np.ndarray = field(init=False, repr=False)  # float32 bounds of each feature, infinite where open
    high_D: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if type(self.history) is not int or self.history != 1:  # to Python 1.0 and true are 1
            _require_frames(self.observation, self.history)
        low_D, high_D = self.observation.bounds()
        object.__setattr__(self, "low_D", low_D)
        object.__setattr__(self, "high_D", high_D)

    @property
    def num_features(self) -> int:
        return len(self.low_D)

    @cached_property
    def frame(self) -> Box:
        """The newest of the observations that a policy with a history looks at."""
        assert isinstance(self.observation, Box) and self.history > 1
        return Box(*(np.asarray(bound[-1]) for bound in (self.observation.low, self.observation.high)), self.observation.dtype)

    @property
    def mask_size(self) -> int:
        """Length of an action mask: one truth value per choice of every component."""
        assert isinstance(self.action, Choices)
        return sum(self.action.nvec)

    def to_json(self) -> dict[str, Any]:
        """Return the spaces as JSON values; an open bound is null, since JSON has no infinity."""
        spaces: dict[str, Any] = {"observation": self.observation.to_json(), "action": self.action.to_json()}
        if self.has_mask:
            spaces["has_mask"] = True
        if self.history > 1:
            spaces["history"] = self.history
        return spaces

    def interface(self) -> dict[str, Any]:
        """Return what a client has to know of the spaces: all but the bounds of the observations."""
        return self.without_observation_bounds().to_json()

    def without_observation_bounds(self) -> "Spaces":
        """Return the same spaces with observations whose numbers may be anything finite."""
        return replace(self, observation=observations.without_bounds(self.observation))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Spaces":
        """Read what `to_json` wrote; raises `IntegrityError` for anything else."""
        try:
            observation, action = observations.from_json(value["observation"]), _read_action(value["action"])
            _require_encodable(observation)
            has_mask = value.get("has_mask", False) is True
            if has_mask and not isinstance(action, Choices):
                raise ValueError("real numbers cannot be masked")
            return cls(observation, action, has_mask, value.get("history", 1))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError) as error:
            raise IntegrityError(f"spaces cannot be read: {type(error).__name__} {error}") from error

    @classmethod
    def from_gymnasium(
        cls, observation_space: Any, action_space: Any, *, mask_in_info: bool = False, history: int = 1
    ) -> "Spaces":
        """Read a Gymnasium environment's single spaces; raises `SpaceUnsupported` and names what is supported.

        With a `history` the space is that of all frames. A Dict observation's key `action_mask` is the mask, not a feature.
        """
        parts = dict(observation_space.spaces) if type(observation_space).__name__ == "Dict" else {}
        has_mask = mask_in_info or ACTION_MASK in parts
        action = action_of(action_space)
        if has_mask and not isinstance(action, Choices):
            raise SpaceUnsupported(f"action space {action_space} cannot be masked: only Discrete and the Multi spaces can")
        if ACTION_MASK in parts:
            observation: Observation = _group({name: part for name, part in parts.items() if name != ACTION_MASK})
        else:
            observation = _observation_of(observation_space)
        try:
            _require_encodable(observation)
            return cls(observation, action, has_mask, history)
        except ValueError as error:
            raise SpaceUnsupported(f"observation space {observation_space} is not supported: {error}") from None

    def encode_batch(self, values: Any, batch_size: int) -> np.ndarray:
        """Return what a vectorised environment observed as float32 [B, D]; raises ValueError when it does not fit."""
        obs_BD = np.empty((batch_size, self.num_features), np.float32)
        self.observation.encode_batch(values, obs_BD)
        return obs_BD

    def check_observation(self, value: Any) -> np.ndarray:
        """Return a request's observation as float32 of shape [D]; raises `RequestInvalid` saying what was expected."""
        return np.array(self.features_of(value), np.float64).astype(np.float32)

    def features_of(self, value: Any) -> list[float]:
        """Return the same before it is rounded to float32."""
        try:
            return self.observation.encode_json(value, "observation")
        except RequestInvalid:
            if self.history > 1 and _fits(self.frame, value):
                raise RequestInvalid(
                    f"observation is one frame, and this policy looks at the last {self.history}: send `state` beside it, "
                    '"" to begin an episode and after that what the answer before said; or send all of them, oldest first',
                    400,
                ) from None
            raise

    def check_frame(self, value: Any) -> np.ndarray:
        """Return one frame that came with a state as float32 [F]; raises `RequestInvalid` saying what was expected."""
        try:
            numbers = self.frame.encode_json(value, "observation")
        except RequestInvalid as error:
            raise RequestInvalid(f"{error}; beside `state` an observation is one frame") from None
        return np.array(numbers, np.float64).astype(np.float32)

    def check_mask(self, value: Any) -> np.ndarray | None:
        """Return a request's action mask as bool [A], or None where there are none; raises `RequestInvalid`."""
        if not self.has_mask:
            if value is not None:
                raise RequestInvalid("action_mask is given, but this policy was trained without masks")
            return None
        expected = f"expected a list of {self.mask_size} of 0 and 1 (or false and true), one per choice"
        while isinstance(value, list) and value and all(isinstance(row, list) for row in value):
            value = [item for row in value for item in row]  # in the action's own shape, as an environment may have it
        if not isinstance(value, list) or len(value) != self.mask_size:
            raise RequestInvalid(f"action_mask is {'missing' if value is None else 'something else'}; {expected}")
        if any(item not in (0, 1) or type(item) is float for item in value):
            raise RequestInvalid(f"action_mask holds something else than 0 and 1; {expected}")
        mask_A = np.array(value, bool)
        if not allows_something(mask_A[None], self.action)[0]:
            raise RequestInvalid("action_mask allows no choice at all in at least one component")
        return mask_A

    def holds_action(self, action: Any) -> bool:
        """Say whether a JSON value is an action of the space: a number, or nested lists of the space's shape."""
        try:
            value = np.asarray(action)
        except ValueError:  # lists of different lengths
            return False
        is_choice = isinstance(self.action, Choices)
        kinds, shape = ("i", self.action.shape) if is_choice else ("if", self.action.low.shape)
        if value.dtype.kind not in kinds or value.shape != shape:
            return False
        if is_choice:
            starts_K = np.array(self.action.starts)
            index_K = value.reshape(-1) - starts_K
            return bool(((index_K >= 0) & (index_K < np.array(self.action.nvec))).all())
        return bool((np.isfinite(value) & (value >= self.action.low) & (value <= self.action.high)).all())

    def mask_allows(self, action: Any, mask_A: np.ndarray | None) -> bool:
        """Say whether a mask lets an action of the space through."""
        if mask_A is None:
            return True
        assert isinstance(self.action, Choices)
        starts_K = np.cumsum((0, *self.action.nvec[:-1]))
        index_K = np.asarray(action).reshape(-1) - np.array(self.action.starts)
        return bool(mask_A[starts_K + index_K].all())

    def example_request(self) -> dict[str, Any]:
        """Return a body that `/v1/decide` takes."""
        if self.history > 1:
            body = {"observation": self.frame.example(), "state": ""}
        else:
            body = {"observation": self.observation.example()}
        return {**body, "action_mask": [1] * self.mask_size} if self.has_mask else body

    def split_mask(self, value: Any, mask: Any) -> tuple[Any, Any]:
        """Return an observation without its key `action_mask`, and that mask, or else the one that was given beside it."""
        if not (self.has_mask and isinstance(value, dict) and ACTION_MASK in value):
            return value, mask
        if mask is not None:
            raise RequestInvalid("action_mask is given twice, in the observation and beside it; leave one of them away")
        rest = {name: part for name, part in value.items() if name != ACTION_MASK}
        return rest, value[ACTION_MASK]


def allows_something(mask_BA: np.ndarray, action: Choices) -> np.ndarray:
    """Say for each row whether every component has a choice that is allowed."""
    starts = np.cumsum((0, *action.nvec[:-1]))
    return np.logical_or.reduceat(mask_BA, starts, axis=1).all(axis=1)


def _require_encodable(observation: Observation) -> None:
    """Raise ValueError for an observation without features, or with so many that arrays of them do not fit in memory."""
    if not 0 < observation.num_features <= MAX_FEATURES:
        raise ValueError(f"{observation.num_features} features; at least 1 and at most {MAX_FEATURES}")


def _require_frames(observation: Observation, history: Any) -> None:
    """Raise ValueError unless an observation is one Box of `history` frames that are alike, few enough to be kept by callers."""
    if type(history) is not int or not 1 <= history <= MAX_HISTORY:
        raise ValueError(f"history {history!s:.24}; an integer from 1 to {MAX_HISTORY}")
    if not isinstance(observation, Box) or observation.low.shape[:1] != (history,):
        raise ValueError(f"history {history} of observations that are not one Box of {history} frames")
    if any((bound != bound[-1]).any() for bound in (observation.low, observation.high)):
        raise ValueError(f"history {history} of frames with different bounds")
    num_bytes = state_bytes(history, observation.num_features // history)
    if num_bytes > MAX_STATE_BYTES:
        raise ValueError(f"history {history} makes a state of {num_bytes} bytes; at most {MAX_STATE_BYTES}")


def state_bytes(history: int, num_frame_features: int) -> int:
    """Return how large the frames are that a caller keeps of a policy with a history."""
    return 4 * (history - 1) * num_frame_features


def _fits(box: Box, value: Any) -> bool:
    try:
        box.encode_json(value, "observation")
    except RequestInvalid:
        return False
    return True


def _read_action(value: dict[str, Any]) -> Action:
    part = observations.from_json(value)
    if isinstance(part, Group):
        raise ValueError(f"kind {value['kind']!r} is no action space")
    return _action_like(part)


def _action_like(part: Box | Categories | Bits) -> Action:
    """Return the action whose values are those of this observation; raises ValueError when it is too large."""
    size = part.num_features
    if not 0 < size <= MAX_ACTION_SIZE:
        raise ValueError(f"an action of {size} choices or numbers; at least 1 and at most {MAX_ACTION_SIZE}")
    if isinstance(part, Box):
        return Numbers(part.low, part.high)
    if isinstance(part, Bits):
        return Choices("multi_binary", (2,) * size, (0,) * size, part.shape)
    return Choices("multi_discrete" if part.shape else "discrete", part.nvec, part.starts, part.shape)


def action_of(space: Any) -> Action:
    """Read a Gymnasium action space; raises `SpaceUnsupported` and names what is supported."""
    if type(space).__name__ not in ("Discrete", "MultiDiscrete", "MultiBinary", "Box"):
        raise SpaceUnsupported(
            f"action space {space} is not supported: it must be Discrete, MultiDiscrete, MultiBinary or Box; "
            "turn others into one of these with a gymnasium.ActionWrapper"
        )
    part = _observation_of(space)
    assert not isinstance(part, Group)
    if isinstance(part, Box):
        if not np.issubdtype(space.dtype, np.floating):
            raise SpaceUnsupported(f"action space {space} is not supported: a Box of actions must hold floats")
        part = _inside(part, space)
    try:
        return _action_like(part)
    except ValueError as error:
        raise SpaceUnsupported(f"action space {space} is not supported: {error}") from None


def _inside(box: Box, space: Any) -> Box:
    """Return the box with its bounds rounded inwards: 0.1 is less than the float32 nearest to it, which would be refused."""
    is_below, is_above = np.isfinite(box.low) & (box.low < space.low), np.isfinite(box.high) & (box.high > space.high)
    low = np.where(is_below, np.nextafter(box.low, np.float32(np.inf)), box.low)
    return Box(low, np.where(is_above, np.nextafter(box.high, np.float32(-np.inf)), box.high))


def _observation_of(space: Any) -> Observation:
    kind = type(space).__name__
    if kind == "Box":
        return Box(*_open_bounds(space), str(space.dtype))
    if kind == "Discrete":
        return Categories((int(space.n),), (int(space.start),), ())
    if kind == "MultiDiscrete":
        nvec, starts = space.nvec.reshape(-1).tolist(), np.broadcast_to(space.start, space.nvec.shape).reshape(-1).tolist()
        return Categories(tuple(nvec), tuple(starts), tuple(space.nvec.shape))
    if kind == "MultiBinary":
        return Bits(tuple(space.shape))
    if kind == "Tuple":
        return Group(tuple(_observation_of(part) for part in space.spaces), None)
    if kind == "Dict":
        return _group(dict(space.spaces))
    raise SpaceUnsupported(
        f"observation space {space} is not supported: it must be made of Box, Discrete, MultiDiscrete, MultiBinary, Tuple and "
        "Dict; turn others into one of these with a gymnasium.ObservationWrapper"
    )


def _group(parts: dict[str, Any]) -> Group:
    names = tuple(sorted(parts))
    if not all(isinstance(name, str) for name in names):
        raise SpaceUnsupported(f"observation keys {names} are not all strings")
    return Group(tuple(_observation_of(parts[name]) for name in names), names)


def _open_bounds(space: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 bounds. CartPole spells "no bound" as the largest float32; to a caller that is an open one, not a limit."""
    with np.errstate(over="ignore"):
        low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    low = np.where(low <= -LARGEST_FLOAT32, -np.inf, low).astype(np.float32)
    return low, np.where(high >= LARGEST_FLOAT32, np.inf, high).astype(np.float32)
