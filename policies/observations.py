"""What an observation looks like, and how any of them becomes one flat vector of float32 features.

    Box                       its numbers in C order             Tuple   its parts, one after the other
    Discrete, MultiDiscrete   one-hot, one group per component   Dict    its parts in the order of their sorted names
    MultiBinary               0 or 1 per bit

Two doors lead in: `encode_batch` takes what a vectorised environment returns, `encode_json` what a request says. They give
the same numbers (a property test holds them together). `example` is a value that fits. B environment, F feature of this part.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from policies.errors import RequestInvalid

LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
MAX_FEATURES = 1 << 18
MAX_DIMENSIONS = 32  # numpy makes no arrays of more than 64, a batch of them included


@dataclass(frozen=True, eq=False)
class Box:
    """Numbers between `low` and `high` (float32 arrays of the space's shape, infinite where open)."""

    low: np.ndarray
    high: np.ndarray
    dtype: str = "float32"
    # The outermost Python floats that become float32 within the bounds. 0.7 is more than the float32 nearest to it, and allowed.
    _lows: list[float] = field(init=False, repr=False)
    _highs: list[float] = field(init=False, repr=False)
    _lows_F: np.ndarray = field(init=False, repr=False)
    _highs_F: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_lows", _outermost(self.low, -np.inf).reshape(-1).tolist())
        object.__setattr__(self, "_highs", _outermost(self.high, np.inf).reshape(-1).tolist())
        object.__setattr__(self, "_lows_F", np.array(self._lows))
        object.__setattr__(self, "_highs_F", np.array(self._highs))

    @property
    def num_features(self) -> int:
        return self.low.size

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return self.low.reshape(-1), self.high.reshape(-1)

    def encode_batch(self, values: Any, out_BF: np.ndarray) -> None:
        array = np.asarray(values)
        expected = (len(out_BF), *self.low.shape)
        if array.shape != expected:
            raise ValueError(f"has shape {array.shape}, its space says {expected}")
        out_BF[:] = array.reshape(len(out_BF), -1)

    def encode_json(self, value: Any, path: str) -> list[float]:
        numbers = _flatten(value, self.low.shape, path, "finite numbers")
        for index, (item, low, high) in enumerate(zip(numbers, self._lows, self._highs)):
            if type(item) is not float and type(item) is not int:
                expected = _expected(self.low.shape, "finite numbers")
                raise RequestInvalid(f"{_item_path(path, index, self.low.shape)} is {type(item).__name__}; {expected}")
            if not low <= item <= high:  # NaN fails too
                limits = f"[{self.low.flat[index]:g}, {self.high.flat[index]:g}]"
                where = _item_path(path, index, self.low.shape)
                expected = _expected(self.low.shape, "finite numbers")
                raise RequestInvalid(f"{where} = {item!s:.24} is outside {limits}; {expected} in range")
        return numbers

    def encode_many(self, values: list[Any]) -> np.ndarray | None:
        """Return observations of nothing but numbers in nested lists as float64 [N, F]; None when any does not fit.

        Whether each item is a number must be known: numpy would take "1" and true for one.
        """
        try:
            array_NF = np.array(values, np.float64).reshape(len(values), -1)
        except (ValueError, OverflowError):  # rows of different lengths; an integer beyond any float
            return None
        if array_NF.shape[1] != len(self._lows) or np.shape(values[0]) != self.low.shape:
            return None
        fits = (array_NF >= self._lows_F) & (array_NF <= self._highs_F)  # NaN does neither
        return array_NF if fits.all() else None

    def example(self) -> Any:
        return np.clip(np.zeros_like(self.low), self.low, self.high).astype(float).tolist()

    def to_json(self) -> dict[str, Any]:
        shape = list(self.low.shape)
        return {"kind": "box", "shape": shape, "low": _bounds(self.low), "high": _bounds(self.high), "dtype": self.dtype}


@dataclass(frozen=True)
class Categories:
    """Integers, each from a range of its own: Discrete (shape ()) or MultiDiscrete; `nvec` and `starts` are flat."""

    nvec: tuple[int, ...]
    starts: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def num_features(self) -> int:
        return sum(self.nvec)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(self.num_features, np.float32), np.ones(self.num_features, np.float32)

    def encode_batch(self, values: Any, out_BF: np.ndarray) -> None:
        values_BK = np.asarray(values).reshape(len(out_BF), -1)
        if values_BK.shape[1] != len(self.nvec):
            raise ValueError(f"has {values_BK.shape[1]} integers per environment, its space says {len(self.nvec)}")
        index_BK = values_BK - np.array(self.starts)
        if (index_BK < 0).any() or (index_BK >= np.array(self.nvec)).any():
            raise ValueError(f"holds {values_BK.tolist()}, outside of its ranges (counts {self.nvec}, starts {self.starts})")
        out_BF[:] = 0
        offsets_K = np.cumsum((0, *self.nvec[:-1]))
        out_BF[np.arange(len(out_BF))[:, None], index_BK + offsets_K] = 1

    def encode_json(self, value: Any, path: str) -> list[float]:
        items = _flatten(value, self.shape, path, "integers")
        features = [0.0] * self.num_features
        offset = 0
        for index, (item, n, start) in enumerate(zip(items, self.nvec, self.starts)):
            if type(item) is not int or not start <= item < start + n:
                where = _item_path(path, index, self.shape)
                raise RequestInvalid(f"{where} = {item!s:.24} is not an integer from {start} to {start + n - 1}")
            features[offset + item - start] = 1.0
            offset += n
        return features

    def example(self) -> Any:
        return np.array(self.starts).reshape(self.shape).tolist()

    def to_json(self) -> dict[str, Any]:
        if self.shape == ():
            return {"kind": "discrete", "n": self.nvec[0], "start": self.starts[0]}
        return {"kind": "multi_discrete", "nvec": list(self.nvec), "starts": list(self.starts), "shape": list(self.shape)}


@dataclass(frozen=True)
class Bits:
    """Zeros and ones (MultiBinary)."""

    shape: tuple[int, ...]

    @property
    def num_features(self) -> int:
        return math.prod(self.shape)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(self.num_features, np.float32), np.ones(self.num_features, np.float32)

    def encode_batch(self, values: Any, out_BF: np.ndarray) -> None:
        array = np.asarray(values)
        if array.shape != (len(out_BF), *self.shape):
            raise ValueError(f"has shape {array.shape}, its space says {(len(out_BF), *self.shape)}")
        out_BF[:] = array.reshape(len(out_BF), -1)

    def encode_json(self, value: Any, path: str) -> list[float]:
        items = _flatten(value, self.shape, path, "zeros and ones")
        for index, item in enumerate(items):
            if type(item) is not int or item not in (0, 1):
                raise RequestInvalid(f"{_item_path(path, index, self.shape)} = {item!s:.24} is neither 0 nor 1")
        return [float(item) for item in items]

    def example(self) -> Any:
        return np.zeros(self.shape, int).tolist()

    def to_json(self) -> dict[str, Any]:
        return {"kind": "multi_binary", "shape": list(self.shape)}


@dataclass(frozen=True)
class Group:
    """Several observations together: a Dict by its sorted names, or a Tuple (`names` is None)."""

    parts: tuple["Observation", ...]
    names: tuple[str, ...] | None

    @property
    def num_features(self) -> int:
        return sum(part.num_features for part in self.parts)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        lows, highs = zip(*(part.bounds() for part in self.parts))
        return np.concatenate(lows), np.concatenate(highs)

    def encode_batch(self, values: Any, out_BF: np.ndarray) -> None:
        start = 0
        for key, part in zip(self.names or range(len(self.parts)), self.parts):
            try:
                part.encode_batch(values[key], out_BF[:, start : start + part.num_features])
            except (ValueError, TypeError, KeyError, IndexError) as error:
                raise ValueError(f"[{key!r}] {error}") from error
            start += part.num_features

    def encode_json(self, value: Any, path: str) -> list[float]:
        if self.names is None:
            if not isinstance(value, list) or len(value) != len(self.parts):
                raise RequestInvalid(f"{path} must be a list of {len(self.parts)} observations")
            members = [(part, item, f"{path}[{index}]") for index, (part, item) in enumerate(zip(self.parts, value))]
        else:
            if not isinstance(value, Mapping) or set(value) != set(self.names):
                found = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
                raise RequestInvalid(f"{path} must be an object with exactly the keys {list(self.names)}, found {found!s:.200}")
            members = [(part, value[name], f"{path}.{name}") for name, part in zip(self.names, self.parts)]
        return [number for part, item, where in members for number in part.encode_json(item, where)]

    def example(self) -> Any:
        examples = [part.example() for part in self.parts]
        return examples if self.names is None else dict(zip(self.names, examples))

    def to_json(self) -> dict[str, Any]:
        parts = [part.to_json() for part in self.parts]
        if self.names is None:
            return {"kind": "tuple", "parts": parts}
        return {"kind": "dict", "parts": dict(zip(self.names, parts))}


Observation = Box | Categories | Bits | Group


def without_bounds(observation: Observation) -> Observation:
    """Return the same observation whose numbers may be anything finite."""
    if isinstance(observation, Group):
        return Group(tuple(map(without_bounds, observation.parts)), observation.names)
    if isinstance(observation, Box):
        open_F = np.full_like(observation.low, np.inf)
        return Box(-open_F, open_F, observation.dtype)
    return observation


def from_json(value: dict[str, Any], *, max_features: int = MAX_FEATURES) -> Observation:
    """Read what an observation's `to_json` wrote; raises KeyError, TypeError, ValueError or OverflowError for anything else.

    No arrays are made of more than `max_features` numbers, all parts together.
    """
    kind = value["kind"]
    if kind == "box":
        shape = _read_shape(value["shape"], max_features)
        low, high = _read_bounds(value["low"], -np.inf, shape), _read_bounds(value["high"], np.inf, shape)
        return Box(low, high, str(value.get("dtype", "float32")))
    if kind == "discrete":
        return _read_categories([value["n"]], [value["start"]], ())
    if kind == "multi_discrete":
        return _read_categories(value["nvec"], value["starts"], _read_shape(value["shape"], max_features))
    if kind == "multi_binary":
        return Bits(_read_shape(value["shape"], max_features))
    if kind == "tuple":
        return Group(_read_parts(value["parts"], max_features), None)
    if kind == "dict":
        names = tuple(sorted(value["parts"]))
        return Group(_read_parts([value["parts"][name] for name in names], max_features), names)
    raise ValueError(f"kind {kind!r} is no observation")


def _flatten(value: Any, shape: tuple[int, ...], path: str, what: str) -> list[Any]:
    """Return the items of nested lists of exactly this shape."""
    if not shape:
        return [value]
    if not isinstance(value, list):
        raise RequestInvalid(f"{path} is {type(value).__name__}; {_expected(shape, what)}")
    if len(value) != shape[0]:
        raise RequestInvalid(f"{path} has {len(value)} items; {_expected(shape, what)}")
    if len(shape) == 1:
        return value
    return [item for index, row in enumerate(value) for item in _flatten(row, shape[1:], f"{path}[{index}]", what)]


def _expected(shape: tuple[int, ...], what: str) -> str:
    return f"expected a list of {' x '.join(map(str, shape))} {what}" if shape else f"expected one of {what}"


def _item_path(path: str, index: int, shape: tuple[int, ...]) -> str:
    return path + "".join(f"[{i}]" for i in np.unravel_index(index, shape)) if shape else path


def _outermost(bound: np.ndarray, direction: float) -> np.ndarray:
    """Return the outermost float64 that is rounded to the bound; the largest float32 for an open one: 1e39 is no finite float32.

    That is halfway to the next float32, or just before it: halfway itself is rounded to the even one of the two.
    """
    exact = bound.astype(np.float64)
    beyond = np.nextafter(bound, np.float32(direction)).astype(np.float64)
    halfway = np.clip((exact + beyond) / 2, -LARGEST_FLOAT32, LARGEST_FLOAT32)
    is_beyond = np.isfinite(bound) & (halfway.astype(np.float32) != bound)
    return np.where(is_beyond, np.nextafter(halfway, exact), halfway)


def _bounds(array: np.ndarray) -> Any:
    """Return one number when all bounds are equal, as in images, else a flat list; an open bound is null."""
    values = [float(x) if np.isfinite(x) else None for x in array.reshape(-1)]
    return values[0] if len(values) > 1 and len(set(values)) == 1 and array.ndim > 1 else values


def _read_parts(values: list[Any], max_features: int) -> tuple[Observation, ...]:
    parts: list[Observation] = []
    for value in values:
        parts.append(from_json(value, max_features=max_features))
        max_features -= parts[-1].num_features
    return tuple(parts)


def _read_shape(value: Any, max_features: int) -> tuple[int, ...]:
    """Return a shape that is small enough to make an array of it."""
    shape = tuple(int(size) for size in value)
    if min(shape, default=0) < 0 or math.prod(shape) > max_features or len(shape) > MAX_DIMENSIONS:
        raise ValueError(
            f"shape {list(shape)!s:.200}; sizes are at least 0, {MAX_FEATURES} at most together, in {MAX_DIMENSIONS} dimensions"
        )
    return shape


def _read_categories(nvec: Any, starts: Any, shape: tuple[int, ...]) -> Categories:
    categories = Categories(tuple(map(int, nvec)), tuple(map(int, starts)), shape)
    if not len(categories.nvec) == len(categories.starts) == math.prod(shape) or min(categories.nvec, default=1) < 1:
        raise ValueError(f"counts {nvec!s:.200} with starts {starts!s:.200} in shape {list(shape)}")
    return categories


def _read_bounds(value: Any, open_bound: float, shape: tuple[int, ...]) -> np.ndarray:
    if not isinstance(value, list):
        value = [value] * math.prod(shape)
    array = np.array([open_bound if x is None else x for x in value], np.float32)
    if array.size != math.prod(shape):
        raise ValueError(f"shape {list(shape)} with {array.size} bounds")
    if np.isnan(array).any():
        raise ValueError("a bound is not a number")
    return array.reshape(shape)
