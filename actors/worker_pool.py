"""Which rollout workers run which shards, and what happens when one of them dies, hangs or fails."""

import contextlib
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

from actors.rollout_worker import CollectReport, RolloutWorker
from policies.errors import ClusterError, EnvironmentFailed, TrainingFailed, TrimtabError
from training.config import EnvironmentConfig, TrainingConfig
from training.evaluation import Evaluation, EvaluationRequest, join

START_TIMEOUT_S = 120.0  # a worker starts in under a second here; a busy cluster may have to start a machine's first process
EVALUATION_TIMEOUT_S = 600.0  # one chunk of whole episodes, behind fragments that were asked for before
MAX_ATTEMPTS = 5  # of the same work; a crash that comes back four times on fresh environments will come back for ever
FIRST_PAUSE_S = 0.1  # before the second attempt; doubles: what a worker needs may be coming back just now

FAILURES = (EnvironmentFailed, RayActorError, GetTimeoutError, ObjectLostError)


@dataclass(frozen=True)
class Fragments:
    """One update's experience: references to the arrays, in the workers' order, and the episodes that ended in it."""

    references: list[Any]  # ObjectRef of list[Rollout]
    episode_returns_E: np.ndarray
    compute_s: float  # of the slowest worker


@dataclass
class _Task:
    """A fragment that a worker was asked for."""

    update: int
    weights: Any  # ObjectRef of Weights
    report: Any  # ObjectRef of CollectReport
    rollouts: Any  # ObjectRef of list[Rollout]


class WorkerPool:
    """Rollout workers as Ray actors. They die with the process that made the pool, or on `close`.

        pool.start(weights, update=7)       # returns at once; several may be under way
        fragments = pool.collect(7)         # in the order in which they were started

    A worker that dies or hangs is replaced, and its shards are collected again with fresh environments; so are those of a
    worker whose environment raises. After `MAX_ATTEMPTS` at the same fragment the run ends with `EnvironmentFailed` or
    `TrainingFailed`.
    """

    def __init__(self, environment: EnvironmentConfig, training: TrainingConfig) -> None:
        self._environment = environment
        self._training = training
        self.num_restarts = 0
        self.num_environment_failures = 0
        self._fresh: set[int] = set()  # workers that have no environments yet
        self._workers: list[ActorHandle] = [self._start_worker(index) for index in range(training.num_env_runners)]
        self._tasks: list[deque[_Task]] = [deque() for _ in self._workers]

    def wait_until_ready(self) -> list[int]:
        """Return the workers' process ids once all of them answer; raises `ClusterError` when Ray does not start them."""
        return [self._ready(index) for index in range(len(self._workers))]

    def _ready(self, index: int) -> int:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return ray.get(self._workers[index].process_id.remote(), timeout=START_TIMEOUT_S)
            except RayActorError as error:
                self._recover(index, error, attempt, restart_fragments=True)
            except GetTimeoutError:
                wanted = self._training.num_env_runners * self._training.num_cpus_per_env_runner
                raise ClusterError(
                    f"{len(self._workers)} rollout workers did not start within {START_TIMEOUT_S:g} s; they need {wanted:g} "
                    f"CPUs, the cluster has {ray.available_resources().get('CPU', 0):g} of "
                    f"{ray.cluster_resources().get('CPU', 0):g} free; lower num_env_runners or num_cpus_per_env_runner"
                ) from None
        raise AssertionError("the last attempt returns or raises")

    def start(self, weights: Any, *, update: int, reset: bool) -> None:
        """Ask for one fragment of every shard with these weights (an ObjectRef); with `reset` on fresh environments."""
        if reset:
            self._fresh.update(range(len(self._workers)))
        for index in range(len(self._workers)):
            self._tasks[index].append(self._submit(index, update, weights, attempt=0))

    def collect(self, update: int) -> Fragments:
        """Wait for the fragments that were started for an update: the oldest ones."""
        reports = [self._finished(index, update) for index in range(len(self._workers))]
        tasks = [tasks.popleft() for tasks in self._tasks]
        return Fragments(
            references=[task.rollouts for task in tasks],
            episode_returns_E=np.concatenate([report.episode_returns_E for report in reports]),
            compute_s=max(report.compute_s for report in reports),
        )

    def forget(self) -> None:
        """Drop all fragments that are under way: the next ones start on fresh environments."""
        for tasks in self._tasks:
            tasks.clear()
        self._fresh.update(range(len(self._workers)))

    def evaluate(self, *requests: EvaluationRequest) -> list[Evaluation]:
        """Do what `training.evaluation.evaluate` does for each request, all their chunks spread over the workers at once.

        The rows are the same.
        """
        chunks = [(ray.put(request), chunk) for request in requests for chunk in request.chunks]

        def submit(place: int) -> tuple[ActorHandle, Any]:
            worker, (request, chunk) = self._workers[place % len(self._workers)], chunks[place]
            return worker, worker.evaluate.remote(request, chunk.index, chunk.num_episodes)

        submitted = [submit(place) for place in range(len(chunks))]
        parts = []
        for place, (worker, reference) in enumerate(submitted):
            for attempt in range(1, MAX_ATTEMPTS + 1):
                try:
                    parts.append(ray.get(reference, timeout=EVALUATION_TIMEOUT_S))
                    break
                except FAILURES as error:
                    index = place % len(self._workers)
                    # A worker has several chunks; the first that fails replaces it, the others only go to its successor.
                    is_dead = worker is self._workers[index] and not isinstance(error, EnvironmentFailed)
                    self._recover(index, error, attempt, restart_fragments=is_dead)
                    worker, reference = submit(place)
                except TrimtabError as error:
                    raise without_ray(error) from None
        ends = np.cumsum([len(request.chunks) for request in requests])
        return [join(parts[end - len(request.chunks) : end]) for request, end in zip(requests, ends)]

    def __enter__(self) -> Self:
        try:
            self.wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            ray.kill(worker)

    def _submit(self, index: int, update: int, weights: Any, *, attempt: int) -> _Task:
        restart = attempt if attempt > 0 or index in self._fresh else None
        self._fresh.discard(index)
        collect = self._workers[index].collect.options(num_returns=2)
        report, rollouts = collect.remote(weights, update, attempt=restart)
        return _Task(update, weights, report, rollouts)

    def _finished(self, index: int, update: int) -> CollectReport:
        """Wait for a worker's oldest fragment; start it again when its environment or the worker fails."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            task = self._tasks[index][0]
            assert task.update == update, f"worker {index} was asked for fragment {task.update} next, not {update}"
            try:
                return ray.get(task.report, timeout=self._training.worker_timeout_s)
            except FAILURES as error:
                self._recover(index, error, attempt, restart_fragments=True)
            except TrimtabError as error:
                raise without_ray(error) from None
        raise AssertionError("the last attempt returns or raises")

    def _recover(self, index: int, error: Exception, attempt: int, *, restart_fragments: bool) -> None:
        """Replace a worker that died or hangs, and start its fragments again; raises when that was tried often enough."""
        is_environment = isinstance(error, EnvironmentFailed)
        self.num_environment_failures += is_environment
        if attempt == MAX_ATTEMPTS:
            raise self._give_up(error) from None
        time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
        if not restart_fragments:
            return
        if not is_environment:
            ray.kill(self._workers[index])  # it may only hang
            self._workers[index] = self._start_worker(index)
            self.num_restarts += 1
            # Its start, which may wait for a place in the cluster, is not the environment's time. If it fails, the next attempt
            # finds out.
            with contextlib.suppress(RayActorError, GetTimeoutError):
                ray.get(self._workers[index].process_id.remote(), timeout=START_TIMEOUT_S)
        # Those behind the failed one lost their beginning. They follow it on its fresh environments.
        tasks = list(self._tasks[index])
        self._tasks[index] = deque(
            self._submit(index, task.update, task.weights, attempt=attempt if place == 0 else 0)
            for place, task in enumerate(tasks)
        )

    def _start_worker(self, index: int) -> ActorHandle:
        self._fresh.add(index)
        shards = tuple(range(index, self._training.num_shards, self._training.num_env_runners))
        actor_class = ray.remote(RolloutWorker).options(num_cpus=self._training.num_cpus_per_env_runner)
        return actor_class.remote(self._environment, self._training, shards)

    def _give_up(self, error: Exception) -> TrainingFailed:
        if isinstance(error, EnvironmentFailed):
            return EnvironmentFailed(f"gave up after {MAX_ATTEMPTS} attempts on fresh environments: {without_ray(error)}")
        if isinstance(error, GetTimeoutError):
            return EnvironmentFailed(
                f"gave up after {MAX_ATTEMPTS} attempts: no answer from a rollout worker within "
                f"{self._training.worker_timeout_s:g} s each time; raise training.worker_timeout_s if it is only slow"
            )
        return TrainingFailed(f"gave up after a rollout worker died {MAX_ATTEMPTS} times at the same work: {error}")


def without_ray(error: TrimtabError) -> TrimtabError:
    """Return an error as it was raised in the other process: Ray wraps it in its own traceback."""
    return getattr(error, "cause", error)
