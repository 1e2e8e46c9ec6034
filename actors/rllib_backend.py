"""How a run trains with RLlib instead of our own trainer: another learner under the same command, with the same result.

    algorithm.train() ──▶ exported policy ──▶ evaluation ──every checkpoint_every_updates──▶ checkpoint with golden vectors

One update is one call of `algorithm.train()`, whose time counts as learning. RLlib's algorithm lives in this process; its env
runners and learners, where more than none are asked for, are actors of the cluster. Checkpoints are in our format: RLlib's own
are pickles.
"""

import contextlib
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, EPISODE_RETURN_MEAN, LEARNER_RESULTS, NUM_EPISODES_LIFETIME

from actors import rllib_algorithm, rllib_environment
from actors.clock import Clock
from actors.controller import OnMessage, OnProgress, Progress, TrainResult
from actors.learner import LOCK_TIMEOUT_S
from actors.rllib_algorithm import DEFAULT_MODULE_ID
from actors.rllib_export import InferencePath
from actors.rllib_settings import passed_settings, rllib_config
from policies.errors import ConfigError, NotFound, TrainingFailed, UsageError
from policies.policy import Policy
from policies.spaces import Spaces
from policies.storage import Storage
from training.checkpoint import load_checkpoint, read_layout, save_checkpoint
from training.config import EnvironmentConfig, TrainingConfig
from training.environment import check_environment, read_spaces
from training.evaluation import EvaluationRequest, evaluate
from training.golden import golden_inputs, to_tensors
from training.metrics import MetricsLog
from training.network import parameters_sha256
from training.pacing import Evaluations, is_evaluated, stop_reason
from training.runs import (
    RESUMABLE_CHANGES,
    RunConfig,
    change_config,
    create_run,
    lock_run,
    new_run_id,
    open_run,
    require_resumable,
)
from training.seeds import Stream, derived_seed
from training.vectorization import make_single

# RLlib's names of what `UpdateReport` has as well, so that curves and TensorBoard show both trainers' beside each other.
OUR_NAMES = {
    "vf_loss": "value_loss",
    "mean_kl_loss": "kl",
    "vf_explained_var": "explained_variance",
    "gradients_default_optimizer_global_norm": "grad_norm",
    "default_optimizer_learning_rate": "lr",
}
NOT_SAVED = (
    "RLlib's replay buffer, environments and random numbers are in no checkpoint: this run goes on from its weights, optimisers, "
    "normaliser and counters, but not to the same bits as if it had never stopped"
)


def train_with_rllib(
    environment: EnvironmentConfig,
    training: TrainingConfig,
    storage: Storage,
    *,
    run_id: str | None = None,
    resume: bool = False,
    force: bool = False,
    on_progress: OnProgress = lambda progress: None,
    on_message: OnMessage = lambda message: None,
) -> TrainResult:
    """Do what `actors.controller.train` does, with the RLlib algorithm that `training.algorithm` names.

    Before anything starts, `ConfigError` names a setting that RLlib does not know or that a bundle cannot hold, and
    `ClusterError` what the cluster lacks. What a resumed run does not get back is said to `on_message`.
    """
    called_s = time.monotonic()
    if not resume:
        check_environment(environment)
    run_id = run_id or (None if resume else new_run_id(time.time()))
    if run_id is None:
        raise UsageError("resuming needs a run id")
    spaces, config, path = _prepare(environment, training, env_name=f"trimtab-{run_id}")
    rllib_algorithm.require_resources(config)
    run_config = RunConfig(environment, training)
    if resume:
        start = _resume_run(storage, run_id, run_config, spaces, path, force=force, on_message=on_message)
    else:
        start = _Run(create_run(storage, run_id, run_config))
    with (
        lock_run(start.run_dir, timeout_s=LOCK_TIMEOUT_S),
        contextlib.closing(MetricsLog(start.run_dir, after_update=start.update)) as metrics,
    ):
        if start.is_over(training):  # nothing to do: RLlib need not even start
            return _Loop(environment, training, spaces, path, start, metrics, on_progress).result(called_s)
        rllib_environment.register(config.env, environment)
        with rllib_algorithm.running(config, training) as algorithm:
            loop = _Loop(environment, training, spaces, path, start, metrics, on_progress)  # its clock starts now
            loop.run(algorithm)
    return loop.result(called_s)


@dataclass
class _Run:
    """Where a run is. `state` is RLlib's, of the checkpoint it began with; `best` are the best policy's tensors."""

    run_dir: Path
    update: int = 0
    env_steps: int = 0
    elapsed_s: float = 0.0
    evaluations: Evaluations = field(default_factory=Evaluations)
    state: Any = None
    best: dict[str, np.ndarray] | None = None
    checkpoint: str = ""
    parameters_sha256: str = ""

    def is_over(self, training: TrainingConfig) -> bool:
        return stop_reason(training, self.env_steps, self.evaluations) is not None


class _Loop:
    """Trains, evaluates and saves until the run is over, and keeps account of where it is."""

    def __init__(
        self,
        environment: EnvironmentConfig,
        training: TrainingConfig,
        spaces: Spaces,
        path: InferencePath,
        run: _Run,
        metrics: MetricsLog,
        on_progress: OnProgress,
    ) -> None:
        self._environment = environment
        self._training = training
        self._spaces = spaces
        self._path = path
        self._metrics = metrics
        self._on_progress = on_progress
        self._first_env_step = run.env_steps
        self._clock = Clock(run.elapsed_s)
        self._run = run

    def run(self, algorithm: Algorithm) -> None:
        """Train to the end; raises `EnvironmentFailed` or `TrainingFailed`, after which the run can be resumed."""
        training, run, clock = self._training, self._run, self._clock
        if run.state is not None:
            _restore(algorithm, run.state, run.run_dir)
            run.state = None
            rllib_algorithm.refill_replay_buffer(algorithm)
        else:
            self._save(algorithm)  # generation 0, so that the run can be resumed after a kill at any moment
        counter = rllib_algorithm.StepCounter(algorithm, training)
        while not run.is_over(training):
            began_s = time.monotonic()
            result = _train_once(algorithm, run)
            clock.computed(learner_s=time.monotonic() - began_s)  # RLlib collects and learns in one call
            run.update, run.env_steps = run.update + 1, run.env_steps + counter.steps_since_last()
            run.evaluations = run.evaluations.after_update()
            clock.lap("learn_s")

            if is_evaluated(training, run.update, run.env_steps):
                self._evaluate(algorithm)
                clock.lap("evaluate_s")

            progress = self._progress(result)
            self._metrics.append(asdict(progress))  # before the checkpoint, as in our own loop

            if run.is_over(training) or run.update % training.checkpoint_every_updates == 0:
                self._save(algorithm)
                clock.lap("checkpoint_s")
            self._on_progress(progress)

    def result(self, called_s: float) -> TrainResult:
        run, clock = self._run, self._clock
        reason = stop_reason(self._training, run.env_steps, run.evaluations)
        return TrainResult(
            run_id=run.run_dir.name,
            env_steps=run.env_steps,
            updates=run.update,
            wall_s=time.monotonic() - called_s,
            env_steps_per_s=(run.env_steps - self._first_env_step) / clock.session_s,
            time_to_target_s=clock.evaluated_s if reason == "target" else None,
            evaluation_return_mean=run.evaluations.last_return,
            best_return_mean=run.evaluations.best_return,
            stop_reason=reason,
            parameters_sha256=run.parameters_sha256,
            checkpoint=run.checkpoint,
            phases_s=clock.totals,
        )

    def _evaluate(self, algorithm: Algorithm) -> None:
        """Run episodes with the greedy policy as it would be served, and keep it when it is the best so far."""
        run = self._run
        seed = derived_seed(self._training.seed, Stream.EVALUATION, run.update)
        request = EvaluationRequest(self._current_policy(algorithm), self._training.evaluation_episodes, seed, keep_steps=True)
        episodes = evaluate(self._environment, request)
        obs_ND, _ = golden_inputs(self._spaces, episodes.obs_ND, None, seed=self._training.seed)
        policy, golden = self._path.export(obs_ND)  # every time: a policy that is exported wrongly was evaluated wrongly
        run.evaluations = run.evaluations.after_evaluation(run.update, episodes.return_mean)
        if run.evaluations.best_update == run.update:
            run.best = policy.tensors | to_tensors(golden)

    def _current_policy(self, algorithm: Algorithm) -> Policy:
        self._path.load(rllib_algorithm.module_state(algorithm), rllib_algorithm.connector_state(algorithm))
        return self._path.policy()

    def _save(self, algorithm: Algorithm) -> None:
        """Commit a checkpoint: the policy as it is now, RLlib's whole state as tensors, and the best policy so far."""
        run = self._run
        policy = self._current_policy(algorithm)
        run.parameters_sha256 = parameters_sha256(policy.tensors)
        state = {
            "run_id": run.run_dir.name,
            "update": run.update,
            "env_steps": run.env_steps,
            "elapsed_s": self._clock.elapsed_s,
            "evaluations": asdict(run.evaluations),
            "parameters_sha256": run.parameters_sha256,
            "spaces": policy.spaces.to_json(),
            "network": policy.architecture.to_json(),
            "vf_share_layers": False,
            "rllib": {"version": ray.__version__, "settings": passed_settings(self._training)},
        }
        run.checkpoint = str(
            save_checkpoint(
                run.run_dir,
                update=run.update,
                tensors=policy.tensors | rllib_algorithm.state_tensors(algorithm),
                best=run.best,
                state=state,
                keep=self._training.keep_checkpoints,
            )
        )

    def _progress(self, result: dict[str, Any]) -> Progress:
        run, clock = self._run, self._clock
        runners = result.get(ENV_RUNNER_RESULTS, {})
        return Progress(
            run_id=run.run_dir.name,
            update=run.update,
            env_steps=run.env_steps,
            env_steps_per_s=(run.env_steps - self._first_env_step) / clock.session_s,
            elapsed_s=clock.elapsed_s,
            num_episodes=int(runners.get(NUM_EPISODES_LIFETIME, 0)),
            return_mean=_finite(runners.get(EPISODE_RETURN_MEAN)),
            return_low=None,  # RLlib tells the mean of its last episodes, but not their spread
            return_high=None,
            evaluation_return_mean=run.evaluations.last_return,
            best_return_mean=run.evaluations.best_return,
            losses=_losses(result),
            worker_restarts=0,
            environment_failures=0,
            learner_restarts=0,
            **clock.take_laps(),
        )


def _prepare(
    environment: EnvironmentConfig, training: TrainingConfig, *, env_name: str
) -> tuple[Spaces, AlgorithmConfig, InferencePath]:
    """Refuse everything that can be refused without starting anything."""
    spaces = read_spaces(environment)
    single = make_single(environment)
    try:
        config = rllib_config(environment, training, single, env_name=env_name)
        rllib_environment.use_explaining_runners(config)
        return spaces, config, InferencePath(config, training, single, spaces)
    finally:
        single.close()


def _resume_run(
    storage: Storage,
    run_id: str,
    config: RunConfig,
    spaces: Spaces,
    path: InferencePath,
    *,
    force: bool,
    on_message: OnMessage,
) -> _Run:
    run_dir = open_run(storage, run_id)
    lock_run(run_dir, timeout_s=LOCK_TIMEOUT_S).close()  # a killed run may still be in the middle of a checkpoint
    require_resumable(run_dir, config, force=force)
    try:
        checkpoint = load_checkpoint(run_dir)
    except NotFound:  # killed after it was created and before generation 0 was saved
        change_config(run_dir, config)
        return _Run(run_dir)
    _require_same_settings(run_id, checkpoint.state, config.training, force=force)
    layout = read_layout(checkpoint.state)
    if layout.spaces.to_json() != spaces.to_json():
        raise ConfigError(f"run {run_id!r} was trained on {layout.spaces.to_json()}, its environment now has {spaces.to_json()}")
    if layout.architecture != path.architecture:
        raise ConfigError(f"run {run_id!r} has the network {layout.architecture}, the settings now ask for {path.architecture}")
    change_config(run_dir, config)  # last: a run that is refused keeps its settings
    for message in checkpoint.skipped:
        on_message(f"damaged checkpoint skipped, continuing from {checkpoint.path.name}: {message}")
    start = _Run(
        run_dir=run_dir,
        update=checkpoint.state["update"],
        env_steps=checkpoint.state["env_steps"],
        elapsed_s=checkpoint.state["elapsed_s"],
        evaluations=Evaluations(**checkpoint.state["evaluations"]),
        state=rllib_algorithm.state_from_tensors(checkpoint.tensors),
        best=checkpoint.best,
        checkpoint=str(checkpoint.path),
        parameters_sha256=checkpoint.state["parameters_sha256"],
    )
    if not start.is_over(config.training):
        on_message(NOT_SAVED)
    return start


def _require_same_settings(run_id: str, state: dict[str, Any], training: TrainingConfig, *, force: bool) -> None:
    """Compare what RLlib is told with what it was told: a default of RLlib's is no setting of ours that could be compared."""
    if "rllib" not in state:
        raise ConfigError(f"run {run_id!r} was not trained by RLlib; resume it with the algorithm it was started with")
    before, after = state["rllib"]["settings"], passed_settings(training)
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    refused = [key for key in changed if key not in RESUMABLE_CHANGES]
    if refused and not force:
        listed = ", ".join(f"{key} {before.get(key, 'not set')!r} -> {after.get(key, 'not set')!r}" for key in refused)
        raise ConfigError(
            f"run {run_id!r} cannot be resumed with changed RLlib settings: {listed}; restore them, start a new run or go on all "
            "the same with --force"
        )


def _restore(algorithm: Algorithm, state: Any, run_dir: Path) -> None:
    try:
        rllib_algorithm.restore(algorithm, state)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise ConfigError(
            f"RLlib does not take back the state of run {run_dir.name!r}: {type(error).__name__} {error}; it was saved with "
            "other settings or by another version"
        ) from error


def _train_once(algorithm: Algorithm, run: _Run) -> dict[str, Any]:
    """Run one update; the environment's own error comes through, any other says how to go on."""
    try:
        return algorithm.train()
    except Exception as error:
        own = rllib_environment.find_own_error(error)
        if own is not None:
            raise own from None
        raise TrainingFailed(
            f"RLlib failed in update {run.update + 1}: {type(error).__name__}: {error}; "
            f"`trimtab resume --run {run.run_dir.name}` goes on from the last checkpoint"
        ) from error


def _losses(result: dict[str, Any]) -> dict[str, float]:
    """Return what RLlib's learner reports of the policy: its plain numbers, under our names where those mean the same."""
    learner = result.get(LEARNER_RESULTS, {}).get(DEFAULT_MODULE_ID, {})
    numbers = {OUR_NAMES.get(key, key): _finite(value) for key, value in learner.items()}
    return {key: value for key, value in numbers.items() if value is not None}


def _finite(value: Any) -> float | None:
    if isinstance(value, (int, float, np.number)) and np.isfinite(value):
        return float(value)
    return None
