"""The process that steps environments: collects fragments of its shards, and runs evaluation episodes. Imports no torch."""

import os
import time
from dataclasses import dataclass

import numpy as np

from policies.errors import TrainingFailed
from policies.torch_network import trust
from training.config import EnvironmentConfig, TrainingConfig
from training.evaluation import Chunk, Evaluation, EvaluationRequest, evaluate_chunk
from training.network import Weights
from training.rollout import Rollout, Shard
from training.threads import use_one_thread


@dataclass(frozen=True)
class CollectReport:
    """The small part of a fragment, for the controller; the arrays go to the learner without passing through it."""

    episode_returns_E: np.ndarray
    compute_s: float


class RolloutWorker:
    """Runs one or more shards. Everything it knows can be made again from the run's settings: it may die at any time."""

    def __init__(self, environment: EnvironmentConfig, training: TrainingConfig, shards: tuple[int, ...]) -> None:
        use_one_thread()
        if training.module is not None:
            trust(training.module)  # the settings come from the driver, not from a file that somebody may have changed
        self._environment = environment
        self._training = training
        self._shard_numbers = shards
        self._shards: list[Shard] = []
        self._next_update: int | None = None  # None: it has no environments, or they failed

    def process_id(self) -> int:
        """Return the process id; the answer also says that this worker is ready."""
        return os.getpid()

    def collect(self, weights: Weights, update: int, *, attempt: int | None) -> tuple[CollectReport, list[Rollout]]:
        """Return a report and one fragment per shard. With `attempt` given, all environments are made anew and reset first.

        Fragments follow each other: one that comes after a failed one is refused, because its beginning is missing.
        """
        began_s = time.perf_counter()
        if attempt is not None:
            self._make_shards(update, attempt)
        elif self._next_update != update:
            raise TrainingFailed(f"fragment {update} cannot follow: the environments are at {self._next_update}")
        self._next_update = None
        rollouts = [shard.collect(weights, update=update) for shard in self._shards]
        self._next_update = update + 1
        returns_E = np.concatenate([rollout.episode_returns_E for rollout in rollouts])
        return CollectReport(returns_E, time.perf_counter() - began_s), rollouts

    def evaluate(self, request: EvaluationRequest, index: int, num_episodes: int) -> Evaluation:
        """Run one chunk of evaluation episodes on environments of its own."""
        return evaluate_chunk(self._environment, Chunk(request, index, num_episodes))

    def _make_shards(self, update: int, attempt: int) -> None:
        old, self._shards = self._shards, []  # forgotten first: one that cannot be closed must not stop every later attempt
        for shard in old:
            shard.close()
        self._shards = [
            Shard(self._environment, self._training, shard, update=update, attempt=attempt) for shard in self._shard_numbers
        ]
