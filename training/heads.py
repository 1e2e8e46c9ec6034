"""How training samples actions, and what a change of the network's outputs does to their log-probability and entropy.

The gradients are derived by hand: see `docs/training.md`. `policies/distributions.py` says the same distributions for serving,
in float64 and with the environment's own actions; here everything is float32 and an action is what was drawn: the index of a
choice, or the number on the policy's scale before it was put into its bounds (the bounds do not depend on the parameters, so
they fall out of every ratio).

N steps, O network outputs, K components of an action, A choices of all components together.
"""

from typing import NamedTuple, Protocol

import numpy as np

from policies.distributions import Scale
from policies.network import LOG_STD_RANGE, Architecture
from policies.spaces import Choices, Numbers, Spaces

LOG_SQRT_2PI = np.float32(0.5 * np.log(2 * np.pi))
NEVER = np.float32(-1e9)  # logit of a masked choice: its probability is exactly 0 in float32, and 0 times it is 0, not NaN


class Evaluated(NamedTuple):
    """Log-probability and entropy [N] of each step, and what `gradient` needs to go back from them."""

    logp_N: np.ndarray
    entropy_N: np.ndarray
    memory: tuple[np.ndarray, ...]


class Head(Protocol):
    """What a network's last outputs mean."""

    num_components: int
    action_dtype: type

    def noise(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Return all random numbers of a fragment at once: [*shape, …] float32."""

    def sample(self, outputs_NO: np.ndarray, noise_N: np.ndarray, mask_NA: np.ndarray | None) -> np.ndarray:
        """Return one drawn action per row [N, K]."""

    def to_environment(self, actions_NK: np.ndarray) -> np.ndarray:
        """Return drawn actions as `env.step` takes them."""

    def log_probability(self, outputs_NO: np.ndarray, actions_NK: np.ndarray, mask_NA: np.ndarray | None) -> np.ndarray:
        """Return the log-probability [N] of drawn actions."""

    def evaluate(self, outputs_NO: np.ndarray, actions_NK: np.ndarray, mask_NA: np.ndarray | None) -> Evaluated:
        """Return log-probabilities of drawn actions, and entropies."""

    def gradient(self, evaluated: Evaluated, d_logp_N: np.ndarray, d_entropy: float) -> np.ndarray:
        """Return the loss's gradient [N, O] by the outputs, given it by each log-probability and (one number) each entropy."""


class ChoiceHead:
    """Logits of independent choices. The largest of logits plus Gumbel noise is a sample of their softmax."""

    action_dtype = np.int64

    def __init__(self, action: Choices) -> None:
        self._action = action
        self._num_outputs = sum(action.nvec)
        self.num_components = action.num_components
        ends = np.cumsum(action.nvec).tolist()
        self._parts = [slice(end - n, end) for end, n in zip(ends, action.nvec)]
        self._starts = [part.start for part in self._parts]

    def noise(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.random((*shape, self._num_outputs), np.float32)
        np.maximum(noise, np.finfo(np.float32).tiny, out=noise)  # 0 has no logarithm
        np.log(noise, out=noise)
        np.negative(noise, out=noise)
        np.log(noise, out=noise)
        return np.negative(noise, out=noise)

    def sample(self, outputs_NO: np.ndarray, noise_N: np.ndarray, mask_NA: np.ndarray | None) -> np.ndarray:
        perturbed_NO = outputs_NO + noise_N
        if mask_NA is not None:
            perturbed_NO[~mask_NA] = -np.inf
        if self.num_components == 1:
            return _argmax(perturbed_NO)[:, None]
        return np.stack([_argmax(perturbed_NO[:, part]) for part in self._parts], axis=1)

    def to_environment(self, actions_NK: np.ndarray) -> np.ndarray:
        return self._action.to_environment(actions_NK)

    def log_probability(self, outputs_NO: np.ndarray, actions_NK: np.ndarray, mask_NA: np.ndarray | None) -> np.ndarray:
        return self._chosen(self._log_probabilities(outputs_NO, mask_NA), actions_NK)[0]

    def evaluate(self, outputs_NO: np.ndarray, actions_NK: np.ndarray, mask_NA: np.ndarray | None) -> Evaluated:
        logp_ON = self._log_probabilities(outputs_NO, mask_NA)
        logp_N, places = self._chosen(logp_ON, actions_NK)
        p_ON = np.exp(logp_ON)
        plogp_ON = p_ON * logp_ON
        return Evaluated(logp_N, -plogp_ON.sum(axis=0), (p_ON, logp_ON, plogp_ON, *places))

    def _log_probabilities(self, outputs_NO: np.ndarray, mask_NA: np.ndarray | None) -> np.ndarray:
        # Choices are rows here: numpy adds up whole rows ten times faster than two numbers beside each other, ten thousand times.
        logp_ON = np.ascontiguousarray(outputs_NO.T)
        if mask_NA is not None:
            logp_ON[~mask_NA.T] = NEVER
        for part in self._parts:
            _log_softmax(logp_ON[part])
        return logp_ON

    def _chosen(self, logp_ON: np.ndarray, actions_NK: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Return the log-probability [N] of actions, and where its parts stand: columns, then rows per component."""
        columns_N = np.arange(logp_ON.shape[1])
        rows = [actions_NK[:, k] + start for k, start in enumerate(self._starts)]
        return sum(logp_ON[row_N, columns_N] for row_N in rows), (columns_N, *rows)  # type: ignore[return-value]

    def gradient(self, evaluated: Evaluated, d_logp_N: np.ndarray, d_entropy: float) -> np.ndarray:
        """For logits z: d log p_a / dz_j = 1[j = a] - p_j and d H / dz_j = -p_j (log p_j + H), component by component."""
        p_ON, logp_ON, plogp_ON, columns_N, *rows = evaluated.memory
        d_ON = p_ON * -d_logp_N
        for row_N in rows:
            d_ON[row_N, columns_N] += d_logp_N
        if d_entropy:
            for part in self._parts:
                entropy_N = -plogp_ON[part].sum(axis=0)
                d_ON[part] -= np.float32(d_entropy) * p_ON[part] * (logp_ON[part] + entropy_N)
        return d_ON.T


class NumberHead:
    """Mean and log-deviation of independent normal numbers, side by side in the outputs."""

    action_dtype = np.float32

    def __init__(self, action: Numbers, squash: str) -> None:
        self._action = action
        self._scale = Scale(action, squash)
        self.num_components = action.num_components

    def noise(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return rng.standard_normal((*shape, self.num_components), np.float32)

    def sample(self, outputs_NO: np.ndarray, noise_N: np.ndarray, mask_NA: np.ndarray | None) -> np.ndarray:
        mean_NK, log_std_NK = np.split(outputs_NO, 2, axis=1)
        return mean_NK + np.exp(np.clip(log_std_NK, *LOG_STD_RANGE)) * noise_N

    def to_environment(self, actions_NK: np.ndarray) -> np.ndarray:
        return self._action.to_environment(self._scale.to_bounds(actions_NK))

    def log_probability(self, outputs_NO: np.ndarray, actions_NK: np.ndarray, mask_NA: np.ndarray | None) -> np.ndarray:
        return self.evaluate(outputs_NO, actions_NK, mask_NA).logp_N

    def evaluate(self, outputs_NO: np.ndarray, actions_NK: np.ndarray, mask_NA: np.ndarray | None) -> Evaluated:
        mean_NK, raw_NK = np.split(outputs_NO, 2, axis=1)
        log_std_NK = np.clip(raw_NK, *LOG_STD_RANGE)
        inverse_std_NK = np.exp(-log_std_NK)
        z_NK = (actions_NK - mean_NK) * inverse_std_NK
        logp_N = (-0.5 * z_NK * z_NK - log_std_NK - LOG_SQRT_2PI).sum(axis=1)
        entropy_N = (log_std_NK + (LOG_SQRT_2PI + np.float32(0.5))).sum(axis=1)
        return Evaluated(logp_N, entropy_N, (z_NK, inverse_std_NK, raw_NK == log_std_NK))

    def gradient(self, evaluated: Evaluated, d_logp_N: np.ndarray, d_entropy: float) -> np.ndarray:
        """For z = (u - mean) / std: d log p / d mean = z / std, d log p / d log std = z^2 - 1, and d H / d log std = 1."""
        z_NK, inverse_std_NK, is_inside_NK = evaluated.memory
        d_logp_N1 = d_logp_N[:, None]
        d_log_std_NK = (d_logp_N1 * (z_NK * z_NK - 1) + np.float32(d_entropy)) * is_inside_NK
        return np.concatenate([d_logp_N1 * z_NK * inverse_std_NK, d_log_std_NK], axis=1)


def head_of(spaces: Spaces, architecture: Architecture) -> Head:
    """Return the head for a policy's actions."""
    if isinstance(spaces.action, Choices):
        return ChoiceHead(spaces.action)
    assert architecture.gaussian is not None, "real-valued actions need a Gaussian head"
    return NumberHead(spaces.action, architecture.gaussian.squash)


def _argmax(x_NA: np.ndarray) -> np.ndarray:
    """Return the index of the largest number of each row: of two by comparing them, ten times as fast as numpy's search."""
    return (x_NA[:, 1] > x_NA[:, 0]).astype(np.int64) if x_NA.shape[1] == 2 else x_NA.argmax(axis=1)


def _log_softmax(z_ON: np.ndarray) -> None:
    """Turn logits into log-probabilities, in place."""
    z_ON -= z_ON.max(axis=0)
    z_ON -= np.log(np.exp(z_ON).sum(axis=0))
