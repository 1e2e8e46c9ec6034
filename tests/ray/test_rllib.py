"""Does RLlib train behind our command: to a bundle that acts as RLlib's own evaluation says, resumable, with errors that help?"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import safetensors.numpy
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.ppo import PPOConfig

from actors import rllib_algorithm, rllib_backend, rllib_environment
from actors.controller import Progress, TrainResult
from actors.rllib_backend import train_with_rllib
from policies.errors import ClusterError, ConfigError, EnvironmentFailed, IntegrityError
from policies.golden import NUM_GOLDEN, check_golden
from policies.policy import Policy
from policies.registry import Registry
from policies.storage import Storage, open_storage
from policies.verdicts import Verdict
from training.checkpoint import load_checkpoint, load_golden, load_policy, read_layout
from training.config import EnvironmentConfig, TrainingConfig
from training.evaluation import EvaluationRequest, evaluate
from training.gates.intervals import mean_interval
from training.golden import NUM_CORNERS
from training.network import policy_of
from trimtab import pipeline
from trimtab.loop_file import LoopConfig, load_loop_file

pytestmark = pytest.mark.ray

EXAMPLES = Path(__file__).parents[2] / "examples"
CARTPOLE = EnvironmentConfig(id="CartPole-v1")
PENDULUM = EnvironmentConfig(id="Pendulum-v1")
RAY_RESULTS = Path("~/ray_results").expanduser()
NUM_EPISODES = 40
# Two intervals of 99.9 % each: that they miss each other by chance alone happens less than once in a thousand runs.
CONFIDENCE = 0.999

DQN = {
    "algorithm": "rllib:DQN",
    "hidden": (32,),
    "activation": "relu",
    "lr": 1e-3,
    "gamma": 0.99,
    "normalize_observations": True,
    "max_env_steps": 1_500,
    "evaluation_every_updates": 2,
    "evaluation_episodes": 5,
    "checkpoint_every_updates": 2,
    "rllib": {
        "min_sample_timesteps_per_iteration": 250,
        "num_steps_sampled_before_learning_starts": 200,
        "num_envs_per_env_runner": 4,
        "epsilon": [[0, 1.0], [1000, 0.05]],
        "evaluation_duration": NUM_EPISODES,
    },
}
PPO = {
    "algorithm": "rllib:PPO",
    "hidden": (16,),
    "normalize_observations": True,
    "num_env_runners": 1,
    "max_env_steps": 400,
    "evaluation_episodes": 2,
    "rllib": {"train_batch_size_per_learner": 200, "num_epochs": 2, "num_envs_per_env_runner": 2},
}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are tiny, and the machine may be busy with other tests
    yield
    torch.set_num_threads(threads)
    ray.shutdown()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "storage")


def loop_of(environment: EnvironmentConfig, training: dict[str, Any], **gates: Any) -> LoopConfig:
    """Return a loop whose gates let everything pass that is not worse than nothing."""
    return LoopConfig(
        name="rllib",
        environment=environment,
        training={"target_return": 1e9, "num_cpus_per_env_runner": 0.5, **training},
        gates={
            "performance": {"min_return": -1e9, "episodes": 20},
            "safety": {"constraints": []},
            "robustness": {"strengths": {"noise": [0.05]}, "watched": {}, "min_return_ratio": 0.01, "episodes": 5},
            **gates,
        },
        feedback={"outcome_range": [-1e9, 1e9]},
    )


class Interrupted(Exception):
    """Raised by a progress callback to end a run from within."""


@pytest.fixture(scope="module")
def loop() -> LoopConfig:
    return loop_of(CARTPOLE, DQN)


@pytest.fixture(scope="module")
def dqn(loop: LoopConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, TrainResult, list[Progress], list[str]]:
    """A run that is interrupted after its third update and resumed to its end."""
    storage = open_storage(tmp_path_factory.mktemp("dqn") / "storage")
    progress: list[Progress] = []
    messages: list[str] = []

    def interrupt(row: Progress) -> None:
        progress.append(row)
        if row.update == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        pipeline.train_run(
            loop, storage, run_id="dqn", resume=False, force=False, on_progress=interrupt, on_message=messages.append
        )
    assert load_checkpoint(storage.run("dqn")).state["update"] == 2
    result = pipeline.train_run(
        loop, storage, run_id="dqn", resume=True, force=False, on_progress=progress.append, on_message=messages.append
    )
    return storage, result, progress, messages


def restored(environment: EnvironmentConfig, training: TrainingConfig, run: Path) -> Any:
    """Return RLlib's algorithm as the run's last checkpoint left it: a context manager."""
    _, config, _ = rllib_backend._prepare(environment, training, env_name="trimtab-restored")
    rllib_environment.register(config.env, environment)
    return rllib_algorithm.running(config, training)


def rllibs_own_evaluation(algorithm: Algorithm) -> np.ndarray:
    """Return the returns of greedy episodes that RLlib's own runner makes with its own module and connectors."""
    algorithm.env_runner_group.sync_weights(from_worker_or_learner_group=algorithm.learner_group, inference_only=True)
    episodes = algorithm.env_runner.sample(num_episodes=NUM_EPISODES, explore=False)
    return np.array([episode.get_return() for episode in episodes if episode.is_done])


def assert_same_mean(ours_E: np.ndarray, theirs_E: np.ndarray) -> None:
    ours, theirs = mean_interval(ours_E, CONFIDENCE), mean_interval(theirs_E, CONFIDENCE)
    assert ours.low <= theirs.high and theirs.low <= ours.high, (ours, theirs)


def test_a_run_counts_its_updates_and_steps_across_an_interruption(dqn):
    storage, result, progress, messages = dqn
    assert [row.update for row in progress] == [1, 2, 3, 3, 4, 5, 6]
    assert result.updates == 6 and 1_500 <= result.env_steps < 1_600
    assert 500 <= progress[1].env_steps < 520 and 750 <= progress[3].env_steps < 780  # it went on from update 2
    assert result.stop_reason == "max_env_steps" and not result.reached_target
    metrics = [json.loads(line) for line in (storage.run("dqn") / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert metrics[-1]["losses"]["qf_loss"] > 0 and metrics[-1]["return_mean"] > 0
    assert [message for message in messages if "replay buffer" in message]


def test_resuming_a_finished_run_changes_nothing(loop: LoopConfig, dqn):
    storage, result, _, _ = dqn
    messages: list[str] = []
    again = train_with_rllib(
        CARTPOLE, loop.training, storage, run_id="dqn", resume=True, on_message=messages.append, on_progress=pytest.fail
    )
    assert (again.checkpoint, again.parameters_sha256) == (result.checkpoint, result.parameters_sha256) and messages == []


def test_nothing_on_the_disk_is_a_pickle(dqn):
    storage, _, _, _ = dqn
    files = [path for path in storage.run("dqn").rglob("*") if path.is_file()]
    assert {path.suffix for path in files if path.parent.name != "tensorboard"} <= {".json", ".jsonl", ".safetensors", ".npz", ""}
    for path in files:
        assert not path.read_bytes().startswith((b"\x80\x04", b"\x80\x05"))  # how a pickle of today begins
        if path.suffix == ".safetensors":
            safetensors.numpy.load(path.read_bytes())
    assert not RAY_RESULTS.exists() or not any(path.stat().st_mtime > time.time() - 600 for path in RAY_RESULTS.glob("*/*"))


def test_the_state_of_an_algorithm_comes_back_whole(loop: LoopConfig, dqn):
    storage, _, _, _ = dqn
    saved = load_checkpoint(storage.run("dqn")).tensors
    with restored(CARTPOLE, loop.training, storage.run("dqn")) as algorithm:
        fresh = rllib_algorithm.state_tensors(algorithm)
        rllib_algorithm.restore(algorithm, rllib_algorithm.state_from_tensors(saved))
        again = rllib_algorithm.state_tensors(algorithm)
    learned = [name for name in again if "/rl_module/" in name or "/optimizer/" in name]
    assert len(learned) > 20 and all(np.array_equal(again[name], saved[name]) for name in learned)
    assert not all(name in fresh and np.array_equal(fresh[name], saved[name]) for name in learned)
    statistics = json.loads(saved[rllib_algorithm.STATE_JSON].tobytes())
    assert "MeanStdFilter" in json.dumps(statistics)


def test_the_bundle_acts_as_rllibs_own_evaluation_says(loop: LoopConfig, dqn):
    storage, _, _, _ = dqn
    run = storage.run("dqn")
    checkpoint = load_checkpoint(run)
    layout = read_layout(checkpoint.state)
    last = policy_of(checkpoint.tensors, layout.spaces, layout.architecture)
    with restored(CARTPOLE, loop.training, run) as algorithm:
        rllib_algorithm.restore(algorithm, rllib_algorithm.state_from_tensors(checkpoint.tensors))
        theirs_E = rllibs_own_evaluation(algorithm)
    ours_E = evaluate(CARTPOLE, EvaluationRequest(last, num_episodes=NUM_EPISODES, seed=1)).returns_E
    assert_same_mean(ours_E, theirs_E)

    report = pipeline.gate_run(loop, storage, "dqn")
    assert report.verdict is Verdict.PASS, [result.reason for result in report.results]
    published = pipeline.publish_run(loop, storage, "dqn")
    bundle = Registry(storage.registry("rllib")).bundle(published.version)
    best, _ = load_policy(run)
    assert published.is_champion and bundle.manifest["serving_mode"] == "greedy"
    assert bundle.policy.sha256() == best.sha256() and bundle.policy.architecture.observation_clip == 10.0


def test_the_bundles_golden_vectors_are_rllibs_and_notice_a_lost_normaliser(dqn):
    storage, _, _, _ = dqn
    run = storage.run("dqn")
    golden, (policy, _) = load_golden(run), load_policy(run)
    # of what five episodes met, and corners; each distribution was computed by RLlib's module and connectors
    assert len(golden.observations_ND) == NUM_GOLDEN + NUM_CORNERS
    check_golden(policy, golden)
    lost = {"normaliser.mean": np.zeros(4, np.float32), "normaliser.scale": np.ones(4, np.float32)}
    with pytest.raises(IntegrityError, match="golden vectors"):
        check_golden(Policy(policy.spaces, policy.architecture, {**policy.tensors, **lost}), golden)


def test_resume_refuses_settings_that_rllib_would_hear_otherwise(loop: LoopConfig, dqn):
    storage, _, _, _ = dqn
    # equal to our default, so that our own comparison sees no change; but RLlib was told 0.99 before and is told nothing now
    changed = TrainingConfig(**{key: value for key, value in DQN.items() if key != "gamma"}, target_return=1e9)
    with pytest.raises(ConfigError, match=r"RLlib settings: gamma 0\.99 -> 'not set'"):
        train_with_rllib(CARTPOLE, changed, storage, run_id="dqn", resume=True)
    with pytest.raises(ConfigError, match="algorithm"):
        other = TrainingConfig(**{**DQN, "algorithm": "rllib:PPO", "rllib": {}})
        train_with_rllib(CARTPOLE, other, storage, run_id="dqn", resume=True, force=True)


def test_remote_runners_merge_their_normalisers_into_the_policy(storage: Storage):
    result = train_with_rllib(PENDULUM, TrainingConfig(**PPO), storage, run_id="ppo")
    assert result.env_steps == 400
    policy, _ = load_policy(storage.run("ppo"))
    # Pendulum shows cos, sin and a speed of up to 8: the deviations of 200 steps and more are nowhere near 0, or 1 for speed
    deviation_D = 1 / policy.tensors["normaliser.scale"] - 1e-6
    assert 0.2 < deviation_D[0] < 1 and 0.2 < deviation_D[1] < 1 and 1 < deviation_D[2] < 8
    check_golden(policy, load_golden(storage.run("ppo")))


def test_sacs_temperature_survives_a_resume(storage: Storage):
    settings = {
        "algorithm": "rllib:SAC",
        "hidden": (16,),
        "max_env_steps": 200,
        "evaluation_episodes": 1,
        "rllib": {
            "num_steps_sampled_before_learning_starts": 100,
            "train_batch_size_per_learner": 16,
            "alpha_lr": 0.01,
            "initial_alpha": 0.5,
            "min_time_s_per_iteration": 0,
        },
    }
    training = TrainingConfig(**settings)
    train_with_rllib(PENDULUM, training, storage, run_id="sac")
    saved = rllib_algorithm.state_from_tensors(load_checkpoint(storage.run("sac")).tensors)
    log_alpha = saved[rllib_algorithm.EXTRA]["curr_log_alpha"]["default_policy"]
    assert abs(log_alpha.item() - np.log(0.5)) > 1e-3  # it learned
    with restored(PENDULUM, training, storage.run("sac")) as algorithm:
        rllib_algorithm.restore(algorithm, saved)
        again = rllib_algorithm._from_one_learner(algorithm)["curr_log_alpha"]["default_policy"]
    assert again == log_alpha


@pytest.mark.parametrize("num_env_runners", [0, 1])
def test_the_environments_own_traceback_ends_the_run(storage: Storage, num_env_runners: int):
    environment = EnvironmentConfig(id="tests.training_environments:Faulty", kwargs={"fault": "raise"}, max_episode_steps=10)
    training = {key: value for key, value in PPO.items() if key != "num_env_runners"}
    training["rllib"] = {**PPO["rllib"], "num_env_runners": num_env_runners}
    began_s = time.monotonic()
    with pytest.raises(EnvironmentFailed) as raised:
        train_with_rllib(environment, TrainingConfig(**training), storage, run_id="faulty")
    message = str(raised.value)
    assert "ZeroDivisionError in step: the cart left the building" in message
    assert "training_environments.py" in message and message.count("Traceback") == 1
    assert time.monotonic() - began_s < 55  # RLlib would sleep for 60 s first
    assert load_checkpoint(storage.run("faulty")).state["update"] == 0  # resumable, once the environment is mended


def test_an_environment_that_hangs_ends_the_run(storage: Storage):
    environment = EnvironmentConfig(id="tests.training_environments:Faulty", kwargs={"fault": "hang"}, max_episode_steps=10)
    with pytest.raises(EnvironmentFailed, match=r"no environment made a step within 2 s; raise training\.worker_timeout_s"):
        train_with_rllib(environment, TrainingConfig(**PPO, worker_timeout_s=2), storage, run_id="hangs")


@pytest.mark.parametrize(
    ("rllib", "message"),
    [
        ({"num_gpus_per_learner": 2}, r"use 2 GPUs, the cluster has 0"),
        ({"num_env_runners": 50}, r"use 50 CPUs, the cluster has 3"),
    ],
)
def test_what_the_cluster_does_not_have_is_said_before_anything_starts(storage: Storage, rllib: dict[str, Any], message: str):
    training = TrainingConfig(algorithm="rllib:PPO", rllib=rllib)
    with pytest.raises(ClusterError, match=message):
        train_with_rllib(CARTPOLE, training, storage, run_id="greedy")
    assert not storage.run("greedy").exists()


def test_behaviour_cloning_learns_from_a_recording_of_rllib(storage: Storage, tmp_path: Path):
    record_episodes(tmp_path / "recorded", num_episodes=3)
    training = TrainingConfig(
        algorithm="rllib:BC",
        hidden=(16,),
        lr=0.01,
        max_env_steps=64,
        evaluation_episodes=2,
        rllib={
            "input_": [str(tmp_path / "recorded")],
            "dataset_num_iters_per_learner": 1,
            "train_batch_size_per_learner": 32,
        },
    )
    progress: list[Progress] = []
    result = train_with_rllib(CARTPOLE, training, storage, run_id="bc", on_progress=progress.append)
    assert result.env_steps >= 64 and progress[-1].losses["policy_loss"] > 0
    policy, _ = load_policy(storage.run("bc"))
    check_golden(policy, load_golden(storage.run("bc")))


def record_episodes(path: Path, *, num_episodes: int) -> None:
    """Let RLlib record episodes of CartPole as rows of Parquet files."""
    config = PPOConfig().environment("CartPole-v1").env_runners(num_env_runners=0, batch_mode="complete_episodes")
    config.offline_data(output=str(path), output_write_episodes=False, output_compress_columns=[])
    config.rl_module(model_config={"fcnet_hiddens": [8]})
    algorithm = config.build_algo()
    try:
        algorithm.env_runner.sample(num_episodes=num_episodes)
    finally:
        algorithm.stop()
        Path(algorithm.logdir).rmdir()


@pytest.mark.slow
@pytest.mark.parametrize(("example", "environment"), [("cartpole_dqn", CARTPOLE), ("pendulum_sac", PENDULUM)])
def test_examples_reach_their_target_and_act_as_rllib_says(storage: Storage, example: str, environment: EnvironmentConfig):
    loop = load_loop_file(EXAMPLES / f"{example}.yaml")
    result = pipeline.train_run(loop, storage, run_id="r", resume=False, force=False, on_progress=print, on_message=print)
    assert result.reached_target and result.env_steps <= 100_000
    report = pipeline.gate_run(loop, storage, "r")
    assert report.verdict is Verdict.PASS, [result.reason for result in report.results]
    version = pipeline.publish_run(loop, storage, "r").version
    ours_E = pipeline.evaluate_version(loop, storage, version, episodes=100, seed=5).returns_E
    checkpoint = load_checkpoint(storage.run("r"))
    with restored(environment, loop.training, storage.run("r")) as algorithm:
        rllib_algorithm.restore(algorithm, rllib_algorithm.state_from_tensors(checkpoint.tensors))
        theirs_E = rllibs_own_evaluation(algorithm)
    assert_same_mean(ours_E, theirs_E)
