"""Does the directory of a run say how the run stands, at every point of its life?"""

from pathlib import Path

import pytest

from policies.integrity import canonical_json, write_atomic
from policies.storage import Storage, open_storage
from tests.progress import row
from training.config import EnvironmentConfig, TrainingConfig
from training.metrics import MetricsLog
from training.run_state import RunState, read_run_state
from training.runs import RESULT, RunConfig, create_run, newest_run
from trimtab.live import training_line

CONFIG = RunConfig(EnvironmentConfig(id="CartPole-v1"), TrainingConfig(target_return=495, max_env_steps=9_000))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "data")


@pytest.fixture
def run_dir(storage: Storage) -> Path:
    return create_run(storage, "run-1", CONFIG)


def _train(run_dir: Path, updates: range, **changes) -> RunState:
    """Make updates and return the state while the run is still running."""
    log = MetricsLog(run_dir, after_update=updates.start - 1)
    for update in updates:
        log.append(row(update, **changes))
    state = read_run_state(run_dir)
    log.close()
    return state


def _finish(run_dir: Path, *, updates: int) -> None:
    write_atomic(run_dir / RESULT, canonical_json({"updates": updates, "stop_reason": "target"}))


def test_a_run_that_has_not_begun_has_no_numbers(run_dir: Path):
    state = _train(run_dir, range(1, 1))
    assert (state.state, state.update, state.env_steps, state.return_mean) == ("running", 0, 0, None)
    assert training_line(state.to_json()) == "training run run-1 running · 0 steps"


def test_running_then_interrupted_then_finished(run_dir: Path):
    assert _train(run_dir, range(1, 3)).state == "running"
    assert read_run_state(run_dir).state == "interrupted"
    _train(run_dir, range(3, 5))
    _finish(run_dir, updates=4)
    state = read_run_state(run_dir)
    assert (state.state, state.stop_reason, state.update) == ("finished", "target", 4)


def test_a_finished_run_that_goes_on_and_is_interrupted_is_not_finished(run_dir: Path):
    _train(run_dir, range(1, 3))
    _finish(run_dir, updates=2)
    running = _train(run_dir, range(3, 4))
    assert (running.state, running.stop_reason) == ("running", None)
    assert read_run_state(run_dir).state == "interrupted"


def test_the_newest_greedy_return_is_shown_until_the_next(run_dir: Path):
    log = MetricsLog(run_dir, after_update=0)
    log.append(row(1, evaluation_return_mean=30.0, best_return_mean=30.0))
    log.append(row(2, best_return_mean=30.0))
    state = read_run_state(run_dir)
    log.close()
    assert (state.evaluation_return_mean, state.best_return_mean, state.return_mean) == (30.0, 30.0, 22.0)


def test_what_was_mended_is_shown_and_what_was_not_needed_is_not(run_dir: Path):
    state = _train(run_dir, range(1, 2), worker_restarts=2, environment_failures=1)
    assert (state.worker_restarts, state.environment_failures, state.learner_restarts) == (2, 1, 0)
    line = training_line(state.to_json())
    assert line.endswith("2 worker restarts · 1 environment failures") and "learner" not in line


def test_the_newest_run_is_the_one_started_or_resumed_last(storage: Storage):
    assert newest_run(storage) is None
    first, second = create_run(storage, "b", CONFIG), create_run(storage, "a", CONFIG)
    assert newest_run(storage) == second
    write_atomic(first / "config.json", (first / "config.json").read_bytes())  # as `resume` does
    assert newest_run(storage) == first
