"""Is an exported policy the one that RLlib has: module, connectors and distribution, without training and without a cluster?"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces as gym_spaces

from actors.rllib_export import InferencePath
from actors.rllib_settings import passed_settings, rllib_config
from policies.errors import ConfigError, IntegrityError, SpaceUnsupported, TrainingFailed
from policies.golden import NUM_GOLDEN, check_golden
from policies.network import Architecture, Gaussian
from policies.policy import Policy
from policies.spaces import Spaces
from training.config import RLLIB_OFFLINE, EnvironmentConfig, TrainingConfig
from training.environment import read_spaces
from training.golden import NUM_CORNERS, golden_inputs
from training.vectorization import make_single
from trimtab.loop_file import LoopConfig, load_loop_file

EXAMPLES = Path(__file__).parents[2] / "examples"
VECTOR = gym_spaces.Box(-np.inf, np.inf, (3,), np.float32)
TORQUE = gym_spaces.Box(np.array([-2, 0], np.float32), np.array([2, 5], np.float32))
PUSH = gym_spaces.Discrete(4)
NESTED = gym_spaces.Dict(
    {
        "where": gym_spaces.Box(-1, 1, (2, 2), np.float32),
        "gear": gym_spaces.Discrete(3),
        "and": gym_spaces.Tuple([gym_spaces.MultiDiscrete([2, 4]), gym_spaces.MultiBinary(2)]),
    }
)
FAMILIES = [
    ("PPO", PUSH),
    ("PPO", gym_spaces.MultiDiscrete([2, 3])),
    ("PPO", TORQUE),
    ("APPO", TORQUE),
    ("IMPALA", PUSH),
    ("DQN", PUSH),
    ("SAC", TORQUE),
    ("SAC", PUSH),
    ("BC", TORQUE),
    ("MARWIL", PUSH),
    ("CQL", TORQUE),
    ("IQL", TORQUE),
]


class Still(gymnasium.Env):
    """Has spaces; nobody steps it."""

    def __init__(self, observation_space: gymnasium.Space, action_space: gymnasium.Space):
        self.observation_space, self.action_space = observation_space, action_space


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


def settings(algorithm: str, **changes: Any) -> TrainingConfig:
    rllib = changes.pop("rllib", {})
    if algorithm in RLLIB_OFFLINE:
        rllib = {"input_": str(Path(__file__).parent), "dataset_num_iters_per_learner": 1, **rllib}
    return TrainingConfig(algorithm=f"rllib:{algorithm}", rllib=rllib, **{"hidden": (16, 8), **changes})


def path_of(
    algorithm: str, action: gymnasium.Space = PUSH, observation: gymnasium.Space = VECTOR, **changes: Any
) -> InferencePath:
    training, single = settings(algorithm, **changes), Still(observation, action)
    config = rllib_config(EnvironmentConfig(id="Still-v0"), training, single)
    return InferencePath(config, training, single, Spaces.from_gymnasium(observation, action))


def met(path: InferencePath, num_rows: int = 300) -> np.ndarray:
    """Return observations as an evaluation would meet them, with their corners."""
    space = path._space
    space.seed(1)
    obs_ND = path._encode([space.sample() for _ in range(num_rows)])
    return golden_inputs(path._spaces, obs_ND, None, seed=0)[0]


def learn_normaliser(path: InferencePath) -> None:
    """Let RLlib's own filter see observations that are far from normal."""
    filter_ = path._filter
    filter_._init_new_filters()
    rng = np.random.default_rng(0)
    for obs_D in rng.normal([100.0, -3.0, 0.0], [5.0, 0.1, 1.0], (200, 3)).astype(np.float32):
        filter_._filters[None](obs_D, update=True)


def greedy_actions(path: InferencePath, observations: list[Any], config: Any, action: gymnasium.Space) -> np.ndarray:
    """Return what RLlib sends to the environment when it does not explore, by its own connectors."""
    from ray.rllib.env import INPUT_ENV_SINGLE_SPACES
    from ray.rllib.env.single_agent_episode import SingleAgentEpisode

    to_env = config.build_module_to_env_connector(spaces={INPUT_ENV_SINGLE_SPACES: (path._space, action)})
    episodes = [SingleAgentEpisode(observations=[observation]) for observation in observations]
    batch = path._pipeline(rl_module=path._module, batch={}, episodes=episodes, explore=False, shared_data={})
    outputs = path._module.forward_inference(batch)
    shared = {"memorized_map_structure": [(episode.id_,) for episode in episodes]}
    sent = to_env(rl_module=path._module, batch=outputs, episodes=episodes, explore=False, shared_data=shared)
    return np.stack(sent.get("actions_for_env", sent["actions"]))


@pytest.mark.parametrize(("algorithm", "action"), FAMILIES, ids=[f"{name}-{type(space).__name__}" for name, space in FAMILIES])
def test_policy_gives_rllibs_distributions_and_rllibs_greedy_actions(algorithm: str, action: gymnasium.Space):
    normalises = algorithm not in RLLIB_OFFLINE
    path = path_of(algorithm, action, normalize_observations=normalises)
    if normalises:
        learn_normaliser(path)
    policy, golden = path.export(met(path))
    assert len(golden.observations_ND) == NUM_GOLDEN + NUM_CORNERS
    assert np.ptp(golden.distributions_NP, axis=0).max() > 1e-3  # it does depend on the observation
    check_golden(policy, golden)

    training = settings(algorithm, normalize_observations=normalises)
    config = rllib_config(EnvironmentConfig(id="Still-v0"), training, Still(VECTOR, action))
    theirs = greedy_actions(path, list(golden.observations_ND), config, action)
    ours = policy.distribution.choose_rows(policy.distributions(golden.observations_ND), "greedy", np.random.default_rng(0))
    assert np.abs(theirs - ours).max() < 1e-4


def test_a_lost_normaliser_is_noticed():
    path = path_of("PPO", TORQUE, normalize_observations=True)
    learn_normaliser(path)
    policy, golden = path.export(met(path))
    lost = {"normaliser.mean": np.zeros(3, np.float32), "normaliser.scale": np.ones(3, np.float32)}
    with pytest.raises(IntegrityError, match="differs from its golden vectors"):
        check_golden(Policy(policy.spaces, policy.architecture, {**policy.tensors, **lost}), golden)
    unclipped = dataclasses.replace(policy.architecture, observation_clip=None)  # RLlib's filter cuts at 10 deviations
    with pytest.raises(IntegrityError, match="differs from its golden vectors"):
        check_golden(Policy(policy.spaces, unclipped, policy.tensors), golden)


def test_sacs_greedy_action_is_the_cut_mean_as_rllib_has_it():
    path = path_of("SAC", TORQUE)
    policy, golden = path.export(met(path))
    mean_NK = golden.distributions_NP[:, :2]
    ours = policy.distribution.choose_rows(golden.distributions_NP, "greedy", np.random.default_rng(0))
    center, half = np.array([0, 2.5]), np.array([2, 2.5])
    assert np.allclose(ours, center + half * np.clip(mean_NK, -1, 1), atol=1e-6)
    assert not np.allclose(ours, center + half * np.tanh(mean_NK), atol=1e-3)  # what Soft Actor-Critic's own code does
    sampled = policy.distribution.choose_rows(golden.distributions_NP, "sample", np.random.default_rng(0))
    noise = np.random.default_rng(0).standard_normal(mean_NK.shape)
    assert np.allclose(sampled, center + half * np.tanh(mean_NK + golden.distributions_NP[:, 2:] * noise), atol=1e-5)


def test_free_log_std_becomes_one_parameter_per_component():
    path = path_of("PPO", TORQUE, rllib={"model_config": {"free_log_std": True}})
    path._head.log_std.data += torch.tensor([-1.0, 0.5])
    policy, golden = path.export(met(path))
    assert policy.tensors["policy.log_std"].tolist() == [-1.0, 0.5]
    assert np.allclose(golden.distributions_NP[:, 2:], np.exp([-1.0, 0.5]))


def test_dqns_logits_stay_comparable_when_values_are_large():
    path = path_of("DQN")
    with torch.no_grad():
        path._head.net.mlp[-1].weight *= 30_000
    _, golden = path.export(met(path))  # float32 values of 10,000 are wrong by 1e-3; their softmax has to agree to 2e-5
    assert golden.distributions_NP.min() > 0 and np.ptp(golden.distributions_NP) > 0.1
    undivided = path.policy()
    assert (undivided.distributions(golden.observations_ND).argmax(1) == golden.distributions_NP.argmax(1)).all()


def test_nested_observations_have_our_features_in_our_order():
    path = path_of("PPO", PUSH, NESTED)
    where = np.array([[0.0, 0.25], [0.5, 1.0]], np.float32)
    seen = path._batch([{"where": where, "gear": 2, "and": (np.array([1, 0]), np.array([0, 1]))}])["obs"]
    ours = path._spaces.check_observation({"where": where.tolist(), "gear": 2, "and": [[1, 0], [0, 1]]})
    assert seen.tolist() == [ours.tolist()] == [[0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0.25, 0.5, 1]]
    _, golden = path.export(met(path))
    assert golden.observations_ND.shape == (256, 15)  # a Dict has no corners: all zeros is no category


def test_another_order_of_features_is_refused():
    renamed = gym_spaces.Dict({name[::-1]: space for name, space in NESTED.spaces.items()})  # sorts otherwise
    training, single = settings("PPO"), Still(NESTED, PUSH)
    config = rllib_config(EnvironmentConfig(id="Still-v0"), training, single)
    with pytest.raises(SpaceUnsupported, match="flatten"):
        InferencePath(config, training, single, Spaces.from_gymnasium(renamed, PUSH))


def test_a_normaliser_of_nested_observations_is_exported_too():
    path = path_of("PPO", PUSH, NESTED, normalize_observations=True)
    path._filter._init_new_filters()
    NESTED.seed(3)
    for obs_D in path._encode([NESTED.sample() for _ in range(100)]):
        path._filter._filters[None](obs_D, update=True)
    policy, golden = path.export(met(path))
    check_golden(policy, golden)
    assert policy.tensors["normaliser.scale"].std() > 0.1


@pytest.mark.parametrize(
    ("observation", "action", "algorithm", "message"),
    [
        (gym_spaces.Discrete(3, start=5), PUSH, "PPO", "observation space .* RLlib"),
        (gym_spaces.Box(0, 255, (8, 8, 3), np.uint8), PUSH, "PPO", "images"),
        (gym_spaces.Dict({"x": VECTOR, "action_mask": gym_spaces.MultiBinary(4)}), PUSH, "PPO", "action masks"),
        (VECTOR, gym_spaces.Discrete(3, start=1), "DQN", "start at 0"),
        (VECTOR, gym_spaces.Box(0, np.inf, (1,), np.float32), "PPO", "open and closed"),
        (VECTOR, gym_spaces.Box(-np.inf, np.inf, (1,), np.float32), "SAC", "between -1 and 1"),
        (VECTOR, gym_spaces.Box(-1, 1, (2, 2), np.float32), "SAC", "dimensions"),
    ],
)
def test_spaces_that_rllib_treats_otherwise_are_refused(
    observation: gymnasium.Space, action: gymnasium.Space, algorithm: str, message: str
):
    with pytest.raises(SpaceUnsupported, match=message):
        path_of(algorithm, action, observation)


@pytest.mark.parametrize(
    ("algorithm", "action", "changes", "message"),
    [
        ("PPO", PUSH, {"rllib": {"model_config": {"use_lstm": True}}}, "use_lstm"),
        ("PPO", PUSH, {"rllib": {"model_config": {"fcnet_use_layernorm": True}}}, "fcnet_use_layernorm"),
        ("PPO", PUSH, {"rllib": {"model_config": {"conv_filters": [[4, 3, 1]]}}}, "conv_filters"),
        ("PPO", PUSH, {"rllib": {"model_config": {"fcnet_activation": "swish"}}}, "fcnet_activation 'swish'"),
        ("PPO", PUSH, {"rllib": {"model_config": {"head_fcnet_hiddens": [8]}}}, "head_fcnet_activation"),
        ("PPO", PUSH, {"rllib": {"model_config": {"fcnet_hidden": [8]}}}, "did you mean fcnet_hiddens"),
        ("PPO", PUSH, {"rllib": {"model_config": {"fcnet_hiddens": [8]}}}, "set in `training` as well"),
        ("PPO", PUSH, {"rllib": {"train_batch_sise": 8}}, "did you mean train_batch_size"),
        ("PPO", PUSH, {"rllib": {"callbacks_class": "x"}}, "it is code"),
        ("PPO", PUSH, {"rllib": {"observation_filter": "MeanStdFilter"}}, "training.normalize_observations"),
        ("PPO", PUSH, {"rllib": {"lr": "fast"}}, "PPO refuses its settings"),
        ("PPO", PUSH, {"rllib": {"gamma": 0.9}, "gamma": 0.9}, "set both as"),
        ("PPO", PUSH, {"num_shards": 4}, "training.num_shards is a setting of our own trainer"),
        ("PPO", TORQUE, {"rllib": {"normalize_actions": False}}, "normalize_actions"),
        ("PPO", gym_spaces.MultiBinary(3), {}, "cannot learn this"),
        ("DQN", TORQUE, {}, "cannot learn this"),
        ("DQN", PUSH, {"rllib": {"num_atoms": 5}}, "num_atoms"),
        ("SAC", TORQUE, {"lr": 1e-3}, "actor_lr"),
        ("BC", PUSH, {"rllib": {"input_": ["/nowhere"]}}, "/nowhere, which does not exist"),
        ("BC", PUSH, {"rllib": {"input_": []}}, "set training.rllib.input_"),
        ("DQN", PUSH, {"rllib": {"input_": "."}}, "learns from the environment"),
        ("CQL", TORQUE, {"normalize_observations": True}, "normalise the recording"),
    ],
)
def test_settings_that_cannot_be_passed_or_exported_are_named(
    algorithm: str, action: gymnasium.Space, changes: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        path_of(algorithm, action, **changes)


@pytest.mark.parametrize(("algorithm", "changes"), [("SAC", {}), ("PPO", {"normalize_observations": True})])
def test_networks_are_written_and_read(algorithm: str, changes: dict[str, Any]):
    architecture = path_of(algorithm, TORQUE, **changes).architecture
    assert Architecture.from_json(json.loads(json.dumps(architecture.to_json()))) == architecture
    assert Gaussian().to_json() == {"squash": "clip", "std": "parameter"}  # as it was before RLlib's: digests stay the same


@pytest.mark.parametrize(
    "hostile",
    [
        {"observation_clip": 0},
        {"observation_clip": float("inf")},
        {"observation_clip": True},
        {"observation_clip": [1]},
        {"gaussian": {"squash": "tanh", "std": "output", "greedy": "eval"}},
        {"gaussian": {"squash": "tanh", "std": "output", "log_std_range": [2, -5]}},
        {"gaussian": {"squash": "tanh", "std": "output", "log_std_range": [0, 1e9]}},
        {"gaussian": {"squash": "tanh", "std": "output", "log_std_range": [0]}},
        {"gaussian": {"squash": "tanh", "std": "output", "log_std_range": [float("nan"), 1]}},
    ],
)
def test_hostile_networks_are_refused(hostile: dict[str, Any]):
    with pytest.raises(IntegrityError, match="network description cannot be read"):
        Architecture.from_json({"kind": "mlp", "hidden": [4], "activation": "tanh", **hostile})


def test_only_what_the_user_set_is_passed_on():
    assert passed_settings(TrainingConfig(algorithm="rllib:PPO")) == {}
    training = TrainingConfig(
        algorithm="rllib:PPO",
        gamma=0.9,
        lr=[[0, 1e-3], [1000, 0]],
        hidden=(32,),
        worker_timeout_s=5,
        target_return=1,
        rllib={"train_batch_size_per_learner": 100, "model_config": {"head_fcnet_hiddens": [4]}},
    )
    assert passed_settings(training) == {
        "gamma": 0.9,
        "lr": [[0, 1e-3], [1000, 0]],
        "sample_timeout_s": 5,
        "train_batch_size_per_learner": 100,
        "model_config": {"fcnet_hiddens": [32], "head_fcnet_hiddens": [4]},
    }


def test_rllib_gets_the_settings():
    training = settings("SAC", seed=7, gamma=0.9, rllib={"actor_lr": 0.1, "replay_buffer_config": {"capacity": 50}})
    config = rllib_config(EnvironmentConfig(id="Still-v0"), training, Still(VECTOR, TORQUE))
    assert (config.seed, config.gamma, config.actor_lr, config.replay_buffer_config["capacity"]) == (7, 0.9, 0.1, 50)
    assert config.replay_buffer_config["type"] == "PrioritizedEpisodeReplayBuffer"  # RLlib merges, and so it is merged here
    assert config.model_config["fcnet_hiddens"] == [16, 8]
    assert config.restart_failed_env_runners is False


@pytest.mark.parametrize("name", ["cartpole_dqn", "pendulum_sac"])
def test_examples_can_be_passed_and_exported(name: str):
    loop = load_loop_file(EXAMPLES / f"{name}.yaml")
    single = make_single(loop.environment)
    config = rllib_config(loop.environment, loop.training, single)
    spaces = Spaces.from_gymnasium(single.observation_space, single.action_space)
    assert InferencePath(config, loop.training, single, spaces).architecture.hidden == loop.training.hidden


def test_a_policy_with_a_history_is_exported_with_it():
    loop = load_loop_file(
        EXAMPLES / "cartpole_history.yaml", overrides=["training={algorithm: rllib:PPO, hidden: [16], target_return: 1}"]
    )
    spaces, single = read_spaces(loop.environment), make_single(loop.environment)
    config = rllib_config(loop.environment, loop.training, single)
    path = InferencePath(config, loop.training, single, spaces)
    observations = [single.reset(seed=seed)[0] for seed in range(5)]
    assert path.policy().spaces.history == 4
    obs_ND = np.stack([observation.reshape(-1) for observation in observations])
    np.testing.assert_allclose(path.policy().distributions(obs_ND), path.distributions(observations), atol=1e-5)


@pytest.mark.parametrize("name", ["rllib:sac", "SAC", "rllib:SCA"])
def test_algorithm_names_have_a_hint(name: str):
    with pytest.raises(ValueError, match="did you mean 'rllib:SAC'"):
        TrainingConfig(algorithm=name)
    with pytest.raises(ValueError, match="is for algorithm rllib:<NAME>"):
        TrainingConfig(rllib={"lr": 1})


def test_dqn_is_only_served_greedily():
    loop = {"name": "x", "environment": {"id": "CartPole-v1"}, "feedback": {"outcome_range": [0, 500]}}
    training = {"algorithm": "rllib:DQN", "target_return": 1}
    with pytest.raises(ValueError, match=r"serving\.mode 'sample' has no meaning"):
        LoopConfig(**loop, training=training, serving={"mode": "sample"})
    assert LoopConfig(**loop, training=training).training.rllib_algorithm == "DQN"


def test_weights_that_are_not_finite_are_no_policy():
    path = path_of("PPO")
    state = path._module.get_state()
    state[next(iter(state))] = np.full_like(state[next(iter(state))], np.nan)
    with pytest.raises(TrainingFailed, match="NaN or infinite"):
        path.load(state, {})


def test_golden_vectors_of_very_short_episodes_are_enough_for_a_bundle():
    path = path_of("PPO")
    policy, golden = path.export(met(path, num_rows=2))
    assert len(golden.observations_ND) == NUM_GOLDEN + NUM_CORNERS
    check_golden(policy, golden)
