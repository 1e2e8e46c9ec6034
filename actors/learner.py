"""The process that learns: holds the parameters, improves them from fragments, and writes checkpoints."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policies.torch_network import trust
from training.checkpoint import save_checkpoint
from training.config import TrainingConfig
from training.learner_state import LearnerState, UpdateReport
from training.network import Layout, Weights, parameters_sha256
from training.ppo import PPO
from training.rollout import Rollout
from training.runs import lock_run
from training.threads import use_one_thread

LOCK_TIMEOUT_S = 30.0  # the learner of a killed driver ends within a second or two, but may be in the middle of an update


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint."""

    path: str
    parameters_sha256: str


class Learner:
    """Improves the parameters it is given; the only writer of its run's checkpoints."""

    def __init__(self, run_dir: Path, layout: Layout, training: TrainingConfig, state: LearnerState) -> None:
        use_one_thread()
        if training.module is not None:
            trust(training.module)  # the settings come from the driver, not from a file that somebody may have changed
        self._lock = lock_run(run_dir, timeout_s=LOCK_TIMEOUT_S)
        self._run_dir = run_dir
        self._layout = layout
        self._keep_checkpoints = training.keep_checkpoints
        self._ppo = PPO(layout, training, state)

    def weights(self) -> Weights:
        """Return the current version for the rollout workers."""
        return self._ppo.state.weights()

    def update(self, *fragments: Sequence[Rollout]) -> tuple[tuple[UpdateReport, float], Weights]:
        """Learn from one list of fragments per worker; return what happened, the seconds it took, and the next weights."""
        began_s = time.perf_counter()
        report = self._ppo.update([rollout for fragment in fragments for rollout in fragment])
        return (report, time.perf_counter() - began_s), self._ppo.state.weights()

    def save(self, best: Weights | None, **progress: Any) -> Saved:
        """Commit a checkpoint of the current version with the best one so far; `progress` goes into its state as it is."""
        state = self._ppo.state
        digest = parameters_sha256(state.weights().tensors(self._layout))
        metadata: dict[str, Any] = {
            "run_id": self._run_dir.name,
            **state.counters(),
            **progress,
            "parameters_sha256": digest,
            "spaces": self._layout.spaces.to_json(),
            "network": self._layout.architecture.to_json(),
            "vf_share_layers": self._layout.shares_layers,
        }
        path = save_checkpoint(
            self._run_dir,
            update=state.update,
            tensors=state.to_tensors(self._layout),
            best=None if best is None else best.tensors(self._layout),
            state=metadata,
            keep=self._keep_checkpoints,
        )
        return Saved(str(path), digest)
