"""Does a real run tell how it goes: while it trains, interrupted, resumed and finished, with shares of time that add up?"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from actors.controller import Progress
from policies.storage import Storage, open_storage
from training.config import EnvironmentConfig
from training.metrics import TENSORBOARD, read_metrics
from training.phases import time_shares
from training.run_state import read_run_state
from trimtab.loop_file import LoopConfig, load_loop_file
from trimtab.pipeline import train_run

pytestmark = pytest.mark.ray

LOOP_FILE = Path(__file__).parents[2] / "examples" / "cartpole.yaml"
# 4 updates of 512 steps
SHORT = [
    "training.num_envs_per_shard=8",
    "training.rollout_fragment_length=32",
    "training.minibatch_size=256",
    "training.max_env_steps=1800",
    "training.evaluation_every_updates=2",
    "training.evaluation_episodes=5",
    "training.checkpoint_every_updates=2",
]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "storage")


def _loop(*overrides: str) -> LoopConfig:
    return load_loop_file(LOOP_FILE, overrides=[*SHORT, *overrides])


class Interrupted(Exception):
    """Raised by a progress callback to end a run from within."""


def test_a_run_tells_how_it_stands_from_its_first_update_to_its_end(storage: Storage):
    run_dir = storage.run("watched")
    states: list[str] = []

    def interrupt_after_three(progress: Progress) -> None:
        states.append(read_run_state(run_dir).state)
        if progress.update == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_run(_loop(), storage, run_id="watched", resume=False, on_progress=interrupt_after_three, on_message=print)
    assert states == ["running"] * 3
    interrupted = read_run_state(run_dir)
    assert (interrupted.state, interrupted.update) == ("interrupted", 3)

    result = train_run(_loop(), storage, run_id="watched", resume=True, on_progress=lambda progress: None, on_message=print)
    finished = read_run_state(run_dir)
    assert (finished.state, finished.stop_reason, finished.env_steps) == ("finished", "max_env_steps", result.env_steps)
    assert finished.evaluation_return_mean == result.evaluation_return_mean
    # The checkpoint was of update 2: update 3 was made again, and TensorBoard shows it once.
    steps = [row["env_steps"] for row in read_metrics(run_dir)]
    scalars = EventAccumulator(str(run_dir / TENSORBOARD)).Reload().Scalars("return/mean")
    assert [event.step for event in scalars] == steps and len(steps) == 4


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_the_time_shares_of_a_run_fill_its_loop(storage: Storage, max_staleness: int):
    loop = _loop(f"training.max_staleness={max_staleness}")
    rows: list[Progress] = []
    result = train_run(loop, storage, run_id="timed", resume=False, on_progress=rows.append, on_message=print)
    shares = time_shares(result.phases_s, overlaps=max_staleness > 0)
    assert sum(shares.parts().values()) == pytest.approx(1.0)
    assert 0 < shares.machinery < 1 and 0 < shares.loop_s <= result.wall_s
    # The loop's laps follow each other without a gap, until the last update is written down and then saved.
    last_save_s = result.phases_s["checkpoint_s"] - sum(row.checkpoint_s for row in rows)
    assert last_save_s > 0
    assert shares.loop_s == pytest.approx(rows[-1].elapsed_s + last_save_s, rel=0.02)


def test_failures_of_the_environment_are_shown(storage: Storage, tmp_path: Path):
    faulty = EnvironmentConfig(
        id="tests.training_environments:Faulty",
        kwargs={"fault": "raise", "once": str(tmp_path / "happened")},
        max_episode_steps=10,
    )
    loop = _loop().model_copy(update={"environment": faulty})
    train_run(loop, storage, run_id="faulty", resume=False, on_progress=lambda progress: None, on_message=print)
    state = read_run_state(storage.run("faulty"))
    assert (tmp_path / "happened").exists() and state.environment_failures >= 1
