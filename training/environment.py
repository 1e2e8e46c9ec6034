"""How environments are stepped and checked, with one meaning of "the episode ended".

B environment, D feature, A choices of an action mask, F environments whose final observation came beside the next one.
"""

import traceback
import warnings
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import concatenate, create_empty_array

from policies.errors import ConfigError, EnvironmentFailed
from policies.spaces import ACTION_MASK, Choices, Spaces, action_of, allows_something
from training.config import EnvironmentConfig
from training.vectorization import failed, make_single, make_vector


@dataclass(frozen=True)
class Step:
    """What one call of `env.step` did in all environments.

    `valid_B` is False where it only reset (autoreset mode NEXT_STEP): no reward, nothing ended, nothing to learn from. In mode
    SAME_STEP the next episode's first observation has taken the place of the final one, which is then in `final_obs_FD`, with
    the environments they belong to in `final_F`.
    """

    valid_B: np.ndarray
    rewards_B: np.ndarray
    terminateds_B: np.ndarray
    truncateds_B: np.ndarray
    final_F: np.ndarray
    final_obs_FD: np.ndarray


class VectorEnvironment:
    """`num_envs` environments stepped together. `obs_BD` and `mask_BA` (None without masks) are what a policy has to look at.

    This is the one place where environments are stepped, for collecting and for evaluation alike. Gymnasium's modes NEXT_STEP
    and SAME_STEP are both understood. Raises `ConfigError`, `SpaceUnsupported` or `EnvironmentFailed`.
    """

    def __init__(
        self, config: EnvironmentConfig, num_envs: int, *, seed: int, reset_options: dict[str, Any] | None = None
    ) -> None:
        self.config = config
        self.num_envs = num_envs
        self._env = make_vector(config, num_envs)
        try:
            self._begin(seed, reset_options)
        except BaseException:
            self.close()
            raise

    def _begin(self, seed: int, reset_options: dict[str, Any] | None) -> None:
        """Reset, and see what the environment is like."""
        num_envs = self.num_envs
        try:
            observations, infos = self._env.reset(seed=seed, options=reset_options)
        except Exception as error:
            raise failed(self.config, "reset", error) from error
        self.spaces = Spaces.from_gymnasium(
            self._env.single_observation_space,
            self._env.single_action_space,
            mask_in_info=ACTION_MASK in infos,
            history=self.config.history,
        )
        self._mask_is_observed = isinstance(observations, dict) and ACTION_MASK in observations
        self._resets_in_same_step = self._env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
        self._ended_B = np.zeros(num_envs, bool)
        self._nothing_final = np.empty(0, np.int64), np.empty((0, self.spaces.num_features), np.float32)
        self.obs_BD = self._encode(observations, num_envs)
        self.mask_BA = self._mask(observations, infos)

    def step(self, actions: np.ndarray) -> Step:
        """Send the environment's own actions (batched as its spaces say), move on, and say what happened."""
        try:
            observations, rewards, terminateds, truncateds, infos = self._env.step(actions)
        except Exception as error:
            raise failed(self.config, "step", error) from error
        valid_B = np.ones(self.num_envs, bool) if self._resets_in_same_step else ~self._ended_B
        # Copies: an environment may write its next step into the same arrays, and a fragment keeps them all.
        terminateds_B, truncateds_B = np.array(terminateds, bool), np.array(truncateds, bool)
        self._ended_B = terminateds_B | truncateds_B
        self.obs_BD = self._encode(observations, self.num_envs)
        self.mask_BA = self._mask(observations, infos)
        final = self._nothing_final
        if self._resets_in_same_step and self._ended_B.any():
            final = self._final_observations(infos, np.flatnonzero(self._ended_B))
        return Step(valid_B, self._checked_rewards(rewards), terminateds_B, truncateds_B, *final)

    def close(self) -> None:
        try:
            self._env.close()
        except Exception as error:
            raise failed(self.config, "close", error) from error

    def _encode(self, observations: Any, batch_size: int) -> np.ndarray:
        try:
            obs_BD = self.spaces.encode_batch(observations, batch_size)
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise EnvironmentFailed(
                f"environment {self.config.id!r} returned an observation that does not fit its space: {error}"
            ) from error
        if not np.isfinite(obs_BD).all():
            slot, feature = np.argwhere(~np.isfinite(obs_BD))[0]
            raise EnvironmentFailed(
                f"environment {self.config.id!r} returned observation[{feature}] = {obs_BD[slot, feature]} in environment "
                f"{slot}; observations must be finite"
            )
        return obs_BD

    def _mask(self, observations: Any, infos: dict[str, Any]) -> np.ndarray | None:
        """Return which choices exist, bool [B, A]; everything is allowed where an episode is over: that action is ignored."""
        if not self.spaces.has_mask:
            if ACTION_MASK in infos:
                raise EnvironmentFailed(
                    f"environment {self.config.id!r} gave {ACTION_MASK} in `info` of a step, but not when it was reset; "
                    "without it the first action of an episode may be one that does not exist"
                )
            return None
        assert isinstance(self.spaces.action, Choices)
        mask_BA, is_given_B = self._given_mask(observations, infos)
        is_ignored_B = self._ended_B & (not self._resets_in_same_step)
        if not (is_given_B | is_ignored_B).all():
            raise EnvironmentFailed(f"environment {self.config.id!r} gave {ACTION_MASK} in `info` before, but not in this step")
        nothing_B = ~allows_something(mask_BA, self.spaces.action)
        if (nothing_B & ~is_ignored_B).any():
            raise EnvironmentFailed(
                f"environment {self.config.id!r} gave an {ACTION_MASK} that allows nothing, in environment "
                f"{np.flatnonzero(nothing_B & ~is_ignored_B)[0]}; end the episode instead"
            )
        mask_BA[nothing_B] = True
        return mask_BA

    def _given_mask(self, observations: Any, infos: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Return masks [B, A] and for which environments there are any [B]: in `info` each may have one or not."""
        if not self._mask_is_observed and ACTION_MASK not in infos:
            return np.zeros((self.num_envs, self.spaces.mask_size), bool), np.zeros(self.num_envs, bool)
        mask = observations[ACTION_MASK] if self._mask_is_observed else infos[ACTION_MASK]
        is_given_B = np.ones(self.num_envs, bool)
        if not self._mask_is_observed:
            is_given_B = infos.get(f"_{ACTION_MASK}", is_given_B)
        if np.asarray(mask).dtype == object:  # Python's own lists, and None where there was none
            no_mask = np.zeros(self.spaces.mask_size)
            mask = [_flat_mask(row) if is_given else no_mask for row, is_given in zip(mask, is_given_B)]
        sizes = {np.size(row) for row in mask} - {self.spaces.mask_size}
        if sizes:
            raise EnvironmentFailed(
                f"environment {self.config.id!r} gave an {ACTION_MASK} of {min(sizes)} choices, its action space has "
                f"{self.spaces.mask_size}"
            )
        return np.array(mask).astype(bool).reshape(self.num_envs, -1), is_given_B

    def _final_observations(self, infos: dict[str, Any], ended_F: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what the episodes that ended saw last: SAME_STEP keeps it in `infos`."""
        finals = infos.get("final_obs")
        if finals is None:
            raise EnvironmentFailed(
                f"environment {self.config.id!r} resets in the same step but has no `final_obs` in its infos; without it a "
                "truncated episode's last value is unknown"
            )
        if isinstance(finals, dict):  # Gymnasium batches dictionaries key by key
            return ended_F, self._encode(_rows(finals, ended_F), len(ended_F))
        space = self._env.single_observation_space
        batch = concatenate(space, [finals[index] for index in ended_F], create_empty_array(space, len(ended_F)))
        return ended_F, self._encode(batch, len(ended_F))

    def _checked_rewards(self, rewards: Any) -> np.ndarray:
        rewards_B = np.array(rewards, np.float32)
        if rewards_B.shape != (self.num_envs,) or not np.isfinite(rewards_B).all():
            raise EnvironmentFailed(
                f"environment {self.config.id!r} returned rewards {rewards_B}; expected {self.num_envs} finite numbers"
            )
        return rewards_B


def read_spaces(config: EnvironmentConfig) -> Spaces:
    """Return what an environment's policies take and give, by making it once.

    Raises `ConfigError` when the settings name another number of features than an observation has.
    """
    environment = VectorEnvironment(config, 1, seed=0)
    environment.close()
    num_features = environment.spaces.num_features // config.history
    for key in ("observation_names", "observation_units"):
        if len(labels := getattr(config, key)) not in (0, num_features):
            raise ConfigError(
                f"environment.{key} has {len(labels)} entries, an observation has {num_features} features; give one for each, "
                "or none at all"
            )
    return environment.spaces


def feature_labels(config: EnvironmentConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return a name and a unit per feature of what a policy looks at; with a history the older ones say how old they are."""
    ages = range(config.history - 1, -1, -1)
    names = tuple(f"{name}, {age} before" if age else name for age in ages for name in config.observation_names)
    return names, config.observation_units * config.history


def check_environment(config: EnvironmentConfig) -> None:
    """Raise `ConfigError` with the message and the name of the rule when Gymnasium's own checker refuses the environment."""
    from gymnasium.utils.env_checker import check_env

    env = make_single(config.model_copy(update={"history": 1}))  # the environment itself, not what Gymnasium puts around it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it only advises is not a reason to refuse
            check_env(_as_checked(env), skip_render_check=True, skip_close_check=True)
    except Exception as error:
        raise ConfigError(
            f"environment {config.id!r} breaks a rule of Gymnasium's checker, {_rule(error)}: {type(error).__name__}: {error}"
        ) from error
    finally:
        env.close()


def _as_checked(env: gymnasium.Env) -> gymnasium.Env:
    """Return an environment without the wrappers of `gymnasium.make`: a time limit of one step is no fault of its own."""
    while type(env) in (gymnasium.wrappers.TimeLimit, gymnasium.wrappers.OrderEnforcing):
        env = env.env  # type: ignore[attr-defined]
    try:
        observation, info = env.reset(seed=0)
    except Exception:
        return env  # the checker resets it too, and names the rule
    return _KeepsToMasks(env) if _mask_in(observation, info) is not None else env


class _KeepsToMasks(gymnasium.Wrapper):
    """Takes the first choices that exist, whatever it is told: the checker draws from the whole space."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._mask = _mask_in(observation, info)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        choices = action_of(self.action_space)
        if self._mask is not None and isinstance(choices, Choices):
            parts = np.split(_flat_mask(self._mask), np.cumsum(choices.nvec)[:-1])
            action = choices.to_environment(np.array([[part.argmax() for part in parts]]))[0]
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._mask = _mask_in(observation, info)
        return observation, reward, terminated, truncated, info


def _flat_mask(mask: Any) -> np.ndarray:
    """Return a mask as one row; one of several components may be a list (or Gymnasium's tuple) of rows of different lengths."""
    return np.concatenate([np.ravel(part) for part in mask]) if isinstance(mask, (list, tuple)) else np.ravel(mask)


def _mask_in(observation: Any, info: Any) -> Any:
    if isinstance(observation, dict) and ACTION_MASK in observation:
        return observation[ACTION_MASK]
    return info.get(ACTION_MASK) if isinstance(info, dict) else None


def _rows(tree: Any, index_F: np.ndarray) -> Any:
    return {key: _rows(value, index_F) for key, value in tree.items()} if isinstance(tree, dict) else tree[index_F]


def _rule(error: BaseException) -> str:
    """Return the name of the checker's innermost function: of Gymnasium's own ones, not of the environment's."""
    frames = traceback.extract_tb(error.__traceback__)
    names = [frame.name for frame in frames if frame.filename.endswith("env_checker.py")]
    return names[-1] if names else "check_env"
