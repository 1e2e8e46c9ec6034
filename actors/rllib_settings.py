"""Which configuration of RLlib a run's settings come to, and which settings are refused.

What is under `training.rllib` goes to RLlib's `AlgorithmConfig` under RLlib's own names, unchanged. Of the other settings of
`training` these are passed on, and only where the user set them, so that RLlib's own defaults hold otherwise:

    gamma, grad_clip, num_env_runners, num_cpus_per_env_runner, rollout_fragment_length    the same names
    lr                       all but SAC, CQL and IQL, which have several learning rates of their own
    lambda_                  PPO, APPO and MARWIL
    vf_loss_coeff, entropy_coeff, num_epochs, minibatch_size        PPO, APPO and IMPALA
    clip_param               PPO and APPO
    hidden, activation       model_config.fcnet_hiddens and model_config.fcnet_activation
    vf_share_layers          model_config.vf_share_layers: PPO, APPO, IMPALA and MARWIL
    worker_timeout_s         sample_timeout_s
    normalize_observations   RLlib's connector MeanStdFilter: all but the offline algorithms, which do not run it

`seed` is always passed on. `target_return`, `max_env_steps`, `patience`, `evaluation_…` and `checkpoint_…`, `keep_checkpoints`
are ours and hold for RLlib as well. Every other setting of `training` belongs to our own trainer and is refused when it is set.
"""

import dataclasses
import difflib
import importlib
import inspect
import logging
from pathlib import Path
from typing import Any

import gymnasium
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.connectors.common.flatten_observations import FlattenObservations
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

from policies.errors import ConfigError
from training.config import RLLIB_OFFLINE, EnvironmentConfig, TrainingConfig

WITH_OWN_LEARNING_RATES = ("SAC", "CQL", "IQL")
ON_POLICY = ("PPO", "APPO", "IMPALA")

# Setting of `training` -> which algorithms take it under the same name; empty: all of them.
SHARED: dict[str, tuple[str, ...]] = {
    "gamma": (),
    "grad_clip": (),
    "num_env_runners": (),
    "num_cpus_per_env_runner": (),
    "rollout_fragment_length": (),
    "lr": (*ON_POLICY, "DQN", "BC", "MARWIL"),
    "lambda_": ("PPO", "APPO", "MARWIL"),
    "vf_loss_coeff": ON_POLICY,
    "entropy_coeff": ON_POLICY,
    "num_epochs": ON_POLICY,
    "minibatch_size": ON_POLICY,
    "clip_param": ("PPO", "APPO"),
}
SHARED_MODEL: dict[str, tuple[str, tuple[str, ...]]] = {
    "hidden": ("fcnet_hiddens", ()),
    "activation": ("fcnet_activation", ()),
    "vf_share_layers": ("vf_share_layers", (*ON_POLICY, "MARWIL")),
}
OWN_TO_THE_RUN = {
    "algorithm",
    "rllib",
    "seed",
    "target_return",
    "max_env_steps",
    "patience",
    "evaluation_every_updates",
    "evaluation_episodes",
    "checkpoint_every_updates",
    "keep_checkpoints",
    "worker_timeout_s",
    "normalize_observations",
}

# The methods of AlgorithmConfig whose arguments are the settings one may pass through.
METHODS = (
    "environment",
    "env_runners",
    "learners",
    "training",
    "evaluation",
    "offline_data",
    "rl_module",
    "reporting",
    "debugging",
    "fault_tolerance",
)
IS_CODE = "it is code, which neither a loop file nor a bundle can hold"
IS_LOST = (
    "what it does to observations or actions would not be in the bundle; for a normaliser set training.normalize_observations"
)
IS_ENVIRONMENT = "the section `environment` of the loop file says it"
IS_OLD = "it belongs to RLlib's old API stack; see rllib.model_config"
REFUSED = {
    "env": IS_ENVIRONMENT,
    "env_config": IS_ENVIRONMENT,
    "observation_space": IS_ENVIRONMENT,
    "action_space": IS_ENVIRONMENT,
    "seed": "set training.seed",
    "env_runner_cls": IS_CODE,
    "learner_class": IS_CODE,
    "rl_module_spec": IS_CODE,
    "callbacks_class": IS_CODE,
    "custom_evaluation_function": IS_CODE,
    "env_to_module_connector": IS_LOST,
    "module_to_env_connector": IS_LOST,
    "learner_connector": IS_LOST,
    "add_default_connectors_to_env_to_module_pipeline": IS_LOST,
    "add_default_connectors_to_module_to_env_pipeline": IS_LOST,
    "add_default_connectors_to_learner_pipeline": IS_LOST,
    "observation_filter": IS_LOST,
    "preprocessor_pref": IS_OLD,
    "model": IS_OLD,
    "model_config_dict": IS_OLD,
    "exploration_config": IS_OLD,
}


def rllib_config(
    environment: EnvironmentConfig, training: TrainingConfig, single: gymnasium.Env, *, env_name: str = "trimtab"
) -> AlgorithmConfig:
    """Return RLlib's configuration, validated by RLlib; `single` is one of the environments, `env_name` its registered name.

    Raises `ConfigError` that names the setting and, for an unknown one, what is close to it.
    """
    name = training.rllib_algorithm
    assert name is not None
    logging.getLogger("ray.rllib").setLevel(logging.ERROR)  # it warns of its own defaults while it is configured
    # Not by Ray Tune's registry: it imports every algorithm, and what those need.
    config: AlgorithmConfig = getattr(importlib.import_module(f"ray.rllib.algorithms.{name.lower()}"), f"{name}Config")()
    settings = passed_settings(training)
    for setting in settings:
        if setting in REFUSED:
            raise ConfigError(f"training.rllib.{setting} cannot be set: {REFUSED[setting]}")
    if name in RLLIB_OFFLINE:
        _check_input(name, settings, training)
    elif "input_" in settings:
        raise ConfigError(f"training.rllib.input_ is for {', '.join(RLLIB_OFFLINE)}; RLlib's {name} learns from the environment")
    methods = _methods_by_setting(config)
    calls: dict[str, dict[str, Any]] = {}
    for setting, value in settings.items():
        calls.setdefault(methods.get(setting, "") or _refuse(setting, name, methods), {})[setting] = value
    try:
        _apply_our_own(config, environment, training, single, env_name)
        for method, arguments in calls.items():
            getattr(config, method)(**arguments)
        if (
            name in RLLIB_OFFLINE
        ):  # two readers as RLlib has them take both CPUs of a small machine, and wait for a third for ever
            config.map_batches_kwargs = {"concurrency": max(1, config.num_learners), **config.map_batches_kwargs}
        config.validate()
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise ConfigError(f"RLlib's {name} refuses its settings: {error}") from error
    return config


def passed_settings(training: TrainingConfig) -> dict[str, Any]:
    """Return all settings that RLlib gets, by its names: those under `rllib` and the ones passed on from `training`."""
    name = training.rllib_algorithm
    assert name is not None
    settings, model = dict(training.rllib), {}
    for key in sorted(training.model_fields_set - OWN_TO_THE_RUN):
        model_key, algorithms = SHARED_MODEL.get(key, (None, SHARED.get(key)))
        if algorithms is None or (algorithms and name not in algorithms):
            raise ConfigError(f"training.{key} is a setting of our own trainer that RLlib's {name} does not have; {_remedy(key)}")
        if model_key is not None:
            model[model_key] = _as_json(getattr(training, key))
        elif key in settings:
            raise ConfigError(f"{key} is set both as training.{key} and as training.rllib.{key}; remove one of them")
        else:
            settings[key] = _as_json(getattr(training, key))
    if "worker_timeout_s" in training.model_fields_set and "sample_timeout_s" not in settings:
        settings["sample_timeout_s"] = training.worker_timeout_s
    given = settings.get("model_config", {})
    _check_model_config(given, model)
    if model or given:
        settings["model_config"] = model | given
    return settings


def observation_connectors(
    observation_space: gymnasium.Space, training: TrainingConfig, *, update_stats: bool = True
) -> list[ConnectorV2]:
    """Return what RLlib does to observations before its module sees them: flatten what is not a vector, then normalise."""
    connectors: list[ConnectorV2] = [FlattenObservations()] if needs_flattening(observation_space) else []
    if training.normalize_observations:
        connectors.append(MeanStdFilter(update_stats=update_stats))
    return connectors


def needs_flattening(space: gymnasium.Space) -> bool:
    """Say whether RLlib's modules cannot take an observation as it is: all but vectors of floats."""
    return not (isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1 and space.dtype.kind == "f")


def _apply_our_own(
    config: AlgorithmConfig, environment: EnvironmentConfig, training: TrainingConfig, single: gymnasium.Env, env_name: str
) -> None:
    """Set what the loop file says elsewhere, and defaults under which an error arrives at once and as itself."""
    space = single.observation_space
    offline = training.rllib_algorithm in RLLIB_OFFLINE
    config.environment(env_name)
    config.env_runners(env_to_module_connector=lambda env, spaces, device: observation_connectors(space, training))
    if offline:  # where no environment runs, the spaces are asked of the configuration, and only the learner flattens
        config.environment(observation_space=space, action_space=single.action_space)
        config.offline_data(input_compress_columns=[])  # what RLlib calls compressed is a pickle: only for who asks for it
        if needs_flattening(space):
            config.learners(learner_connector=lambda *_: [FlattenObservations(as_learner_connector=True)])
    if training.rllib_algorithm in WITH_OWN_LEARNING_RATES:
        config.training(lr=None)  # CQL's own default is one that RLlib refuses
    if environment.vectorization == "async":
        config.env_runners(gym_env_vectorize_mode="async")
    config.debugging(seed=training.seed, log_level="ERROR", log_sys_usage=False)
    # RLlib's own default restarts a runner a thousand times, 60 s after each failure, and tells nobody why.
    config.fault_tolerance(restart_failed_env_runners=False)


def _methods_by_setting(config: AlgorithmConfig) -> dict[str, str]:
    """Return which method of the configuration takes each setting; a subclass adds to what its base takes."""
    methods = {}
    for method in METHODS:
        for cls in type(config).__mro__:
            function = vars(cls).get(method)
            if function is not None:
                parameters = inspect.signature(function).parameters.values()
                methods |= {p.name: method for p in parameters if p.kind is p.KEYWORD_ONLY}
    return methods


def _refuse(setting: str, name: str, methods: dict[str, str]) -> str:
    close = difflib.get_close_matches(setting, methods, n=3)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    raise ConfigError(f"training.rllib.{setting} is not a setting of RLlib's {name}{hint}")


def _check_input(name: str, settings: dict[str, Any], training: TrainingConfig) -> None:
    if training.normalize_observations:
        raise ConfigError(
            f"training.normalize_observations: RLlib's {name} does not normalise what it reads; normalise the recording"
        )
    paths = settings.get("input_")
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        raise ConfigError(f"RLlib's {name} learns from recorded episodes: set training.rllib.input_ to a path or a list of paths")
    missing = [path for path in paths if "://" not in path and not Path(path).exists()]
    if missing:
        raise ConfigError(f"training.rllib.input_ names {', '.join(missing)}, which does not exist")


def _check_model_config(given: Any, ours: dict[str, Any]) -> None:
    if not isinstance(given, dict):
        raise ConfigError(
            f"training.rllib.model_config is {type(given).__name__}, expected a mapping of RLlib's DefaultModelConfig"
        )
    known = [field.name for field in dataclasses.fields(DefaultModelConfig)]
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise ConfigError(f"training.rllib.model_config.{key} is not in RLlib's DefaultModelConfig{hint}")
        if key in ours:
            raise ConfigError(f"training.rllib.model_config.{key} is set in `training` as well; remove one of them")


def _remedy(key: str) -> str:
    if key == "lr":
        return "set training.rllib.actor_lr, critic_lr and the like instead"
    return "remove it, or set what RLlib has instead under training.rllib"


def _as_json(value: Any) -> Any:
    """Return a setting as RLlib writes it: schedules and sizes are lists there."""
    return [_as_json(item) for item in value] if isinstance(value, tuple) else value
