"""Which rollout workers run which shards, and what happens when one of them dies, hangs or fails."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError

from actors.rollout_worker import CollectReport, RolloutWorker
from policies.errors import ClusterError, EnvironmentFailed, TrainingFailed, TrimtabError
from policies.policy import Mode, Policy
from training.config import EnvironmentConfig, TrainingConfig
from training.evaluation import Evaluation, chunks_of, join

START_TIMEOUT_S = 120.0  # a worker starts in under a second here; a busy cluster may have to start a machine's first process
WORK_TIMEOUT_S = 600.0  # one fragment or one chunk of episodes; only a hanging environment takes this long
MAX_ATTEMPTS = 3  # of the same work; a crash that comes back twice on fresh environments will come back for ever


@dataclass(frozen=True)
class Fragments:
    """One update's experience: references to the arrays, in the workers' order, and the episodes that ended in it."""

    references: list[Any]  # ObjectRef of list[Rollout]
    episode_returns_E: np.ndarray


class WorkerPool:
    """Rollout workers as Ray actors. They die with the process that made the pool, or on `close`.

    A worker that dies is replaced, and its shards are collected again with fresh environments; so is a worker's work when
    its environment raises. After `MAX_ATTEMPTS` the run ends with `EnvironmentFailed` or `TrainingFailed`.
    """

    def __init__(self, environment: EnvironmentConfig, training: TrainingConfig) -> None:
        self._environment = environment
        self._training = training
        self.num_restarts = 0
        self._fresh: set[int] = set()  # workers that have no environments yet
        self._workers: list[ActorHandle] = [self._start_worker(index) for index in range(training.num_env_runners)]

    def wait_until_ready(self) -> list[int]:
        """Return the workers' process ids once all of them answer; raises `ClusterError` when Ray does not start them."""
        try:
            return ray.get([worker.process_id.remote() for worker in self._workers], timeout=START_TIMEOUT_S)
        except GetTimeoutError:
            wanted = self._training.num_env_runners * self._training.num_cpus_per_env_runner
            raise ClusterError(
                f"{len(self._workers)} rollout workers did not start within {START_TIMEOUT_S:g} s; they need {wanted:g} CPUs, "
                f"the cluster has {ray.available_resources().get('CPU', 0):g} of {ray.cluster_resources().get('CPU', 0):g} free; "
                "lower num_env_runners or num_cpus_per_env_runner"
            ) from None

    def collect(self, weights: Any, *, update: int, reset: bool) -> Fragments:
        """Collect one fragment of every shard with these weights (an ObjectRef); with `reset` on fresh environments."""
        if reset:
            self._fresh.update(range(len(self._workers)))

        def submit(worker: ActorHandle, index: int, attempt: int) -> list[Any]:
            restart = attempt if attempt > 0 or index in self._fresh else None
            return worker.collect.options(num_returns=2).remote(weights, update, attempt=restart)

        answers = self._run(submit, num_tasks=len(self._workers))
        self._fresh.clear()
        reports: list[CollectReport] = [report for report, _ in answers]
        return Fragments(
            references=[reference for _, reference in answers],
            episode_returns_E=np.concatenate([report.episode_returns_E for report in reports]),
        )

    def evaluate(
        self,
        policy: Policy,
        *,
        num_episodes: int,
        seed: int,
        mode: Mode = "greedy",
        noise_std_D: np.ndarray | None = None,
        keep_steps: bool = False,
    ) -> Evaluation:
        """Do what `training.evaluation.evaluate` does, its chunks spread over the workers; the rows are the same."""
        chunks = chunks_of(num_episodes)
        policy_reference = ray.put(policy)

        def submit(worker: ActorHandle, index: int, attempt: int) -> list[Any]:
            options = {"seed": seed, "mode": mode, "noise_std_D": noise_std_D, "keep_steps": keep_steps}
            return [worker.evaluate.remote(policy_reference, chunks[index], **options)]

        return join([evaluation for (evaluation,) in self._run(submit, num_tasks=len(chunks))])

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

    def _run(self, submit: Callable[[ActorHandle, int, int], list[Any]], *, num_tasks: int) -> list[list[Any]]:
        """Run numbered tasks, task i on worker i modulo their number; return for each its first result and further references."""
        workers = [self._worker_of(index) for index in range(num_tasks)]
        tasks = [submit(worker, index, 0) for index, worker in enumerate(workers)]
        return [self._result(submit, index, worker, task) for index, (worker, task) in enumerate(zip(workers, tasks))]

    def _result(
        self, submit: Callable[[ActorHandle, int, int], list[Any]], index: int, worker: ActorHandle, task: list[Any]
    ) -> list[Any]:
        """Wait for one task and repeat it when its environment or its worker fails."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return [ray.get(task[0], timeout=WORK_TIMEOUT_S), *task[1:]]
            except (EnvironmentFailed, RayActorError, GetTimeoutError) as error:
                if attempt == MAX_ATTEMPTS:
                    raise _give_up(error, attempt) from None
                # A worker has several tasks; the first that fails replaces it, the others only go to its successor.
                if not isinstance(error, EnvironmentFailed) and worker is self._worker_of(index):
                    self._replace_worker(index % len(self._workers))
            except TrimtabError as error:
                raise without_ray(error) from None
            worker = self._worker_of(index)
            task = submit(worker, index, attempt)
        raise AssertionError("the last attempt returns or raises")

    def _worker_of(self, index: int) -> ActorHandle:
        return self._workers[index % len(self._workers)]

    def _start_worker(self, index: int) -> ActorHandle:
        self._fresh.add(index)
        shards = tuple(range(index, self._training.num_shards, self._training.num_env_runners))
        actor_class = ray.remote(RolloutWorker).options(num_cpus=self._training.num_cpus_per_env_runner)
        return actor_class.remote(self._environment, self._training, shards)

    def _replace_worker(self, index: int) -> None:
        ray.kill(self._workers[index])  # it may only hang
        self._workers[index] = self._start_worker(index)
        self.num_restarts += 1


def without_ray(error: TrimtabError) -> TrimtabError:
    """Return an error as it was raised in the other process: Ray wraps it in its own traceback."""
    return getattr(error, "cause", error)


def _give_up(error: Exception, attempts: int) -> TrainingFailed:
    if isinstance(error, EnvironmentFailed):
        return EnvironmentFailed(f"gave up after {attempts} attempts on fresh environments: {without_ray(error)}")
    if isinstance(error, GetTimeoutError):
        return EnvironmentFailed(
            f"gave up after {attempts} attempts: no answer from a rollout worker within {WORK_TIMEOUT_S:g} s each time"
        )
    return TrainingFailed(f"gave up after a rollout worker died {attempts} times at the same work: {error}")
