"""Environments: what is refused, and that what goes wrong inside one is said with its own words."""

import numpy as np
import pytest

from policies.errors import ConfigError, EnvironmentFailed, SpaceUnsupported
from training.config import EnvironmentConfig
from training.environment import VectorEnvironment, read_spaces

HERE = "tests.training_environments:"


def config(name: str, **kwargs) -> EnvironmentConfig:
    return EnvironmentConfig(id=HERE + name, kwargs=kwargs)


def test_unknown_id_names_close_matches():
    with pytest.raises(ConfigError, match="CartPole-v1"):
        read_spaces(EnvironmentConfig(id="CartPol-v1"))


def test_id_in_a_module_that_does_not_exist_is_a_config_error():
    with pytest.raises(ConfigError, match="no_such_module"):
        read_spaces(EnvironmentConfig(id="no_such_module:Thing-v0"))


def test_unsupported_spaces_are_named():
    with pytest.raises(SpaceUnsupported, match="FlattenObservation"):
        read_spaces(config("Picture-v0"))
    with pytest.raises(SpaceUnsupported, match="Discrete"):
        read_spaces(EnvironmentConfig(id="Pendulum-v1"))


def test_unknown_constructor_argument_carries_the_constructors_traceback():
    with pytest.raises(EnvironmentFailed, match=r"(?s)no_such_argument.*Traceback"):
        read_spaces(config("Constant-v0", no_such_argument=1))


def test_native_vectorisation_is_used_where_its_episodes_end_our_way():
    native = VectorEnvironment(EnvironmentConfig(id="CartPole-v1"), 3)
    assert type(native._env.unwrapped).__name__ == "CartPoleVectorEnv"
    other_mode = VectorEnvironment(config("SameStep-v0"), 3)
    assert type(other_mode._env.unwrapped).__name__ == "SyncVectorEnv"


def test_max_episode_steps_truncates():
    environment = VectorEnvironment(EnvironmentConfig(id=HERE + "Constant-v0", max_episode_steps=2), 1)
    environment.reset(0)
    assert [bool(environment.step(np.zeros(1, int))[3][0]) for _ in range(3)] == [False, True, False]


def test_action_indices_become_the_environments_actions():
    environment = VectorEnvironment(config("Counter-v0"), 2)  # actions 5 and 6, paid as reward
    environment.reset(0)
    _, rewards_B, _, _ = environment.step(np.array([0, 1]))
    assert rewards_B.tolist() == [5, 6]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise", "(?s)ZeroDivisionError in step: the cart left the building.*Traceback.*training_environments.py"),
        ("nan", r"observation\[0\] = nan in environment 0"),
        ("shape", "(?s)in step.*Traceback"),
        ("reward", "rewards .*inf"),
    ],
)
def test_faults_inside_an_environment_are_told_in_its_own_words(fault: str, words: str):
    environment = VectorEnvironment(config("Faulty-v0", fault=fault), 2)
    environment.reset(0)
    with pytest.raises(EnvironmentFailed, match=words):
        for _ in range(3):
            environment.step(np.zeros(2, int))
