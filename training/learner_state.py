"""What a learner knows between two updates, and what it says of each. P parameter, D feature."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from policies.observations import Box
from training.network import Layout, Weights, initial_parameters

NORMALISER_EPSILON = 1e-8
MAX_NORMALISER_SCALE = 1e4  # a feature that never changes would otherwise be blown up by its rounding errors


@dataclass(frozen=True)
class UpdateReport:
    """What one update did: losses and the like are means over its minibatches.

    `num_epochs` is smaller than the setting when the KL limit ended the update. `lag_mean` and `lag_max` count the versions
    that the learner was ahead of the weights each fragment was collected with.
    """

    num_env_steps: int
    policy_loss: float
    value_loss: float
    entropy: float
    kl: float
    clip_fraction: float
    grad_norm: float
    explained_variance: float
    num_epochs: int
    lr: float
    lag_mean: float
    lag_max: int


@dataclass
class LearnerState:
    """Everything an update reads and writes. Random numbers are not here: they are named by seed and update."""

    parameters_P: np.ndarray  # float32
    adam_m_P: np.ndarray  # float32
    adam_v_P: np.ndarray  # float32
    adam_steps: int
    normaliser_mean_D: np.ndarray  # float64
    normaliser_m2_D: np.ndarray  # float64, sum of squared distances from the mean
    normaliser_count: int
    return_moments: np.ndarray  # float64 [count, mean, sum of squared distances] of discounted sums of rewards
    update: int
    env_steps: int

    @classmethod
    def initial(cls, layout: Layout, seed: int, *, log_std: float = 0.0) -> "LearnerState":
        zeros_P, zeros_D = np.zeros(layout.size, np.float32), np.zeros(layout.spaces.num_features)
        parameters_P = initial_parameters(layout, seed, log_std=log_std)
        # The range of bytes is known beforehand: as if one observation had been seen whose deviation is 255.
        is_bytes = isinstance(layout.spaces.observation, Box) and layout.spaces.observation.dtype == "uint8"
        m2_D, count = (zeros_D + 255.0**2, 1) if is_bytes else (zeros_D.copy(), 0)
        return cls(parameters_P, zeros_P, zeros_P.copy(), 0, zeros_D, m2_D, count, np.zeros(3), 0, 0)

    def to_tensors(self, layout: Layout) -> dict[str, np.ndarray]:
        """Return the arrays by name, the parameters under their published names."""
        return {
            **self.weights().tensors(layout),
            "adam.m": self.adam_m_P,
            "adam.v": self.adam_v_P,
            "normaliser.running_mean": self.normaliser_mean_D,
            "normaliser.running_m2": self.normaliser_m2_D,
            "return_moments": self.return_moments,
        }

    def counters(self) -> dict[str, int]:
        return {
            "update": self.update,
            "env_steps": self.env_steps,
            "adam_steps": self.adam_steps,
            "normaliser_count": self.normaliser_count,
        }

    @classmethod
    def from_tensors(cls, layout: Layout, tensors: dict[str, np.ndarray], counters: Mapping[str, int]) -> "LearnerState":
        """Read what `to_tensors` and `counters` returned."""
        return cls(
            parameters_P=layout.join(tensors),
            adam_m_P=tensors["adam.m"].copy(),
            adam_v_P=tensors["adam.v"].copy(),
            adam_steps=counters["adam_steps"],
            normaliser_mean_D=tensors["normaliser.running_mean"].copy(),
            normaliser_m2_D=tensors["normaliser.running_m2"].copy(),
            normaliser_count=counters["normaliser_count"],
            return_moments=tensors["return_moments"].copy(),
            update=counters["update"],
            env_steps=counters["env_steps"],
        )

    def weights(self) -> Weights:
        """Return a copy of what rollout workers and policies need; version is the number of updates made."""
        scale_D = np.ones(len(self.normaliser_mean_D))
        if self.normaliser_count:
            variance_D = self.normaliser_m2_D / self.normaliser_count
            scale_D = np.minimum(1 / np.sqrt(variance_D + NORMALISER_EPSILON), MAX_NORMALISER_SCALE)
        mean_D = self.normaliser_mean_D.astype(np.float32)
        return Weights(self.update, self.parameters_P.copy(), mean_D, scale_D.astype(np.float32))
