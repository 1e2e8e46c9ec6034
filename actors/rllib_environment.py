"""How RLlib steps an environment of ours, and how the environment's own error gets back to whoever waits for the run."""

import traceback
from collections.abc import Callable
from typing import Any

import gymnasium
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.tune.registry import register_env

from policies.errors import EnvironmentFailed, TrimtabError
from training.config import EnvironmentConfig
from training.vectorization import make_single


def register(name: str, environment: EnvironmentConfig) -> None:
    """Make an environment known to all processes of the cluster under a name."""
    register_env(name, lambda context: _Explaining(make_single(environment), environment.id))


def use_explaining_runners(config: AlgorithmConfig) -> None:
    """Let RLlib's env runners pass on what the environment raised; when they record episodes RLlib needs its own kind."""
    if config.output is None:
        config.env_runners(env_runner_cls=ExplainingEnvRunner)


class ExplainingEnvRunner(SingleAgentEnvRunner):
    """RLlib's env runner, but an environment's exception reaches the caller.

    RLlib's turns it into a bare RuntimeError, and a remote one writes it to its own log and ends its process.
    """

    def sample(self, **kwargs: Any) -> Any:
        try:
            return super().sample(**kwargs)
        except Exception as error:
            raise find_own_error(error) or error from None

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function with this runner: RLlib's way to run anything in it."""

        def call(runner: Any) -> Any:
            try:
                return func(runner, *args, **kwargs)
            except TrimtabError as error:
                return error

        result = super().apply(call)
        if isinstance(result, TrimtabError):
            raise result
        return result


class _Explaining(gymnasium.Wrapper):
    """Raises `EnvironmentFailed` with the environment's own traceback."""

    def __init__(self, env: gymnasium.Env, env_id: str) -> None:
        super().__init__(env)
        self._id = env_id

    def step(self, action: Any) -> Any:
        return self._explained("step", action)

    def reset(self, **kwargs: Any) -> Any:
        return self._explained("reset", **kwargs)

    def _explained(self, method: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(self.env, method)(*args, **kwargs)
        except Exception as error:
            raise EnvironmentFailed(
                f"environment {self._id!r} raised {type(error).__name__} in {method}: {error}\nIts traceback:\n"
                + "".join(traceback.format_exception(error))
            ) from None


def find_own_error(error: BaseException | None) -> TrimtabError | None:
    """Return the error of ours that an exception was raised from, if any."""
    while error is not None:
        original = getattr(error, "cause", error)  # as it was raised in the other process: Ray wraps it in its own traceback
        if isinstance(original, TrimtabError):
            return original
        error = error.__cause__ or error.__context__
    return None
