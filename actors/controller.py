"""How a run trains: collect, learn, evaluate, save, until the target is reached.

    rollout workers ──fragments──▶ learner ──weights──▶ rollout workers
                                      └──every checkpoint_every_updates──▶ checkpoint

This file is the training loop, to be read from top to bottom. What a step does is one call below: collecting in
`actors/worker_pool.py` and `training/rollout.py`, learning in `actors/learner.py` and `training/ppo.py`; which fragments are
due and when it is over, in `training/pacing.py`.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

from actors.clock import Clock
from actors.learner import LOCK_TIMEOUT_S, Learner, Saved
from actors.worker_pool import START_TIMEOUT_S, WorkerPool, without_ray
from policies.errors import ClusterError, ConfigError, NotFound, TrainingFailed, TrimtabError, UsageError
from policies.storage import Storage
from training.checkpoint import load_checkpoint, read_layout
from training.config import EnvironmentConfig, TrainingConfig
from training.environment import check_environment, read_spaces
from training.evaluation import EvaluationRequest
from training.learner_state import LearnerState, UpdateReport
from training.metrics import MetricsLog
from training.network import Layout, Weights, layout_of
from training.pacing import Evaluations, StopReason, fragments_due, is_evaluated, next_restart, stop_reason
from training.runs import RunConfig, change_config, create_run, lock_run, new_run_id, open_run, require_resumable
from training.seeds import Stream, derived_seed

LEARNER_TIMEOUT_S = 600.0  # one update or one checkpoint; they take tens of milliseconds for small networks
MAX_LEARNER_DEATHS = 3  # in a row without a checkpoint in between: what kills it then will kill it again
RETURN_WINDOW_EPISODES = 100  # training episodes that `return_mean` looks back on

OnProgress = Callable[["Progress"], None]
OnMessage = Callable[[str], None]


@dataclass(frozen=True)
class Progress:
    """One update as a person wants to see it.

    `return_mean`, `return_low` and `return_high` are of the last training episodes, actions sampled (None before two ended);
    the interval is the mean plus or minus two standard errors. Of the times, `collect_s` is what the loop waited for
    fragments and `learn_s` for the learner, and `checkpoint_s` is of a checkpoint before this update; `worker_s` and
    `learner_s` are what those processes computed.
    """

    run_id: str
    update: int
    env_steps: int
    env_steps_per_s: float
    elapsed_s: float
    num_episodes: int
    return_mean: float | None
    return_low: float | None
    return_high: float | None
    evaluation_return_mean: float | None  # of the greedy policy, when this update was evaluated
    best_return_mean: float | None  # of all evaluations of the run
    losses: UpdateReport | dict[str, float]  # RLlib's own numbers by its names, where RLlib trains
    worker_restarts: int
    environment_failures: int
    learner_restarts: int
    collect_s: float
    learn_s: float
    evaluate_s: float
    checkpoint_s: float
    worker_s: float
    learner_s: float

    def __str__(self) -> str:
        parts = [f"update {self.update}", f"{self.env_steps:,} steps", f"{self.env_steps_per_s:,.0f} steps/s"]
        if self.return_mean is not None:
            parts.append(f"return {self.return_mean:.1f}")
        if self.evaluation_return_mean is not None:
            parts.append(f"greedy return {self.evaluation_return_mean:.1f}")
        for count, what in self.troubles():
            parts.append(f"{count} {what}")
        return " · ".join(parts)

    def troubles(self) -> list[tuple[int, str]]:
        """Return what went wrong so far and was mended."""
        counts = (
            (self.worker_restarts, "worker restarts"),
            (self.environment_failures, "environment failures"),
            (self.learner_restarts, "learner restarts"),
        )
        return [(count, what) for count, what in counts if count]


@dataclass(frozen=True)
class TrainResult:
    """What a run came to; `time_to_target_s` counts from the first environment step and is None when it was not reached.

    `phases_s` says where this session's time went: waiting for fragments, for the learner, evaluating, saving; and how much of
    the first two the processes behind them computed.
    """

    run_id: str
    env_steps: int
    updates: int
    wall_s: float
    env_steps_per_s: float
    time_to_target_s: float | None
    evaluation_return_mean: float
    best_return_mean: float
    stop_reason: StopReason
    parameters_sha256: str
    checkpoint: str
    phases_s: dict[str, float]

    @property
    def reached_target(self) -> bool:
        return self.stop_reason == "target"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "reached_target": self.reached_target}


class LearnerDied(TrainingFailed):
    """The learner's process is gone; what it had learned since the last checkpoint is made again."""


def train(
    environment: EnvironmentConfig,
    training: TrainingConfig,
    storage: Storage,
    *,
    run_id: str | None = None,
    resume: bool = False,
    force: bool = False,
    tuned: tuple[str, ...] = (),
    on_progress: OnProgress = lambda progress: None,
    on_message: OnMessage = lambda message: None,
) -> TrainResult:
    """Train a new run, or go on with run `run_id` from its last good checkpoint. Ray must be initialised.

    A learner that dies is started again from the last checkpoint. `on_message` hears of that, and of damaged checkpoints.
    `force` resumes with changed settings; `tuned` notes in a new run which of its settings a search chose. Raises `UsageError`
    (settings, run id, cluster), `EnvironmentFailed` or `TrainingFailed`; after each of them the run can be resumed.
    """
    called_s = time.monotonic()
    if not resume:
        check_environment(environment)
    layout = layout_of(read_spaces(environment), training)
    config = RunConfig(environment, training, tuned)
    if resume:
        start = _resume_run(storage, run_id, config, layout, force=force, on_message=on_message)
    else:
        start = _new_run(storage, run_id, config, layout)
    metrics = MetricsLog(start.run_dir, after_update=start.state.update)
    pool = WorkerPool(environment, training)
    loop = _Loop(layout, training, pool, metrics, on_progress, called_s)
    try:
        while True:
            try:
                return loop.run(start)
            except LearnerDied as error:
                loop.count_death(error)
                start = _resume_run(storage, start.run_dir.name, config, layout, force=False, on_message=on_message)
                on_message(f"{error}; going on from update {start.state.update}")
                metrics.rewind(after_update=start.state.update)
    finally:
        pool.close()
        metrics.close()  # last: its lock says that the run is running


class _Loop:
    """The loop itself, and what outlives a learner."""

    def __init__(
        self,
        layout: Layout,
        training: TrainingConfig,
        pool: WorkerPool,
        metrics: MetricsLog,
        on_progress: OnProgress,
        called_s: float,
    ) -> None:
        self._layout = layout
        self._training = training
        self._pool = pool
        self._metrics = metrics
        self._on_progress = on_progress
        self._called_s = called_s
        self._learner_restarts = 0
        self._deaths_in_a_row = 0  # without a checkpoint in between

    def run(self, start: "_Start") -> TrainResult:
        """Train from `start` to the end; raises `LearnerDied` when the learner does not live that long."""
        training, pool, run_dir = self._training, self._pool, start.run_dir
        # It starts while the workers do.
        learner = ray.remote(Learner).options(num_cpus=0).remote(run_dir, self._layout, training, start.state)
        try:
            weights_ref = learner.weights.remote()
            _ask(weights_ref, run_dir, timeout_s=START_TIMEOUT_S + LOCK_TIMEOUT_S)
            pool.wait_until_ready()
            update, env_steps, evaluations = start.state.update, start.state.env_steps, start.evaluations
            best_ref = None if start.best is None else ray.put(start.best)
            # A new run saves generation 0 at once, so that it can be resumed after a kill at any moment.
            saved = start.saved or self._save(learner, run_dir, best_ref, evaluations, elapsed_s=0.0)
            clock = Clock(start.elapsed_s)
            figures = _Figures(run_dir.name, start.state.env_steps, clock)
            restarted_at = update

            while stop_reason(training, env_steps, evaluations) is None:
                for due in fragments_due(update, restarted_at=restarted_at, training=training):
                    pool.start(weights_ref, update=due, reset=due == restarted_at)
                fragments = pool.collect(update)
                figures.count_episodes(fragments.episode_returns_E)
                clock.lap("collect_s")

                answer_ref, weights_ref = learner.update.options(num_returns=2).remote(*fragments.references)
                report, learner_s = _ask(answer_ref, run_dir)
                update, env_steps, evaluations = update + 1, env_steps + report.num_env_steps, evaluations.after_update()
                clock.lap("learn_s")

                if is_evaluated(training, update, env_steps):
                    evaluations = self._evaluate(update, _ask(weights_ref, run_dir), evaluations)
                    best_ref = weights_ref if evaluations.best_update == update else best_ref
                    clock.lap("evaluate_s")

                clock.computed(worker_s=fragments.compute_s, learner_s=learner_s)
                progress = figures.progress(update, env_steps, evaluations, report, pool, self._learner_restarts)
                # Before the checkpoint: a run that is killed in between makes this update again, and replaces its row.
                self._metrics.append(asdict(progress))

                # Environments restart at these updates whether or not the run is killed in between: so a resumed run, which has
                # to restart them, makes the same bits as one that was never killed.
                is_restart = next_restart(update - 1, training) == update
                restarted_at = update if is_restart else restarted_at
                if is_restart or stop_reason(training, env_steps, evaluations) is not None:
                    saved = self._save(learner, run_dir, best_ref, evaluations, elapsed_s=clock.elapsed_s)
                    self._deaths_in_a_row = 0
                    clock.lap("checkpoint_s")
                self._on_progress(progress)

            reason = stop_reason(training, env_steps, evaluations)
            return figures.result(update, env_steps, evaluations, reason, saved, wall_s=time.monotonic() - self._called_s)
        finally:
            ray.kill(learner)

    def count_death(self, error: LearnerDied) -> None:
        """Get ready to run again after the learner's death; raises `TrainingFailed` when that does not lead anywhere."""
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row == MAX_LEARNER_DEATHS:
            raise TrainingFailed(f"gave up after the learner died {MAX_LEARNER_DEATHS} times without a new checkpoint: {error}")
        self._learner_restarts += 1
        self._pool.forget()

    def _evaluate(self, update: int, weights: Weights, evaluations: Evaluations) -> Evaluations:
        seed = derived_seed(self._training.seed, Stream.EVALUATION, update)
        request = EvaluationRequest(weights.policy(self._layout), self._training.evaluation_episodes, seed)
        (rows,) = self._pool.evaluate(request)
        return evaluations.after_evaluation(update, rows.return_mean)

    def _save(self, learner: ActorHandle, run_dir: Path, best_ref: Any, evaluations: Evaluations, *, elapsed_s: float) -> Saved:
        reference = learner.save.remote(best_ref, elapsed_s=elapsed_s, evaluations=asdict(evaluations))
        return _ask(reference, run_dir)


class _Figures:
    """What the loop says of itself: counts since it began, and the time from its clock."""

    def __init__(self, run_id: str, start_env_steps: int, clock: Clock) -> None:
        self._run_id = run_id
        self._start_env_steps = start_env_steps
        self._clock = clock
        self._returns: deque[float] = deque(maxlen=RETURN_WINDOW_EPISODES)
        self._num_episodes = 0

    def count_episodes(self, returns_E: np.ndarray) -> None:
        self._returns.extend(returns_E)
        self._num_episodes += len(returns_E)

    def progress(
        self,
        update: int,
        env_steps: int,
        evaluations: Evaluations,
        report: UpdateReport,
        pool: WorkerPool,
        learner_restarts: int,
    ) -> Progress:
        return Progress(
            run_id=self._run_id,
            update=update,
            env_steps=env_steps,
            env_steps_per_s=self._env_steps_per_s(env_steps),
            elapsed_s=self._clock.elapsed_s,
            num_episodes=self._num_episodes,
            **_interval(self._returns),
            evaluation_return_mean=evaluations.last_return,
            best_return_mean=evaluations.best_return,
            losses=report,
            worker_restarts=pool.num_restarts,
            environment_failures=pool.num_environment_failures,
            learner_restarts=learner_restarts,
            **self._clock.take_laps(),
        )

    def result(
        self, update: int, env_steps: int, evaluations: Evaluations, reason: StopReason, saved: Saved, *, wall_s: float
    ) -> TrainResult:
        return TrainResult(
            run_id=self._run_id,
            env_steps=env_steps,
            updates=update,
            wall_s=wall_s,
            env_steps_per_s=self._env_steps_per_s(env_steps),
            time_to_target_s=self._clock.evaluated_s if reason == "target" else None,
            evaluation_return_mean=evaluations.last_return,
            best_return_mean=evaluations.best_return,
            stop_reason=reason,
            parameters_sha256=saved.parameters_sha256,
            checkpoint=saved.path,
            phases_s=self._clock.totals,
        )

    def _env_steps_per_s(self, env_steps: int) -> float:
        return (env_steps - self._start_env_steps) / self._clock.session_s


@dataclass(frozen=True)
class _Start:
    """Where the loop begins; `best` are the weights of the best evaluation so far."""

    run_dir: Path
    state: LearnerState
    elapsed_s: float
    evaluations: Evaluations
    best: Weights | None
    saved: Saved | None


def _new_run(storage: Storage, run_id: str | None, config: RunConfig, layout: Layout) -> _Start:
    run_dir = create_run(storage, run_id or new_run_id(time.time()), config)
    return _beginning(run_dir, config, layout)


def _beginning(run_dir: Path, config: RunConfig, layout: Layout) -> _Start:
    state = LearnerState.initial(layout, config.training.seed, log_std=config.training.initial_log_std)
    return _Start(run_dir, state, 0.0, Evaluations(), None, None)


def _resume_run(
    storage: Storage, run_id: str | None, config: RunConfig, layout: Layout, *, force: bool, on_message: OnMessage
) -> _Start:
    if run_id is None:
        raise UsageError("resuming needs a run id")
    run_dir = open_run(storage, run_id)
    lock_run(run_dir, timeout_s=LOCK_TIMEOUT_S).close()  # a killed run's learner may still be in the middle of a checkpoint
    require_resumable(run_dir, config, force=force)
    try:
        checkpoint = load_checkpoint(run_dir)
    except NotFound:  # killed after it was created and before generation 0 was saved
        change_config(run_dir, config)
        return _beginning(run_dir, config, layout)
    trained = read_layout(checkpoint.state)
    trained_on = trained.spaces.to_json()
    if trained_on != layout.spaces.to_json():
        raise ConfigError(f"run {run_id!r} was trained on {trained_on}, its environment now has {layout.spaces.to_json()}")
    if trained.shapes != layout.shapes:  # with the same settings: the code of a network of the user's own was changed
        raise ConfigError(
            f"run {run_id!r} has parameters {trained.shapes}, its network now has {layout.shapes}; restore the code"
        )
    change_config(run_dir, config)  # last: a run that is refused keeps its settings
    for message in checkpoint.skipped:
        on_message(f"damaged checkpoint skipped, continuing from {checkpoint.path.name}: {message}")
    evaluations = Evaluations(**checkpoint.state["evaluations"])
    best = None
    if checkpoint.best is not None:
        best = Weights.from_tensors(evaluations.best_update, checkpoint.best, layout)
    return _Start(
        run_dir=run_dir,
        state=LearnerState.from_tensors(layout, checkpoint.tensors, checkpoint.state),
        elapsed_s=checkpoint.state["elapsed_s"],
        evaluations=evaluations,
        best=best,
        saved=Saved(str(checkpoint.path), checkpoint.state["parameters_sha256"]),
    )


def _ask(reference: Any, run_dir: Path, *, timeout_s: float = LEARNER_TIMEOUT_S) -> Any:
    """Return the learner's answer; its own errors come through, its silence becomes one that says how to go on."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except TrimtabError as error:
        raise without_ray(error) from None
    except GetTimeoutError:
        raise ClusterError(
            f"the learner did not answer within {timeout_s:g} s; `trimtab resume --run {run_dir.name}` continues the run"
        ) from None
    except RayActorError as error:
        raise LearnerDied(f"the learner died: {_cause(error)}") from None
    except ObjectLostError as error:  # a node went after its workers' report arrived and before the learner had their arrays
        raise LearnerDied(f"fragments were lost on their way to the learner: {str(error).splitlines()[0]}") from None


def _cause(error: RayActorError) -> str:
    """Return the last line of an error's traceback if it has one, else its first line: Ray's own explanation is a page."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if "Traceback" in str(error) or "ray::" in lines[0] else lines[0]


def _interval(returns: deque[float]) -> dict[str, float | None]:
    if len(returns) < 2:
        return {"return_mean": returns[0] if returns else None, "return_low": None, "return_high": None}
    mean, half = float(np.mean(returns)), 2 * float(np.std(returns, ddof=1)) / len(returns) ** 0.5
    return {"return_mean": mean, "return_low": mean - half, "return_high": mean + half}
