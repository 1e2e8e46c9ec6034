"""When Ray Tune ends a trial of a search early, and when it lets one copy another."""

import itertools
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler

from training.config import TrainingConfig
from training.seeds import Stream, generator
from training.tuning import TuningConfig, perturbed

REDUCTION_FACTOR = 3  # ASHA lets the best third of the trials go on, each time after three times as many environment steps
DEFAULT_GRACE = 9  # so that is at a ninth and at a third of all


def asha(tuning: TuningConfig) -> TrialScheduler:
    """Return the scheduler that stops a trial which is not among the best third of who came as far as it.

    It compares the best evaluation so far: that is what a run delivers.
    """
    return ASHAScheduler(
        time_attr="env_steps",
        metric="best_return",
        mode="max",
        max_t=tuning.max_env_steps,
        grace_period=tuning.grace_env_steps or max(1, tuning.max_env_steps // DEFAULT_GRACE),
        reduction_factor=REDUCTION_FACTOR,
        stop_last_trials=False,
    )


def pbt(tuning: TuningConfig, training: TrainingConfig) -> TrialScheduler:
    """Return the scheduler by which the worst quarter of the trials copy the best quarter and go on with other settings.

    It compares the last evaluation, that of the weights that are copied. It is asynchronous: no trial waits for another one, so
    a trial that fails holds nobody up; which trials meet then depends on timing.
    """
    rng = generator(tuning.seed, Stream.PERTURBATION)

    def explore(config: dict[str, Any]) -> dict[str, Any]:
        sample = config["sample"]
        return {"sample": {**sample, "parameters": perturbed(tuning, training, sample["parameters"], rng)}}

    return _TakingTurns(
        time_attr="rounds",
        metric="return_mean",
        mode="max",
        perturbation_interval=1,
        custom_explore_fn=explore,
        log_config=False,
    )


class _TakingTurns(PopulationBasedTraining):
    """Lets the trial go on that has waited longest, where not all fit the cluster at once.

    Ray's own rule prefers the one that has learned least, and a trial that copies another takes over its donor's time. As long
    as it stays the worse one it would be preferred, and copy, again and again, and its donor would wait for ever.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._turns = itertools.count()
        self._last_turn: dict[str, int] = {}

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        self._last_turn[trial.trial_id] = next(self._turns)
        return super().on_trial_result(tune_controller, trial, result)

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        waiting = [trial for trial in tune_controller.get_trials() if trial.status in (TuneTrial.PENDING, TuneTrial.PAUSED)]
        return min(waiting, key=lambda trial: self._last_turn.get(trial.trial_id, -1), default=None)
