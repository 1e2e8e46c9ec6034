"""How an environment is made and stepped: vectorised, checked, and with one meaning of "the episode ended"."""

import difflib
import traceback
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from policies.errors import ConfigError, EnvironmentFailed
from policies.spaces import Spaces
from training.config import EnvironmentConfig


class VectorEnvironment:
    """`num_envs` environments stepped together, always with Gymnasium's NEXT_STEP autoreset.

    The step after an episode's end ignores its action and returns the first observation of the next episode. So the
    observation that belongs to `truncated` is the real final one, and the caller masks the step that follows.

    Raises `ConfigError`, `SpaceUnsupported` or `EnvironmentFailed`.
    """

    def __init__(self, config: EnvironmentConfig, num_envs: int) -> None:
        self.config = config
        self.num_envs = num_envs
        self._env = _make(config, num_envs)
        self.spaces = Spaces.from_gymnasium(self._env.single_observation_space, self._env.single_action_space)

    def reset(self, seed: int) -> np.ndarray:
        """Start new episodes everywhere and return float32 observations [B, D]."""
        try:
            observations, _ = self._env.reset(seed=seed)
        except Exception as error:
            raise self._failed("reset", error) from error
        return self._checked_observations(observations)

    def step(self, actions_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Send action indices (0 is the first action) and return obs [B, D], rewards, terminateds, truncateds [B]."""
        try:
            observations, rewards, terminateds, truncateds, _ = self._env.step(actions_B + self.spaces.action_start)
        except Exception as error:
            raise self._failed("step", error) from error
        rewards_B = self._checked_rewards(rewards)
        return self._checked_observations(observations), rewards_B, np.asarray(terminateds, bool), np.asarray(truncateds, bool)

    def close(self) -> None:
        self._env.close()

    def _failed(self, method: str, error: Exception) -> EnvironmentFailed:
        return EnvironmentFailed(
            f"environment {self.config.id!r} raised {type(error).__name__} in {method}: {error}\nIts traceback:\n"
            + "".join(traceback.format_exception(error))
        )

    def _checked_observations(self, observations: Any) -> np.ndarray:
        try:
            obs_BD = np.asarray(observations, np.float32)
        except (TypeError, ValueError) as error:
            raise EnvironmentFailed(
                f"environment {self.config.id!r} returned an observation that is no array of numbers: {error}"
            ) from error
        if obs_BD.shape != (self.num_envs, self.spaces.num_features):
            raise EnvironmentFailed(
                f"environment {self.config.id!r} returned observations of shape {obs_BD.shape}, "
                f"its observation space says {(self.num_envs, self.spaces.num_features)}"
            )
        if not np.isfinite(obs_BD).all():
            slot, feature = np.argwhere(~np.isfinite(obs_BD))[0]
            raise EnvironmentFailed(
                f"environment {self.config.id!r} returned observation[{feature}] = {obs_BD[slot, feature]} in environment "
                f"{slot}; observations must be finite"
            )
        return obs_BD

    def _checked_rewards(self, rewards: Any) -> np.ndarray:
        rewards_B = np.asarray(rewards, np.float32)
        if rewards_B.shape != (self.num_envs,) or not np.isfinite(rewards_B).all():
            raise EnvironmentFailed(
                f"environment {self.config.id!r} returned rewards {rewards_B}; expected {self.num_envs} finite numbers"
            )
        return rewards_B


def read_spaces(config: EnvironmentConfig) -> Spaces:
    """Return what an environment's policies take and give, by making it once."""
    environment = VectorEnvironment(config, 1)
    environment.close()
    return environment.spaces


def _make(config: EnvironmentConfig, num_envs: int) -> VectorEnv:
    try:
        env = _make_vector(config, num_envs, None)
        if env.metadata.get("autoreset_mode") is AutoresetMode.NEXT_STEP:
            return env
        env.close()  # its own vectorisation ends episodes in another way; single environments in lockstep end them ours
        return _make_vector(config, num_envs, "sync")
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


def _make_vector(config: EnvironmentConfig, num_envs: int, vectorization_mode: str | None) -> VectorEnv:
    kwargs = dict(config.kwargs)
    if config.max_episode_steps is not None:
        kwargs["max_episode_steps"] = config.max_episode_steps
    return gymnasium.make_vec(config.id, num_envs=num_envs, vectorization_mode=vectorization_mode, **kwargs)


def _unknown_id(env_id: str) -> str:
    close = difflib.get_close_matches(env_id, gymnasium.registry.keys(), n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    return f"environment {env_id!r} is not registered with Gymnasium{hint} An id of your own is written module:Id-v0"
