"""How a network's outputs become a distribution over actions, and how an action is drawn from it, with its propensity.

A distribution is a row of float64 numbers P: the probability of every choice, or mean and standard deviation per number. An
action is the environment's own value as JSON says it: an integer, a number, or nested lists of them.

B rows, O network outputs, P numbers of a distribution, A choices of all components together, K components.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from policies.network import Architecture, Gaussian
from policies.spaces import Choices, Numbers, Spaces

Mode = Literal["greedy", "sample"]

MAX_CHOICES_LISTED = 1000
FEW_ROWS = 4  # one by one, so few are drawn faster than by arrays
_ONE_OF_MANY = re.compile(r"(.+):([0-9]{1,5})\.([0-9a-f]+)")


class Propensity(NamedTuple):
    """How probable an action is: over `num_densities` of its numbers a density, over all the others a probability."""

    value: float
    num_densities: int = 0


class Distribution(Protocol):
    """What serving, evaluation and replay ask of an action space."""

    num_parameters: int

    def parameters(self, outputs_BO: np.ndarray, mask_BA: np.ndarray | None) -> np.ndarray:
        """Return the distributions float64 [B, P]; a masked choice has probability 0."""

    def choose(self, parameters_P: np.ndarray, mode: Mode, seed: int) -> tuple[Any, float]:
        """Return the action and its propensity, from nothing but the distribution, the mode and the seed (53 bits)."""

    def choose_many(self, parameters_BP: np.ndarray, mode: Mode, seeds: list[int]) -> tuple[list[Any], list[float]]:
        """Return the actions and propensities of many rows: bit for bit those that `choose` returns for each."""

    def propensity(self, action: Any, parameters_P: np.ndarray, mode: Mode) -> float:
        """Return the probability (of real numbers: the density) with which a policy in this mode sends the action."""

    def propensity_many(self, actions: list[Any], parameters_BP: np.ndarray, mode: Mode) -> list[float]:
        """Return what `propensity` returns for each row."""

    def num_densities(self, action: Any, mode: Mode) -> int:
        """Return over how many of the action's numbers `propensity` is a density."""

    def choose_rows(self, parameters_BP: np.ndarray, mode: Mode, rng: np.random.Generator) -> np.ndarray:
        """Return an action per row, as `env.step` takes them."""


class Categorical:
    """Independent choices, one per component. Greedy takes the first of the most probable ones."""

    def __init__(self, action: Choices) -> None:
        self.action = action
        self.num_parameters = sum(action.nvec)
        ends = np.cumsum(action.nvec).tolist()
        self.parts = [slice(end - n, end) for end, n in zip(ends, action.nvec)]
        self._is_single = action.kind == "discrete"

    def parameters(self, outputs_BO: np.ndarray, mask_BA: np.ndarray | None) -> np.ndarray:
        z_BA = outputs_BO.astype(np.float64)
        if mask_BA is not None:
            z_BA[~mask_BA] = -np.inf
        for part in self.parts:
            z = z_BA[:, part]
            z -= z.max(axis=1, keepdims=True)
            np.exp(z, out=z)
            z /= z.sum(axis=1, keepdims=True)
        return z_BA

    def choose(self, parameters_P: np.ndarray, mode: Mode, seed: int) -> tuple[Any, float]:
        if self._is_single:  # the usual case on the request path
            index, propensity = _choose_one(parameters_P, mode, uniform(seed))
            return index + self.action.starts[0], propensity
        draws_K = np.random.Generator(np.random.Philox(seed)).random(len(self.parts)).tolist() if mode == "sample" else None
        chosen = [_choose_one(parameters_P[part], mode, draws_K[k] if draws_K else 0.0) for k, part in enumerate(self.parts)]
        return self.action.to_answer(np.array([index for index, _ in chosen])), math.prod(p for _, p in chosen)

    def choose_many(self, parameters_BP: np.ndarray, mode: Mode, seeds: list[int]) -> tuple[list[Any], list[float]]:
        if not self._is_single or len(seeds) < FEW_ROWS:
            return _each_chosen(self, parameters_BP, mode, seeds)
        if mode == "greedy":
            index_B, propensities = parameters_BP.argmax(axis=1), [1.0] * len(seeds)
        else:
            draws_B1 = np.array(seeds, np.float64)[:, None] / (1 << 53)
            index_B = (np.cumsum(parameters_BP, axis=1) <= draws_B1).sum(axis=1)
            for row in np.flatnonzero(index_B == parameters_BP.shape[1]):  # see `_choose_one`
                index_B[row] = np.flatnonzero(parameters_BP[row])[-1]
            propensities = parameters_BP[np.arange(len(index_B)), index_B].tolist()
        start = self.action.starts[0]
        return (index_B + start if start else index_B).tolist(), propensities

    def propensity_many(self, actions: list[Any], parameters_BP: np.ndarray, mode: Mode) -> list[float]:
        if not self._is_single or len(actions) < FEW_ROWS:
            return [self.propensity(action, parameters_P, mode) for action, parameters_P in zip(actions, parameters_BP)]
        index_B = np.array(actions) - self.action.starts[0]
        if mode == "greedy":
            return (index_B == parameters_BP.argmax(axis=1)).astype(np.float64).tolist()
        return parameters_BP[np.arange(len(index_B)), index_B].tolist()

    def num_densities(self, action: Any, mode: Mode) -> int:
        return 0

    def choices(self) -> list[Any] | None:
        """Return all actions, None where they are too many to look at each."""
        if math.prod(self.action.nvec) > MAX_CHOICES_LISTED:
            return None
        if self._is_single:
            return [index + self.action.starts[0] for index in range(self.action.nvec[0])]
        return [self.action.to_answer(np.array(index_K)) for index_K in itertools.product(*map(range, self.action.nvec))]

    def propensity(self, action: Any, parameters_P: np.ndarray, mode: Mode) -> float:
        if self._is_single:
            return _propensity_of_one(action - self.action.starts[0], parameters_P, mode)
        index_K = np.asarray(action).reshape(-1) - np.array(self.action.starts)
        return math.prod(_propensity_of_one(int(i), parameters_P[part], mode) for i, part in zip(index_K, self.parts))

    def choose_rows(self, parameters_BP: np.ndarray, mode: Mode, rng: np.random.Generator) -> np.ndarray:
        index_BK = np.stack([_choose_column(parameters_BP[:, part], mode, rng) for part in self.parts], axis=1)
        return self.action.to_environment(index_BK)


class Normal:
    """Independent normal distributions, one per number, put into the bounds as the head says.

    Greedy sends the mean, so its propensity is 1. A sampled action's propensity is the product of its components' densities
    in the environment's units. On a bound, a component's share is the whole probability of what is sent as the bound: of what
    `clip` cuts, or of what `tanh` bends so near to it that float32 has nothing in between.
    """

    def __init__(self, action: Numbers, head: Gaussian) -> None:
        self.action = action
        self.scale = Scale(action, head.squash)
        self._greedy_scale = self.scale if head.greedy == "squash" else Scale(action, head.greedy)
        self._log_std_range = head.log_std_range
        self.num_parameters = 2 * action.num_components

    def parameters(self, outputs_BO: np.ndarray, mask_BA: np.ndarray | None) -> np.ndarray:
        """Return [mean, standard deviation] on the policy's scale; `outputs_BO` are mean and log-deviation, side by side."""
        parameters_BP = outputs_BO.astype(np.float64)
        log_std = parameters_BP[:, self.action.num_components :]
        np.exp(np.clip(log_std, *self._log_std_range), out=log_std)
        return parameters_BP

    def choose(self, parameters_P: np.ndarray, mode: Mode, seed: int) -> tuple[Any, float]:
        mean_K, std_K = np.split(parameters_P, 2)
        if mode == "greedy":
            return self.action.to_answer(_as_sent(self._greedy_scale.to_bounds(mean_K))), 1.0
        noise_K = np.random.Generator(np.random.Philox(seed)).standard_normal(len(mean_K))
        action_K = _as_sent(self.scale.to_bounds(mean_K + std_K * noise_K))
        return self.action.to_answer(action_K), self.scale.density(action_K, mean_K, std_K)

    def choose_many(self, parameters_BP: np.ndarray, mode: Mode, seeds: list[int]) -> tuple[list[Any], list[float]]:
        return _each_chosen(self, parameters_BP, mode, seeds)

    def propensity_many(self, actions: list[Any], parameters_BP: np.ndarray, mode: Mode) -> list[float]:
        return [self.propensity(action, parameters_P, mode) for action, parameters_P in zip(actions, parameters_BP)]

    def probability_within(self, low_K: np.ndarray, high_K: np.ndarray, parameters_P: np.ndarray) -> float:
        """Return the probability that every component of a sampled action is from `low_K` to `high_K`."""
        mean_K, std_K = np.split(parameters_P, 2)
        at_most_K = self.scale.cdf(high_K, mean_K, std_K, closed=True)
        below_K = self.scale.cdf(low_K, mean_K, std_K, closed=False)
        return math.prod(max(upper - lower, 0.0) for upper, lower in zip(at_most_K, below_K))

    def propensity(self, action: Any, parameters_P: np.ndarray, mode: Mode) -> float:
        mean_K, std_K = np.split(parameters_P, 2)
        action_K = np.asarray(action, np.float64).reshape(-1)
        if mode == "greedy":
            return float(np.array_equal(action_K, _as_sent(self._greedy_scale.to_bounds(mean_K))))
        return self.scale.density(action_K, mean_K, std_K)

    def num_densities(self, action: Any, mode: Mode) -> int:
        if mode == "greedy":
            return 0
        action_K = np.asarray(action, np.float64).reshape(-1)
        return int(((action_K > self.scale.low_K) & (action_K < self.scale.high_K)).sum())

    def choose_rows(self, parameters_BP: np.ndarray, mode: Mode, rng: np.random.Generator) -> np.ndarray:
        mean_BK, std_BK = np.split(parameters_BP, 2, axis=1)
        if mode == "greedy":
            return self.action.to_environment(self._greedy_scale.to_bounds(mean_BK))
        return self.action.to_environment(self.scale.to_bounds(mean_BK + std_BK * rng.standard_normal(mean_BK.shape)))


class Scale:
    """The way from a normal number to an action within its bounds, and back to its density.

    A component with two bounds has them at -1 and 1 on the policy's scale; any other is not scaled, only cut at the bound
    it may have. So is one whose two bounds are the same number, which is then all that is ever sent.
    """

    def __init__(self, action: Numbers, squash: str) -> None:
        self.low_K, self.high_K = action.low.reshape(-1).astype(np.float64), action.high.reshape(-1).astype(np.float64)
        is_bounded_K = np.isfinite(self.low_K) & np.isfinite(self.high_K) & (self.low_K < self.high_K)
        with np.errstate(invalid="ignore"):
            self.center_K = np.where(is_bounded_K, (self.low_K + self.high_K) / 2, 0)
            self.half_K = np.where(is_bounded_K, (self.high_K - self.low_K) / 2, 1)
        self._bends_K = is_bounded_K & (squash == "tanh")
        self._low_edge_K, self._high_edge_K = self._edges(action.low.reshape(-1), action.high.reshape(-1))

    def to_bounds(self, latent_BK: np.ndarray) -> np.ndarray:
        """Return actions in the environment's units."""
        if self._bends_K.any():
            latent_BK = np.where(self._bends_K, np.tanh(latent_BK), latent_BK)
        return np.clip(self.center_K + self.half_K * latent_BK, self.low_K, self.high_K)

    def density(self, action_K: np.ndarray, mean_K: np.ndarray, std_K: np.ndarray) -> float:
        """Return the product over components of density, or of probability where the action lies on a bound that cut it."""
        y_K = (action_K - self.center_K) / self.half_K
        product = 1.0
        for k, (y, mean, std) in enumerate(zip(y_K.tolist(), mean_K.tolist(), std_K.tolist())):
            half = float(self.half_K[k])
            if action_K[k] <= self.low_K[k]:
                product *= _normal_cdf((self._low_edge_K[k] - mean) / std)
            elif action_K[k] >= self.high_K[k]:
                product *= _normal_cdf((mean - self._high_edge_K[k]) / std)
            elif self._bends_K[k]:
                product *= _normal_density((math.atanh(y) - mean) / std) / (std * half * (1 - y * y))
            else:
                product *= _normal_density((y - mean) / std) / (std * half)
        return product

    def cdf(self, value_K: np.ndarray, mean_K: np.ndarray, std_K: np.ndarray, *, closed: bool) -> list[float]:
        """Return for each component the probability that a sampled action is at most the value, or less than it (not closed)."""
        result = []
        for k, (value, mean, std) in enumerate(zip(value_K.tolist(), mean_K.tolist(), std_K.tolist())):
            low, high = self.low_K[k], self.high_K[k]
            if value < low or (value == low and not closed):
                result.append(0.0)
            elif value > high or (value == high and closed):
                result.append(1.0)
            elif value == low:
                result.append(_normal_cdf((self._low_edge_K[k] - mean) / std))
            elif value == high:
                result.append(_normal_cdf((self._high_edge_K[k] - mean) / std))
            else:
                y = (value - self.center_K[k]) / self.half_K[k]
                result.append(_normal_cdf(((math.atanh(y) if self._bends_K[k] else y) - mean) / std))
        return result

    def _edges(self, low_K: np.ndarray, high_K: np.ndarray) -> tuple[list[float], list[float]]:
        """Return the numbers on the policy's scale below and above which the bound itself is sent."""
        edges_K = []
        for bound_K, other_K in ((low_K, high_K), (high_K, low_K)):
            # Bent numbers come near to the bound without end; from halfway to the last float32 before it they are rounded to it.
            rounded_K = (bound_K.astype(np.float64) + np.nextafter(bound_K, other_K)) / 2
            with np.errstate(invalid="ignore", divide="ignore"):
                cut_K = (bound_K - self.center_K) / self.half_K
                bent_K = np.arctanh((rounded_K - self.center_K) / self.half_K)
            edges_K.append(np.where(self._bends_K, bent_K, cut_K))
        edges_K[0][low_K == high_K] = np.inf  # whatever is drawn, it is sent as this number
        return edges_K[0].tolist(), edges_K[1].tolist()


def mixed(parts: Iterable[tuple[float, Propensity]]) -> Propensity:
    """Return the propensity under a mixture of parts, each with its weight.

    Of the parts that can send the action only those with the fewest densities count: among all that is sent, a point that one
    part sends with a probability is that part's alone, for a density gives it none. This is the derivative with respect to the
    sum of the counting measure, for whatever is sent with a probability, and the Lebesgue measures, inside of the bounds and on
    each of their faces. A sum of probabilities and densities would change with the action's unit.
    """
    shares = [Propensity(weight * part.value, part.num_densities) for weight, part in parts if weight * part.value != 0]
    fewest = min((share.num_densities for share in shares), default=0)
    return Propensity(math.fsum(share.value for share in shares if share.num_densities == fewest), fewest)


def distribution_of(spaces: Spaces, architecture: Architecture) -> Distribution:
    """Return the distribution of a policy's actions."""
    if isinstance(spaces.action, Choices):
        return Categorical(spaces.action)
    assert architecture.gaussian is not None, "real-valued actions need a Gaussian head"
    return Normal(spaces.action, architecture.gaussian)


def _as_sent(action_K: np.ndarray) -> np.ndarray:
    """Return an action exactly as float32 can say it: an environment's arrays hold no more."""
    return action_K.astype(np.float32).astype(np.float64)


def seed_of(decision_id: str) -> int:
    """Return the 53-bit sampling seed of a decision: the same id draws the same number on every replica, for ever.

    It is taken from the SHA-256 of the id. Of one of many, `<batch>:<index>.<tag>`, it is that of its place in `seeds_of_many`.
    """
    one_of_many = _ONE_OF_MANY.fullmatch(decision_id)
    if one_of_many is not None:
        batch, index, tag = one_of_many.groups()
        return seeds_of_many(f"{batch}.{tag}", int(index) + 1)[-1]
    return int.from_bytes(hashlib.sha256(decision_id.encode()).digest()[:8]) >> 11


def seeds_of_many(name: str, num: int) -> list[int]:
    """Return the 53-bit seeds of a batch's decisions from one SHAKE-256 of its name; a hash for each would cost too much."""
    return (np.frombuffer(hashlib.shake_256(name.encode()).digest(8 * num), ">u8") >> np.uint64(11)).tolist()


def uniform(seed: int) -> float:
    """Return a number in [0, 1) from a 53-bit seed."""
    return seed / (1 << 53)


def _each_chosen(
    distribution: Distribution, parameters_BP: np.ndarray, mode: Mode, seeds: list[int]
) -> tuple[list[Any], list[float]]:
    chosen = [distribution.choose(parameters_P, mode, seed) for parameters_P, seed in zip(parameters_BP, seeds)]
    return [action for action, _ in chosen], [propensity for _, propensity in chosen]


def _choose_one(probabilities_A: np.ndarray, mode: Mode, draw: float) -> tuple[int, float]:
    if mode == "greedy":
        return int(probabilities_A.argmax()), 1.0
    index = int(np.searchsorted(np.cumsum(probabilities_A), draw, side="right"))
    if index >= len(probabilities_A):  # the cumulative sum can end a rounding error below 1
        index = int(np.flatnonzero(probabilities_A)[-1])
    return index, float(probabilities_A[index])


def _propensity_of_one(index: int, probabilities_A: np.ndarray, mode: Mode) -> float:
    if mode == "greedy":
        return float(index == int(probabilities_A.argmax()))
    return float(probabilities_A[index])


def _choose_column(probabilities_BA: np.ndarray, mode: Mode, rng: np.random.Generator) -> np.ndarray:
    if mode == "greedy":
        return probabilities_BA.argmax(axis=1)
    cumulative_BA = np.cumsum(probabilities_BA, axis=1)
    # Against the row's own sum, which can end a rounding error below 1: beyond it lies no choice, or one that is masked.
    draws_B1 = rng.random((len(probabilities_BA), 1)) * cumulative_BA[:, -1:]
    return (cumulative_BA <= draws_B1).sum(axis=1)


def _normal_density(z: float) -> float:
    return math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))
