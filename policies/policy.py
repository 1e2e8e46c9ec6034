"""A policy that answers: normalise the observation, run the network, give a distribution over actions.

Serving, gates, golden vectors and replay all come through here, with numpy alone. Training has its own differentiable
definition of the same function (`training/ppo.py`); golden vectors hold the two together.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from policies.errors import IntegrityError
from policies.integrity import canonical_json, sha256_hex
from policies.spaces import Spaces

# Rows are computed in blocks of exactly this many, zero-padded: BLAS picks its kernel, and so the order of additions, by the
# shape of the whole product. Measured with OpenBLAS: the same row in batches of 1, 3, 5 or 128 has different last bits;
# in fixed blocks of 8 it has the same bits in every batch and at every place, so a logged probability can be recomputed.
BLOCK_ROWS = 8
MAX_PARAMETERS = 50_000_000

ACTIVATIONS = {"tanh": np.tanh, "relu": lambda x, out: np.maximum(x, 0, out=out)}


@dataclass(frozen=True)
class Architecture:
    """A multi-layer perceptron from `num_features` numbers to `num_actions` logits."""

    hidden: tuple[int, ...] = (64, 64)
    activation: Literal["tanh", "relu"] = "tanh"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "mlp", "hidden": list(self.hidden), "activation": self.activation}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Architecture":
        """Read what `to_json` wrote; only names on this list become code."""
        try:
            if value["kind"] != "mlp" or value["activation"] not in ACTIVATIONS:
                raise ValueError(f"network {value['kind']!r} with activation {value['activation']!r} is not known")
            hidden = tuple(int(size) for size in value["hidden"])
            if not all(0 < size <= 65_536 for size in hidden) or len(hidden) > 16:
                raise ValueError(f"hidden sizes {hidden} are out of bounds")
            return cls(hidden, value["activation"])
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"network description cannot be read: {error}") from error


def tensor_shapes(architecture: Architecture, spaces: Spaces) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of a policy; a weight is [inputs, outputs], applied as `x @ w + b`.

    `normaliser.mean` and `normaliser.scale` [D] turn an observation x into `(x - mean) * scale`; they are 0 and 1 when the
    run did not normalise.
    """
    sizes = (spaces.num_features, *architecture.hidden, spaces.num_actions)
    shapes: dict[str, tuple[int, ...]] = {"normaliser.mean": (sizes[0],), "normaliser.scale": (sizes[0],)}
    for layer, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
        shapes[f"policy.{layer}.weight"] = (inputs, outputs)
        shapes[f"policy.{layer}.bias"] = (outputs,)
    return shapes


@dataclass(frozen=True)
class Policy:
    """Spaces, network and tensors (float32, named as in `tensor_shapes`); raises `IntegrityError` when they do not fit."""

    spaces: Spaces
    architecture: Architecture
    tensors: dict[str, np.ndarray]
    _layers: list[tuple[np.ndarray, np.ndarray]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        expected = tensor_shapes(self.architecture, self.spaces)
        if set(expected) != set(self.tensors):
            raise IntegrityError(f"policy tensors are {sorted(self.tensors)}, expected {sorted(expected)}")
        for name, shape in expected.items():
            tensor = self.tensors[name]
            if tensor.dtype != np.float32 or tensor.shape != shape:
                raise IntegrityError(f"tensor {name} is {tensor.dtype}{tensor.shape}, expected float32{shape}")
            if not np.isfinite(tensor).all():
                raise IntegrityError(f"tensor {name} holds NaN or infinity")
        num_layers = len(self.architecture.hidden) + 1
        layers = [(self.tensors[f"policy.{i}.weight"], self.tensors[f"policy.{i}.bias"]) for i in range(num_layers)]
        object.__setattr__(self, "_layers", layers)

    def sha256(self) -> str:
        """Return the digest of what the policy computes: network, spaces and every tensor; not of any file's layout."""
        digest = hashlib.sha256(canonical_json({"network": self.architecture.to_json(), "spaces": self.spaces.to_json()}))
        for name in sorted(self.tensors):
            digest.update(name.encode() + np.ascontiguousarray(self.tensors[name]).tobytes())
        return digest.hexdigest()

    def logits(self, obs_BD: np.ndarray) -> np.ndarray:
        """Return float32 logits [B, A]; a row's bits do not depend on the batch it is in."""
        num_rows = len(obs_BD)
        num_blocks = -(-num_rows // BLOCK_ROWS)
        x_KRD = np.zeros((num_blocks, BLOCK_ROWS, self.spaces.num_features), np.float32)
        flat = x_KRD.reshape(num_blocks * BLOCK_ROWS, -1)
        np.subtract(obs_BD, self.tensors["normaliser.mean"], out=flat[:num_rows])
        flat[:num_rows] *= self.tensors["normaliser.scale"]
        activate = ACTIVATIONS[self.architecture.activation]
        x = x_KRD
        for index, (weight, bias) in enumerate(self._layers):
            x = x @ weight  # three dimensions: numpy runs one product of fixed shape per block
            x += bias
            if index < len(self._layers) - 1:
                activate(x, out=x)
        return x.reshape(num_blocks * BLOCK_ROWS, -1)[:num_rows]

    def probabilities(self, obs_BD: np.ndarray) -> np.ndarray:
        """Return float64 action probabilities [B, A]; each row sums to 1 within 1e-12, or is NaN if the network overflowed."""
        z_BA = self.logits(obs_BD).astype(np.float64)
        z_BA -= z_BA.max(axis=1, keepdims=True)
        np.exp(z_BA, out=z_BA)
        z_BA /= z_BA.sum(axis=1, keepdims=True)
        return z_BA


Mode = Literal["greedy", "sample"]


def choose(probabilities_A: np.ndarray, mode: Mode, seed: int) -> tuple[int, float]:
    """Return the index of the action and its propensity, from nothing but the distribution, the mode and the seed.

    Greedy takes the first of the most probable actions, so its propensity is 1. Sampling inverts the cumulative
    distribution at a number made from the seed.
    """
    if mode == "greedy":
        return int(probabilities_A.argmax()), 1.0
    index = int(np.searchsorted(np.cumsum(probabilities_A), uniform(seed), side="right"))
    index = min(index, len(probabilities_A) - 1)  # the cumulative sum can end a rounding error below 1
    return index, float(probabilities_A[index])


def propensity_of(action: int, probabilities_A: np.ndarray, mode: Mode) -> float:
    """Return the probability with which a policy in this mode sends the action (an index)."""
    if mode == "greedy":
        return float(action == int(probabilities_A.argmax()))
    return float(probabilities_A[action])


def seed_of(decision_id: str) -> int:
    """Return the 53-bit sampling seed of a decision: the same id draws the same number on every replica, for ever."""
    return int(sha256_hex(decision_id.encode())[:16], 16) >> 11


def uniform(seed: int) -> float:
    """Return a number in [0, 1) from a 53-bit seed."""
    return seed / (1 << 53)
