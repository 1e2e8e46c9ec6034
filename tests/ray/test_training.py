"""Training on Ray actors: the same bits for any number of workers and across kills, and what the death of a process costs."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from actors.controller import Progress, TrainResult, train
from actors.worker_pool import WorkerPool
from policies.errors import ConfigError, EnvironmentFailed, NotFound, TrainingFailed
from policies.storage import Storage, open_storage
from training.checkpoint import load_checkpoint, load_policy
from training.config import EnvironmentConfig, TrainingConfig
from training.evaluation import evaluate

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).parents[2]
CARTPOLE = EnvironmentConfig(id="CartPole-v1")
# 4 shards x 8 environments x 16 steps = 512 steps per update; small, because bits are compared here and not learning speed
SHORT = TrainingConfig(
    num_shards=4,
    num_env_runners=2,
    num_envs_per_shard=8,
    rollout_fragment_length=16,
    minibatch_size=256,
    num_epochs=2,
    hidden=(16,),
    num_cpus_per_env_runner=0.25,
    max_env_steps=6_000,
    checkpoint_every_updates=3,
    evaluation_every_updates=5,
    evaluation_episodes=5,
    seed=11,
    normalize_observations=True,
)


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


def changed(**changes) -> TrainingConfig:
    return TrainingConfig(**{**SHORT.model_dump(), **changes})


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
    assert evaluate(CARTPOLE, policy, num_episodes=100, seed=12345).return_mean > 400


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


def test_resuming_a_finished_run_changes_nothing(undisturbed_storage: Storage, undisturbed: TrainResult):
    progress: list[Progress] = []
    again = train(CARTPOLE, SHORT, undisturbed_storage, run_id="undisturbed", resume=True, on_progress=progress.append)
    assert progress == [] and again.checkpoint == undisturbed.checkpoint
    assert again.parameters_sha256 == undisturbed.parameters_sha256
    assert again.evaluation_return_mean == undisturbed.evaluation_return_mean


def test_resume_refuses_what_it_cannot_continue(undisturbed_storage: Storage, undisturbed: TrainResult):
    with pytest.raises(NotFound):
        train(CARTPOLE, SHORT, undisturbed_storage, run_id="never-started", resume=True)
    with pytest.raises(ConfigError, match=r"lr .* -> 0\.5"):
        train(CARTPOLE, changed(lr=0.5), undisturbed_storage, run_id="undisturbed", resume=True)


DRIVER = """
import sys, ray
from actors.controller import train
from policies.storage import open_storage
from training.config import EnvironmentConfig, TrainingConfig
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
training = TrainingConfig.model_validate_json(sys.argv[2])
train(EnvironmentConfig(id="CartPole-v1"), training, open_storage(sys.argv[1]), run_id="killed",
      on_progress=lambda progress: print(progress.update, flush=True))
"""


def test_killed_driver_leaves_a_run_that_ends_with_the_same_parameters(storage: Storage, undisturbed: TrainResult):
    # A cluster of its own: the processes of a driver that is killed without warning must not outlive it either.
    command = [sys.executable, "-c", DRIVER, str(storage.root), SHORT.model_dump_json()]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    driver = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)
    watchdog = threading.Timer(120, driver.kill)
    watchdog.start()
    for line in driver.stdout:
        if line.strip() == "7":  # generations 0, 3 and 6 are saved, updates 7 and perhaps 8 will be made again
            break
    driver.send_signal(signal.SIGKILL)
    watchdog.cancel()
    assert driver.wait(timeout=30) == -signal.SIGKILL
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


def test_environment_that_always_raises_ends_the_run_with_its_own_traceback(storage: Storage):
    environment = EnvironmentConfig(id="tests.training_environments:Faulty-v0", kwargs={"fault": "raise"})
    with pytest.raises(EnvironmentFailed) as raised:
        train(environment, SHORT, storage, run_id="faulty")
    message = str(raised.value)
    assert "gave up after 3 attempts" in message and "the cart left the building" in message
    assert "training_environments.py" in message and message.count("Traceback") == 1
    assert load_checkpoint(storage.run("faulty")).state["update"] == 0  # resumable, once the environment is mended


def test_environment_that_always_kills_its_process_ends_the_run(storage: Storage):
    environment = EnvironmentConfig(id="tests.training_environments:Faulty-v0", kwargs={"fault": "exit"})
    with pytest.raises(TrainingFailed, match="worker died 3 times"):
        train(environment, SHORT, storage)


def test_evaluation_on_the_pool_gives_the_rows_of_one_process_also_when_a_worker_dies(undisturbed: TrainResult):
    policy, _ = load_policy(Path(undisturbed.checkpoint).parents[1])
    options = {"num_episodes": 200, "seed": 3, "mode": "sample", "keep_steps": True}
    here = evaluate(CARTPOLE, policy, **options)
    with WorkerPool(CARTPOLE, SHORT) as pool:
        pids = pool.wait_until_ready()
        for num_restarts in range(2):
            on_pool = pool.evaluate(policy, **options)
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
