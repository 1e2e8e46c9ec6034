"""How an RLlib algorithm is started, watched, asked for its state and given one back."""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import (
    ALL_MODULES,
    COMPONENT_ENV_TO_MODULE_CONNECTOR,
    COMPONENT_LEARNER,
    COMPONENT_LEARNER_GROUP,
    COMPONENT_METRICS_LOGGER,
    COMPONENT_RL_MODULE,
    DEFAULT_MODULE_ID,
)
from ray.rllib.execution.rollout_ops import synchronous_parallel_sample
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    LEARNER_RESULTS,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    NUM_ENV_STEPS_TRAINED_LIFETIME,
    NUM_MODULE_STEPS_TRAINED_LIFETIME,
)
from ray.tune.result import TRAINING_ITERATION

from actors.rllib_environment import find_own_error
from actors.worker_pool import START_TIMEOUT_S
from policies.errors import ClusterError, ConfigError, EnvironmentFailed
from training import nested_state
from training.config import RLLIB_OFFLINE, TrainingConfig

STATE_PREFIX, STATE_JSON = "rllib", "rllib.json"  # tensors of a checkpoint; the second one holds UTF-8 bytes
# What learners of RLlib 2.60 learn outside their module and leave out of their state: SAC's temperature, PPO's KL coefficient,
# MARWIL's scale of advantages. Each is a tensor per module.
LEFT_OUT = ("curr_log_alpha", "curr_kl_coeffs_per_module", "moving_avg_sqd_adv_norms_per_module")
EXTRA = "trimtab_left_out"
POLL_S = 0.2


@contextlib.contextmanager
def running(config: AlgorithmConfig, training: TrainingConfig) -> Iterator[Algorithm]:
    """Build the algorithm for the time of the block. Its processes end with it, and so does the log directory RLlib makes.

    A learner in this process (`num_learners: 0`) uses one thread: several processes that each start a thread per core wait for
    each other (measured on two busy cores: 500 updates of DQN took 230 s with two threads, 12 s with one).
    """
    algorithm_class = config.algo_class
    if training.rllib_algorithm in RLLIB_OFFLINE:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    else:
        algorithm_class = _watched(algorithm_class, training.worker_timeout_s)
    num_threads, log_level = torch.get_num_threads(), logging.getLogger("ray.rllib").level
    torch.set_num_threads(1)
    algorithm = None
    try:
        algorithm = _built(algorithm_class, config)
        yield algorithm
    except BaseException:
        if algorithm is not None:
            logging.getLogger("ray.rllib").setLevel(logging.CRITICAL)  # that its runners are dead when it stops them is no news
            _kill_runners(algorithm)  # it would ask each to stop, and wait for one that hangs for ever
        raise
    finally:
        torch.set_num_threads(num_threads)
        if algorithm is not None:
            algorithm.stop()
            with contextlib.suppress(OSError):  # something is in it: then it is not ours to remove
                Path(algorithm.logdir).rmdir()
        logging.getLogger("ray.rllib").setLevel(log_level)


def require_resources(config: AlgorithmConfig) -> None:
    """Raise `ClusterError` when the cluster has not, or does not within two minutes have free, what RLlib will wait for."""
    learners, aggregators = max(1, config.num_learners), config.num_aggregator_actors_per_learner
    gpus = config.num_gpus_per_learner * learners + config.num_gpus_per_env_runner * config.num_env_runners
    cpus_per_learner = config.num_cpus_per_learner
    if cpus_per_learner == "auto":
        cpus_per_learner = 0 if config.num_gpus_per_learner else 1
    runners = config.num_env_runners + config.evaluation_num_env_runners
    cpus = config.num_cpus_per_env_runner * runners + cpus_per_learner * config.num_learners + aggregators * learners
    if config.is_offline:  # the actors that prepare batches, and one task that reads what they prepare
        concurrency = config.map_batches_kwargs["concurrency"]
        actors = concurrency if isinstance(concurrency, int) else concurrency[0]
        cpus += actors * config.map_batches_kwargs.get("num_cpus", 1) + 1
    there = ray.cluster_resources()
    for what, wanted, settings in (
        ("GPU", gpus, "training.rllib.num_gpus_per_learner or num_gpus_per_env_runner"),
        ("CPU", cpus, "training.num_env_runners, training.num_cpus_per_env_runner or training.rllib.num_learners"),
    ):
        if wanted > there.get(what, 0):
            raise ClusterError(
                f"RLlib is asked to use {wanted:g} {what}s, the cluster has {there.get(what, 0):g}; lower {settings}, or join a "
                "bigger cluster with --address"
            )
    deadline = time.monotonic() + START_TIMEOUT_S
    while cpus > ray.available_resources().get("CPU", 0):
        if time.monotonic() > deadline:
            free = ray.available_resources().get("CPU", 0)
            raise ClusterError(f"RLlib needs {cpus:g} CPUs, {free:g} of {there['CPU']:g} are free; wait for what uses the others")
        time.sleep(POLL_S)


class StepCounter:
    """Counts environment steps; of an offline algorithm, the recorded steps it learned from."""

    def __init__(self, algorithm: Algorithm, training: TrainingConfig) -> None:
        self._algorithm = algorithm
        self._is_offline = training.rllib_algorithm in RLLIB_OFFLINE
        self._last = self._total()

    def steps_since_last(self) -> int:
        last, self._last = self._last, self._total()
        return self._last - last

    def _total(self) -> int:
        if not self._is_offline:
            return _env_steps(self._algorithm)
        metrics, key = self._algorithm.metrics, (LEARNER_RESULTS, ALL_MODULES, NUM_ENV_STEPS_TRAINED_LIFETIME)
        steps = metrics.peek(key, default=0)
        return int(steps or metrics.peek((LEARNER_RESULTS, DEFAULT_MODULE_ID, NUM_MODULE_STEPS_TRAINED_LIFETIME), default=0))


def module_state(algorithm: Algorithm) -> dict[str, Any]:
    """Return the weights that the learner has now, of the part of the module that acts."""
    state = algorithm.learner_group.get_state(components=f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}", inference_only=True)
    modules = state[COMPONENT_LEARNER][COMPONENT_RL_MODULE]
    if isinstance(modules, ray.ObjectRef):
        modules = ray.get(modules, timeout=START_TIMEOUT_S)
    return modules[DEFAULT_MODULE_ID]


def connector_state(algorithm: Algorithm) -> dict[str, Any]:
    """Return what the env-to-module connectors learned, merged over all env runners: RLlib keeps that in the local one."""
    if algorithm.env_runner is not None:
        return algorithm.env_runner.get_state(components=COMPONENT_ENV_TO_MODULE_CONNECTOR)[COMPONENT_ENV_TO_MODULE_CONNECTOR]
    return algorithm.env_to_module_connector.get_state() if algorithm.env_to_module_connector is not None else {}


def state_tensors(algorithm: Algorithm) -> dict[str, np.ndarray]:
    """Return the whole state of an algorithm as tensors: modules, optimisers, connectors, counters."""
    state = {**algorithm.get_state(), EXTRA: _from_one_learner(algorithm)}
    node, tensors = nested_state.to_tensors(state, STATE_PREFIX)
    return {**tensors, STATE_JSON: np.frombuffer(json.dumps(node, allow_nan=False).encode(), np.uint8)}


def state_from_tensors(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Read what `state_tensors` returned."""
    return nested_state.from_tensors(json.loads(tensors[STATE_JSON].tobytes()), tensors)


def restore(algorithm: Algorithm, state: dict[str, Any]) -> None:
    """Give a state back to an algorithm that was just built."""
    if algorithm.env_runner_group is not None:
        algorithm.set_state(state)
    else:  # RLlib's own `set_state` forgets that an offline algorithm has no env runners
        algorithm.learner_group.set_state(state[COMPONENT_LEARNER_GROUP])
        algorithm.metrics.set_state(state[COMPONENT_METRICS_LOGGER])
        algorithm._iteration = state[TRAINING_ITERATION]
    for result in algorithm.learner_group.foreach_learner(_write_left_out, left_out=state[EXTRA]):
        result.get()


def refill_replay_buffer(algorithm: Algorithm) -> None:
    """Collect what a new run collects before it learns, with the policy of now; no step of it is counted.

    An empty buffer beside a trained network would be learned by heart.
    """
    wanted = getattr(algorithm.config, "num_steps_sampled_before_learning_starts", 0)
    if algorithm.local_replay_buffer is None or algorithm.offline_data is not None or not wanted:
        return
    try:
        episodes = synchronous_parallel_sample(
            worker_set=algorithm.env_runner_group,
            max_env_steps=wanted,
            sample_timeout_s=algorithm.config.sample_timeout_s,
            _uses_new_env_runners=True,
        )
    except Exception as error:
        raise find_own_error(error) or error from None
    algorithm.local_replay_buffer.add(episodes)


def _built(algorithm_class: type[Algorithm], config: AlgorithmConfig) -> Algorithm:
    try:
        return algorithm_class(config=config)
    except Exception as error:
        own = find_own_error(error)
        if own is not None:
            raise own from None
        if isinstance(error, (ValueError, TypeError, KeyError, AssertionError, NotImplementedError, OSError)):
            raise ConfigError(f"RLlib cannot start with these settings: {type(error).__name__}: {error}") from error
        raise


def _watched(algorithm_class: type[Algorithm], timeout_s: float) -> type[Algorithm]:
    """Return the algorithm, but it gives up when no environment moves any more: RLlib itself would ask again for ever."""

    class Watched(algorithm_class):  # type: ignore[misc, valid-type]
        _idle_s = 0.0

        def training_step(self) -> None:
            before, began_s = _env_steps(self), time.monotonic()
            super().training_step()
            self._idle_s = 0.0 if _env_steps(self) > before else self._idle_s + time.monotonic() - began_s
            if self._idle_s > timeout_s:
                raise EnvironmentFailed(
                    f"no environment made a step within {timeout_s:g} s; raise training.worker_timeout_s if it is only slow"
                )

    Watched.__name__ = Watched.__qualname__ = algorithm_class.__name__
    return Watched


def _kill_runners(algorithm: Algorithm) -> None:
    for group in (algorithm.env_runner_group, algorithm.eval_env_runner_group):
        if group is not None:
            for actor_id in group._worker_manager.actor_ids():
                ray.kill(group._worker_manager._actors[actor_id])


def _env_steps(algorithm: Algorithm) -> int:
    return int(algorithm.metrics.peek((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME), default=0))


def _from_one_learner(algorithm: Algorithm) -> dict[str, Any]:
    return next(iter(result.get() for result in algorithm.learner_group.foreach_learner(_read_left_out)))


def _read_left_out(learner: Any) -> dict[str, Any]:
    found = {name: getattr(learner, name) for name in LEFT_OUT if hasattr(learner, name)}
    return {
        name: {key: torch.as_tensor(variable).detach().cpu().numpy().copy() for key, variable in variables.items()}
        for name, variables in found.items()
    }


def _write_left_out(learner: Any, *, left_out: dict[str, Any]) -> None:
    for name, variables in left_out.items():
        for key, value in variables.items():
            getattr(learner, name)[key].data.copy_(torch.as_tensor(value))
