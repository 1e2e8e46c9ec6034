"""The search space: values inside their domains, reproducible, and mistakes said before anything starts."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from policies.errors import ConfigError
from tests.command_line import ROOT
from training.search_space import Domain, draw, perturb
from training.tuning import TuningConfig
from trimtab.loop_file import load_loop_file

LR, GAMMA, EPOCHS = Domain(log_uniform=(1e-4, 1e-2)), Domain(uniform=(0.95, 0.999)), Domain(choice=(4, 8, 16))


def tuning(**parameters: object) -> TuningConfig:
    return TuningConfig.model_validate({"parameters": parameters})


@pytest.mark.parametrize("domain", [LR, GAMMA])
def test_drawn_numbers_lie_inside_the_range_and_can_be_written_down(domain: Domain):
    for position in np.linspace(0, 1, 101):
        value = domain.at(position)
        assert domain.ends[0] <= value <= domain.ends[1]
        assert float(f"{value:.4g}") == value
        assert domain.position(value) == pytest.approx(position, abs=0.02)  # four digits of 0.95 … 0.999 are steps of 0.002


def test_log_uniform_draws_each_decade_equally_often_and_uniform_does_not():
    rng = np.random.default_rng(0)
    uniform = Domain(uniform=(1e-4, 1e-2))
    below = {name: np.mean([d.at(rng.random()) < 1e-3 for _ in range(1_000)]) for name, d in (("log", LR), ("uniform", uniform))}
    # Half of the decades lie below 1e-3, but 9 % of the range; four standard errors of 1,000 draws are 0.063 and 0.036.
    assert abs(below["log"] - 0.5) < 0.063 and abs(below["uniform"] - 0.091) < 0.036


def test_choices_are_drawn_equally_often_and_moved_to_their_neighbours():
    assert [EPOCHS.at(position) for position in (0.0, 0.3, 0.34, 0.66, 0.67, 1.0)] == [4, 4, 8, 8, 16, 16]
    assert [EPOCHS.moved(value, up=True) for value in (4, 8, 16)] == [8, 16, 16]
    assert [EPOCHS.moved(value, up=False) for value in (4, 8, 16)] == [4, 4, 8]


def test_numbers_move_a_tenth_of_their_range_and_stay_inside():
    # two decades: a tenth is a factor of 10 ** 0.2 = 1.585
    assert LR.moved(1e-3, up=True) == pytest.approx(1.585e-3, rel=1e-3)
    assert LR.moved(1e-3, up=False) == pytest.approx(0.631e-3, rel=1e-3)
    assert GAMMA.moved(0.97, up=True) == pytest.approx(0.9749, abs=1e-4)
    assert LR.moved(9.9e-3, up=True) == 1e-2 and GAMMA.moved(0.951, up=False) == 0.95


def test_same_seed_same_draw():
    space = {"lr": LR, "gamma": GAMMA, "num_epochs": EPOCHS}
    drawn = [draw(space, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    moved = [perturb(space, drawn[0], np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert moved[0] == moved[1] != moved[2]


def test_choices_become_values_of_their_setting():
    """PyYAML reads 1e-4 as a string and a network as lists; what is drawn is compared and written down, so it has one form."""
    parameters = tuning(lr={"choice": ["1e-4", 1]}, hidden={"choice": [[64, 64], (32,)]}, conv_filters={"choice": [[[8, 3, 1]]]})
    assert parameters.parameters["lr"].choice == (1e-4, 1.0)
    assert parameters.parameters["hidden"].choice == ([64, 64], [32])
    assert parameters.parameters["conv_filters"].choice == ([[8, 3, 1]],)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"learning_rate": {"uniform": [0, 1]}}, "'learning_rate' is no training setting; allowed: .*lr"),
        ({"gama": {"uniform": [0, 1]}}, "did you mean 'gamma'"),
        ({"lr": {}}, "exactly one of"),
        ({"lr": {"uniform": [0.1, 0.2], "choice": [1]}}, "exactly one of"),
        ({"lr": {"uniform": [0.2, 0.1]}}, "0.2 must be below the upper end 0.1"),
        ({"lr": {"log_uniform": [0, 0.1]}}, "ends above 0"),
        ({"lr": {"choice": []}}, "at least 1 item"),
        ({"num_epochs": {"uniform": [4, 16]}}, "valid integer.*write the values to try as choice"),
        ({"num_epochs": {"choice": [4, 0]}}, "greater than or equal to 1"),
        ({"gamma": {"uniform": [0.9, 1.1]}}, "less than or equal to 1"),
        ({"activation": {"choice": ["tanh", "sigmoid"]}}, "'tanh' or 'relu'"),
        ({"max_env_steps": {"choice": [1, 2]}}, "how far or with how much to run"),
        ({}, "at least 1 item"),
    ],
)
def test_mistakes_are_named(parameters: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=f"(?s){message}"):
        tuning(**parameters)


def test_mistakes_in_the_loop_file_are_named_with_their_place():
    path = ROOT / "examples" / "cartpole.yaml"
    assert load_loop_file(path, overrides=["tuning.parameters={lr: {log_uniform: [1e-4, 1e-2]}}"]).tuning.parameters == {"lr": LR}
    with pytest.raises(ConfigError, match=r"tuning\.parameters\.lr\.log_unifrom: unknown key; did you mean 'log_uniform'"):
        load_loop_file(path, overrides=["tuning.parameters={lr: {log_unifrom: [1e-4, 1e-2]}}"])
    with pytest.raises(ConfigError, match=r"tuning\.parameters: .*'gama' is no training setting"):
        load_loop_file(path, overrides=["tuning.parameters={gama: {uniform: [0, 1]}}"])
    with pytest.raises(ConfigError, match=r"tuning\.num_trails: unknown key; did you mean 'num_trials'"):
        load_loop_file(path, overrides=["tuning.num_trails=3"])


def test_pbt_refuses_what_would_break_a_copied_checkpoint_and_asha_does_not():
    breaking = {"hidden": {"choice": [[8], [16]]}, "lr": {"uniform": [0.1, 0.2]}}
    with pytest.raises(ValidationError, match=r"does not fit other values of hidden; .* use scheduler: asha"):
        TuningConfig.model_validate({"scheduler": "pbt", "parameters": breaking})
    assert TuningConfig.model_validate({"scheduler": "asha", "parameters": breaking}).scheduler == "asha"
    with pytest.raises(ValidationError, match="perturb_every_updates"):
        TuningConfig.model_validate({"scheduler": "pbt", "parameters": {"checkpoint_every_updates": {"choice": [1, 2]}}})
    with pytest.raises(ValidationError, match="num_trials >= 2"):
        TuningConfig(scheduler="pbt", num_trials=1)


def test_positions_of_a_log_scale_are_those_of_its_exponents():
    assert LR.position(1e-3) == pytest.approx(0.5) and LR.position(10**-2.5) == pytest.approx(0.75)
    assert math.isclose(GAMMA.position(0.9745), 0.5)
