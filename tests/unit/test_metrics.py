"""Do the metrics of a run say each update once, in its own file and to TensorBoard's reader, whatever interrupted the run?"""

import multiprocessing
from dataclasses import fields
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as ServerAccumulator
from tensorboard.util.tensor_util import make_ndarray

from actors.controller import Progress
from policies.errors import UsageError
from tests.progress import progress, row
from training.event_file import EventFile
from training.learner_state import UpdateReport
from training.metrics import TAGS, TENSORBOARD, MetricsLog, read_last_metrics, read_metrics, scalars
from training.runs import METRICS, is_running


def _write(run_dir: Path, updates: range, **changes) -> None:
    log = MetricsLog(run_dir, after_update=updates.start - 1)
    for update in updates:
        log.append(row(update, **changes))
    log.close()


def _tensorboard(directory: Path) -> EventAccumulator:
    reader = EventAccumulator(str(directory))
    return reader.Reload()


def _points(directory: Path, tag: str) -> list[tuple[int, float]]:
    """Return what TensorBoard shows of a tag: the same by its library's reader and by its server's, which differ inside."""
    points = [(event.step, round(event.value, 4)) for event in _tensorboard(directory).Scalars(tag)]
    server = ServerAccumulator(str(directory)).Reload()
    assert points == [(event.step, round(make_ndarray(event.tensor_proto).item(), 4)) for event in server.Tensors(tag)]
    return points


def test_updates_that_are_made_again_replace_those_before_the_kill(tmp_path: Path):
    _write(tmp_path, range(1, 4), return_mean=1.0)
    with open(tmp_path / METRICS, "ab") as file:
        file.write(b'{"update": 4, "ses')  # killed in the middle of a line
    _write(tmp_path, range(3, 5), return_mean=2.0)
    assert [(line["update"], line["return_mean"]) for line in read_metrics(tmp_path)] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert _points(tmp_path / TENSORBOARD, "return/mean") == [(1000, 1), (2000, 1), (3000, 2), (4000, 2)]


def test_rewinding_within_a_run_replaces_updates_as_well(tmp_path: Path):
    log = MetricsLog(tmp_path, after_update=0)
    for update in (1, 2, 3):
        log.append(row(update, return_mean=1.0))
    log.rewind(after_update=0)
    log.append(row(1, return_mean=2.0))
    log.close()
    assert [(line["update"], line["return_mean"]) for line in read_metrics(tmp_path)] == [(1, 2)]
    assert _points(tmp_path / TENSORBOARD, "return/mean") == [(1000, 2)]


def test_without_the_purge_step_the_reader_would_see_updates_twice(tmp_path: Path):
    """The negative control: a second file that purges nothing."""
    _write(tmp_path, range(1, 4))
    events = EventFile(tmp_path / TENSORBOARD, now=1.0, purge_step=1_000_000)
    events.append(3_000, {"return/mean": 2.0}, now=1.0)
    events.close()
    assert [step for step, _ in _points(tmp_path / TENSORBOARD, "return/mean")] == [1000, 2000, 3000, 3000]


def test_tensorboard_reads_every_number_under_its_name(tmp_path: Path):
    _write(tmp_path, range(1, 3), evaluation_return_mean=30.0)
    reader = _tensorboard(tmp_path / TENSORBOARD)
    expected = scalars(row(2, evaluation_return_mean=30.0))
    assert set(reader.Tags()["scalars"]) == set(expected) == set(TAGS.values())
    for tag, value in expected.items():
        last = reader.Scalars(tag)[-1]
        assert (last.step, last.value) == (2_000, pytest.approx(value, rel=1e-6))  # event files hold 32-bit floats


def test_numbers_that_do_not_exist_yet_are_left_out(tmp_path: Path):
    _write(tmp_path, range(1, 2), return_mean=None, return_low=None, return_high=None)
    tags = _tensorboard(tmp_path / TENSORBOARD).Tags()["scalars"]
    assert "return/mean" not in tags and "return/greedy" not in tags and "loss/policy" in tags


def test_a_loss_that_is_no_number_does_not_end_the_run(tmp_path: Path):
    diverged = row(1)
    diverged["losses"] |= {"kl": float("inf"), "policy_loss": float("nan")}
    log = MetricsLog(tmp_path, after_update=0)
    log.append(diverged)
    log.close()
    losses = read_metrics(tmp_path)[0]["losses"]
    assert losses["kl"] is None and losses["policy_loss"] is None and losses["entropy"] == row(1)["losses"]["entropy"]
    assert "policy/kl" not in scalars(read_metrics(tmp_path)[0])


def test_every_number_of_an_update_has_a_tag_or_a_reason_not_to():
    known = {"run_id", "update", "env_steps", "elapsed_s", "best_return_mean", "losses.num_env_steps"}  # axes, and sums of others
    names = {field.name for field in fields(Progress)} - {"losses"}
    names |= {f"losses.{field.name}" for field in fields(UpdateReport)}
    assert names - known == set(TAGS)


def test_a_damaged_event_is_refused_by_the_reader(tmp_path: Path):
    """Without right checksums the tests above would prove nothing: the reader has to look at them."""
    _write(tmp_path, range(1, 2))
    (path,) = (tmp_path / TENSORBOARD).iterdir()
    damaged = bytearray(path.read_bytes())
    damaged[-10] ^= 1
    path.write_bytes(damaged)
    assert _tensorboard(tmp_path / TENSORBOARD).Tags()["scalars"] == []


@pytest.mark.parametrize("step", [0, 127, 128, 2**31, 2**53])
def test_steps_of_any_size_are_read_back(tmp_path: Path, step: int):
    events = EventFile(tmp_path / TENSORBOARD, now=1.0, purge_step=0)
    events.append(step, {"return/mean": -1.5}, now=2.0)
    events.close()
    (event,) = _tensorboard(tmp_path / TENSORBOARD).Scalars("return/mean")
    assert (event.step, event.value, event.wall_time) == (step, -1.5, 2.0)


def test_foreign_files_do_not_disturb(tmp_path: Path):
    (tmp_path / TENSORBOARD).mkdir()
    (tmp_path / TENSORBOARD / "events.out.tfevents.1732521000.host").write_bytes(b"")
    _write(tmp_path, range(1, 2))
    assert (tmp_path / TENSORBOARD / "events.out.tfevents.000001").exists()


def test_the_newest_rows_are_read_without_the_others(tmp_path: Path):
    _write(tmp_path, range(1, 500))
    rows = read_last_metrics(tmp_path)
    assert rows == read_metrics(tmp_path)[-len(rows) :]
    assert 50 < len(rows) < 499 and rows[-1]["update"] == 499


def test_a_run_without_updates_has_no_rows(tmp_path: Path):
    assert read_metrics(tmp_path) == read_last_metrics(tmp_path) == []
    MetricsLog(tmp_path, after_update=0).close()
    assert read_metrics(tmp_path) == read_last_metrics(tmp_path) == []


def test_a_run_is_running_as_long_as_its_metrics_are_open(tmp_path: Path):
    assert not is_running(tmp_path)
    log = MetricsLog(tmp_path, after_update=0)
    assert is_running(tmp_path)
    log.rewind(after_update=0)
    assert is_running(tmp_path)
    log.close()
    assert not is_running(tmp_path)


def _hold(run_dir: Path, ready) -> None:
    log = MetricsLog(run_dir, after_update=0)
    ready.set()
    log.append(row(1))
    multiprocessing.Event().wait(60)


def test_a_killed_run_is_not_running_and_a_second_writer_is_refused_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("training.metrics.LOCK_TIMEOUT_S", 0.1)
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    try:
        assert ready.wait(60) and is_running(tmp_path)
        with pytest.raises(UsageError, match="being written by another process"):
            MetricsLog(tmp_path, after_update=0)
    finally:
        process.kill()
        process.join(30)
    assert not is_running(tmp_path)
    MetricsLog(tmp_path, after_update=0).close()


def test_the_row_is_the_progress_itself():
    assert row(3)["losses"]["kl"] == progress(3).losses.kl
