"""How what RLlib trained becomes a policy of ours: its module's layers, and what its connectors do to observations.

    env-to-module connectors ──▶ module ──▶ action distribution        RLlib's own way: `InferencePath.distributions`
    normaliser, clip         ──▶ layers ──▶ distribution               ours: `InferencePath.policy`

The two are compared on golden vectors each time a policy is exported, so a normaliser cannot get lost on the way. What our
networks cannot express is refused by name before anything trains. N rows, D features, O outputs, K components of an action.
"""

import dataclasses
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces as gym_spaces
from gymnasium.vector.utils import concatenate, create_empty_array
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.bc.torch.default_bc_torch_rl_module import DefaultBCTorchRLModule
from ray.rllib.algorithms.dqn.default_dqn_rl_module import QF_PREDS, DefaultDQNRLModule
from ray.rllib.algorithms.ppo.default_ppo_rl_module import DefaultPPORLModule
from ray.rllib.algorithms.sac.default_sac_rl_module import DefaultSACRLModule
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchCategorical, TorchMultiCategorical
from ray.rllib.core.models.torch.heads import TorchFreeLogStdMLPHead
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.filter import RunningStat
from ray.rllib.utils.numpy import MAX_LOG_NN_OUTPUT, MIN_LOG_NN_OUTPUT, SMALL_NUMBER

from actors.rllib_settings import needs_flattening, observation_connectors
from policies.errors import ConfigError, SpaceUnsupported, TrainingFailed
from policies.golden import Golden, check_golden
from policies.network import MAX_LOG_STD, Architecture, Gaussian
from policies.policy import Policy
from policies.spaces import Numbers, Spaces
from training.config import TrainingConfig
from training.golden import NUM_CORNERS

FILTER = "MeanStdFilter"
ACTIVATIONS = {torch.nn.Tanh: "tanh", torch.nn.ReLU: "relu"}
NUM_SAMPLES = 8  # observations on which RLlib's encoding is compared with ours
# Float32 values near 1,000 are wrong by 1e-4, which the softmax of two nearly equal ones shows; divided to at most 10 they are
# compared as exactly as any probability. Their order, all that a greedy policy looks at, stays.
MAX_LOGIT = 10.0


class InferencePath:
    """RLlib's own way from observations to distributions, built beside the algorithm, and its translation.

    Raises `ConfigError` or `SpaceUnsupported` when the settings ask for what our networks cannot express.
    """

    def __init__(self, config: AlgorithmConfig, training: TrainingConfig, single: gymnasium.Env, spaces: Spaces) -> None:
        self._space = single.observation_space
        self._spaces = spaces
        _check_spaces(config, training, single, spaces)
        model = _checked_model_config(config)
        ends = (single.observation_space, single.action_space)
        if needs_flattening(self._space):
            _check_encoding(config, training, ends, spaces)
        self._pipeline = _pipeline(config, training, ends)
        try:
            module_ends = (self._pipeline.observation_space, single.action_space)
            self._module: RLModule = config.get_rl_module_spec(
                spaces={DEFAULT_MODULE_ID: module_ends}, inference_only=True
            ).build()
        except (ValueError, NotImplementedError, AssertionError, AttributeError) as error:
            raise ConfigError(f"RLlib's {training.rllib_algorithm} cannot learn this: {error or type(error).__name__}") from error
        encoder, self._head = _parts(self._module)
        self._linears, activation = _stack([*encoder.net.mlp, *self._head.net.mlp])
        hidden = tuple(linear.out_features for linear in self._linears[:-1])
        gaussian = _gaussian(self._module, self._head, model) if isinstance(spaces.action, Numbers) else None
        clip = self._filter.clip_by_value if self._filter is not None else None
        self.architecture = Architecture(hidden, activation, gaussian=gaussian, observation_clip=clip)
        self.policy()  # what does not fit together is said now

    def load(self, module_state: dict[str, Any], connector_state: dict[str, Any]) -> None:
        """Take over what an algorithm's learner and its env-to-module connectors know."""
        self._module.set_state(module_state)
        self._pipeline.set_state(connector_state)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self._module.parameters()):
            raise TrainingFailed(
                "RLlib's weights are NaN or infinite: the learning rate is too high, or the environment's numbers are not finite"
            )

    def export(self, obs_ND: np.ndarray) -> tuple[Policy, Golden]:
        """Return the policy, and what RLlib computes for the observations (the last ones are corners) that a policy met.

        Raises `IntegrityError` when the policy gives other distributions than RLlib does.
        """
        if not isinstance(self._space, gym_spaces.Box):
            obs_ND = obs_ND[:-NUM_CORNERS]  # zeros and ones everywhere are no category
        observations = [_to_observation(self._space, obs_D) for obs_D in obs_ND]
        seen_ND = self._encode(observations)  # as a float64 or an integer space rounds them
        divisor = self._logit_divisor(observations)
        policy, golden = self.policy(divisor), Golden(seen_ND, self.distributions(observations, divisor))
        check_golden(policy, golden)
        return policy, golden

    def policy(self, logit_divisor: float = 1.0) -> Policy:
        """Return what the module and the connectors compute as a policy of ours.

        Of a dueling network the advantages are the logits: what the state's value adds is the same for every action.
        """
        tensors = self._normaliser()
        for index, linear in enumerate(self._linears):
            divisor = logit_divisor if linear is self._linears[-1] else 1.0
            tensors[f"policy.{index}.weight"] = np.ascontiguousarray((linear.weight.detach() / divisor).T.numpy())
            tensors[f"policy.{index}.bias"] = (linear.bias.detach() / divisor).numpy().copy()
        if isinstance(self._head, TorchFreeLogStdMLPHead):
            tensors["policy.log_std"] = self._head.log_std.detach().numpy().copy()
        return Policy(self._spaces, self.architecture, tensors)

    def distributions(self, observations: list[Any], logit_divisor: float = 1.0) -> np.ndarray:
        """Return RLlib's distributions [N, P] for the environment's own observations, in the form of `policies.distributions`."""
        module, batch = self._module, self._batch(observations)
        with torch.no_grad():
            if isinstance(module, DefaultDQNRLModule):
                q_NA = module.compute_q_values(batch)[QF_PREDS]
                distribution = module.get_exploration_action_dist_cls().from_logits(q_NA / logit_divisor)
            else:
                inputs_NO = module.forward_inference(batch)[Columns.ACTION_DIST_INPUTS]
                distribution = module.get_inference_action_dist_cls().from_logits(inputs_NO)
        return _parameters(distribution).numpy().astype(np.float64)

    def _batch(self, observations: list[Any]) -> dict[str, Any]:
        episodes = [
            SingleAgentEpisode(observations=[observation], observation_space=self._space, len_lookback_buffer=0)
            for observation in observations
        ]
        return self._pipeline(rl_module=self._module, batch={}, episodes=episodes, explore=False, shared_data={})

    def _encode(self, observations: list[Any]) -> np.ndarray:
        return _encode(self._space, observations, self._spaces)

    def _logit_divisor(self, observations: list[Any]) -> float:
        if not isinstance(self._module, DefaultDQNRLModule):
            return 1.0
        with torch.no_grad():
            q_NA = self._module.compute_q_values(self._batch(observations))[QF_PREDS]
        return max(1.0, float(q_NA.abs().max()) / MAX_LOGIT)

    @property
    def _filter(self) -> Any:
        return next((piece for piece in self._pipeline.connectors if type(piece).__name__ == FILTER), None)

    def _normaliser(self) -> dict[str, np.ndarray]:
        """Return mean and scale of RLlib's filter: it divides by the deviation plus 1e-6."""
        mean_D, scale_D = np.zeros(self._spaces.num_features), np.ones(self._spaces.num_features)
        if self._filter is not None:
            ((_, state),) = self._filter.get_state().items()
            (running,) = state["running_stats"]
            statistics = RunningStat.from_state(running)
            mean_D, scale_D = statistics.mean, 1 / (statistics.std + SMALL_NUMBER)
        return {"normaliser.mean": mean_D.astype(np.float32), "normaliser.scale": scale_D.astype(np.float32)}


def _check_spaces(config: AlgorithmConfig, training: TrainingConfig, single: gymnasium.Env, spaces: Spaces) -> None:
    """Refuse the spaces that RLlib would treat otherwise than we do."""
    space = single.action_space
    if spaces.has_mask:
        raise SpaceUnsupported("the environment gives action masks, which RLlib's own modules do not look at; use algorithm: ppo")
    if isinstance(single.observation_space, gym_spaces.Box) and len(single.observation_space.shape) == 3:
        raise SpaceUnsupported(
            f"observations {single.observation_space} are images: RLlib would train a CNN, which is not exported; use algorithm: "
            "ppo, or wrap the environment in gymnasium.wrappers.FlattenObservation for a multi-layer perceptron"
        )
    if np.any(getattr(space, "start", 0) != 0):
        raise SpaceUnsupported(f"action space {space} does not start at 0; RLlib sends actions that do")
    if not isinstance(space, gym_spaces.Box):
        return
    if len(space.shape) != 1:
        raise SpaceUnsupported(f"action space {space} has {len(space.shape)} dimensions; RLlib's modules need exactly one")
    num_bounded = int((space.bounded_below & space.bounded_above).sum())
    is_open = not (space.bounded_below | space.bounded_above).any()
    if num_bounded < space.shape[0] and not is_open:
        raise SpaceUnsupported(f"action space {space} has open and closed sides: RLlib would send actions beyond the closed ones")
    if num_bounded and not config.normalize_actions:
        raise ConfigError("training.rllib.normalize_actions: false is not exported for bounded actions; remove it")
    if is_open and training.rllib_algorithm in ("SAC", "CQL", "IQL"):
        raise SpaceUnsupported(f"action space {space} is open; RLlib's {training.rllib_algorithm} sends actions between -1 and 1")


def _checked_model_config(config: AlgorithmConfig) -> dict[str, Any]:
    """Return RLlib's model settings; raises `ConfigError` for those whose networks we cannot express."""
    model = dataclasses.asdict(DefaultModelConfig()) | config.model_config
    where = "training.rllib.model_config"
    if model["use_lstm"]:
        raise ConfigError(f"{where}.use_lstm: a policy with memory is not exported; stack frames in the environment instead")
    for key in ("fcnet_use_layernorm", "head_fcnet_use_layernorm"):
        if model[key]:
            raise ConfigError(f"{where}.{key}: layer normalisation is not exported; remove it")
    if model["conv_filters"]:
        raise ConfigError(f"{where}.conv_filters: convolutions are not exported; use algorithm: ppo with training.conv_filters")
    if model["fcnet_activation"] not in ACTIVATIONS.values():
        raise ConfigError(f"{where}.fcnet_activation {model['fcnet_activation']!r} is not exported; use tanh or relu")
    if model["head_fcnet_hiddens"] and model["head_fcnet_activation"] != model["fcnet_activation"]:
        raise ConfigError(
            f"{where}.head_fcnet_activation {model['head_fcnet_activation']!r} differs from fcnet_activation "
            f"{model['fcnet_activation']!r}; a policy has one activation: set both to the same"
        )
    if model.get("num_atoms", 1) > 1:
        raise ConfigError("training.rllib.num_atoms: distributional Q-learning is not exported; remove it")
    return model


def _pipeline(config: AlgorithmConfig, training: TrainingConfig, ends: tuple[gymnasium.Space, gymnasium.Space]) -> Any:
    """Return RLlib's env-to-module connectors with a normaliser that only applies what was learned."""
    own = config.copy(copy_frozen=False)
    own.env_runners(env_to_module_connector=lambda *_: observation_connectors(ends[0], training, update_stats=False))
    return own.build_env_to_module_connector(spaces={INPUT_ENV_SPACES: ends, INPUT_ENV_SINGLE_SPACES: ends})


def _check_encoding(
    config: AlgorithmConfig, training: TrainingConfig, ends: tuple[gymnasium.Space, gymnasium.Space], spaces: Spaces
) -> None:
    """Raise `SpaceUnsupported` unless RLlib flattens observations to the features we have, in the same order."""
    space = ends[0]
    space.seed(0)
    samples = [space.sample() for _ in range(NUM_SAMPLES)]
    episodes = [SingleAgentEpisode(observations=[sample], observation_space=space, len_lookback_buffer=0) for sample in samples]
    try:
        flatten_only = _pipeline(config, training.model_copy(update={"normalize_observations": False}), ends)
        theirs = flatten_only(rl_module=None, batch={}, episodes=episodes, explore=False, shared_data={})[Columns.OBS]
        same = np.array_equal(theirs, _encode(space, samples, spaces))
    except (AssertionError, ValueError, IndexError, KeyError, TypeError) as error:
        raise SpaceUnsupported(f"observation space {space} cannot be flattened by RLlib: {error}") from error
    if not same:
        raise SpaceUnsupported(
            f"observation space {space}: RLlib flattens it to other features than a bundle's; start every count at 0"
        )


def _parts(module: RLModule) -> tuple[Any, Any]:
    """Return the network that sees the observation and the one that gives the outputs."""
    if isinstance(module, DefaultDQNRLModule):
        return module.encoder, module.af
    if isinstance(module, DefaultSACRLModule):  # CQL and IQL as well
        return module.pi_encoder, module.pi
    if isinstance(module, DefaultBCTorchRLModule):
        return module._encoder, module._pi_head
    if isinstance(module, DefaultPPORLModule):  # APPO, IMPALA and MARWIL as well
        return getattr(module.encoder, "encoder", None) or module.encoder.actor_encoder, module.pi
    raise ConfigError(f"RLlib's module {type(module).__name__} is not one whose layers are known; it cannot be exported")


def _stack(layers: list[Any]) -> tuple[list[torch.nn.Linear], str]:
    """Return the linear layers and their one activation; raises `ConfigError` for anything between them that is neither."""
    linears = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    activations = [ACTIVATIONS.get(type(layer)) for layer in layers if not isinstance(layer, torch.nn.Linear)]
    alternates = all(isinstance(a, torch.nn.Linear) != isinstance(b, torch.nn.Linear) for a, b in pairwise(layers))
    if not alternates or len(set(activations)) != 1 or None in activations or not isinstance(layers[-1], torch.nn.Linear):
        raise ConfigError(
            f"training.rllib.model_config gives layers {[type(layer).__name__ for layer in layers]}, which cannot be exported"
        )
    return linears, activations[0]


def _gaussian(module: RLModule, head: Any, model: dict[str, Any]) -> Gaussian:
    if isinstance(module, DefaultSACRLModule):
        return Gaussian("tanh", "output", (float(MIN_LOG_NN_OUTPUT), float(MAX_LOG_NN_OUTPUT)), greedy="clip")
    limit = min(float(model["log_std_clip_param"]), MAX_LOG_STD)
    return Gaussian("clip", "parameter" if isinstance(head, TorchFreeLogStdMLPHead) else "output", (-limit, limit))


def _parameters(distribution: Any) -> torch.Tensor:
    """Return RLlib's distribution in our form: probabilities, or means and deviations side by side."""
    if isinstance(distribution, TorchCategorical):
        return distribution._dist.probs
    if isinstance(distribution, TorchMultiCategorical):
        return torch.cat([part._dist.probs for part in distribution._cats], dim=-1)
    return torch.cat([distribution._dist.loc, distribution._dist.scale], dim=-1)


def _encode(space: gymnasium.Space, observations: list[Any], spaces: Spaces) -> np.ndarray:
    batch = concatenate(space, observations, create_empty_array(space, len(observations)))
    return spaces.encode_batch(batch, len(observations))


def _to_observation(space: gymnasium.Space, obs_F: np.ndarray) -> Any:
    """Return the environment's own observation that has these features."""
    if isinstance(space, gym_spaces.Box):
        return obs_F.reshape(space.shape).astype(space.dtype)
    if isinstance(space, gym_spaces.Dict):
        parts = {name: space[name] for name in sorted(space.spaces)}
        values = _split(list(parts.values()), obs_F)
        return {name: _to_observation(part, value) for (name, part), value in zip(parts.items(), values)}
    if isinstance(space, gym_spaces.Tuple):
        return tuple(_to_observation(part, value) for part, value in zip(space.spaces, _split(list(space.spaces), obs_F)))
    return gym_spaces.unflatten(space, obs_F.astype(np.int64))


def _split(parts: list[gymnasium.Space], obs_F: np.ndarray) -> list[np.ndarray]:
    return np.split(obs_F, np.cumsum([gym_spaces.flatdim(part) for part in parts])[:-1])
