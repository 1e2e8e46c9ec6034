"""What the directory of a training run holds: its settings, its metrics, its checkpoints and a lock for its one writer.

runs/<run-id>/config.json       environment and training settings
              metrics.jsonl     one line per update
              checkpoints/      see `training/checkpoint.py`
              .lock             held by the learner that writes here
"""

import fcntl
import json
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from policies.errors import ConfigError, IntegrityError, NotFound, UsageError
from policies.integrity import canonical_json, create_if_absent, parse_json, write_atomic
from policies.storage import NAME_PATTERN, Storage
from training.config import EnvironmentConfig, TrainingConfig

SCHEMA_VERSION = 1
CONFIG, METRICS, LOCK = "config.json", "metrics.jsonl", ".lock"
# Settings that only say how far or with how many processes to go on; any other one would make a resumed run a different run.
RESUMABLE_CHANGES = {
    "num_env_runners",
    "num_cpus_per_env_runner",
    "target_return",
    "max_env_steps",
    "evaluation_episodes",
    "evaluation_every_updates",
    "keep_checkpoints",
}


@dataclass(frozen=True)
class RunConfig:
    """What a run learns, and how."""

    environment: EnvironmentConfig
    training: TrainingConfig


def new_run_id(now: float) -> str:
    """Return an id that sorts by time and that two runs of one second do not share."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime(now)) + "-" + secrets.token_hex(3)


def create_run(storage: Storage, run_id: str, config: RunConfig) -> Path:
    """Create a run's directory; raises `UsageError` when the id is taken or is no name."""
    if not NAME_PATTERN.fullmatch(run_id):
        raise UsageError(f"run id {run_id!r} must match {NAME_PATTERN.pattern}")
    run_dir = storage.run(run_id)
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        create_if_absent(run_dir / CONFIG, _to_bytes(config))
    except FileExistsError:
        raise UsageError(f"run {run_id!r} exists already; `trimtab resume --run {run_id}` continues it") from None
    return run_dir


def open_run(storage: Storage, run_id: str) -> Path:
    """Return the directory of a run; raises `NotFound` and names the newest runs there are."""
    run_dir = storage.run(run_id)
    if NAME_PATTERN.fullmatch(run_id) and (run_dir / CONFIG).exists():
        return run_dir
    found = sorted(path.parent.name for path in storage.runs.glob(f"*/{CONFIG}"))[-5:]
    raise NotFound(f"run {run_id!r} is not in {storage.runs}; newest runs: {', '.join(found) or 'none'}")


def read_config(run_dir: Path) -> RunConfig:
    """Read what `create_run` wrote; raises `IntegrityError` when it is damaged or newer than this Trimtab."""
    source = str(run_dir / CONFIG)
    value = parse_json((run_dir / CONFIG).read_bytes(), source)
    try:
        if value["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {value['schema_version']}, this Trimtab reads {SCHEMA_VERSION}")
        return RunConfig(EnvironmentConfig(**value["environment"]), TrainingConfig(**value["training"]))
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise IntegrityError(f"{source} cannot be read: {error}") from error


def change_config(run_dir: Path, config: RunConfig) -> None:
    """Continue a run with new settings; raises `ConfigError` and lists the changes that would make it another run."""
    old, new = read_config(run_dir), config
    before = {**old.environment.model_dump(), **old.training.model_dump()}
    after = {**new.environment.model_dump(), **new.training.model_dump()}
    refused = [
        f"{key} {before[key]!r} -> {after[key]!r}" for key in before if before[key] != after[key] and key not in RESUMABLE_CHANGES
    ]
    if refused:
        raise ConfigError(
            f"run {run_dir.name!r} cannot be resumed with changed settings: {', '.join(refused)}; restore them or start a "
            f"new run. Settings that may change: {', '.join(sorted(RESUMABLE_CHANGES))}"
        )
    write_atomic(run_dir / CONFIG, _to_bytes(config))


def lock_run(run_dir: Path, *, timeout_s: float) -> IO[bytes]:
    """Become the run's only writer until the returned file is closed or the process dies.

    Waits, because the learner of a driver that was killed needs a moment to notice it.
    """
    file = open(run_dir / LOCK, "ab")  # noqa: SIM115 - the lock lives as long as the file is open
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise UsageError(f"run {run_dir.name!r} is being written by another process; wait for it or end it") from None
            time.sleep(0.05)


class MetricsLog:
    """Appends one JSON line per update; lines of updates that a resumed run makes again are removed first."""

    def __init__(self, run_dir: Path, *, after_update: int) -> None:
        path = run_dir / METRICS
        lines = path.read_bytes().splitlines() if path.exists() else []
        kept = [line for line in lines if _update_of(line) <= after_update]
        write_atomic(path, b"".join(line + b"\n" for line in kept))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by `close`

    def append(self, row: dict[str, Any]) -> None:
        self._file.write(canonical_json(row) + b"\n")

    def close(self) -> None:
        self._file.close()


def _update_of(line: bytes) -> float:
    try:
        return json.loads(line)["update"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the torn last line of a killed run: its update is made again


def _to_bytes(config: RunConfig) -> bytes:
    return canonical_json(
        {
            "schema_version": SCHEMA_VERSION,
            "environment": config.environment.model_dump(mode="json"),
            "training": config.training.model_dump(mode="json"),
        }
    )
