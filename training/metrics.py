"""What a run writes down after each update, and how it is read again.

runs/<run-id>/metrics.jsonl     one line per update, the truth
              tensorboard/      the same numbers as event files, for TensorBoard
"""

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from policies.integrity import canonical_json
from training.event_file import EventFile
from training.runs import METRICS, take_lock

TENSORBOARD = "tensorboard"
LOCK_TIMEOUT_S = 5.0  # who asks whether the run is running holds the lock for microseconds
TAIL_BYTES = 65_536  # about 80 lines
# Names of TensorBoard's scalars, by where they stand in a line. Its x axis is the number of environment steps.
TAGS = {
    "return_mean": "return/mean",
    "return_low": "return/low",
    "return_high": "return/high",
    "evaluation_return_mean": "return/greedy",
    "num_episodes": "return/num_episodes",
    "losses.policy_loss": "loss/policy",
    "losses.value_loss": "loss/value",
    "losses.entropy": "policy/entropy",
    "losses.kl": "policy/kl",
    "losses.clip_fraction": "policy/clip_fraction",
    "losses.explained_variance": "value/explained_variance",
    "losses.grad_norm": "learner/grad_norm",
    "losses.num_epochs": "learner/num_epochs",
    "losses.lr": "learner/lr",
    "losses.lag_mean": "lag/mean",
    "losses.lag_max": "lag/max",
    "env_steps_per_s": "throughput/env_steps_per_s",
    "collect_s": "time/collect_s",
    "learn_s": "time/learn_s",
    "evaluate_s": "time/evaluate_s",
    "checkpoint_s": "time/checkpoint_s",
    "worker_s": "time/worker_s",
    "learner_s": "time/learner_s",
    "worker_restarts": "faults/worker_restarts",
    "environment_failures": "faults/environment_failures",
    "learner_restarts": "faults/learner_restarts",
}


class MetricsLog:
    """Appends what each update came to; updates that a resumed run makes again are forgotten first.

    As long as it is open it holds a lock on `metrics.jsonl`: that is how others know that the run is running. Raises
    `UsageError` when another process holds it.
    """

    def __init__(self, run_dir: Path, *, after_update: int) -> None:
        self._run_dir = run_dir
        self._lines = open(run_dir / METRICS, "ab", buffering=0)  # noqa: SIM115 - open until `close`
        take_lock(self._lines, run_dir.name, timeout_s=LOCK_TIMEOUT_S)
        self._events = self._rewound(after_update)

    def append(self, row: dict[str, Any]) -> None:
        row = _finite(row)
        self._lines.write(canonical_json(row) + b"\n")
        self._events.append(row["env_steps"], scalars(row), now=time.time())

    def rewind(self, *, after_update: int) -> None:
        """Forget the updates that are made again."""
        self._events.close()
        self._events = self._rewound(after_update)

    def close(self) -> None:
        self._lines.close()
        self._events.close()

    def _rewound(self, after_update: int) -> EventFile:
        """Cut the lines off behind an update (in place: another file would not have the lock), and begin a new event file."""
        lines = (self._run_dir / METRICS).read_bytes()
        kept = [(end, row) for end, row in _rows(lines) if row["update"] <= after_update]
        end, purge_step = (kept[-1][0], kept[-1][1]["env_steps"] + 1) if kept else (0, 0)
        self._lines.truncate(end)
        return EventFile(self._run_dir / TENSORBOARD, now=time.time(), purge_step=purge_step)


def adopt_metrics(run_dir: Path, donor_dir: Path) -> None:
    """Replace a run's metrics by another run's: with `adopt_checkpoint`, the history of what it learns from here on."""
    rows = read_metrics(donor_dir)
    log = MetricsLog(run_dir, after_update=-1)  # forgets all of its own
    for row in rows:
        log.append(row)
    log.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return one row per update, the oldest first; none for a run that has made no update."""
    path = run_dir / METRICS
    return [row for _, row in _rows(path.read_bytes())] if path.exists() else []


def read_last_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the newest rows, dozens of them, without reading the others."""
    path = run_dir / METRICS
    if not path.exists():
        return []
    with open(path, "rb") as file:
        size_bytes = file.seek(0, os.SEEK_END)
        file.seek(max(0, size_bytes - TAIL_BYTES))
        return [row for _, row in _rows(file.read())]


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a row by their TensorBoard tags, without those that do not exist yet."""
    values = {tag: _value_at(row, place) for place, tag in TAGS.items()}
    return {tag: value for tag, value in values.items() if value is not None}


def _finite(value: Any) -> Any:
    """Return a row with None in the place of infinity and NaN, which a loss can be and JSON cannot say."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _value_at(row: dict[str, Any], place: str) -> float | None:
    section, _, key = place.rpartition(".")
    return (row.get(section, {}) if section else row).get(key)


def _rows(lines: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row and where its line ends.

    What is not a whole line is left out: the torn last one of a killed run, the cut first one of a tail, a damaged one.
    """
    end = 0
    for line in lines.splitlines(keepends=True):
        end += len(line)
        try:
            row = json.loads(line)
        except ValueError:
            continue
        is_whole = line.endswith(b"\n") and isinstance(row, dict)
        if is_whole and all(isinstance(row.get(key), int) for key in ("update", "env_steps")):
            yield end, row
