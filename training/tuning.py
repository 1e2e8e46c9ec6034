"""What a hyper-parameter search tries, and which of its trials is the best: rules without a process."""

import difflib
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from policies.errors import ConfigError, SpaceUnsupported
from policies.spaces import Spaces
from training.config import TrainingConfig
from training.network import layout_of
from training.runs import BREAKING_CHANGES, RESUMABLE_CHANGES
from training.search_space import Domain, domain_of, draw, perturb
from training.seeds import Stream, generator

MAX_PERTURBATIONS = 10  # drawn until one is valid; then the donor's own settings are kept


class TuningConfig(BaseModel):
    """Settings of `trimtab tune`; the defaults finish on a laptop in minutes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: dict[str, Domain] = Field(
        {
            "lr": Domain(log_uniform=(3e-4, 1e-2)),
            "num_epochs": Domain(choice=(4, 8, 16)),
            "gamma": Domain(uniform=(0.97, 0.999)),
            "entropy_coeff": Domain(choice=(0.0, 0.003, 0.01)),
        },
        min_length=1,
        description="training settings to search, each with log_uniform, uniform or choice; more of them need more trials",
    )
    num_trials: int = Field(8, ge=1, le=10_000, description="bigger tries more settings and takes longer")
    scheduler: Literal["asha", "pbt"] = Field(
        "asha", description="asha: stop bad trials early; pbt: bad trials copy good ones and vary their settings"
    )
    max_env_steps: int = Field(200_000, ge=1, description="bigger lets every trial learn for longer before they are compared")
    max_concurrent: int | None = Field(None, ge=1, description="bigger runs more trials at once; null: as many as CPUs allow")
    seed: int = Field(0, ge=0, lt=2**63, description="same seed, same parameters: the same settings are drawn")
    grace_env_steps: int | None = Field(
        None, ge=1, description="asha: bigger gives bad trials more time before they are stopped; null: a ninth of max_env_steps"
    )
    perturb_every_updates: int = Field(
        10, ge=1, description="pbt: bigger lets trials learn for longer between copies; environments restart at each"
    )

    @field_validator("parameters")
    @classmethod
    def _are_settings_to_search(cls, parameters: dict[str, Domain]) -> dict[str, Domain]:
        for setting in parameters:
            if setting in RESUMABLE_CHANGES:
                raise ValueError(f"{setting} says how far or with how much to run, not how to learn; set it under training")
            if setting not in TrainingConfig.model_fields:
                allowed = sorted(set(TrainingConfig.model_fields) - RESUMABLE_CHANGES)
                close = difflib.get_close_matches(setting, allowed, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise ValueError(f"{setting!r} is no training setting; {hint}allowed: {', '.join(allowed)}")
        return {setting: domain_of(setting, domain) for setting, domain in parameters.items()}

    @model_validator(mode="after")
    def _scheduler_can_search(self) -> Self:
        if self.grace_env_steps is not None and self.grace_env_steps > self.max_env_steps:
            raise ValueError(f"grace_env_steps {self.grace_env_steps} must not be more than max_env_steps {self.max_env_steps}")
        if self.scheduler != "pbt":
            return self
        if self.num_trials < 2:
            raise ValueError("pbt needs trials that can copy each other; set num_trials >= 2")
        breaking = sorted(set(self.parameters) & BREAKING_CHANGES)
        if breaking:
            raise ValueError(
                f"pbt gives a trial the checkpoint of another one and changes its settings, and a checkpoint does not fit other "
                f"values of {', '.join(breaking)}; take them out of parameters or use scheduler: asha"
            )
        if "checkpoint_every_updates" in self.parameters:
            raise ValueError("pbt saves a checkpoint at each perturbation; set perturb_every_updates instead")
        return self


class TrialStatus(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped early"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Trial:
    """One run of a search and what came of it.

    `reason` says why it finished (as a run's stop reason) or failed. `donors` are the checkpoints it copied, as
    run/generation.
    """

    number: int
    run_id: str
    parameters: dict[str, Any]
    status: TrialStatus = TrialStatus.WAITING
    env_steps: int = 0
    best_return: float | None = None
    reason: str = ""
    donors: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "status": str(self.status), "donors": list(self.donors)}


def draw_trials(tuning: TuningConfig, training: TrainingConfig, spaces: Spaces, search_id: str) -> list[Trial]:
    """Return the trials of a search; those whose settings do not fit each other have failed already.

    Each trial has random numbers of its own: a search with more trials begins with the same ones. Raises `ConfigError` when
    none can start.
    """
    if training.rllib_algorithm is not None:
        raise ConfigError(
            f"tuning searches with our own trainer, training.algorithm is {training.algorithm!r}; set it to ppo, or search with "
            "Ray Tune and RLlib themselves"
        )
    if tuning.scheduler == "pbt" and tuning.perturb_every_updates % training.evaluation_every_updates:
        raise ConfigError(
            f"tuning.perturb_every_updates {tuning.perturb_every_updates} must be a multiple of "
            f"training.evaluation_every_updates {training.evaluation_every_updates}: trials are compared when they are evaluated"
        )
    trials = []
    for number in range(tuning.num_trials):
        parameters = draw(tuning.parameters, generator(tuning.seed, Stream.TUNING, number))
        trial = Trial(number, f"tune-{search_id}-{number:02d}", parameters)
        try:
            layout_of(spaces, trial_training(tuning, training, parameters))
        except (ConfigError, SpaceUnsupported) as error:
            trial = replace(trial, status=TrialStatus.FAILED, reason=str(error))
        trials.append(trial)
    if all(trial.status is TrialStatus.FAILED for trial in trials):
        raise ConfigError(f"no drawn combination of tuning.parameters is valid; the first one: {trials[0].reason}")
    return trials


def trial_training(tuning: TuningConfig, training: TrainingConfig, parameters: dict[str, Any]) -> TrainingConfig:
    """Return the settings of a trial's run; raises `ConfigError` when they do not fit each other."""
    changes = {**parameters, "max_env_steps": tuning.max_env_steps}
    if tuning.scheduler == "pbt":
        changes["checkpoint_every_updates"] = tuning.perturb_every_updates  # what a trial copies is a checkpoint
    try:
        return TrainingConfig(**{**training.model_dump(), **changes})
    except ValidationError as error:
        raise ConfigError("; ".join(_explained(problem) for problem in error.errors())) from None


def tuned_settings(tuning: TuningConfig) -> tuple[str, ...]:
    """Name the training settings by which a trial's run differs from the loop file for good."""
    return (*tuning.parameters, *(("checkpoint_every_updates",) if tuning.scheduler == "pbt" else ()))


def perturbed(
    tuning: TuningConfig, training: TrainingConfig, parameters: dict[str, Any], rng: np.random.Generator
) -> dict[str, Any]:
    """Return a valid combination near these parameters."""
    for _ in range(MAX_PERTURBATIONS):
        candidate = perturb(tuning.parameters, parameters, rng)
        try:
            trial_training(tuning, training, candidate)
            return candidate
        except ConfigError:
            continue
    return parameters


def ranked(trials: list[Trial], target_return: float | None) -> list[Trial]:
    """Return the trials from the best to the worst.

    Who reached the target comes first, with the fewest environment steps: more than the target was not asked for. Then the
    highest return. Trials that failed come last, whatever they reached: so does what never was evaluated.
    """

    def key(trial: Trial) -> tuple[bool, bool, bool, int, float, int]:
        best = trial.best_return
        reached = best is not None and target_return is not None and best >= target_return
        return (
            trial.status is TrialStatus.FAILED,
            best is None,
            not reached,
            trial.env_steps if reached else 0,
            0.0 if best is None else -best,
            trial.number,
        )

    return sorted(trials, key=key)


def best_of(trials: list[Trial], target_return: float | None) -> Trial | None:
    """Return the best trial, or None when none was evaluated."""
    first = ranked(trials, target_return)[0]
    return None if first.status is TrialStatus.FAILED or first.best_return is None else first


def _explained(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message
