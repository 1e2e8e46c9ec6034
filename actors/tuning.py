"""How a hyper-parameter search runs: trials as Ray Tune trials, many at once, stopped early or copied by Tune's scheduler."""

import contextlib
import functools
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from actors.schedulers import asha, pbt
from actors.trial import Report, TrialSpec, run_trial
from policies.errors import ClusterError
from policies.storage import Storage
from training.config import EnvironmentConfig, TrainingConfig
from training.environment import check_environment, read_spaces
from training.tuning import Trial, TrialStatus, TuningConfig, draw_trials

START_TIMEOUT_S = 180.0  # with no trial running: somebody else's work holds the CPUs, or their processes do not start
TUNE_STATE = "tune"  # Ray Tune's own files, below the search's directory; removed at the end

# Tune writes CSV, JSON and TensorBoard files per trial, changes directories, takes over Ctrl-C and prints unless told not to.
TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints its heading whatever the verbosity
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

OnTrial = Callable[[list[Trial], Trial], None]


class _Stopped(Exception):
    """Somebody asked the search to stop."""


def search(
    environment: EnvironmentConfig,
    training: TrainingConfig,
    tuning: TuningConfig,
    storage: Storage,
    search_id: str,
    *,
    on_trial: OnTrial = lambda trials, changed: None,
    on_message: Callable[[str], None] = lambda message: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Trial]:
    """Run all trials and return what came of each. Ray must be initialised.

    `on_trial` hears of every change of a trial. Once `should_stop` says so, running trials end as interrupted; their runs can
    be resumed like any other. Raises `ConfigError`, `EnvironmentFailed` or `ClusterError` where no trial can run at all.
    """
    check_environment(environment)
    trials = draw_trials(tuning, training, read_spaces(environment), search_id)
    trainable = functools.partial(_tune_trial, TrialSpec(environment, training, tuning, storage.root))
    watcher = _Watcher(trials, on_trial=on_trial, on_message=on_message, should_stop=should_stop)
    state_dir = storage.tuning(search_id) / TUNE_STATE
    tune_config = tune.TuneConfig(
        scheduler=asha(tuning) if tuning.scheduler == "asha" else pbt(tuning, training),
        max_concurrent_trials=tuning.max_concurrent if tuning.scheduler == "asha" else None,
        reuse_actors=True,  # a process that has imported Ray Tune is half of a short trial's time
        trial_name_creator=_run_id,
        trial_dirname_creator=_run_id,
    )
    run_config = tune.RunConfig(name="state", storage_path=str(state_dir), verbose=0, callbacks=[watcher])
    trainable = tune.with_resources(trainable, tune.PlacementGroupFactory(_bundles(tuning, training)))
    try:
        with _quiet_tune(), contextlib.suppress(_Stopped):
            tune.Tuner(trainable, param_space=_samples(trials), tune_config=tune_config, run_config=run_config).fit()
    finally:
        shutil.rmtree(state_dir, ignore_errors=True)
    return watcher.ended()


def _samples(trials: list[Trial]) -> dict[str, Any]:
    """Return a search space for Tune of exactly the trials that can start. All drawing is ours, so that it is reproducible."""
    startable = [trial for trial in trials if trial.status is not TrialStatus.FAILED]
    return {"sample": tune.grid_search([{"run_id": trial.run_id, "parameters": trial.parameters} for trial in startable])}


def _tune_trial(spec: TrialSpec, config: dict[str, Any]) -> None:
    run_trial(spec, config["sample"]["parameters"])


def _run_id(trial: TuneTrial) -> str:
    return trial.config["sample"]["run_id"]


def _bundles(tuning: TuningConfig, training: TrainingConfig) -> list[dict[str, float]]:
    """Return the CPUs of one trial as Tune reserves them: for its own process, which only waits, and for its rollout workers.

    All are reserved at once or none, so trials that wait for each other's CPUs do not exist. Raises `ClusterError` when even
    one trial does not fit.
    """
    cpus = ray.cluster_resources().get("CPU", 0.0)
    needed = training.num_cpus_per_env_runner * training.num_env_runners
    if needed > cpus:
        raise ClusterError(
            f"one trial needs {needed:g} CPUs for {training.num_env_runners} rollout workers, the cluster has {cpus:g}; lower "
            "training.num_env_runners or training.num_cpus_per_env_runner"
        )
    own, workers = 0.0, [{"CPU": training.num_cpus_per_env_runner}] * training.num_env_runners
    if not needed:
        own, workers = 0.01, []  # Tune cannot reserve nothing at all
    if tuning.scheduler == "pbt" and tuning.max_concurrent is not None:
        # Tune's own limit would not let the other trials start before the first have finished, and pbt compares all of them.
        own = max(own, int(100 * (cpus / tuning.max_concurrent - needed)) / 100)
    return [{"CPU": own}, *workers]


class _Watcher(tune.Callback):
    """Keeps what came of each trial from what Tune hears, and ends the search when that is due."""

    def __init__(
        self,
        trials: list[Trial],
        *,
        on_trial: OnTrial,
        on_message: Callable[[str], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self._trials = {trial.run_id: trial for trial in trials}
        self._on_trial = on_trial
        self._on_message = on_message
        self._should_stop = should_stop
        self._last_seen_running_s = time.monotonic()

    def __reduce__(self) -> tuple[Any, ...]:
        return tune.Callback, ()  # Tune keeps its settings to restore a search from them, which nobody does here

    def ended(self) -> list[Trial]:
        """Return all trials; whatever still ran was interrupted."""
        for trial in list(self._trials.values()):
            if trial.status in (TrialStatus.RUNNING, TrialStatus.WAITING):
                self._change(trial.run_id, status=TrialStatus.INTERRUPTED)
        return list(self._trials.values())

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        if self._should_stop():
            raise _Stopped
        now_s = time.monotonic()
        if any(trial.status == TuneTrial.RUNNING for trial in trials):
            self._last_seen_running_s = now_s
        elif now_s - self._last_seen_running_s > START_TIMEOUT_S:
            raise ClusterError(
                f"no trial has been running for {START_TIMEOUT_S:g} s; {ray.available_resources().get('CPU', 0):g} of "
                f"{ray.cluster_resources().get('CPU', 0):g} CPUs are free: wait for what else runs on the cluster, or lower "
                "training.num_env_runners or training.num_cpus_per_env_runner"
            )

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._change(str(trial), status=TrialStatus.RUNNING, parameters=trial.config["sample"]["parameters"])

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        report = Report(**{field.name: result[field.name] for field in fields(Report)})
        known = self._trials[str(trial)]
        for message in report.messages:
            self._on_message(f"{known.run_id}: {message}")
        changes: dict[str, Any] = {
            "env_steps": report.env_steps,
            "best_return": None if math.isnan(report.best_return) else report.best_return,
            "reason": report.failure or report.stop_reason or "",
        }
        if report.failure is not None:
            changes["status"] = TrialStatus.FAILED
        elif report.stop_reason is not None:
            changes["status"] = TrialStatus.FINISHED
        if report.donor is not None and (report.donor,) != known.donors[-1:]:
            changes["donors"] = (*known.donors, report.donor)
        self._change(known.run_id, **changes)

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        if self._trials[str(trial)].status is TrialStatus.RUNNING:
            self._change(str(trial), status=TrialStatus.STOPPED)

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._change(str(trial), status=TrialStatus.FAILED, reason=_error_of(trial))

    def _change(self, run_id: str, **changes: Any) -> None:
        self._trials[run_id] = replace(self._trials[run_id], **changes)
        self._on_trial(list(self._trials.values()), self._trials[run_id])


def _error_of(trial: TuneTrial) -> str:
    """Return what Tune says of a trial that raised what is none of our errors, or whose process died."""
    lines = []
    if trial.error_file is not None:
        with open(trial.error_file) as file:
            lines = [line.strip() for line in file if line.strip()]
    return lines[-1] if lines else "its process died"


@contextlib.contextmanager
def _quiet_tune() -> Iterator[None]:
    """Let Tune say and change nothing here: what it would log of trials is in the table, and our Ctrl-C stays ours."""
    before = {name: os.environ.get(name) for name in TUNE_ENVIRONMENT}
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    levels = [logger.level for logger in loggers]
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGUSR1)
    os.environ.update(TUNE_ENVIRONMENT)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        if is_main:
            signal.signal(signal.SIGUSR1, handler)
