"""One trial of a search: a normal run, in the process that Ray Tune starts for it, that reports its evaluations there."""

import os
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ray import tune

from actors.controller import Progress, train
from actors.learner import LOCK_TIMEOUT_S
from policies.errors import TrimtabError
from policies.integrity import canonical_json, parse_json
from policies.storage import Storage, existing_storage
from training.checkpoint import adopt_checkpoint, generation_name, load_checkpoint
from training.config import EnvironmentConfig, TrainingConfig
from training.metrics import adopt_metrics
from training.pacing import Evaluations, StopReason, stop_reason
from training.runs import lock_run
from training.tuning import TuningConfig, trial_training, tuned_settings

NOTE = "trial.json"  # all that our checkpoints in Tune hold: which run, which generation
# Before Tune uses this process for another trial it waits for the end of the run's own thread: it only ends its workers.
THREAD_TIMEOUT_S = 60


@dataclass(frozen=True)
class TrialSpec:
    """What all trials of a search have in common."""

    environment: EnvironmentConfig
    training: TrainingConfig
    tuning: TuningConfig
    storage_root: Path


@dataclass(frozen=True)
class Report:
    """What a trial tells of itself at each evaluation; the attributes are the names of Tune's metrics.

    A return that is not known yet is NaN, because Tune insists on a number. `rounds` counts the perturbations that were due so
    far: the checkpoints at which trials copy each other; the last report has none, a run that is over does not copy any more.
    `failure` is the message of the error that ended the trial, beside the numbers of its last report. `donor` is the run and
    generation that it was copied from last.
    """

    env_steps: int = 0
    return_mean: float = float("nan")
    best_return: float = float("nan")
    rounds: int = 0
    stop_reason: StopReason | None = None
    failure: str | None = None
    donor: str | None = None
    messages: tuple[str, ...] = ()


def run_trial(spec: TrialSpec, parameters: dict[str, Any]) -> None:
    """Train the trial whose name Tune gives this process, as a new run or from the checkpoint that Tune hands it.

    Its own errors end the trial, not the search: they are reported.
    """
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(THREAD_TIMEOUT_S)
    run_id = tune.get_context().get_trial_name()
    reporter = _Reporter(run_id, spec.tuning)
    try:
        storage = existing_storage(spec.storage_root)
        training = trial_training(spec.tuning, spec.training, parameters)
        note = _read_note()
        if note is not None:
            _restore(storage, run_id, note, reporter)
        result = train(
            spec.environment,
            training,
            storage,
            run_id=run_id,
            resume=note is not None,
            force=True,  # copied from a run with other settings: that is the point of it
            tuned=tuned_settings(spec.tuning),
            on_progress=lambda progress: reporter.progress(progress, training),
            on_message=reporter.messages.append,
        )
        reporter.finished(result.updates, result.env_steps, result.stop_reason)
    except TrimtabError as error:
        reporter.failed(error)


def _read_note() -> dict[str, str] | None:
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as directory:
        return parse_json((Path(directory) / NOTE).read_bytes(), NOTE)


def _restore(storage: Storage, run_id: str, note: dict[str, str], reporter: "_Reporter") -> None:
    """Get the run ready to be resumed: where Tune hands over another run's checkpoint, its own are replaced by a copy."""
    run_dir, donor_dir = storage.run(run_id), storage.run(note["run_id"])
    if donor_dir != run_dir:
        with lock_run(run_dir, timeout_s=LOCK_TIMEOUT_S):
            donated = adopt_checkpoint(run_dir, donor_dir, note["generation"])
            adopt_metrics(run_dir, donor_dir)
        reporter.donor = f"{donor_dir.name}/{donated.path.name}"
    reporter.evaluations = Evaluations(**load_checkpoint(run_dir).state["evaluations"])


@dataclass
class _Reporter:
    """Turns a run's progress into reports. Each blocks until Tune's answer: go on, or end here (as `SystemExit`)."""

    run_id: str
    tuning: TuningConfig
    evaluations: Evaluations = field(default_factory=Evaluations)
    donor: str | None = None
    messages: list[str] = field(default_factory=list)
    last: Report = field(default_factory=Report)

    def progress(self, progress: Progress, training: TrainingConfig) -> None:
        """Report an evaluation, but not the last one: what comes of the run is known when it has returned."""
        if progress.evaluation_return_mean is None:
            return
        self.evaluations = self.evaluations.after_evaluation(progress.update, progress.evaluation_return_mean)
        if stop_reason(training, progress.env_steps, self.evaluations) is None:
            self._report(progress.update, progress.env_steps, is_saved=progress.update % training.checkpoint_every_updates == 0)

    def finished(self, update: int, env_steps: int, reason: StopReason) -> None:
        self._report(update, env_steps, is_saved=False, stop_reason=reason)

    def failed(self, error: TrimtabError) -> None:
        self._send(replace(self.last, failure=str(error), messages=self._take_messages()), generation=None)

    def _report(self, update: int, env_steps: int, *, is_saved: bool, stop_reason: StopReason | None = None) -> None:
        self.last = Report(
            env_steps=env_steps,
            return_mean=self.evaluations.last_return,
            best_return=self.evaluations.best_return,
            rounds=0 if stop_reason else update // self.tuning.perturb_every_updates,
            stop_reason=stop_reason,
            donor=self.donor,
            messages=self._take_messages(),
        )
        self._send(self.last, generation=generation_name(update) if is_saved else None)

    def _send(self, report: Report, *, generation: str | None) -> None:
        metrics = asdict(report)
        if generation is None or self.tuning.scheduler != "pbt":
            tune.report(metrics)
            return
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / NOTE).write_bytes(canonical_json({"run_id": self.run_id, "generation": generation}))
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(directory))

    def _take_messages(self) -> tuple[str, ...]:
        messages, self.messages = tuple(self.messages), []
        return messages
