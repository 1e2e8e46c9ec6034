"""Which numbers a learner's flat parameter vector holds, and what they compute without torch."""

import hashlib
from dataclasses import dataclass
from math import prod

import numpy as np

from policies.policy import ACTIVATIONS, Architecture, Policy, tensor_shapes
from policies.spaces import Spaces
from training.seeds import Stream, generator

Layers = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Layout:
    """Names and places of the parameters: the policy's layers, then the value function's, weights as [inputs, outputs]."""

    spaces: Spaces
    architecture: Architecture

    @property
    def num_layers(self) -> int:
        return len(self.architecture.hidden) + 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor in the order of the flat vector."""
        policy = {
            name: shape for name, shape in tensor_shapes(self.architecture, self.spaces).items() if name.startswith("policy.")
        }
        value = {name.replace("policy.", "value."): shape for name, shape in policy.items()}
        last = self.num_layers - 1
        value[f"value.{last}.weight"] = (value[f"value.{last}.weight"][0], 1)
        value[f"value.{last}.bias"] = (1,)
        return policy | value

    @property
    def size(self) -> int:
        return sum(prod(shape) for shape in self.shapes().values())

    def split(self, parameters_P: np.ndarray) -> dict[str, np.ndarray]:
        """Return views of the flat vector by name."""
        views, start = {}, 0
        for name, shape in self.shapes().items():
            views[name] = parameters_P[start : start + prod(shape)].reshape(shape)
            start += prod(shape)
        return views

    def join(self, tensors: dict[str, np.ndarray]) -> np.ndarray:
        """Return a new flat vector made of named tensors; names that are not parameters are left out."""
        return np.concatenate([tensors[name].reshape(-1) for name in self.shapes()]).astype(np.float32)


@dataclass(frozen=True)
class Weights:
    """One version of what the learner knows, as the rollout workers get it."""

    version: int
    parameters_P: np.ndarray
    normaliser_mean_D: np.ndarray
    normaliser_scale_D: np.ndarray

    def tensors(self, layout: Layout) -> dict[str, np.ndarray]:
        """Return everything by name: policy, value function and normaliser."""
        normaliser = {"normaliser.mean": self.normaliser_mean_D, "normaliser.scale": self.normaliser_scale_D}
        return normaliser | layout.split(self.parameters_P)

    def policy(self, layout: Layout) -> Policy:
        """Return what is served of these weights: without the value function."""
        return policy_of(self.tensors(layout), layout.spaces, layout.architecture)


def policy_of(tensors: dict[str, np.ndarray], spaces: Spaces, architecture: Architecture) -> Policy:
    """Return the policy among a learner's tensors."""
    return Policy(spaces, architecture, {name: tensors[name] for name in tensor_shapes(architecture, spaces)})


def parameters_sha256(tensors: dict[str, np.ndarray]) -> str:
    """Return one digest of named tensors; the order of the dict does not matter, names, types, shapes and bits do."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {tensor.dtype.str} {tensor.shape}\n".encode() + tensor.tobytes())
    return digest.hexdigest()


def initial_parameters(layout: Layout, seed: int) -> np.ndarray:
    """Return orthogonal weights and zero biases; the policy starts nearly uniform (last layer scaled by 0.01).

    What matters in on-policy RL, section 3.2: https://arxiv.org/abs/2006.05990
    """
    rng = generator(seed, Stream.INITIAL_PARAMETERS)
    last = layout.num_layers - 1
    output_gain = {f"policy.{last}.weight": 0.01, f"value.{last}.weight": 1.0}
    tensors = {}
    for name, shape in layout.shapes().items():
        gain = output_gain.get(name, np.sqrt(2))
        tensors[name] = gain * _orthogonal(shape, rng) if name.endswith("weight") else np.zeros(shape)
    return layout.join(tensors)


def layers_of(tensors: dict[str, np.ndarray], tower: str, num_layers: int) -> Layers:
    """Return the layers of one tower, `policy` or `value`."""
    return [(tensors[f"{tower}.{layer}.weight"], tensors[f"{tower}.{layer}.bias"]) for layer in range(num_layers)]


def forward(layers: Layers, activation: str, x_ND: np.ndarray) -> np.ndarray:
    """Return the output of an MLP [N, outputs] in float32.

    The whole batch is one product, unlike in `policies.policy`: a shard always has the same number of rows, so its bits are
    stable, and a sixty-fourth of the calls is what makes rollouts fast.
    """
    activate = ACTIVATIONS[activation]
    for weight, bias in layers[:-1]:
        x_ND = x_ND @ weight
        x_ND += bias
        activate(x_ND, out=x_ND)
    weight, bias = layers[-1]
    return x_ND @ weight + bias


def _orthogonal(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    inputs, outputs = shape
    q, r = np.linalg.qr(rng.standard_normal((max(shape), min(shape))))
    q *= np.sign(np.diag(r))  # makes the decomposition unique, so the distribution is uniform
    return q if inputs >= outputs else q.T
