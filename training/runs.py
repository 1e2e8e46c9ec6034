"""What the directory of a training run holds: its settings, its metrics, its checkpoints and a lock for its one writer.

runs/<run-id>/config.json       environment and training settings
              metrics.jsonl     one line per update, see `training/metrics.py`
              tensorboard/      the same for TensorBoard
              checkpoints/      see `training/checkpoint.py`
              result.json       what the run came to, once it has ended by itself
              .lock             held by the learner that writes here
"""

import fcntl
import secrets
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from policies.errors import ConfigError, IntegrityError, NotFound, UsageError
from policies.integrity import canonical_json, create_if_absent, make_directory, parse_json, remove_temporaries, write_atomic
from policies.storage import NAME_PATTERN, Storage
from training.config import EnvironmentConfig, TrainingConfig

SCHEMA_VERSION = 1
CONFIG, METRICS, RESULT, LOCK = "config.json", "metrics.jsonl", "result.json", ".lock"
# Settings that only say how far or with how many processes to go on; any other one would make a resumed run a different run.
RESUMABLE_CHANGES = {
    "num_env_runners",
    "num_cpus_per_env_runner",
    "target_return",
    "max_env_steps",
    "evaluation_episodes",
    "evaluation_every_updates",
    "keep_checkpoints",
    "patience",
    "worker_timeout_s",
    "observation_names",
    "observation_units",
}
# The saved parameters would not fit, or mean something else: not even --force goes on with these changed.
BREAKING_CHANGES = {
    "algorithm",
    "hidden",
    "conv_filters",
    "module",
    "module_kwargs",
    "activation",
    "vf_share_layers",
    "action_squashing",
}


@dataclass(frozen=True)
class RunConfig:
    """What a run learns, and how. `tuned` names the training settings that a search chose, not the loop file."""

    environment: EnvironmentConfig
    training: TrainingConfig
    tuned: tuple[str, ...] = ()

    def tuned_settings(self) -> dict[str, Any]:
        """Return what the search chose."""
        settings = self.training.model_dump(mode="json")
        return {name: settings[name] for name in self.tuned}


def new_run_id(now: float) -> str:
    """Return an id that sorts by time and that two runs of one second do not share."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime(now)) + "-" + secrets.token_hex(3)


def create_run(storage: Storage, run_id: str, config: RunConfig) -> Path:
    """Create a run's directory; raises `UsageError` when the id is taken or is no name."""
    if not NAME_PATTERN.fullmatch(run_id):
        raise UsageError(f"run id {run_id!r} must match {NAME_PATTERN.pattern}")
    run_dir = storage.run(run_id)
    make_directory(run_dir)
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


def newest_run(storage: Storage) -> Path | None:
    """Return the directory of the run that was started or resumed last, or None."""
    configs = sorted(storage.runs.glob(f"*/{CONFIG}"), key=lambda path: path.stat().st_mtime)
    return configs[-1].parent if configs else None


def read_config(run_dir: Path) -> RunConfig:
    """Read what `create_run` wrote; raises `IntegrityError` when it is damaged or newer than this Trimtab."""
    source = str(run_dir / CONFIG)
    value = parse_json((run_dir / CONFIG).read_bytes(), source)
    try:
        if value["schema_version"] != SCHEMA_VERSION:
            raise ValueError(
                f"schema version {value['schema_version']}, this Trimtab reads {SCHEMA_VERSION}; use the one that wrote it"
            )
        training, tuned = TrainingConfig(**value["training"]), tuple(value.get("tuned", ()))
        if unknown := set(tuned) - set(TrainingConfig.model_fields):
            raise ValueError(f"tuned settings {sorted(unknown)} do not exist")
        return RunConfig(EnvironmentConfig(**value["environment"]), training, tuned)
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise IntegrityError(f"{source} cannot be read: {error}") from error


def require_resumable(run_dir: Path, config: RunConfig, *, force: bool = False) -> None:
    """Raise `ConfigError` with a list of the changes when a run cannot go on with these settings.

    `force` lets those pass that only change what is learned from here on; what the saved parameters would not fit stays refused.
    """
    old, new = read_config(run_dir), config
    before = {**old.environment.model_dump(), **old.training.model_dump()}
    after = {**new.environment.model_dump(), **new.training.model_dump()}
    changed = [key for key in before if before[key] != after[key] and key not in RESUMABLE_CHANGES]
    breaking = [key for key in changed if key in BREAKING_CHANGES]
    refused = breaking if force else changed
    if refused:
        listed = ", ".join(f"{key} {before[key]!r} -> {after[key]!r}" for key in refused)
        remedy = "" if breaking else " or go on all the same with --force"
        raise ConfigError(
            f"run {run_dir.name!r} cannot be resumed with changed settings: {listed}; restore them, start a new run{remedy}. "
            f"Settings that may change: {', '.join(sorted(RESUMABLE_CHANGES))}"
        )


def change_config(run_dir: Path, config: RunConfig) -> None:
    """Write down the settings that a run goes on with."""
    remove_temporaries(run_dir)
    write_atomic(run_dir / CONFIG, _to_bytes(replace(config, tuned=read_config(run_dir).tuned)))


def lock_run(run_dir: Path, *, timeout_s: float) -> IO[bytes]:
    """Become the run's only writer until the returned file is closed or the process dies.

    Waits, because the learner of a driver that was killed needs a moment to notice it.
    """
    file = open(run_dir / LOCK, "ab")  # noqa: SIM115 - the lock lives as long as the file is open
    take_lock(file, run_dir.name, timeout_s=timeout_s)
    return file


def take_lock(file: IO[bytes], run_id: str, *, timeout_s: float) -> None:
    """Lock an open file until it is closed or the process dies; closes it and raises `UsageError` when another one has it."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise UsageError(f"run {run_id!r} is being written by another process; wait for it or end it") from None
            time.sleep(0.05)


def is_running(run_dir: Path) -> bool:
    """Say whether a process trains this run now. It holds its metrics' lock, which the kernel gives back when it dies."""
    path = run_dir / METRICS
    if not path.exists():
        return False
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _to_bytes(config: RunConfig) -> bytes:
    document = {
        "schema_version": SCHEMA_VERSION,
        "environment": config.environment.model_dump(mode="json"),
        "training": config.training.model_dump(mode="json"),
    }
    return canonical_json({**document, "tuned": list(config.tuned)} if config.tuned else document)
