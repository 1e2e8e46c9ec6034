"""Does a policy with memory see the last k observations wherever an environment is made, and learn from them?"""

import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces as gym_spaces
from pydantic import ValidationError

from policies.errors import ConfigError, IntegrityError
from policies.spaces import MAX_STATE_BYTES, Spaces
from tests import training_environments
from training.config import EnvironmentConfig
from training.environment import VectorEnvironment, check_environment, feature_labels, read_spaces
from training.evaluation import EvaluationRequest, evaluate
from training.learner_state import LearnerState
from training.network import layout_of
from training.ppo import PPO
from training.rollout import Shard
from training.vectorization import make_single
from trimtab.loop_file import load_loop_file

EXAMPLE = Path(__file__).parents[2] / "examples/cartpole_history.yaml"
HERE = "tests.training_environments:"
TWO_ACTIONS = gym_spaces.Discrete(2)


def counter(history: int, name: str = "Counter-v0", **settings: Any) -> EnvironmentConfig:
    """Return the settings of an environment that shows the number of its step, and ends after three."""
    return EnvironmentConfig(id=HERE + name, history=history, **settings)


# --- what the policy sees ---


@pytest.mark.parametrize("vectorization", ["auto", "async"])
def test_a_stack_is_oldest_first_and_begins_anew_with_each_episode(vectorization: str) -> None:
    environment = VectorEnvironment(counter(3, vectorization=vectorization), 2, seed=0)
    try:
        seen = [environment.obs_BD[0].tolist()]
        for _ in range(5):
            environment.step(np.array([5, 6]))
            seen.append(environment.obs_BD[0].tolist())
    finally:
        environment.close()
    # 0 is the first observation; 3 ends the episode, and the step after that resets: nothing of it is in the next stack.
    assert seen == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3], [0, 0, 0], [0, 0, 1]]
    assert environment.spaces.history == 3 and environment.spaces.to_json()["observation"]["shape"] == [3, 1]


def test_an_environment_that_writes_into_one_array_shows_what_it_showed_then() -> None:
    def seen(env: gymnasium.Env) -> list[float]:
        env.reset(seed=0)
        env.step(5)
        return env.step(5)[0].reshape(-1).tolist()

    assert seen(make_single(counter(3, "CountsInPlace-v0"))) == [0, 1, 2]
    bare = gymnasium.wrappers.FrameStackObservation(training_environments.CountsInPlace(), 3)
    assert seen(bare) == [2, 2, 2], "negative control: the wrapper alone keeps one array three times"


def test_an_environments_own_vectorisation_has_no_history_and_is_not_used() -> None:
    vectorised = VectorEnvironment(counter(2, "WarmingInTheSameStep-v0", max_episode_steps=4), 3, seed=0)
    assert vectorised.obs_BD.tolist() == [[0, 0]] * 3  # its own vectorisation would begin with 0, 1, 2
    alone = VectorEnvironment(counter(1, "WarmingInTheSameStep-v0", max_episode_steps=4), 3, seed=0)
    assert alone.obs_BD.tolist() == [[0], [1], [2]], "the control"


def test_without_a_history_nothing_is_put_around_the_environment() -> None:
    assert read_spaces(counter(1)).history == 1 and "history" not in read_spaces(counter(1)).to_json()
    assert not isinstance(make_single(counter(1)), gymnasium.wrappers.FrameStackObservation)


def test_a_mask_in_info_is_that_of_the_newest_observation() -> None:
    environment = VectorEnvironment(counter(2, "Masked-v0", kwargs={"flat": True}), 1, seed=0)
    environment.step(np.array([2]))
    assert environment.obs_BD.tolist() == [[0, 1]] and environment.spaces.has_mask
    assert environment.mask_BA is not None
    assert environment.mask_BA[0].tolist() == training_environments.allowed_choices(1).astype(bool).tolist()


def test_gymnasiums_checker_looks_at_the_environment_itself() -> None:
    check_environment(counter(3))
    with pytest.raises(ConfigError, match="rule of Gymnasium's checker"):
        check_environment(counter(3, "Unruly-v0", kwargs={"rule": "ignores the seed"}))


# --- what is refused ---


@pytest.mark.parametrize("name", ["Paired-v0", "Everything-v0", "Masked-v0"])
def test_only_one_box_has_a_history(name: str) -> None:
    kwargs = {"Everything-v0": {"action": "discrete"}, "Masked-v0": {"observed": True}}.get(name, {})
    config = counter(2, name, kwargs=kwargs) if name != "Everything-v0" else counter(2, "Everything", kwargs=kwargs)
    for make in (make_single, read_spaces):
        with pytest.raises(ConfigError, match=r"environment\.history is 2.*only a Box has a history.*FlattenObservation"):
            make(config)
    read_spaces(config.model_copy(update={"history": 1}))  # the control


@pytest.mark.parametrize("history", [0, 65, 1.5, "many"])
def test_a_history_that_is_none_is_refused_in_the_loop_file(history: Any) -> None:
    with pytest.raises(ValidationError, match="history"):
        EnvironmentConfig(id="CartPole-v1", history=history)


def test_what_a_caller_would_have_to_keep_is_bounded() -> None:
    """63 earlier observations of 300 numbers, 4 bytes each, are 75,600 bytes; of 192 (8 x 8 x 3 pixels) 48,384."""
    assert read_spaces(counter(64, "Screen")).num_features == 64 * 192
    too_much = rf"history is 64.* \[300\] numbers each, would be 75600 bytes.*{MAX_STATE_BYTES}"
    with pytest.raises(ConfigError, match=too_much):
        read_spaces(counter(64, "wide", kwargs={"num_features": 300}))
    largest = MAX_STATE_BYTES // 4 // 63
    assert read_spaces(counter(64, "wide", kwargs={"num_features": largest})).history == 64
    with pytest.raises(ConfigError, match="bytes for a caller to keep"):
        read_spaces(counter(64, "wide", kwargs={"num_features": largest + 1}))


def spaces_json(**changes: Any) -> dict[str, Any]:
    return {**read_spaces(counter(3)).to_json(), **changes}


BOX = {"kind": "box", "shape": [3, 1], "low": 0.0, "high": 100.0, "dtype": "float32"}


def test_spaces_with_a_history_survive_the_way_through_json() -> None:
    again = Spaces.from_json(spaces_json())
    assert again.to_json() == spaces_json() and again.history == 3
    assert again.frame.low.tolist() == [0] and again.frame.high.tolist() == [100]
    assert again.without_observation_bounds().frame.low.tolist() == [-np.inf]
    assert again.example_request() == {"observation": [0.0], "state": ""}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"history": 2}, "one Box of 2 frames"),
        ({"history": 0}, "integer from 1 to 64"),
        ({"history": 65}, "integer from 1 to 64"),
        ({"history": True}, "integer from 1 to 64"),
        ({"history": 1.0}, "integer from 1 to 64"),
        ({"history": 3.0}, "integer from 1 to 64"),
        ({"history": "3"}, "integer from 1 to 64"),
        ({"history": None}, "integer from 1 to 64"),
        ({"observation": {"kind": "discrete", "n": 3, "start": 0}}, "one Box of 3 frames"),
        ({"observation": {**BOX, "shape": []}}, "one Box of 3 frames"),
        ({"observation": {**BOX, "high": [1.0, 1.0, 2.0]}}, "different bounds"),
        ({"observation": {**BOX, "shape": [3, 10_000]}}, "state of 80000 bytes; at most 65536"),
    ],
)
def test_a_bundle_that_says_a_history_which_its_observation_has_not_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(IntegrityError, match=message):
        Spaces.from_json(spaces_json(**changes))


def test_names_are_those_of_one_observation_and_a_bundle_has_them_for_each() -> None:
    config = counter(3, observation_names=("step",), observation_units=("1",))
    read_spaces(config)
    assert feature_labels(config) == (("step, 2 before", "step, 1 before", "step"), ("1", "1", "1"))
    assert feature_labels(config.model_copy(update={"history": 1})) == (("step",), ("1",))
    with pytest.raises(ConfigError, match="observation_names has 3 entries, an observation has 1 features"):
        read_spaces(counter(3, observation_names=("a", "b", "c")))


# --- what it is good for ---


def returns_after_20_updates(*overrides: str) -> float:
    """Train the example in this process, 20 updates of 1,024 steps, and return the greedy mean return of 20 episodes."""
    loop = load_loop_file(EXAMPLE, overrides=list(overrides))
    layout = layout_of(read_spaces(loop.environment), loop.training)
    learner = PPO(layout, loop.training, LearnerState.initial(layout, loop.training.seed))
    shards = [Shard(loop.environment, loop.training, number, update=0, attempt=0) for number in range(loop.training.num_shards)]
    for update in range(20):
        weights = learner.state.weights()
        learner.update([shard.collect(weights, update=update) for shard in shards])
    assert 19_000 < learner.state.env_steps < 20_500  # as many with and without; the rest are reset steps
    policy = learner.state.weights().policy(layout)
    return evaluate(loop.environment, EvaluationRequest(policy, 20, seed=5)).return_mean


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cartpole_without_velocities_is_learned_from_four_observations_and_not_from_one(seed: int) -> None:
    """Measured: 500, 500, 500 with the history, 44, 45, 43 without: the angle alone says where the pole is, not where it goes."""
    assert returns_after_20_updates(f"training.seed={seed}") > 300
    assert returns_after_20_updates(f"training.seed={seed}", "environment.history=1") < 100, "negative control"


def test_the_example_hides_the_velocities() -> None:
    loop = load_loop_file(EXAMPLE)
    hidden, full = make_single(loop.environment.model_copy(update={"history": 1})), gymnasium.make("CartPole-v1")
    assert hidden.reset(seed=3)[0].tolist() == full.reset(seed=3)[0][[0, 2]].tolist()
    assert "cartpole_positions" in sys.modules and hidden.observation_space.contains(hidden.step(1)[0])
