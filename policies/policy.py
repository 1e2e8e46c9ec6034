"""A policy that answers: normalise the observation, run the network, give a distribution over actions.

Serving, gates, golden vectors and replay all come through here, with numpy alone. Training has its own definition of the same
function, with a backward pass (`training/network.py`); golden vectors hold the two together.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from policies.blocks import BLOCK_ROWS, BlockPerceptron
from policies.distributions import Distribution, distribution_of
from policies.errors import IntegrityError
from policies.integrity import canonical_json
from policies.network import (
    MODULE_PREFIX,
    Architecture,
    Layers,
    convolutions_of,
    inner_features,
    layers_of,
    normalised,
    num_outputs,
    tensor_shapes,
)
from policies.spaces import Spaces
from policies.torch_network import ModuleNetwork

MAX_PARAMETERS = 50_000_000


@dataclass(frozen=True)
class Policy:
    """Spaces, network and tensors (float32, named as in `tensor_shapes`); raises `IntegrityError` when they do not fit."""

    spaces: Spaces
    architecture: Architecture
    tensors: dict[str, np.ndarray]
    distribution: Distribution = field(init=False, repr=False, compare=False)
    _convolutions: Layers = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_tensors()
        object.__setattr__(self, "distribution", distribution_of(self.spaces, self.architecture))
        object.__setattr__(self, "_convolutions", convolutions_of(self.tensors, "policy", self.architecture))

    def sha256(self) -> str:
        """Return the digest of what the policy computes: network, spaces and every tensor; not of any file's layout."""
        digest = hashlib.sha256(canonical_json({"network": self.architecture.to_json(), "spaces": self.spaces.to_json()}))
        for name in sorted(self.tensors):
            digest.update(name.encode() + np.ascontiguousarray(self.tensors[name]).tobytes())
        return digest.hexdigest()

    def outputs(self, obs_BD: np.ndarray) -> np.ndarray:
        """Return the network's float32 outputs [B, O]; a row's bits do not depend on the batch it is in."""
        num_rows, block_rows = len(obs_BD), self._block_rows(len(obs_BD))
        num_blocks = -(-num_rows // block_rows)
        x_KRD = np.zeros((num_blocks, block_rows, self.spaces.num_features), np.float32)
        flat = x_KRD.reshape(num_blocks * block_rows, -1)
        flat[:num_rows] = obs_BD
        if self.normalises:
            normalised(flat[:num_rows], self.tensors, self.architecture)
        if self.architecture.module:
            outputs_KRO = np.stack([self.module_network.outputs_and_values(x_RD)[0] for x_RD in x_KRD])
        else:
            x_KRF = np.concatenate([self._inner_features(x_RD) for x_RD in x_KRD]) if self._convolutions else x_KRD
            outputs_KRO = self.perceptron(x_KRF)
        return self.with_log_std(outputs_KRO.reshape(num_blocks * block_rows, -1)[:num_rows])

    def with_log_std(self, outputs_BO: np.ndarray) -> np.ndarray:
        """Return what the network's last layer gave with the trained deviations behind it, where the policy has them."""
        if "policy.log_std" not in self.tensors:
            return outputs_BO
        log_std_BK = np.broadcast_to(self.tensors["policy.log_std"], outputs_BO.shape)
        return np.concatenate([outputs_BO, log_std_BK], axis=1)

    def _block_rows(self, num_rows: int) -> int:
        is_perceptron = not self.architecture.module and not self._convolutions
        return self.perceptron.block_rows(num_rows) if is_perceptron else BLOCK_ROWS

    def _inner_features(self, x_RD: np.ndarray) -> np.ndarray:
        """Return one block's features behind the convolutions [1, R, F]: all windows of many images at once would fill memory."""
        return inner_features(self._convolutions, self.architecture, self.spaces, x_RD[None])

    def distributions(self, obs_BD: np.ndarray, mask_BA: np.ndarray | None = None) -> np.ndarray:
        """Return a float64 distribution per row [B, P] (see `policies.distributions`), NaN where the network overflowed."""
        return self.distribution.parameters(self.outputs(obs_BD), mask_BA)

    @cached_property
    def normalises(self) -> bool:
        """Whether observations are changed at all before the network sees them."""
        mean, scale = self.tensors["normaliser.mean"], self.tensors["normaliser.scale"]
        return bool(mean.any() or (scale != 1).any()) or self.architecture.observation_clip is not None

    @cached_property
    def perceptron(self) -> BlockPerceptron:
        """The fully connected layers as they are asked, made when they are asked for the first time: golden vectors do that."""
        return BlockPerceptron(layers_of(self.tensors, "policy", len(self.architecture.hidden) + 1), self.architecture.activation)

    @cached_property
    def module_network(self) -> ModuleNetwork:
        """The user's own network, built when it is asked for the first time: that imports torch."""
        tensors = {name.removeprefix(MODULE_PREFIX): tensor for name, tensor in self.tensors.items()}
        outputs = num_outputs(self.architecture, self.spaces)
        return ModuleNetwork(self.architecture.module, tensors, self.spaces.num_features, outputs)

    def __reduce__(self) -> Any:
        return Policy, (self.spaces, self.architecture, self.tensors)

    def _check_tensors(self) -> None:
        expected = tensor_shapes(self.architecture, self.spaces)
        if set(expected) != set(self.tensors):
            raise IntegrityError(f"policy tensors are {sorted(self.tensors)}, expected {sorted(expected)}")
        for name, shape in expected.items():
            tensor = self.tensors[name]
            if tensor.dtype != np.float32 or tensor.shape != shape:
                raise IntegrityError(f"tensor {name} is {tensor.dtype}{tensor.shape}, expected float32{shape}")
            if not np.isfinite(tensor).all():
                raise IntegrityError(f"tensor {name} holds NaN or infinity")
