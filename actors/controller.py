"""How a run trains: collect, learn, evaluate, save, until the target is reached.

    rollout workers ──fragments──▶ learner ──weights──▶ rollout workers
                                      └──every checkpoint_every_updates──▶ checkpoint

This file is the training loop, to be read from top to bottom. What a step does is one call below: collecting in
`actors/worker_pool.py` and `training/rollout.py`, learning in `actors/learner.py` and `training/ppo.py`.
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
from ray.exceptions import GetTimeoutError, RayActorError

from actors.learner import LOCK_TIMEOUT_S, Learner, Saved
from actors.worker_pool import START_TIMEOUT_S, WorkerPool, without_ray
from policies.errors import ClusterError, TrainingFailed, TrimtabError, UsageError
from policies.policy import Architecture
from policies.storage import Storage
from training.checkpoint import load_checkpoint
from training.config import EnvironmentConfig, TrainingConfig
from training.environment import read_spaces
from training.learner_state import LearnerState, UpdateReport
from training.network import Layout, Weights
from training.runs import MetricsLog, RunConfig, change_config, create_run, lock_run, new_run_id, open_run
from training.seeds import Stream, derived_seed

LEARNER_TIMEOUT_S = 600.0  # one update or one checkpoint; they take tens of milliseconds for the networks of this version
RETURN_WINDOW_EPISODES = 100  # training episodes that `return_mean` looks back on


@dataclass(frozen=True)
class Progress:
    """One update as a person wants to see it; the four last times are those of this update."""

    run_id: str
    update: int
    env_steps: int
    env_steps_per_s: float
    return_mean: float | None  # of the last training episodes, actions sampled; None before the first episode ended
    evaluation_return_mean: float | None  # of the greedy policy, when this update was evaluated
    losses: UpdateReport
    worker_restarts: int
    collect_s: float
    learn_s: float
    evaluate_s: float
    checkpoint_s: float

    def __str__(self) -> str:
        parts = [f"update {self.update}", f"{self.env_steps:,} steps", f"{self.env_steps_per_s:,.0f} steps/s"]
        if self.return_mean is not None:
            parts.append(f"return {self.return_mean:.1f}")
        if self.evaluation_return_mean is not None:
            parts.append(f"greedy return {self.evaluation_return_mean:.1f}")
        if self.worker_restarts:
            parts.append(f"{self.worker_restarts} worker restarts")
        return " · ".join(parts)


@dataclass(frozen=True)
class TrainResult:
    """What a run came to; `time_to_target_s` counts from the first environment step and is None when it was not reached."""

    run_id: str
    env_steps: int
    updates: int
    wall_s: float
    env_steps_per_s: float
    time_to_target_s: float | None
    evaluation_return_mean: float
    reached_target: bool
    parameters_sha256: str
    checkpoint: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def train(
    environment: EnvironmentConfig,
    training: TrainingConfig,
    storage: Storage,
    *,
    run_id: str | None = None,
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_message: Callable[[str], None] = lambda message: None,
) -> TrainResult:
    """Train a new run, or go on with run `run_id` from its last good checkpoint. Ray must be initialised.

    `on_message` hears what a resumed run found damaged. Raises `UsageError` (settings, run id, cluster), `EnvironmentFailed`
    or `TrainingFailed`; after each of them the run can be resumed.
    """
    called_s = time.monotonic()
    layout = Layout(read_spaces(environment), Architecture(training.hidden, training.activation))
    config = RunConfig(environment, training)
    start = _resume_run(storage, run_id, config, layout, on_message) if resume else _new_run(storage, run_id, config, layout)
    run_dir, update, env_steps, evaluation_return_mean = (
        start.run_dir,
        start.update,
        start.env_steps,
        start.evaluation_return_mean,
    )

    # Both start at once: importing torch takes the learner 3 s, in which the workers are long ready.
    learner = ray.remote(Learner).options(num_cpus=0).remote(run_dir, layout, training, start.state)
    pool = WorkerPool(environment, training)
    metrics = MetricsLog(run_dir, after_update=update)
    try:
        weights_ref = learner.weights.remote()
        _ask(weights_ref, run_dir, timeout_s=START_TIMEOUT_S + LOCK_TIMEOUT_S)
        pool.wait_until_ready()
        # A new run saves generation 0 at once, so that it can be resumed after a kill at any moment.
        saved = start.saved or _save(learner, run_dir, elapsed_s=0.0, evaluation_return_mean=None)
        returns: deque[float] = deque(maxlen=RETURN_WINDOW_EPISODES)
        clock = _Clock(start.elapsed_s)
        restart_environments = True

        while not _finished(training, env_steps, evaluation_return_mean):
            fragments = pool.collect(weights_ref, update=update, reset=restart_environments)
            returns.extend(fragments.episode_returns_E)
            clock.lap("collect_s")

            report_ref, weights_ref = learner.update.options(num_returns=2).remote(*fragments.references)
            report: UpdateReport = _ask(report_ref, run_dir)
            update, env_steps = update + 1, env_steps + report.num_env_steps
            clock.lap("learn_s")

            evaluation_return_mean = None
            if update % training.evaluation_every_updates == 0 or env_steps >= training.max_env_steps:
                weights: Weights = _ask(weights_ref, run_dir)
                seed = derived_seed(training.seed, Stream.EVALUATION, update)
                evaluation = pool.evaluate(weights.policy(layout), num_episodes=training.evaluation_episodes, seed=seed)
                evaluation_return_mean = evaluation.return_mean
                clock.lap("evaluate_s")

            # Environments restart at these updates whether or not the run is killed in between: so a resumed run, which has to
            # restart them, makes the same bits as one that was never killed.
            restart_environments = update % training.checkpoint_every_updates == 0
            if restart_environments or _finished(training, env_steps, evaluation_return_mean):
                saved = _save(learner, run_dir, elapsed_s=clock.elapsed_s, evaluation_return_mean=evaluation_return_mean)
                clock.lap("checkpoint_s")

            progress = Progress(
                run_id=run_dir.name,
                update=update,
                env_steps=env_steps,
                env_steps_per_s=(env_steps - start.env_steps) / clock.session_s,
                return_mean=float(np.mean(returns)) if returns else None,
                evaluation_return_mean=evaluation_return_mean,
                losses=report,
                worker_restarts=pool.num_restarts,
                **clock.take_laps(),
            )
            metrics.append(asdict(progress))
            on_progress(progress)

        reached = _target_reached(training, evaluation_return_mean)
        return TrainResult(
            run_id=run_dir.name,
            env_steps=env_steps,
            updates=update,
            wall_s=time.monotonic() - called_s,
            env_steps_per_s=(env_steps - start.env_steps) / clock.session_s,
            time_to_target_s=clock.evaluated_s if reached else None,
            evaluation_return_mean=evaluation_return_mean,
            reached_target=reached,
            parameters_sha256=saved.parameters_sha256,
            checkpoint=saved.path,
        )
    finally:
        metrics.close()
        pool.close()
        ray.kill(learner)


def _finished(training: TrainingConfig, env_steps: int, evaluation_return_mean: float | None) -> bool:
    """Say whether this version is the last; one that was not evaluated never is, so every result has an evaluation."""
    if evaluation_return_mean is None:
        return False
    return env_steps >= training.max_env_steps or _target_reached(training, evaluation_return_mean)


def _target_reached(training: TrainingConfig, evaluation_return_mean: float) -> bool:
    return training.target_return is not None and evaluation_return_mean >= training.target_return


@dataclass(frozen=True)
class _Start:
    """Where the loop begins."""

    run_dir: Path
    state: LearnerState
    elapsed_s: float
    evaluation_return_mean: float | None
    saved: Saved | None

    @property
    def update(self) -> int:
        return self.state.update

    @property
    def env_steps(self) -> int:
        return self.state.env_steps


def _new_run(storage: Storage, run_id: str | None, config: RunConfig, layout: Layout) -> _Start:
    run_dir = create_run(storage, run_id or new_run_id(time.time()), config)
    return _Start(run_dir, LearnerState.initial(layout, config.training.seed), 0.0, None, None)


def _resume_run(
    storage: Storage, run_id: str | None, config: RunConfig, layout: Layout, on_message: Callable[[str], None]
) -> _Start:
    if run_id is None:
        raise UsageError("resuming needs a run id")
    run_dir = open_run(storage, run_id)
    lock_run(run_dir, timeout_s=LOCK_TIMEOUT_S).close()  # a killed run's learner may still be in the middle of a checkpoint
    change_config(run_dir, config)
    checkpoint = load_checkpoint(run_dir)
    for message in checkpoint.skipped:
        on_message(f"damaged checkpoint skipped, continuing from {checkpoint.path.name}: {message}")
    return _Start(
        run_dir=run_dir,
        state=LearnerState.from_tensors(layout, checkpoint.tensors, checkpoint.state),
        elapsed_s=checkpoint.state["elapsed_s"],
        evaluation_return_mean=checkpoint.state["evaluation_return_mean"],
        saved=Saved(str(checkpoint.path), checkpoint.state["parameters_sha256"]),
    )


def _save(learner: ActorHandle, run_dir: Path, *, elapsed_s: float, evaluation_return_mean: float | None) -> Saved:
    return _ask(learner.save.remote(elapsed_s=elapsed_s, evaluation_return_mean=evaluation_return_mean), run_dir)


def _ask(reference: Any, run_dir: Path, *, timeout_s: float = LEARNER_TIMEOUT_S) -> Any:
    """Return the learner's answer; its own errors come through, its death or silence becomes one that says how to go on."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except TrimtabError as error:
        raise without_ray(error) from None
    except GetTimeoutError:
        raise ClusterError(
            f"the learner did not answer within {timeout_s:g} s; `trimtab resume --run {run_dir.name}` continues the run"
        ) from None
    except RayActorError as error:
        raise TrainingFailed(
            f"the learner died; `trimtab resume --run {run_dir.name}` continues from the last checkpoint: {error}"
        ) from None


class _Clock:
    """Measures the phases of an update and the time since the first environment step, earlier sessions included."""

    def __init__(self, earlier_s: float) -> None:
        self._began_s = self._lap_began_s = time.monotonic()
        self._earlier_s = earlier_s
        self.evaluated_s = earlier_s  # when the last evaluation ended
        self._laps = self._no_laps()

    @property
    def session_s(self) -> float:
        return time.monotonic() - self._began_s

    @property
    def elapsed_s(self) -> float:
        return self._earlier_s + self.session_s

    def lap(self, phase: str) -> None:
        """Book the time since the last lap to a phase."""
        now_s = time.monotonic()
        self._laps[phase] += now_s - self._lap_began_s
        self._lap_began_s = now_s
        if phase == "evaluate_s":
            self.evaluated_s = self.elapsed_s

    def take_laps(self) -> dict[str, float]:
        """Return the phases of this update and begin the next."""
        laps, self._laps = self._laps, self._no_laps()
        return laps

    @staticmethod
    def _no_laps() -> dict[str, float]:
        return {"collect_s": 0.0, "learn_s": 0.0, "evaluate_s": 0.0, "checkpoint_s": 0.0}
