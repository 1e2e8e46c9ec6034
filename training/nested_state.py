"""How a nested Python state (dicts, lists, arrays, scalars) is written as named tensors and JSON, and read again: no pickle.

Each value becomes a JSON node with one key, its kind: `{"dict": [[key, node], …]}` with keys that are strings, integers or
None, `{"list": [node, …]}`, `{"tuple": [node, …]}`, `{"tensor": name}`, `{"numpy": [dtype, value]}` for a scalar of numpy, and
`{"value": value}` for None, true, false, an integer, a string or a float; a float that is not finite is `{"float": "nan"}`.
"""

import math
from typing import Any

import numpy as np

from policies.errors import IntegrityError, TrainingFailed

TENSOR_KINDS = "biuf"  # truth values, integers and floats; anything else could only be written as objects


def to_tensors(state: Any, prefix: str) -> tuple[Any, dict[str, np.ndarray]]:
    """Return the JSON node of a state, and its arrays by name; raises `TrainingFailed` for a leaf that is not data."""
    tensors: dict[str, np.ndarray] = {}
    return _node(state, prefix, tensors), tensors


def from_tensors(node: Any, tensors: dict[str, np.ndarray]) -> Any:
    """Read what `to_tensors` returned; raises `IntegrityError` for anything else."""
    try:
        return _state(node, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"saved state cannot be read: {type(error).__name__} {error}") from error


def _node(state: Any, path: str, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    if isinstance(state, dict):
        keys = list(state)
        if not all(key is None or type(key) in (str, int) for key in keys):
            raise TrainingFailed(f"state at {path} has keys {keys!s:.200}; only strings, integers and None can be saved as data")
        return {"dict": [[key, _node(state[key], f"{path}/{key}", tensors)] for key in keys]}
    if type(state) in (list, tuple):
        return {type(state).__name__: [_node(item, f"{path}/{index}", tensors) for index, item in enumerate(state)]}
    if isinstance(state, np.ndarray) and state.dtype.kind in TENSOR_KINDS:
        tensors[path] = np.ascontiguousarray(state).reshape(state.shape)
        return {"tensor": path}
    if isinstance(state, np.generic) and state.dtype.kind in TENSOR_KINDS:
        return {"numpy": [state.dtype.str, _node(state.item(), path, tensors)]}
    if isinstance(state, float) and not math.isfinite(state):
        return {"float": str(state)}
    if state is None or type(state) in (bool, int, float, str):
        return {"value": state}
    raise TrainingFailed(
        f"state at {path} is {type(state).__module__}.{type(state).__qualname__}, which cannot be saved as data; "
        "checkpoints hold no pickle"
    )


def _state(node: Any, tensors: dict[str, np.ndarray]) -> Any:
    ((kind, value),) = node.items()
    if kind == "dict":
        return {key: _state(item, tensors) for key, item in value}
    if kind in ("list", "tuple"):
        items = [_state(item, tensors) for item in value]
        return items if kind == "list" else tuple(items)
    if kind == "tensor":
        return tensors[value]
    if kind == "numpy":
        dtype, item = np.dtype(value[0]), _state(value[1], tensors)
        if dtype.kind not in TENSOR_KINDS:
            raise ValueError(f"{dtype} is no number")
        return dtype.type(item)
    if kind == "float":
        return float(value)
    if kind == "value":
        return value
    raise ValueError(f"{kind!r} is no kind of value")
