"""Searches on Ray Tune: trials are normal runs, bad ones end early, copies really have the donor's weights, the best goes on."""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from actors.controller import train
from actors.tuning import search
from policies.errors import ClusterError
from policies.storage import Storage, open_storage
from policies.verdicts import Verdict
from tests.command_line import ROOT, TRIMTAB
from training.checkpoint import adopt_checkpoint, generation_name, load_checkpoint
from training.config import EnvironmentConfig, TrainingConfig
from training.runs import RunConfig, create_run, read_config
from training.tuning import Trial, TrialStatus, TuningConfig, trial_training
from trimtab.loop_file import LoopConfig
from trimtab.pipeline import gate_run, publish_run, train_run
from trimtab.tuning import run_search

pytestmark = pytest.mark.ray

CARTPOLE = EnvironmentConfig(id="CartPole-v1")
# 2 shards x 8 environments x 16 steps = 256 steps per update; one worker with one CPU, so that two trials run at once
SHORT = TrainingConfig(
    num_shards=2,
    num_env_runners=1,
    num_envs_per_shard=8,
    rollout_fragment_length=16,
    minibatch_size=128,
    num_epochs=2,
    hidden=(16,),
    num_cpus_per_env_runner=1.0,
    checkpoint_every_updates=100,
    evaluation_every_updates=2,
    evaluation_episodes=2,
    keep_checkpoints=100,
    seed=5,  # its initial policy is a bad one: lr 1e-6 stays at a return of 9, lr 0.01 is beyond 20 after 1,000 steps
)
COMMAND_TIMEOUT_S = 180.0


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "storage")


def tuning(**settings: Any) -> TuningConfig:
    return TuningConfig.model_validate({"parameters": {"lr": {"choice": [1e-6, 0.01]}}, **settings})


def test_asha_ends_bad_trials_early_and_the_best_one_can_be_gated_and_published(storage: Storage):
    loop = LoopConfig.model_validate(
        {
            "name": "cartpole",
            "environment": CARTPOLE,
            "training": SHORT.model_copy(update={"max_env_steps": 4_000}),
            "tuning": {
                # Seed 12 draws a good lr, minibatches of 512 that do not fit the batch of 256, and a bad lr.
                "parameters": {"lr": {"choice": [1e-6, 0.01]}, "minibatch_size": {"choice": [64, 128, 512]}},
                "num_trials": 3,
                "max_env_steps": 3_000,
                "grace_env_steps": 900,
                "max_concurrent": 1,  # one after the other: which ones are stopped is then no matter of timing
                "seed": 12,
            },
            "gates": {"performance": {"min_return": 5, "episodes": 20}, "robustness": {"episodes": 20}},
            "feedback": {"outcome_range": [0, 500]},
        }
    )
    told: list[Trial] = []
    result = run_search(
        loop, storage, "asha", on_trial=lambda _, changed: told.append(changed), on_message=print, should_stop=lambda: False
    )
    by_status = {status: [t for t in result.trials if t.status is status] for status in TrialStatus}
    (invalid,) = by_status[TrialStatus.FAILED]
    assert "minibatch_size 512 is larger than the batch of 256" in invalid.reason and not storage.run(invalid.run_id).exists()
    assert by_status[TrialStatus.FINISHED] == [result.best] and result.best.parameters["lr"] == 0.01
    assert result.best.env_steps >= 3_000 and result.best.reason == "max_env_steps"
    assert [t.parameters["lr"] for t in by_status[TrialStatus.STOPPED]] == [1e-6]
    assert all(900 <= t.env_steps < 1_500 and t.best_return < 15 for t in by_status[TrialStatus.STOPPED])
    assert all([t for t in told if t.run_id == row.run_id][-1:] in ([row], []) for row in result.trials)
    document = json.loads((result.directory / "result.json").read_bytes())
    assert [row["run_id"] for row in document["trials"]] == [t.run_id for t in result.trials]
    assert sorted(path.name for path in result.directory.iterdir()) == [
        "parallel-coordinates.png",
        "parallel-coordinates.svg",
        "result.json",  # and nothing of Ray Tune's
    ]

    best = result.best.run_id
    assert read_config(storage.run(best)).tuned_settings() == result.settings == result.best.parameters
    continued = train_run(loop, storage, run_id=best, resume=True, force=False, on_progress=lambda _: None, on_message=print)
    assert continued.env_steps >= 4_000  # the loop file's own number, not the search's
    assert read_config(storage.run(best)).training.lr == result.settings["lr"] != loop.training.lr
    report = gate_run(loop, storage, best)
    published = publish_run(loop, storage, best, override_gates=None if report.verdict is Verdict.PASS else "test")
    origin = published.bundle.manifest["origin"]
    assert origin["loop"]["training"]["lr"] == result.settings["lr"]  # the bundle says what it was really trained with


def test_pbt_trials_that_copy_really_learn_on_from_the_donors_weights(storage: Storage):
    settings = tuning(
        scheduler="pbt",
        num_trials=2,
        max_env_steps=2_400,  # 10 updates, two of them with perturbations
        perturb_every_updates=4,
        parameters={"lr": {"log_uniform": [1e-6, 1e-2]}, "gamma": {"uniform": [0.9, 0.99]}},
        seed=2,  # draws a good lr, then a bad one
        max_concurrent=1,  # they take turns, so that who copies whom is no matter of timing
    )
    learned_with: dict[tuple[str, str], dict[str, Any]] = {}  # run and donor -> parameters since then
    ended: list[str] = []

    def note(_: list[Trial], changed: Trial) -> None:
        if changed.status is TrialStatus.FINISHED:
            ended.append(changed.run_id)
        if changed.donors:
            learned_with.setdefault((changed.run_id, changed.donors[-1]), changed.parameters)

    trials = search(CARTPOLE, SHORT, settings, storage, "pbt", on_trial=note)
    assert sorted(ended) == [trial.run_id for trial in trials]  # once each: what is over is not started again
    assert all(trial.status is TrialStatus.FINISHED and trial.env_steps >= 2_400 for trial in trials)
    # A copy removes the copier's own generations. So of the last one of the search, the donor's are still there.
    copies = [copy for trial in trials if trial.donors and (copy := _last_copy(storage, trial)) is not None]
    assert copies, [trial.donors for trial in trials]
    run_dir, donor, state = copies[0]
    original = _state(storage.runs / donor.replace("/", "/checkpoints/"))
    assert state["parameters_sha256"] == original["parameters_sha256"] and state["run_id"] == run_dir.name

    # The same again by hand: the donor's generation in a new run, and on with the settings that the trial had.
    donor_dir, parameters = storage.run(original["run_id"]), learned_with[(run_dir.name, donor)]
    following = _state(sorted((run_dir / "checkpoints").glob("gen-*"))[1])
    again = create_run(storage, "again", RunConfig(CARTPOLE, read_config(donor_dir).training))
    adopt_checkpoint(again, donor_dir, donor.partition("/")[2])
    until = trial_training(settings, SHORT, parameters).model_copy(update={"max_env_steps": following["env_steps"]})
    result = train(CARTPOLE, until, storage, run_id="again", resume=True, force=True)
    assert result.updates == following["update"] and result.parameters_sha256 == following["parameters_sha256"]
    # Negative control: it was not the donor that went on, neither with its settings nor to its parameters.
    chosen = read_config(donor_dir).tuned_settings()
    assert parameters != {name: chosen[name] for name in parameters}
    donors_own = donor_dir / "checkpoints" / generation_name(following["update"])
    assert not donors_own.exists() or _state(donors_own)["parameters_sha256"] != following["parameters_sha256"]


def _last_copy(storage: Storage, trial: Trial) -> tuple[Path, str, dict[str, Any]] | None:
    """Return the trial's run, what it copied last, and its copy; None where the donor's own is gone by now."""
    run_dir, donor = storage.run(trial.run_id), trial.donors[-1]
    copied = run_dir / "checkpoints" / donor.partition("/")[2]
    return (run_dir, donor, _state(copied)) if (storage.runs / donor.replace("/", "/checkpoints/")).exists() else None


def _state(generation: Path) -> dict[str, Any]:
    return json.loads((generation / "state.json").read_bytes())


def test_a_search_that_is_asked_to_stop_leaves_runs_that_can_be_resumed(storage: Storage):
    evaluated = threading.Event()

    def on_trial(_: list[Trial], changed: Trial) -> None:
        if changed.best_return is not None:
            evaluated.set()

    settings = tuning(num_trials=3, max_concurrent=1, max_env_steps=1_000_000)
    first, *others = search(CARTPOLE, SHORT, settings, storage, "cut", on_trial=on_trial, should_stop=evaluated.is_set)
    assert first.status is TrialStatus.INTERRUPTED and first.best_return is not None
    assert {trial.status for trial in others} == {TrialStatus.INTERRUPTED} and {trial.env_steps for trial in others} == {0}
    assert not (storage.tuning("cut") / "tune").exists()
    until = trial_training(settings, SHORT, first.parameters).model_copy(update={"max_env_steps": 1_000})
    resumed = train(CARTPOLE, until, storage, run_id=first.run_id, resume=True)
    fresh = train(CARTPOLE, until, storage, run_id="fresh")
    assert resumed.parameters_sha256 == fresh.parameters_sha256  # resumed, it is the run that it would have been
    assert load_checkpoint(storage.run(first.run_id)).state["update"] == resumed.updates


def test_a_trial_whose_environment_fails_ends_with_its_message_and_the_search_with_all_trials(storage: Storage):
    faulty = EnvironmentConfig(id="tests.training_environments:Faulty-v0", kwargs={"fault": "raise"})
    (trial,) = search(faulty, SHORT, tuning(num_trials=1), storage, "faulty")
    assert trial.status is TrialStatus.FAILED and trial.best_return is None
    assert "gave up after" in trial.reason and "the cart left the building" in trial.reason


def test_a_trial_whose_process_dies_fails_alone(storage: Storage):
    killed: list[int] = []

    def kill_the_first(_: list[Trial], changed: Trial) -> None:
        if changed.best_return is not None and not killed:
            (process,) = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::Implicit")]
            process.kill()
            killed.append(changed.number)

    settings = tuning(num_trials=2, max_concurrent=1, max_env_steps=1_500)
    without_cpus = SHORT.model_copy(update={"num_cpus_per_env_runner": 0.0})  # nothing to reserve is no reason not to start
    trials = search(CARTPOLE, without_cpus, settings, storage, "killed", on_trial=kill_the_first)
    assert killed == [0] and [trial.status for trial in trials] == [TrialStatus.FAILED, TrialStatus.FINISHED]
    assert "died" in trials[0].reason


def test_trials_that_can_never_fit_the_cluster_are_refused(storage: Storage):
    with pytest.raises(ClusterError, match="one trial needs 4 CPUs for 4 rollout workers, the cluster has 2"):
        search(CARTPOLE, SHORT.model_copy(update={"num_shards": 4, "num_env_runners": 4}), tuning(), storage, "big")


def test_control_c_prints_what_is_known_and_leaves_nothing_running(tmp_path: Path):
    command = [*TRIMTAB, "tune", str(ROOT / "examples" / "cartpole.yaml"), "--storage", str(tmp_path / "data"), "--json"]
    command += ["--address", "local", "--search", "cut", "--set", "training.target_return=1000", "--set", "tuning.num_trials=3"]
    command += [
        "--set",
        "tuning.max_env_steps=10000000",
        "--set",
        "tuning.max_concurrent=1",
        "--set",
        "training.num_env_runners=1",
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=_listen
    )
    watchdog = threading.Timer(COMMAND_TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        seen = []
        for line in process.stderr:
            seen.append(line)
            if "best return" in line:
                break
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=COMMAND_TIMEOUT_S)
    finally:
        watchdog.cancel()
        process.kill()
    assert process.returncode == 130, "".join(seen) + stderr
    document = json.loads(stdout)
    assert document["is_interrupted"] and document["best"]["run_id"].startswith("tune-cut-0")
    assert "interrupted" in stderr and "stopped" in stderr and "Traceback" not in stderr
    assert document == json.loads((tmp_path / "data" / "tuning" / "cut" / "result.json").read_bytes())
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no process of its group is left


def _listen() -> None:
    """Undo what a shell does to its background jobs, if these tests are one: it lets them ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
