"""How a policy answers one observation at a time: the bits of the batch, without the batch.

Who decides in the caller's own process has one observation, and most of `Policy.distributions` is then numpy's cost per call.
A row's bits depend on the shape of the matrix products alone (see `policies.blocks`), so the same block is multiplied here, in
arrays that are there already, and the rest is done for one row. Arrays are reused: an evaluator answers one thread at a time.

R rows of a block, D features, A choices.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from policies.blocks import Panel
from policies.distributions import Categorical, Mode, Propensity, uniform
from policies.network import ACTIVATIONS, normalised
from policies.policy import Policy


class RowEvaluator(Protocol):
    """What one version says of one observation. What `distribution` returns is for the other two methods only."""

    def distribution(self, features: list[float], mask_A: np.ndarray | None) -> Any:
        """Return the distribution over actions, None when the network overflows."""

    def choose(self, distribution: Any, mode: Mode, seed: int) -> tuple[Any, float]:
        """Return the action and its propensity, see `policies.distributions`."""

    def propensity(self, action: Any, distribution: Any, mode: Mode) -> Propensity:
        """Return how probable an action is, see `policies.distributions`."""


def row_evaluator(policy: Policy) -> RowEvaluator:
    """Return the fastest evaluator for a policy: of one choice from a perceptron, or of anything else."""
    architecture = policy.architecture
    is_perceptron = architecture.module is None and not architecture.convolutions
    is_one_choice = isinstance(policy.distribution, Categorical) and len(policy.distribution.parts) == 1
    if is_perceptron and is_one_choice and not policy.spaces.has_mask and policy.spaces.action.kind == "discrete":
        return OneChoice(policy)
    return AnyRow(policy)


class AnyRow:
    """Asks the policy itself, with a batch of one."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def distribution(self, features: list[float], mask_A: np.ndarray | None) -> np.ndarray | None:
        obs_1D = np.array([features], np.float64).astype(np.float32)
        parameters_P = self._policy.distributions(obs_1D, None if mask_A is None else mask_A[None])[0]
        return parameters_P if np.isfinite(parameters_P).all() else None

    def choose(self, distribution: np.ndarray, mode: Mode, seed: int) -> tuple[Any, float]:
        return self._policy.distribution.choose(distribution, mode, seed)

    def propensity(self, action: Any, distribution: np.ndarray, mode: Mode) -> Propensity:
        ours = self._policy.distribution
        return Propensity(ours.propensity(action, distribution, mode), ours.num_densities(action, mode))


class OneChoice:
    """One choice from a perceptron over flat features. A distribution is the list of its probabilities."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._start = policy.spaces.action.starts[0]
        self._activate = ACTIVATIONS[policy.architecture.activation]
        num_rows, layers = policy.perceptron.min_rows, policy.perceptron.layers
        self._x_RD = np.zeros((num_rows, policy.spaces.num_features), np.float32)
        self._x_D = self._x_RD[0]
        self._normalises = policy.normalises
        products = [np.zeros((num_rows, bias_RH.shape[1]), np.float32) for _, bias_RH in layers]
        self._layers = [(_steps(panels, out), bias_RH[0], out, out[0]) for (panels, bias_RH), out in zip(layers, products)]
        self._z_A = np.zeros(products[-1].shape[1])

    def distribution(self, features: list[float], mask_A: np.ndarray | None) -> list[float] | None:
        x_RH = self._x_RD
        self._x_D[:] = features
        if self._normalises:
            normalised(self._x_D, self._policy.tensors, self._policy.architecture)
        last = len(self._layers) - 1
        for index, (steps, bias, out, row) in enumerate(self._layers):
            for multiply, weight, columns in steps:
                multiply(x_RH, weight, columns)
            np.add(row, bias, row)  # the block's other rows are zeros, and stay zeros without it
            if index < last:
                self._activate(row, out=row)
            x_RH = out
        return self._softmax(self._layers[-1][3].tolist())

    def choose(self, distribution: list[float], mode: Mode, seed: int) -> tuple[int, float]:
        if mode == "greedy":
            return distribution.index(max(distribution)) + self._start, 1.0
        draw, cumulative = uniform(seed), 0.0
        for index, probability in enumerate(distribution):
            cumulative += probability  # one after the other, as `np.cumsum` adds
            if draw < cumulative:
                return index + self._start, probability
        index = max(index for index, probability in enumerate(distribution) if probability)  # the sum ended below 1
        return index + self._start, distribution[index]

    def propensity(self, action: int, distribution: list[float], mode: Mode) -> Propensity:
        index = action - self._start
        return Propensity(float(index == distribution.index(max(distribution))) if mode == "greedy" else distribution[index])

    def _softmax(self, logits: list[float]) -> list[float] | None:
        """Return probabilities as `Categorical.parameters` computes them: in float64, exponential and sum by numpy."""
        largest, z_A = max(logits), self._z_A
        z_A[:] = [logit - largest for logit in logits]
        np.exp(z_A, out=z_A)
        total = float(np.add.reduce(z_A))
        return [e / total for e in z_A.tolist()] if math.isfinite(total) else None


def _steps(panels: list[Panel], out: np.ndarray) -> list[tuple[Callable[..., Any], np.ndarray, np.ndarray]]:
    """Return how each panel is multiplied into its columns of `out`: `dot` costs less per call, but cannot write to some only."""
    multiply = np.dot if len(panels) == 1 else np.matmul
    return [(multiply, weight, out[:, start:stop]) for start, stop, weight in panels]
