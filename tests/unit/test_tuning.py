"""Trials: drawn alike each time, judged before they start, ranked by what was asked for, and shown so that one can use them."""

import io
import os
import shlex
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from policies.errors import ConfigError
from policies.storage import open_storage
from tests.command_line import ROOT
from training.config import EnvironmentConfig, TrainingConfig
from training.environment import read_spaces
from training.runs import RunConfig, change_config, create_run, read_config, require_resumable
from training.search_space import Domain
from training.tuning import Trial, TrialStatus, TuningConfig, best_of, draw_trials, perturbed, ranked
from trimtab.cluster import first_interrupt_noted
from trimtab.commands.tuning import as_yaml, print_table, set_options, summary
from trimtab.loop_file import load_loop_file
from trimtab.parallel_coordinates import draw_parallel_coordinates, save_figure
from trimtab.pipeline import loop_of_run

SPACES = read_spaces(EnvironmentConfig(id="CartPole-v1"))
BATCH = TrainingConfig().batch_size


def tuning(**settings: object) -> TuningConfig:
    return TuningConfig.model_validate(settings)


def trial(number: int, **changes: object) -> Trial:
    parameters = {"lr": 10 ** -(2 + number / 4), "num_epochs": (4, 8)[number % 2]}
    return replace(Trial(number, f"tune-x-{number:02d}", parameters, TrialStatus.FINISHED), **changes)


def test_a_search_with_more_trials_begins_with_the_same_ones():
    few, many = (draw_trials(tuning(num_trials=n), TrainingConfig(), SPACES, "x") for n in (3, 6))
    assert many[:3] == few and len({str(trial.parameters) for trial in many}) == 6
    assert [trial.run_id for trial in few] == ["tune-x-00", "tune-x-01", "tune-x-02"]
    assert draw_trials(tuning(num_trials=3, seed=1), TrainingConfig(), SPACES, "x") != few


def test_settings_that_do_not_fit_fail_their_trial_with_their_own_message():
    sizes = tuning(parameters={"minibatch_size": {"choice": [256, 2 * BATCH]}}, num_trials=8)
    trials = draw_trials(sizes, TrainingConfig(), SPACES, "x")
    failed = [trial for trial in trials if trial.status is TrialStatus.FAILED]
    assert {trial.parameters["minibatch_size"] for trial in failed} == {2 * BATCH}
    assert all(f"minibatch_size {2 * BATCH} is larger than the batch of {BATCH} steps" in trial.reason for trial in failed)
    assert {trial.parameters["minibatch_size"] for trial in trials if trial not in failed} == {256}


def test_a_search_whose_trials_all_fail_beforehand_is_refused():
    with pytest.raises(ConfigError, match=f"no drawn combination.*minibatch_size {2 * BATCH} is larger"):
        draw_trials(tuning(parameters={"minibatch_size": {"choice": [2 * BATCH]}}), TrainingConfig(), SPACES, "x")


def test_convolutions_that_do_not_fit_the_observation_fail_beforehand_too():
    with pytest.raises(ConfigError, match="no drawn combination"):
        draw_trials(tuning(parameters={"conv_filters": {"choice": [[[8, 3, 1]]]}}), TrainingConfig(), SPACES, "x")


def test_pbt_compares_trials_only_where_they_are_evaluated():
    with pytest.raises(ConfigError, match=r"perturb_every_updates 7 must be a multiple of training\.evaluation_every_updates 5"):
        draw_trials(tuning(scheduler="pbt", perturb_every_updates=7), TrainingConfig(), SPACES, "x")


def test_a_search_does_not_train_with_another_algorithm_than_was_asked_for():
    with pytest.raises(ConfigError, match=r"tuning searches with our own trainer, training\.algorithm is 'rllib:SAC'"):
        draw_trials(tuning(), TrainingConfig(algorithm="rllib:SAC"), SPACES, "x")


def test_perturbed_settings_fit_each_other_or_stay_the_donors():
    rng, sizes = np.random.default_rng(0), {"minibatch_size": {"choice": [256, 2 * BATCH]}}
    for _ in range(20):
        assert perturbed(tuning(parameters=sizes), TrainingConfig(), {"minibatch_size": 256}, rng) == {"minibatch_size": 256}
    fitting = {"minibatch_size": {"choice": [256, BATCH]}}
    found = {
        perturbed(tuning(parameters=fitting), TrainingConfig(), {"minibatch_size": 256}, rng)["minibatch_size"] for _ in range(20)
    }
    assert found == {256, BATCH}  # negative control: where the other size fits, it is tried


def test_who_reached_the_target_first_is_the_best_then_who_came_nearest():
    quick, slow = trial(0, best_return=480.0, env_steps=20_000), trial(1, best_return=500.0, env_steps=90_000)
    near, far = trial(2, best_return=470.0, env_steps=90_000), trial(3, best_return=50.0, env_steps=1_000)
    unseen, failed = trial(4), trial(5, best_return=500.0, status=TrialStatus.FAILED)
    trials = [failed, far, unseen, slow, near, quick]
    assert ranked(trials, 475.0) == [quick, slow, near, far, unseen, failed]
    assert ranked(trials, None)[0] == slow  # without a target the highest return is what was asked for
    assert best_of(trials, 475.0) == quick and best_of([unseen, failed], 475.0) is None


def shown(trials: list[Trial], **options: object) -> str:
    console = Console(file=io.StringIO(), **options)
    print_table(console, trials)
    return console.file.getvalue()


def test_the_table_has_a_line_per_trial_with_its_run_and_how_it_ended():
    trials = [
        trial(0, best_return=500.0, env_steps=40_426, reason="target", donors=("tune-x-01/gen-000010",)),
        trial(1, best_return=-3.25, env_steps=9, status=TrialStatus.STOPPED),
        trial(2, status=TrialStatus.FAILED, reason="the cart [left] the building"),
    ]
    header, *lines = shown(trials, width=40).splitlines()
    assert header.split() == ["rank", "run", "lr", "num_epochs", "env", "steps", "best", "return", "status"]
    cells = ["1", "tune-x-00", "0.01", "4", "40,426", "500.0", "finished", "(target),", "copied", "1"]
    assert lines[0].split() == cells
    assert "stopped early" in lines[1] and "-3.2" in lines[1] and lines[2].split()[-2:] == ["-", "failed"]
    assert "tune-x-02" in shown(trials, width=60, force_terminal=True)  # what one copies is never cut


def test_the_summary_says_how_many_and_what_is_best():
    trials = [trial(0, best_return=7.0, env_steps=1_000), trial(1, status=TrialStatus.RUNNING, env_steps=500)]
    assert (
        summary("x", trials)
        == "search x · 1 finished · 1 running · 1,500 env steps · best return 7.0 (tune-x-00: lr 0.01 num_epochs 4)"
    )


def test_printed_settings_mean_the_same_when_they_are_typed_in():
    settings = {"lr": 3e-05, "hidden": [64, 64], "normalize_observations": True, "entropy_coeff": 0.0}
    options = shlex.split(" ".join(set_options(settings)))[1::2]
    loop = load_loop_file(ROOT / "examples" / "cartpole.yaml", overrides=options)
    assert {name: loop.training.model_dump(mode="json")[name] for name in settings} == settings
    assert yaml.safe_load(as_yaml({"training": settings})) == {"training": settings}
    assert yaml.safe_load(str(3e-05)) == "3e-05"  # negative control: why Python's own spelling would not do


def test_the_picture_shows_every_setting_and_is_the_same_each_time(tmp_path: Path):
    space = {
        "lr": Domain(log_uniform=(1e-4, 1e-1)),
        "num_epochs": Domain(choice=(4, 8)),
        "gamma": Domain(uniform=(0.9, 1.0)),
    }
    trials = [trial(number, best_return=float(number)) for number in range(5)]
    trials.append(trial(5, status=TrialStatus.FAILED))
    trials = [replace(row, parameters={**row.parameters, "gamma": 0.95}) for row in trials]
    written = []
    for name in ("once", "again"):
        (tmp_path / name).mkdir()
        written.append(
            [p.read_bytes() for p in save_figure(draw_parallel_coordinates(trials, space, trials[4]), tmp_path / name)]
        )
    png, svg = written[0]
    assert png.startswith(b"\x89PNG") and written[0] == written[1]
    for text in ("lr (log)", "num_epochs", "gamma", "best return", "failed", "best: tune-x-04, return 4.0", ">0.001<"):
        assert text in svg.decode()


def test_a_search_with_one_evaluated_trial_is_drawn(tmp_path: Path):
    rows = [trial(0, best_return=5.0), trial(1, status=TrialStatus.INTERRUPTED)]
    space = {"lr": Domain(log_uniform=(1e-4, 1e-1)), "num_epochs": Domain(choice=(4, 8))}
    assert all(path.stat().st_size > 1_000 for path in save_figure(draw_parallel_coordinates(rows, space, rows[0]), tmp_path))


def test_the_first_interrupt_only_sets_the_event_and_the_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), first_interrupt_noted() as asked:
        assert not asked.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.wait(timeout=5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)  # ends at once: the interrupt arrives here
    assert signal.getsignal(signal.SIGINT) is before


def test_what_a_search_chose_stands_before_the_loop_file_for_its_run_only(tmp_path: Path):
    storage = open_storage(tmp_path / "storage")
    loop = load_loop_file(ROOT / "examples" / "cartpole.yaml", overrides=["training.lr=0.5"])
    chosen = loop.training.model_copy(update={"lr": 0.25, "max_env_steps": 7})
    create_run(storage, "tuned", RunConfig(loop.environment, chosen, tuned=("lr",)))
    create_run(storage, "plain", RunConfig(loop.environment, chosen))
    assert loop_of_run(loop, storage, "tuned").training == loop.training.model_copy(update={"lr": 0.25})
    assert loop_of_run(loop, storage, "plain") == loop
    change_config(storage.run("tuned"), RunConfig(loop.environment, loop_of_run(loop, storage, "tuned").training))
    assert read_config(storage.run("tuned")).tuned == ("lr",)  # it stays so when the run goes on
    with pytest.raises(ConfigError, match=r"lr 0.25 -> 0.5"):  # negative control: the loop file alone would be refused
        require_resumable(storage.run("tuned"), RunConfig(loop.environment, loop.training))
