"""Training on Ray actors: the same bits for any number of workers and across kills, and what the death of a process costs."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors import controller
from actors.controller import Progress, TrainResult, train
from actors.worker_pool import WorkerPool
from policies.errors import ConfigError, EnvironmentFailed, NotFound, TrainingFailed
from policies.storage import Storage, open_storage
from tests.training_runs import CARTPOLE, SHORT, Driver, changed
from training.checkpoint import load_checkpoint, load_policy
from training.config import EnvironmentConfig, TrainingConfig
from training.evaluation import EvaluationRequest, evaluate
from training.metrics import read_metrics
from training.runs import RunConfig, create_run

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "storage")


@pytest.fixture(scope="module")
def undisturbed_storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return open_storage(tmp_path_factory.mktemp("undisturbed") / "storage")


@pytest.fixture(scope="module")
def undisturbed(undisturbed_storage: Storage) -> TrainResult:
    return train(CARTPOLE, SHORT, undisturbed_storage, run_id="undisturbed")


def test_cartpole_is_solved_with_the_defaults(storage: Storage):
    progress: list[Progress] = []
    result = train(CARTPOLE, TrainingConfig(target_return=475), storage, on_progress=progress.append)
    assert result.reached_target and result.evaluation_return_mean >= 475
    assert 0 < result.time_to_target_s < result.wall_s
    assert [row.update for row in progress] == list(range(1, result.updates + 1))
    metrics = (storage.run(result.run_id) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["env_steps"] for line in metrics] == [row.env_steps for row in progress]
    policy, metadata = load_policy(storage.run(result.run_id))
    assert metadata["parameters_sha256"] == result.parameters_sha256 and metadata["env_steps"] == result.env_steps
    # 20 greedy episodes of at least 475 are no accident: 100 other ones are good too
    assert evaluate(CARTPOLE, EvaluationRequest(policy, num_episodes=100, seed=12345)).return_mean > 400


@pytest.mark.parametrize("num_env_runners", [1, 4])
def test_same_parameters_for_any_number_of_workers(storage: Storage, undisturbed: TrainResult, num_env_runners: int):
    result = train(CARTPOLE, changed(num_env_runners=num_env_runners), storage)
    assert result.parameters_sha256 == undisturbed.parameters_sha256
    assert (result.env_steps, result.evaluation_return_mean) == (undisturbed.env_steps, undisturbed.evaluation_return_mean)


class Interrupted(Exception):
    """Raised by a progress callback to end a run from within."""


def interrupt_after(update: int) -> Callable[[Progress], None]:
    def on_progress(progress: Progress) -> None:
        if progress.update == update:
            raise Interrupted

    return on_progress


@pytest.mark.parametrize(("interrupted_after", "damage"), [(1, False), (8, True)])
def test_resumed_run_ends_with_the_same_parameters(
    storage: Storage, undisturbed: TrainResult, interrupted_after: int, damage: bool
):
    with pytest.raises(Interrupted):
        train(CARTPOLE, SHORT, storage, run_id="cut", on_progress=interrupt_after(interrupted_after))
    if damage:
        newest = load_checkpoint(storage.run("cut")).path / "tensors.safetensors"
        newest.write_bytes(newest.read_bytes()[:-1])
    messages: list[str] = []
    result = train(CARTPOLE, changed(num_env_runners=1), storage, run_id="cut", resume=True, on_message=messages.append)
    assert result.parameters_sha256 == undisturbed.parameters_sha256
    assert result.updates == undisturbed.updates and result.env_steps == undisturbed.env_steps
    assert len(messages) == damage
    metrics = [json.loads(line)["update"] for line in (storage.run("cut") / "metrics.jsonl").read_text().splitlines()]
    assert metrics == list(range(1, result.updates + 1))


def test_no_metrics_are_lost_between_a_checkpoint_and_the_end_of_its_update(storage: Storage, monkeypatch: pytest.MonkeyPatch):
    save = controller._Loop._save

    def die_after_saving(*arguments: Any, **progress: Any) -> controller.Saved:
        saved = save(*arguments, **progress)
        if load_checkpoint(storage.run("cut")).state["update"] > 0:
            raise Interrupted
        return saved

    monkeypatch.setattr(controller._Loop, "_save", die_after_saving)
    with pytest.raises(Interrupted):
        train(CARTPOLE, SHORT, storage, run_id="cut")
    monkeypatch.undo()
    result = train(CARTPOLE, SHORT, storage, run_id="cut", resume=True)
    assert [row["update"] for row in read_metrics(storage.run("cut"))] == list(range(1, result.updates + 1))


def test_asynchronous_run_is_as_reproducible_as_a_synchronous_one(storage: Storage, undisturbed: TrainResult):
    """Fragments two versions behind, for 1, 2 and 4 workers, and killed on the way: the same bits, and others than with lag 0."""
    ahead = {"max_staleness": 2, "checkpoint_every_updates": 5}
    progress: list[Progress] = []
    result = train(CARTPOLE, changed(**ahead), storage, on_progress=progress.append)
    # After each restart of the environments (updates 0, 5, 10) the first fragment is up to date, the next lag 1 and then 2.
    assert [row.losses.lag_max for row in progress] == [(0, 1, 2, 2, 2)[update % 5] for update in range(result.updates)]
    for num_env_runners in (1, 4):
        other = train(CARTPOLE, changed(**ahead, num_env_runners=num_env_runners), storage)
        assert other.parameters_sha256 == result.parameters_sha256
    with pytest.raises(Interrupted):
        train(CARTPOLE, changed(**ahead), storage, run_id="cut", on_progress=interrupt_after(8))
    resumed = train(CARTPOLE, changed(**ahead), storage, run_id="cut", resume=True)
    assert resumed.parameters_sha256 == result.parameters_sha256
    assert train(CARTPOLE, changed(checkpoint_every_updates=5), storage).parameters_sha256 != result.parameters_sha256


def test_changed_settings_are_refused_without_force_and_some_with_it(storage: Storage):
    train(CARTPOLE, changed(max_env_steps=1_000), storage, run_id="forced")
    again = {"run_id": "forced", "resume": True}
    with pytest.raises(ConfigError, match=r"lr 0\.003 -> 0\.001.*--force"):
        train(CARTPOLE, changed(lr=0.001), storage, **again)
    assert train(CARTPOLE, changed(lr=0.001, max_env_steps=2_000), storage, **again, force=True).env_steps >= 2_000
    with pytest.raises(ConfigError, match=r"hidden \(16,\) -> \(32,\)"):
        train(CARTPOLE, changed(hidden=(32,), lr=0.001), storage, **again, force=True)
    with pytest.raises(ConfigError, match="was trained on"):
        train(EnvironmentConfig(id="Acrobot-v1"), changed(lr=0.001), storage, **again, force=True)


def test_run_stops_when_it_does_not_get_better(storage: Storage):
    """The value of patience, on an environment where every policy's return is 10."""
    constant = EnvironmentConfig(id="tests.training_environments:Constant-v0", max_episode_steps=10)
    result = train(constant, changed(patience=2, evaluation_every_updates=1, max_env_steps=10**6), storage)
    assert (result.stop_reason, result.updates, result.best_return_mean) == ("patience", 3, 10)


def test_resuming_a_finished_run_changes_nothing(undisturbed_storage: Storage, undisturbed: TrainResult):
    progress: list[Progress] = []
    again = train(CARTPOLE, SHORT, undisturbed_storage, run_id="undisturbed", resume=True, on_progress=progress.append)
    assert progress == [] and again.checkpoint == undisturbed.checkpoint
    assert again.parameters_sha256 == undisturbed.parameters_sha256
    assert again.evaluation_return_mean == undisturbed.evaluation_return_mean


def test_run_that_was_killed_before_its_first_checkpoint_starts_again(storage: Storage, undisturbed: TrainResult):
    create_run(storage, "created", RunConfig(CARTPOLE, SHORT))
    assert train(CARTPOLE, SHORT, storage, run_id="created", resume=True).parameters_sha256 == undisturbed.parameters_sha256


def test_resume_refuses_what_it_cannot_continue(undisturbed_storage: Storage, undisturbed: TrainResult):
    with pytest.raises(NotFound):
        train(CARTPOLE, SHORT, undisturbed_storage, run_id="never-started", resume=True)
    with pytest.raises(ConfigError, match=r"lr .* -> 0\.5"):
        train(CARTPOLE, changed(lr=0.5), undisturbed_storage, run_id="undisturbed", resume=True)


def test_killed_driver_leaves_a_run_that_ends_with_the_same_parameters(storage: Storage, undisturbed: TrainResult):
    # A cluster of its own: the processes of a driver that is killed without warning must not outlive it either.
    with Driver("local", storage, "killed", SHORT) as driver:
        driver.wait_for_updates(7)  # generations 0, 3 and 6 are saved, updates 7 and perhaps 8 will be made again
        driver.process.kill()
        assert driver.process.wait(timeout=30) == -signal.SIGKILL
    result = train(CARTPOLE, SHORT, storage, run_id="killed", resume=True)
    assert result.parameters_sha256 == undisturbed.parameters_sha256
    assert result.updates == undisturbed.updates


def test_killed_worker_is_replaced_and_the_run_goes_on(storage: Storage, monkeypatch: pytest.MonkeyPatch):
    pids: list[int] = []
    wait_until_ready = WorkerPool.wait_until_ready
    monkeypatch.setattr(WorkerPool, "wait_until_ready", lambda pool: pids.extend(wait_until_ready(pool)))
    progress: list[Progress] = []

    def kill_one_worker(row: Progress) -> None:
        progress.append(row)
        if row.update == 4:
            os.kill(pids[1], signal.SIGKILL)

    result = train(CARTPOLE, SHORT, storage, on_progress=kill_one_worker)
    assert result.env_steps >= SHORT.max_env_steps
    assert [row.worker_restarts for row in progress][3:6] == [0, 1, 1]


def test_environment_that_raises_once_is_made_again(storage: Storage, tmp_path: Path):
    kwargs = {"fault": "raise", "once": str(tmp_path / "happened")}
    environment = EnvironmentConfig(id="tests.training_environments:Faulty-v0", kwargs=kwargs, max_episode_steps=10)
    assert train(environment, changed(max_env_steps=1_000), storage).env_steps >= 1_000
    assert (tmp_path / "happened").exists()


@pytest.mark.parametrize("fault", ["raise_own", "exit"])
def test_environment_in_a_process_of_its_own_that_fails_once_is_made_again(storage: Storage, tmp_path: Path, fault: str):
    """What it raises cannot be pickled, or nothing is left of it that could be closed."""
    kwargs = {"fault": fault, "once": str(tmp_path / "happened")}
    environment = EnvironmentConfig(
        id="tests.training_environments:Faulty-v0", kwargs=kwargs, max_episode_steps=10, vectorization="async"
    )
    progress: list[Progress] = []
    small = changed(num_envs_per_shard=2, num_shards=2, minibatch_size=32, max_env_steps=200)
    assert train(environment, small, storage, on_progress=progress.append).env_steps >= 200
    assert progress[-1].environment_failures == 1 and (tmp_path / "happened").exists()


@pytest.mark.parametrize("name", ["Masked-v0", "MaskedInTheSameStep-v0"])
def test_a_run_keeps_to_action_masks_and_ends_as_a_policy_that_does(storage: Storage, name: str):
    environment = EnvironmentConfig(id=f"tests.training_environments:{name}", kwargs={"observed": True, "last": "zeros"})
    result = train(environment, changed(max_env_steps=20_000, lr=0.01, target_return=5), storage)
    policy, _ = load_policy(storage.run(result.run_id))
    assert policy.spaces.has_mask and result.reached_target
    assert (
        evaluate(environment, EvaluationRequest(policy, num_episodes=3, seed=0)).returns_E.tolist() == [5] * 3
    )  # 2 + 2 + 1, the best there is


def test_environment_that_always_raises_ends_the_run_with_its_own_traceback(storage: Storage):
    environment = EnvironmentConfig(id="tests.training_environments:Faulty-v0", kwargs={"fault": "raise"})
    with pytest.raises(EnvironmentFailed) as raised:
        train(environment, SHORT, storage, run_id="faulty")
    message = str(raised.value)
    assert "gave up after 5 attempts" in message and "the cart left the building" in message
    assert "training_environments.py" in message and message.count("Traceback") == 1
    assert load_checkpoint(storage.run("faulty")).state["update"] == 0  # resumable, once the environment is mended


def test_environment_that_always_kills_its_process_ends_the_run(storage: Storage):
    environment = EnvironmentConfig(id="tests.training_environments:Faulty-v0", kwargs={"fault": "exit"})
    with pytest.raises(TrainingFailed, match="worker died 5 times"):
        train(environment, SHORT, storage)


def test_evaluation_on_the_pool_gives_the_rows_of_one_process_also_when_a_worker_dies(undisturbed: TrainResult):
    policy, _ = load_policy(Path(undisturbed.checkpoint).parents[1])
    request = EvaluationRequest(policy, 200, seed=3, mode="sample", keep_steps=True)
    here = evaluate(CARTPOLE, request)
    with WorkerPool(CARTPOLE, SHORT) as pool:
        pids = pool.wait_until_ready()
        for num_restarts in range(2):
            (on_pool,) = pool.evaluate(request)
            assert pool.num_restarts == num_restarts  # one worker had two of the four chunks, and is replaced once
            assert on_pool.returns_E.tolist() == here.returns_E.tolist()
            assert on_pool.obs_ND.tobytes() == here.obs_ND.tobytes()
            if num_restarts == 0:
                os.kill(pids[0], signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline, "rollout workers outlive their pool"
        time.sleep(0.1)


def test_rollout_workers_do_not_import_torch():
    class Probe:
        def modules(self) -> bool:
            import actors.rollout_worker  # noqa: F401

            return "torch" in sys.modules

    probe = ray.remote(Probe).options(num_cpus=0).remote()
    assert ray.get(probe.modules.remote(), timeout=60) is False
    ray.kill(probe)
