"""How does a run stand, as far as its directory tells?"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from policies.integrity import parse_json
from training.metrics import read_last_metrics
from training.pacing import StopReason
from training.runs import RESULT, is_running, read_config

NUMBERS = (
    "env_steps_per_s",
    "elapsed_s",
    "return_mean",
    "return_low",
    "return_high",
    "best_return_mean",
    "worker_restarts",
    "environment_failures",
    "learner_restarts",
)


@dataclass(frozen=True)
class RunState:
    """What a person asks about a run that goes on, has ended by itself, or was interrupted (or failed) and can be resumed.

    Returns are as in `Progress`; the counts of what was mended are those of the newest session. Numbers are None before the
    first update.
    """

    run_id: str
    state: Literal["running", "finished", "interrupted"]
    stop_reason: StopReason | None
    update: int
    env_steps: int
    max_env_steps: int
    target_return: float | None
    evaluation_return_mean: float | None  # the newest
    env_steps_per_s: float | None
    elapsed_s: float | None
    return_mean: float | None
    return_low: float | None
    return_high: float | None
    best_return_mean: float | None
    worker_restarts: int | None
    environment_failures: int | None
    learner_restarts: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_run_state(run_dir: Path) -> RunState:
    """Read the state of a run; raises `IntegrityError` when its settings or its result are damaged."""
    running = is_running(run_dir)  # first: a run that ends now is then shown as running with all its numbers
    training = read_config(run_dir).training
    rows = read_last_metrics(run_dir)
    last = rows[-1] if rows else {"update": 0, "env_steps": 0}
    result = _result(run_dir)
    # A finished run may have been resumed with a larger max_env_steps and then interrupted: its result is an old one.
    finished = not running and result is not None and result["updates"] >= last["update"]
    evaluated = [row["evaluation_return_mean"] for row in rows if row["evaluation_return_mean"] is not None]
    return RunState(
        run_id=run_dir.name,
        state="running" if running else "finished" if finished else "interrupted",
        stop_reason=result["stop_reason"] if finished else None,
        update=last["update"],
        env_steps=last["env_steps"],
        max_env_steps=training.max_env_steps,
        target_return=training.target_return,
        evaluation_return_mean=evaluated[-1] if evaluated else None,
        **{name: last.get(name) for name in NUMBERS},
    )


def _result(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / RESULT
    return parse_json(path.read_bytes(), str(path)) if path.exists() else None
