"""Which actions may be sent, whoever wants to send them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from policies.distributions import Categorical, Distribution, Mode, Normal
from policies.errors import ConfigError
from policies.functions import load_function
from serve_app.config import ShieldConfig

Constraint = Callable[[np.ndarray, Any], bool]

LIMITS = "limits"


class Shield:
    """Declared limits of the action, and functions of (features float32 [D], action) that say whether it is acceptable."""

    def __init__(self, config: ShieldConfig) -> None:
        self._low = None if config.low is None else np.asarray(config.low, np.float64)
        self._high = None if config.high is None else np.asarray(config.high, np.float64)
        self._constraints: dict[str, Constraint] = {
            reference: load_function(reference, "serving.shield.constraints") for reference in config.constraints
        }

    def violated(self, obs_D: np.ndarray, action: Any) -> str | None:
        """Return what an action violates, None if nothing. A function that raises has not said that the action is acceptable."""
        value = np.asarray(action, np.float64)
        is_below = self._low is not None and bool((value < self._low).any())
        if is_below or (self._high is not None and bool((value > self._high).any())):
            return LIMITS
        for name, constraint in self._constraints.items():
            try:
                if not constraint(obs_D, action):
                    return name
            except Exception as error:
                return f"{name} raised {error!r:.200}"
        return None

    def violation_probability(self, distribution: Distribution, parameters_P: np.ndarray, mode: Mode, obs_D: np.ndarray) -> float:
        """Return how probable it is that what a version draws for this observation is not acceptable."""
        if mode == "greedy":
            action, _ = distribution.choose(parameters_P, "greedy", 0)
            return float(self.violated(obs_D, action) is not None)
        if isinstance(distribution, Normal):
            low = -math.inf if self._low is None else self._low
            high = math.inf if self._high is None else self._high
            shape = distribution.action.low.shape
            low_K, high_K = (np.broadcast_to(bound, shape).reshape(-1) for bound in (low, high))
            return 1.0 - distribution.probability_within(low_K, high_K, parameters_P)
        assert isinstance(distribution, Categorical)
        choices = distribution.choices()
        assert choices is not None, "require_computable was called when the version was loaded"
        bad = (action for action in choices if self.violated(obs_D, action) is not None)
        return math.fsum(distribution.propensity(action, parameters_P, mode) for action in bad)

    def require_computable(self, distribution: Distribution, mode: Mode) -> None:
        """Raise `ConfigError` where nobody could say how probable an answer was, and so nothing could be learned from the log."""
        if mode == "greedy":
            return
        if isinstance(distribution, Normal) and self._constraints:
            raise ConfigError(
                "serving.shield.constraints cannot be combined with sampled real-valued actions: the probability that a sample "
                "violates a function is not known; declare serving.shield.low and high, or serve greedily, also where "
                "requests may choose (serving.request_modes)"
            )
        if isinstance(distribution, Categorical) and distribution.choices() is None:
            raise ConfigError(
                "serving.shield needs at most 1000 possible actions where actions are sampled; serve greedily, also where "
                "requests may choose (serving.request_modes)"
            )
