"""Load a bundle and ask its policy in this process: no cluster, no server, and for our own networks nothing but numpy."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from policies.bundle_reader import Bundle, read_bundle
from policies.distributions import Mode
from policies.errors import RequestInvalid, ServiceUnavailable
from policies.spaces import Spaces


class Action(NamedTuple):
    """An action as JSON says it (a number, or nested lists), and its propensity: a probability, of real numbers a density."""

    action: Any
    propensity: float


class LocalPolicy:
    """A verified policy that answers like the served one: the same observation, mode and seed are the same action."""

    def __init__(self, bundle: Bundle) -> None:
        self.digest = bundle.digest
        self.spaces: Spaces = bundle.policy.spaces
        self.serving_mode: Mode = bundle.manifest["serving_mode"]
        self._policy = bundle.policy

    def act(self, observation: Any, *, seed: int | None = None, mode: Mode | None = None, action_mask: Any = None) -> Action:
        """Return an action, in the serving mode if no other one is given.

        A sample is drawn from `seed`, a random one where none is given. As in the decision log it is 53 random bits, used as they
        are: numbers that you count yourself, 0, 1, 2, would all choose the first action. `trimtab.seed_of(text)` makes one of any
        text. Raises as `distribution` does.
        """
        mode, seed = mode or self.serving_mode, secrets.randbits(53) if seed is None else seed
        if mode not in ("greedy", "sample"):
            raise RequestInvalid(f"mode is {mode!r}, expected greedy or sample")
        if not isinstance(seed, int) or not 0 <= seed < 1 << 53:
            raise RequestInvalid(f"seed is {seed!r}, expected an integer from 0 to 2^53 - 1")
        parameters_P = self.distribution(observation, action_mask=action_mask)
        return Action(*self._policy.distribution.choose(parameters_P, mode, seed))

    def distribution(self, observation: Any, *, action_mask: Any = None) -> np.ndarray:
        """Return the distribution over actions, float64 [P]: a probability per choice, or all means and then all deviations.

        An observation is the environment's own: arrays, numbers, lists, or a dict or tuple of them. Raises `RequestInvalid` for
        one that is not in the space, `ServiceUnavailable` when the network overflows.
        """
        observation, mask = self.spaces.split_mask(as_json(observation), as_json(action_mask))
        obs_D, mask_A = self.spaces.check_observation(observation), self.spaces.check_mask(mask)
        parameters_P = self._policy.distributions(obs_D[None], None if mask_A is None else mask_A[None])[0]
        if not np.isfinite(parameters_P).all():
            raise ServiceUnavailable(f"policy {self.digest[:12]}… overflows for this observation: it gave NaN")
        return parameters_P


def load(path: str | os.PathLike[str], expected_digest: str | None = None) -> LocalPolicy:
    """Read and verify a bundle's directory, and return its policy.

    The digest that it must have is the directory's name where none is given. Raises `IntegrityError` or `GateRefused`.
    """
    return LocalPolicy(read_bundle(Path(os.path.abspath(path)), expected_digest=expected_digest))


def as_json(value: Any) -> Any:
    """Return numpy's arrays and numbers, and tuples of them, as the lists and numbers that a request would hold."""
    kind = type(value)
    if kind is list and all([type(item) is float for item in value]):  # the usual one, and the only one that has to be fast
        return value.copy()  # the caller may go on writing into it
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value
