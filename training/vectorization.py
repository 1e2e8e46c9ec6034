"""How environments are made, from an id or a factory, and how several of them are stepped as one.

B environment.
"""

import contextlib
import ctypes
import difflib
import importlib
import math
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from policies.errors import ConfigError, EnvironmentFailed
from policies.spaces import MAX_STATE_BYTES, state_bytes
from training.config import EnvironmentConfig

CLOSE_TIMEOUT_S = 5.0  # for an environment in a process of its own to give back what it holds, before that is killed
PR_SET_PDEATHSIG = 1  # Linux, sys/prctl.h


def make_single(config: EnvironmentConfig) -> gymnasium.Env:
    """Make one environment that is not vectorised; raises what `VectorEnvironment` raises."""
    return _explained(config, lambda: _factory(config)())


def make_vector(config: EnvironmentConfig, num_envs: int) -> VectorEnv:
    """Make `num_envs` environments that are stepped as one; raises what `VectorEnvironment` raises."""
    return _explained(config, lambda: _make_vector(config, num_envs))


def _explained(config: EnvironmentConfig, make: Callable[[], Any]) -> Any:
    """Call `make` and say in our errors what went wrong in it."""
    try:
        return make()
    except ConfigError:
        raise
    except gymnasium.error.UnregisteredEnv as error:
        raise ConfigError(_unknown_id(config.id)) from error
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        raise ConfigError(f"environment {config.id!r} needs something that cannot be imported: {error}") from error
    except gymnasium.error.Error as error:
        raise ConfigError(f"environment {config.id!r} cannot be made: {error}") from error
    except Exception as error:
        raise EnvironmentFailed(
            f"environment {config.id!r} with kwargs {config.kwargs} raised {type(error).__name__} when it was made: {error}\n"
            "Its traceback:\n" + "".join(traceback.format_exception(error))
        ) from error


def _make_vector(config: EnvironmentConfig, num_envs: int) -> VectorEnv:
    if config.vectorization == "async":
        make, parent = _factory(config), os.getpid()

        def make_in_a_process() -> gymnasium.Env:
            if os.getpid() != parent:  # Gymnasium makes one in this process too, to see its spaces
                _die_with(parent)
            return _TellsWhere(make(), config)

        return ProcessVectorEnv([make_in_a_process] * num_envs, copy=False)
    if config.vectorization == "auto" and config.history == 1 and _has_vector_entry_point(config):
        env = gymnasium.make_vec(config.id, num_envs=num_envs, **_kwargs(config))
        if env.metadata.get("autoreset_mode") in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
            return env
        env.close()  # it ends episodes in no way we know; single environments in lockstep end them in ours
    return SyncVectorEnv([_factory(config)] * num_envs, copy=False)


def _has_vector_entry_point(config: EnvironmentConfig) -> bool:
    registered_id = config.id.rpartition(":")[2]  # `_named_factory` has imported the module that registers it
    return _named_factory(config) is None and gymnasium.spec(registered_id).vector_entry_point is not None


def _factory(config: EnvironmentConfig) -> Callable[[], gymnasium.Env]:
    """Return what makes one environment, which shows the last observations where the settings say so."""
    make = _bare_factory(config)
    return make if config.history == 1 else lambda: _with_history(make(), config)


def _with_history(env: gymnasium.Env, config: EnvironmentConfig) -> gymnasium.Env:
    """Return an environment that shows its last observations, oldest first; the first of an episode stands in for those before.

    Gymnasium's wrapper keeps the arrays that it is given: of an environment that returns the same one in every step it would
    show the newest observation k times, and the policy would be served with another input than it was trained on.
    """
    space = env.observation_space
    if not isinstance(space, gymnasium.spaces.Box):
        env.close()
        raise ConfigError(
            f"environment.history is {config.history}, but {config.id!r} observes {space!s:.200}: only a Box has a history. "
            "Flatten it with gymnasium.wrappers.FlattenObservation, give an action mask in `info`, or remove history"
        )
    num_bytes = state_bytes(config.history, math.prod(space.shape))
    if num_bytes > MAX_STATE_BYTES:
        env.close()
        raise ConfigError(
            f"environment.history is {config.history}: the earlier observations, {list(space.shape)} numbers each, would be "
            f"{num_bytes} bytes for a caller to keep, the limit is {MAX_STATE_BYTES}; lower it, or make the observations smaller"
        )
    copying = gymnasium.wrappers.TransformObservation(env, np.array, None)
    return gymnasium.wrappers.FrameStackObservation(copying, config.history, padding_type="reset")


def _bare_factory(config: EnvironmentConfig) -> Callable[[], gymnasium.Env]:
    """Return what makes the environment itself: the function that the id names, or Gymnasium's `make`."""
    factory = _named_factory(config)
    if factory is None:
        # The passive checker costs as much as CartPole itself; `check_environment` has looked once and for all.
        return lambda: gymnasium.make(config.id, disable_env_checker=True, **_kwargs(config))

    def make() -> gymnasium.Env:
        env = factory(**config.kwargs)
        if not isinstance(env, gymnasium.Env):
            raise ConfigError(f"environment {config.id!r} returned {type(env).__name__}, not a gymnasium.Env")
        limit = config.max_episode_steps
        return env if limit is None else gymnasium.wrappers.TimeLimit(env, limit)

    return make


def _named_factory(config: EnvironmentConfig) -> Callable[..., Any] | None:
    """Return the function or class that `module:name` names, or None when the id is one of Gymnasium's registry."""
    module_name, separator, name = config.id.partition(":")
    if not separator:
        return None
    module = importlib.import_module(module_name)
    factory = getattr(module, name, None)
    if factory is None and not re.search(r"-v\d+$", name):
        raise ConfigError(f"environment {config.id!r}: module {module_name} has no function {name!r}{_close(name, vars(module))}")
    return factory


def _kwargs(config: EnvironmentConfig) -> dict[str, Any]:
    limit = config.max_episode_steps
    return config.kwargs if limit is None else {**config.kwargs, "max_episode_steps": limit}


def failed(config: EnvironmentConfig, method: str, error: Exception) -> EnvironmentFailed:
    """Say what an environment's own code did; what a process of its own said already stays as it is."""
    if isinstance(error, EnvironmentFailed):
        return EnvironmentFailed(str(error))
    if isinstance(error, EOFError):
        return EnvironmentFailed(f"a process of environment {config.id!r} ended in {method}, without an error of Python's")
    return EnvironmentFailed(
        f"environment {config.id!r} raised {type(error).__name__} in {method}: {error}\nIts traceback:\n"
        + "".join(traceback.format_exception(error))
    )


class _TellsWhere(gymnasium.Wrapper):
    """Tells an error with its traceback: of any other one that happens in another process only the message comes back."""

    def __init__(self, env: gymnasium.Env, config: EnvironmentConfig) -> None:
        super().__init__(env)
        self._config = config

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        try:
            return self.env.reset(seed=seed, options=options)
        except Exception as error:
            raise failed(self._config, "reset", error) from error

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        try:
            return self.env.step(action)
        except Exception as error:
            raise failed(self._config, "step", error) from error


def _die_with(parent: int) -> None:
    """Have Linux kill this process when its parent is gone: one whose environment hangs would never notice by itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone already
            os._exit(1)


class ProcessVectorEnv(AsyncVectorEnv):
    """Gymnasium's, but it can be closed whatever became of its processes: some may be gone, some may hang."""

    def close_extras(self, **_: Any) -> None:
        for pipe in self.parent_pipes:
            with contextlib.suppress(OSError, AttributeError):  # broken, or None where the process has told an error
                pipe.send(("close", None))
        deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
        for process in self.processes:
            process.join(max(0.0, deadline_s - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def _unknown_id(env_id: str) -> str:
    hint = _close(env_id, gymnasium.registry)
    own = "An id of your own is written module:Id-v0 or module:factory"
    return f"environment {env_id!r} is not registered with Gymnasium{hint}. {own}"


def _close(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}" if close else ""
