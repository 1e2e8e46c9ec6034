"""Environments: what is refused, and that what goes wrong inside one is said with its own words."""

import ctypes
import multiprocessing
import subprocess
import sys
import time
from typing import Any

import numpy as np
import psutil
import pytest

from actors.rollout_worker import RolloutWorker
from policies.errors import ConfigError, EnvironmentFailed, SpaceUnsupported
from training.config import EnvironmentConfig, TrainingConfig
from training.environment import VectorEnvironment, check_environment, read_spaces
from training.evaluation import EvaluationRequest, evaluate
from training.learner_state import LearnerState
from training.network import layout_of, outputs_as_trained
from training.ppo import PPO
from training.rollout import Shard

HERE = "tests.training_environments:"


def config(name: str, **kwargs) -> EnvironmentConfig:
    return EnvironmentConfig(id=HERE + name, kwargs=kwargs)


def test_unknown_id_names_close_matches():
    with pytest.raises(ConfigError, match="CartPole-v1"):
        read_spaces(EnvironmentConfig(id="CartPol-v1"))


def test_id_in_a_module_that_does_not_exist_is_a_config_error():
    with pytest.raises(ConfigError, match="no_such_module"):
        read_spaces(EnvironmentConfig(id="no_such_module:Thing-v0"))


def test_a_factory_is_called_with_its_arguments_and_the_time_limit_is_kept():
    factory = EnvironmentConfig(id=HERE + "Counter", kwargs={"length": 4}, max_episode_steps=3)
    environment = VectorEnvironment(factory, 2, seed=0)
    steps = [environment.step(np.array([5, 6])) for _ in range(4)]
    assert [step.truncateds_B.tolist() for step in steps] == [[False] * 2, [False] * 2, [True] * 2, [False] * 2]
    assert [step.valid_B.all() for step in steps] == [True, True, True, False] and not steps[2].terminateds_B.any()
    without_limit = VectorEnvironment(config("Counter", length=4), 2, seed=0)
    ends = [without_limit.step(np.array([5, 6])).terminateds_B.all() for _ in range(4)]
    assert ends == [False, False, False, True]


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("Countr", ConfigError, r"has no function 'Countr'; did you mean Counter"),
        ("zzzzz", ConfigError, r"has no function 'zzzzz'$"),
        ("no_environment", ConfigError, "returned str, not a gymnasium.Env"),
        (
            "broken_factory",
            EnvironmentFailed,
            "(?s)OSError when it was made: the simulator has no licence.*Traceback.*environments.py",
        ),
    ],
)
def test_a_factory_that_does_not_work_is_told(name: str, error: type[Exception], words: str):
    for make in (read_spaces, check_environment):
        with pytest.raises(error, match=words):
            make(config(name))


@pytest.mark.parametrize(
    ("rule", "name", "words"),
    [
        ("no action space", "check_env", "must specify an action space"),
        ("no info", "check_reset_return_type", "was not a tuple"),
        ("outside at reset", "check_reset_return_type", "not within the observation space"),
        ("ignores the seed", "check_reset_seed_determinism", "random number generator"),
        ("four values", "env_step_passive_checker", "must be a python dictionary"),
        ("raises", "env_step_passive_checker", "ZeroDivisionError: in check_rules"),
        ("random without the seed", "check_step_determinism", "not equivalent for the same seed"),
    ],
)
def test_a_broken_rule_of_gymnasiums_checker_is_named_with_its_message(rule: str, name: str, words: str):
    with pytest.raises(ConfigError, match=f"(?s)breaks a rule of Gymnasium's checker, {name}: .*({words})"):
        check_environment(config("Unruly-v0", rule=rule))
    check_environment(config("Unruly-v0", rule="none"))  # the control


def test_a_reset_without_a_seed_is_named():
    with pytest.raises(ConfigError, match=r"check_reset_seed_determinism: .*does not provide a `seed`"):
        check_environment(config("WithoutSeed"))


def test_an_environment_is_checked_as_its_wrappers_show_it():
    check_environment(config("shifted", rule="outside at reset", by=-5, bound=5))  # what is wrong below is mended above
    with pytest.raises(ConfigError, match="not within the observation space"):
        check_environment(config("shifted", rule="none", by=1, bound=1))  # … and the other way round


def test_episodes_of_one_step_and_the_environments_of_others_pass_the_checker():
    check_environment(EnvironmentConfig(id=HERE + "Constant-v0", max_episode_steps=1))
    for known in ("CartPole-v1", "Pendulum-v1", "MountainCarContinuous-v0", "Acrobot-v1"):
        check_environment(EnvironmentConfig(id=known))


def test_unsupported_spaces_are_named():
    with pytest.raises(SpaceUnsupported, match=r"observation space Text.*ObservationWrapper"):
        read_spaces(config("Sentence-v0"))
    with pytest.raises(SpaceUnsupported, match=r"action space Text.*ActionWrapper"):
        read_spaces(config("Sentence-v0", acts=True))


def test_unknown_constructor_argument_carries_the_constructors_traceback():
    with pytest.raises(EnvironmentFailed, match=r"(?s)no_such_argument.*Traceback"):
        read_spaces(config("Constant-v0", no_such_argument=1))


def test_native_vectorisation_is_used_where_its_episodes_end_in_a_way_we_know():
    native = VectorEnvironment(EnvironmentConfig(id="CartPole-v1"), 3, seed=0)
    assert type(native._env.unwrapped).__name__ == "CartPoleVectorEnv"
    same_step = VectorEnvironment(config("WarmingInTheSameStep-v0"), 3, seed=0)
    assert type(same_step._env.unwrapped).__name__ == "WarmingInTheSameStep"
    never_resets = VectorEnvironment(config("NeverResets-v0"), 3, seed=0)
    assert type(never_resets._env.unwrapped).__name__ == "SyncVectorEnv"
    asked_for = VectorEnvironment(EnvironmentConfig(id="CartPole-v1", vectorization="sync"), 3, seed=0)
    assert type(asked_for._env.unwrapped).__name__ == "SyncVectorEnv"


def test_an_observation_of_several_parts_without_names_is_learned_from():
    environment = VectorEnvironment(config("Paired-v0"), 2, seed=0)
    assert not environment.spaces.has_mask and environment.obs_BD.tolist() == [[1, 1, 0, 1]] * 2
    environment.step(np.zeros(2, int))
    assert environment.obs_BD.tolist() == [[1, 1, 0, 1]] * 2


def test_what_a_step_was_stays_when_the_environment_writes_the_next_one_into_the_same_arrays():
    def steps(name: str) -> list[list[Any]]:
        environment = VectorEnvironment(config(name, terminate_after=2), 2, seed=0)
        made = [environment.step(np.zeros(2, int)) for _ in range(3)]
        return [[step.rewards_B.tolist(), step.terminateds_B.tolist()] for step in made]

    assert steps("WritesInPlace-v0") == steps("WarmingInTheSameStep-v0")
    assert steps("WritesInPlace-v0")[0] != steps("WritesInPlace-v0")[1]  # negative control: the steps do differ


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Gymnasium closes them once more at the end
def test_environments_that_cannot_be_closed_are_left_behind():
    training = TrainingConfig(num_shards=1, num_envs_per_shard=1, num_env_runners=1, minibatch_size=64)
    worker = RolloutWorker(config("StaysOpen-v0"), training, (0,))
    weights = LearnerState.initial(layout_of(read_spaces(EnvironmentConfig(id=HERE + "Constant-v0")), training), 0).weights()
    worker.collect(weights, 0, attempt=0)
    with pytest.raises(Exception, match="the door is stuck"):
        worker.collect(weights, 0, attempt=1)
    assert worker.collect(weights, 0, attempt=2)[1][0].num_env_steps == 64


def test_max_episode_steps_truncates():
    environment = VectorEnvironment(EnvironmentConfig(id=HERE + "Constant-v0", max_episode_steps=2), 1, seed=0)
    assert [bool(environment.step(np.zeros(1, int)).truncateds_B[0]) for _ in range(3)] == [False, True, False]


def test_choices_become_the_environments_actions():
    environment = VectorEnvironment(config("Counter-v0"), 2, seed=0)  # actions 5 and 6, paid as reward
    chosen_BK = np.array([[0], [1]])
    assert environment.step(environment.spaces.action.to_environment(chosen_BK)).rewards_B.tolist() == [5, 6]


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
    environment = VectorEnvironment(config("Faulty-v0", fault=fault), 2, seed=0)
    with pytest.raises(EnvironmentFailed, match=words):
        for _ in range(3):
            environment.step(np.zeros(2, int))


def run(environment: VectorEnvironment, num_steps: int) -> list[np.ndarray]:
    """Take random actions of a fixed seed; return all that came back."""
    rng = np.random.default_rng(0)
    found = [environment.obs_BD]
    for _ in range(num_steps):
        step = environment.step(rng.integers(0, 2, environment.num_envs))
        found += [environment.obs_BD, step.rewards_B, step.terminateds_B, step.truncateds_B, step.valid_B]
    return found


def test_processes_give_what_one_process_gives():
    found = {}
    for vectorization in ("sync", "async"):
        with_limit = EnvironmentConfig(id="CartPole-v1", vectorization=vectorization, max_episode_steps=10)
        environment = VectorEnvironment(with_limit, 3, seed=7)
        found[vectorization] = run(environment, 30)
        environment.close()
    assert all(np.array_equal(a, b) for a, b in zip(found["sync"], found["async"]))
    assert len({tuple(row) for row in found["sync"][0]}) == 3  # environments start apart
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise", "(?s)ZeroDivisionError in step: the cart left the building.*Traceback.*training_environments.py.*building"),
        ("raise_own", "(?s)Unpicklable in step: a at b.*Traceback.*training_environments.py"),
        ("exit", "a process of environment .* ended in step"),
        ("nan", r"observation\[0\] = nan in environment 0"),
        ("shape", r"\(7,\)"),
        ("reward", "rewards .*inf"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium says the same once more
def test_faults_in_another_process_are_told_in_its_own_words_and_it_can_be_closed(fault: str, words: str):
    faulty = EnvironmentConfig(id=HERE + "Faulty-v0", kwargs={"fault": fault}, vectorization="async")
    environment = VectorEnvironment(faulty, 2, seed=0)
    with pytest.raises(EnvironmentFailed, match=words) as raised:
        for _ in range(3):
            environment.step(np.zeros(2, int))
    assert str(raised.value).count("Traceback") <= 1
    environment.close()
    assert not multiprocessing.active_children()


def test_a_process_that_hangs_is_ended_on_close(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("training.vectorization.CLOSE_TIMEOUT_S", 0.2)
    hanging = EnvironmentConfig(id=HERE + "Faulty-v0", kwargs={"fault": "hang"}, vectorization="async")
    environment = VectorEnvironment(hanging, 2, seed=0)
    for _ in range(2):
        environment.step(np.zeros(2, int))
    environment._env.step_async(np.zeros(2, int))
    began_s = time.monotonic()
    environment.close()
    assert not multiprocessing.active_children() and time.monotonic() - began_s < 60


HANGS_IN_A_PROCESS = """
import numpy as np
from training.config import EnvironmentConfig
from training.environment import VectorEnvironment

config = EnvironmentConfig(id="tests.training_environments:Faulty-v0", kwargs={"fault": "hang"}, vectorization="async")
environment = VectorEnvironment(config, 1, seed=0)
print(environment._env.processes[0].pid, flush=True)
while True:
    environment.step(np.zeros(1, int))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_process_that_hangs_ends_with_the_one_that_made_it():
    parent = subprocess.Popen([sys.executable, "-c", HANGS_IN_A_PROCESS], stdout=subprocess.PIPE, text=True)
    try:
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(1)  # by then it hangs, or else it ends by itself and shows nothing
        assert child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    finally:
        parent.kill()
        parent.wait()
    deadline_s = time.monotonic() + 20
    while lives_on := child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline_s:
            child.kill()
            break
        time.sleep(0.05)
    assert not lives_on


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_who_makes_processes_does_not_end_with_its_own_parent():
    asynchronous = EnvironmentConfig(id="CartPole-v1", vectorization="async")
    VectorEnvironment(asynchronous, 1, seed=0).close()
    signal_number = ctypes.c_int(-1)
    assert ctypes.CDLL(None).prctl(2, ctypes.byref(signal_number)) == 0  # PR_GET_PDEATHSIG
    assert signal_number.value == 0


@pytest.mark.parametrize("action", ["discrete", "multi_discrete", "multi_binary", "box", "open"])
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_every_kind_of_space_is_collected_learned_from_and_evaluated(action: str, vectorization: str):
    everything = EnvironmentConfig(id=HERE + "Everything", kwargs={"action": action}, vectorization=vectorization)
    if vectorization == "sync":
        check_environment(everything)
    learn_once(everything, num_features=4 + 3 + 2 + 6)


@pytest.mark.parametrize("kwargs", [{}, {"channels_first": True}])
@pytest.mark.parametrize("shares", [False, True])
def test_images_are_collected_learned_from_and_evaluated(kwargs: dict, shares: bool):
    """A fragment in which no episode ended has no final observations: no image at all goes through the convolutions."""
    screen = EnvironmentConfig(id=HERE + "Screen", kwargs=kwargs, max_episode_steps=20)
    learn_once(screen, num_features=192, conv_filters=[[4, 3, 2], [8, 2, 1]], activation="relu", vf_share_layers=shares)


def learn_once(environment: EnvironmentConfig, *, num_features: int, **settings: object) -> None:
    """Go once around: collect, learn, evaluate; the policy that comes out acts as training says."""
    sizes = {"num_shards": 1, "num_env_runners": 1, "num_envs_per_shard": 3, "rollout_fragment_length": 12, "minibatch_size": 16}
    training = TrainingConfig(**{**sizes, "hidden": (8,), "normalize_observations": True, **settings})
    shard = Shard(environment, training, 0, update=0, attempt=0)
    layout = layout_of(read_spaces(environment), training)
    learner = PPO(layout, training, LearnerState.initial(layout, 0))
    before_P = learner.state.parameters_P.copy()
    for update in range(2):
        rollout = shard.collect(learner.state.weights(), update=update)
        assert rollout.obs_TBD.shape == (13, 3, num_features)
        learner.update([rollout])
    shard.close()
    assert not np.array_equal(learner.state.parameters_P, before_P)
    policy = learner.state.weights().policy(layout)
    obs_ND = rollout.obs_TBD.reshape(-1, num_features)
    trained_NP = policy.distribution.parameters(outputs_as_trained(policy, obs_ND), None)
    np.testing.assert_allclose(policy.distributions(obs_ND), trained_NP, rtol=1e-5, atol=1e-6)
    result = evaluate(environment, EvaluationRequest(policy, num_episodes=2, seed=0, mode="sample", keep_steps=True))
    assert result.obs_ND.shape == (result.lengths_E.sum(), num_features)
