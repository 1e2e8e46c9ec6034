"""A run that takes over another run's history: verified, complete, and nothing of its own left to go on with."""

from pathlib import Path

import numpy as np
import pytest

from policies.errors import IntegrityError
from policies.network import Architecture
from training.checkpoint import BEST, TENSORS, adopt_checkpoint, load_checkpoint, save_checkpoint
from training.config import EnvironmentConfig
from training.environment import read_spaces
from training.learner_state import LearnerState
from training.metrics import MetricsLog, adopt_metrics, read_metrics
from training.network import Layout

LAYOUT = Layout(read_spaces(EnvironmentConfig(id="CartPole-v1")), Architecture((8,)))


def save(run_dir: Path, update: int, *, seed: int, keep: int = 9) -> None:
    state = LearnerState.initial(LAYOUT, seed)
    state.update = update
    metadata = {**state.counters(), "run_id": run_dir.name, "parameters_sha256": f"{run_dir.name}-{update}"}
    best = state.weights().tensors(LAYOUT)
    save_checkpoint(run_dir, update=update, tensors=state.to_tensors(LAYOUT), best=best, state=metadata, keep=keep)


def generations(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("gen-*"))


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """A run with generations 10, 20 and 30, and a donor with 10 and 20."""
    own, donor = tmp_path / "own", tmp_path / "donor"
    for update in (10, 20, 30):
        save(own, update, seed=1)
    for update in (10, 20):
        save(donor, update, seed=update)
    return own, donor


def test_a_run_goes_on_with_the_donors_generation_and_nothing_else(runs: tuple[Path, Path]):
    own, donor = runs
    adopt_checkpoint(own, donor, "gen-000010")
    copied, original = load_checkpoint(own), donor / "checkpoints" / "gen-000010"
    assert generations(own) == ["gen-000010"] and generations(donor) == ["gen-000010", "gen-000020"]
    assert copied.state["run_id"] == "own" and copied.state["adopted_from"] == {"run_id": "donor", "generation": "gen-000010"}
    assert copied.state["parameters_sha256"] == "donor-10"
    for name in (TENSORS, BEST):
        assert (copied.path / name).read_bytes() == (original / name).read_bytes()
    assert not np.array_equal(LAYOUT.join(copied.tensors), LearnerState.initial(LAYOUT, 1).parameters_P)  # not its own


@pytest.mark.parametrize("damage", ["gone", "flipped"])
def test_the_donors_newest_generation_is_taken_when_the_one_named_is_gone_or_damaged(runs: tuple[Path, Path], damage: str):
    own, donor = runs
    path = donor / "checkpoints" / "gen-000010" / TENSORS
    data = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert adopt_checkpoint(own, donor, "gen-000010").path.name == "gen-000020"
    assert load_checkpoint(own).state["parameters_sha256"] == "donor-20"


def test_a_run_keeps_its_own_when_all_of_the_donors_are_damaged(runs: tuple[Path, Path]):
    own, donor = runs
    for generation in generations(donor):
        (donor / "checkpoints" / generation / TENSORS).write_bytes(b"")
    with pytest.raises(IntegrityError):
        adopt_checkpoint(own, donor, "gen-000010")
    assert load_checkpoint(own).state["parameters_sha256"] == "own-30"


def test_generations_of_a_history_that_was_left_do_not_push_out_new_ones(runs: tuple[Path, Path]):
    own, _ = runs
    save(own, 15, seed=3, keep=2)  # as after a fallback to 10, or when a killed adoption left 20 and 30 behind
    assert generations(own) == ["gen-000010", "gen-000015"]


def test_metrics_come_with_the_history(tmp_path: Path):
    for name, updates in (("own", (1, 2, 3)), ("donor", (1, 2, 3, 4))):
        (tmp_path / name).mkdir()
        log = MetricsLog(tmp_path / name, after_update=0)
        for update in updates:
            log.append({"update": update, "env_steps": 100 * update, "run_id": name, "losses": {}})
        log.close()
    adopt_metrics(tmp_path / "own", tmp_path / "donor")
    MetricsLog(tmp_path / "own", after_update=2).close()
    rows = read_metrics(tmp_path / "own")
    assert [(row["run_id"], row["update"]) for row in rows] == [("donor", 1), ("donor", 2)]
