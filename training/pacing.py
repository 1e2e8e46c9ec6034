"""Which fragments may be collected when, and when a run is over: rules without a process."""

from dataclasses import dataclass, replace
from typing import Literal

from training.config import TrainingConfig

StopReason = Literal["target", "patience", "max_env_steps"]


def fragments_due(version: int, *, restarted_at: int, training: TrainingConfig) -> range:
    """Return the updates whose fragments are collected with this version of the weights, as soon as it exists.

    Fragment u is collected with version max(u - max_staleness, last restart of the environments): at most `max_staleness`
    versions behind, and always the same one. So the bits of an asynchronous run depend on timing no more than those of a
    synchronous one; with `max_staleness` 0 the two are the same run. The budget of fragments that may have been started is

        (version + 1 + max_staleness) * shards

    cut at the next restart, where everything under way is used up first.
    """
    end = min(version + training.max_staleness, next_restart(version, training) - 1)
    first = version if version == restarted_at else version + training.max_staleness
    return range(first, end + 1)


def next_restart(version: int, training: TrainingConfig) -> int:
    """Return the update before which all environments start anew: the next checkpoint after this version."""
    every = training.checkpoint_every_updates
    return version - version % every + every


@dataclass(frozen=True)
class Evaluations:
    """What the evaluations of a run came to so far; `last_return` is None where the newest version was not evaluated."""

    last_return: float | None = None
    best_return: float | None = None
    best_update: int | None = None
    num_without_better: int = 0

    def after_update(self) -> "Evaluations":
        """Return the same with a new version that nobody has evaluated."""
        return replace(self, last_return=None)

    def after_evaluation(self, update: int, return_mean: float) -> "Evaluations":
        """Return the same with one more evaluation."""
        if self.best_return is None or return_mean > self.best_return:
            return Evaluations(return_mean, return_mean, update)
        return replace(self, last_return=return_mean, num_without_better=self.num_without_better + 1)


def stop_reason(training: TrainingConfig, env_steps: int, evaluations: Evaluations) -> StopReason | None:
    """Say why this version is the last one, or None; one that was not evaluated never is, so every result has an evaluation."""
    if evaluations.last_return is None:
        return None
    if training.target_return is not None and evaluations.last_return >= training.target_return:
        return "target"
    if training.patience is not None and evaluations.num_without_better >= training.patience:
        return "patience"
    return "max_env_steps" if env_steps >= training.max_env_steps else None


def is_evaluated(training: TrainingConfig, update: int, env_steps: int) -> bool:
    """Say whether this version is evaluated: every n-th, and the last."""
    return update % training.evaluation_every_updates == 0 or env_steps >= training.max_env_steps
