"""The learner against stable-baselines3's own PPO on the same fragment: advantages, losses, gradients and optimiser steps.

Its `train` runs as it is, on its own policy and its own rollout buffer, into which our parameters and our fragment were copied.
"""

from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import pytest
import stable_baselines3
import torch
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv

from policies.spaces import Spaces
from training.config import TrainingConfig
from training.gae import advantages
from training.heads import head_of
from training.learner_state import LearnerState
from training.network import Layout, Network, layout_of
from training.ppo import PPO
from training.rollout import Rollout

T, B = 16, 8
OBSERVATION = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = {
    "discrete": gymnasium.spaces.Discrete(4),
    "multi_discrete": gymnasium.spaces.MultiDiscrete([2, 3]),
    "box": gymnasium.spaces.Box(-1, 1, (2,), np.float32),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "value clipping": {"vf_clip_param": 0.3},
    "entropy": {"entropy_coeff": 0.03},
    "all": {"vf_clip_param": 0.3, "entropy_coeff": 0.03, "vf_loss_coeff": 0.8, "grad_clip": 0.2, "activation": "relu"},
    "raw advantages, no gradient clipping": {"normalize_advantages": False, "grad_clip": 1e6},
}


class OnlySpaces(gymnasium.Env):
    """Never stepped: stable-baselines3 asks an environment for its spaces."""

    def __init__(self, action_space: gymnasium.Space) -> None:
        self.observation_space, self.action_space = OBSERVATION, action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}


@dataclass
class Ours:
    """Our learner, and the (clipped) gradients of the steps that it took."""

    layout: Layout
    learner: PPO
    gradients: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        step = self.learner._adam_step

        def recording(gradient_P: np.ndarray, lr: float) -> None:
            self.gradients.append(gradient_P.copy())
            step(gradient_P, lr)

        self.learner._adam_step = recording  # type: ignore[method-assign]

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        return self.layout.split(self.learner.state.parameters_P)


def training_of(num_epochs: int = 1, **changes: Any) -> TrainingConfig:
    sizes = {
        "num_shards": 1,
        "num_env_runners": 1,
        "num_envs_per_shard": B,
        "rollout_fragment_length": T,
        "minibatch_size": T * B,
    }
    options = {"lr": 3e-4, "gamma": 0.97, "lambda_": 0.9, "hidden": (16, 8), "num_epochs": num_epochs, "initial_log_std": -0.3}
    return TrainingConfig(**{**sizes, **options, **changes})


def make_ours(action: str, training: TrainingConfig) -> Ours:
    layout = layout_of(Spaces.from_gymnasium(OBSERVATION, ACTIONS[action]), training)
    state = LearnerState.initial(layout, 0, log_std=training.initial_log_std)
    state.parameters_P += np.random.default_rng(5).standard_normal(layout.size).astype(np.float32) * np.float32(0.1)
    return Ours(layout, PPO(layout, training, state))


def make_fragment(ours: Ours) -> Rollout:
    """Return a fragment with both kinds of ends, whose behaviour policy and old values are a little off the learner's.

    In the first epoch of a real update all ratios are 1 and nothing is clipped; so every term has something to do.
    Environments reset in the same step, as stable-baselines3's do.
    """
    rng = np.random.default_rng(1)
    layout, head = ours.layout, head_of(ours.layout.spaces, ours.layout.architecture)
    network = Network(layout, ours.learner.state.parameters_P)
    obs_TBD = rng.standard_normal((T + 1, B, 3)).astype(np.float32)
    outputs_NO = network.outputs(obs_TBD[:-1].reshape(-1, 3))
    actions_NK = head.sample(outputs_NO, head.noise(rng, (T * B,)), None)
    logp_N = head.evaluate(outputs_NO, actions_NK, None).logp_N
    values_TB = network.values(obs_TBD.reshape(-1, 3)).reshape(T + 1, B) + rng.uniform(-0.5, 0.5, (T + 1, B))
    terminateds_TB = rng.random((T, B)) < 0.1
    truncateds_TB = (rng.random((T, B)) < 0.1) & ~terminateds_TB
    final_F = np.flatnonzero(terminateds_TB | truncateds_TB)
    assert terminateds_TB.sum() > 5 and truncateds_TB.sum() > 5
    return Rollout(
        shard=0,
        version=0,
        obs_TBD=obs_TBD,
        actions_TBK=actions_NK.reshape(T, B, -1),
        masks_TBA=None,
        logp_TB=(logp_N + rng.uniform(-0.4, 0.4, T * B)).reshape(T, B).astype(np.float32),
        rewards_TB=rng.standard_normal((T, B)).astype(np.float32),
        terminateds_TB=terminateds_TB,
        truncateds_TB=truncateds_TB,
        values_TB=values_TB.astype(np.float32),
        valid_TB=np.ones((T, B), bool),
        final_F=final_F,
        final_obs_FD=rng.standard_normal((len(final_F), 3)).astype(np.float32),
        final_values_F=rng.standard_normal(len(final_F)).astype(np.float32),
        return_moments=np.zeros(3),
        episode_returns_E=np.zeros(0),
        episode_lengths_E=np.zeros(0, np.int64),
    )


def make_theirs(action: str, training: TrainingConfig, ours: Ours, fragment: Rollout) -> stable_baselines3.PPO:
    """Return their PPO with our parameters and a full buffer."""
    activation = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}[training.activation]
    theirs = stable_baselines3.PPO(
        "MlpPolicy",
        DummyVecEnv([lambda: OnlySpaces(ACTIONS[action])] * B),
        n_steps=T,
        batch_size=T * B,
        n_epochs=training.num_epochs,
        learning_rate=training.lr,
        gamma=training.gamma,
        gae_lambda=training.lambda_,
        clip_range=training.clip_param,
        clip_range_vf=training.vf_clip_param,
        ent_coef=training.entropy_coeff,
        vf_coef=training.vf_loss_coeff,
        max_grad_norm=training.grad_clip,
        normalize_advantage=training.normalize_advantages,
        target_kl=training.kl_target,
        policy_kwargs={"net_arch": list(training.hidden), "activation_fn": activation},
        device="cpu",
    )
    theirs.set_logger(configure(None, []))
    for name, parameter in by_our_names(theirs).items():
        tensor = torch.from_numpy(ours.tensors[name].copy())
        parameter.data = tensor.T.contiguous() if name.endswith("weight") else tensor
    _fill_buffer(theirs, fragment)
    return theirs


def by_our_names(theirs: stable_baselines3.PPO) -> dict[str, torch.nn.Parameter]:
    policy, names = theirs.policy, {}
    for tower, hidden, last in (
        ("policy", policy.mlp_extractor.policy_net, policy.action_net),
        ("value", policy.mlp_extractor.value_net, policy.value_net),
    ):
        for layer, linear in enumerate([module for module in (*hidden, last) if isinstance(module, torch.nn.Linear)]):
            names[f"{tower}.{layer}.weight"], names[f"{tower}.{layer}.bias"] = linear.weight, linear.bias
    return names | ({"policy.log_std": policy.log_std} if hasattr(policy, "log_std") else {})


def _fill_buffer(theirs: stable_baselines3.PPO, fragment: Rollout) -> None:
    """Add the steps as its `collect_rollouts` does: a cut-off step's reward takes the value of its final observation in."""
    final_values = dict(zip(fragment.final_F.tolist(), fragment.final_values_F))
    ended_TB = fragment.terminateds_TB | fragment.truncateds_TB
    starts_B = np.ones(B)
    for t in range(T):
        rewards_B = fragment.rewards_TB[t].copy()
        for b in np.flatnonzero(fragment.truncateds_TB[t]):
            rewards_B[b] += theirs.gamma * final_values[t * B + b]
        values, logp = torch.from_numpy(fragment.values_TB[t]), torch.from_numpy(fragment.logp_TB[t])
        theirs.rollout_buffer.add(fragment.obs_TBD[t], fragment.actions_TBK[t], rewards_B, starts_B, values, logp)
        starts_B = ended_TB[t].astype(float)
    theirs.rollout_buffer.compute_returns_and_advantage(torch.from_numpy(fragment.values_TB[T]), ended_TB[T - 1].astype(float))


def largest_difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    assert set(ours) == set(theirs)
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs)


def as_ours(name: str, tensor: torch.Tensor) -> np.ndarray:
    array = tensor.detach().numpy()
    return array.T if name.endswith("weight") else array


@dataclass
class Compared:
    """Differences after an update: of parameters, of the last step's gradient, and what both report."""

    parameters: float
    gradient: float
    reports: dict[str, tuple[float, float]]
    moved: float
    num_steps: int


def compare(action: str, training: TrainingConfig, *, ours_differs: dict[str, Any] | None = None) -> Compared:
    """Update both; `ours_differs` changes our settings only, for negative controls."""
    ours = make_ours(action, training.model_copy(update=ours_differs or {}))
    fragment = make_fragment(ours)
    theirs = make_theirs(action, training, ours, fragment)
    before = {name: tensor.copy() for name, tensor in ours.tensors.items()}
    report = ours.learner.update([fragment])
    theirs.train()
    log = theirs.logger.name_to_value
    parameters = {name: as_ours(name, parameter) for name, parameter in by_our_names(theirs).items()}
    gradients = {name: as_ours(name, parameter.grad) for name, parameter in by_our_names(theirs).items()}
    return Compared(
        parameters=largest_difference(ours.tensors, parameters),
        gradient=largest_difference(ours.layout.split(ours.gradients[-1]), gradients),
        reports={
            "policy_loss": (report.policy_loss, log["train/policy_gradient_loss"]),
            "value_loss": (report.value_loss, log["train/value_loss"]),
            "entropy": (report.entropy, -log["train/entropy_loss"]),
            "clip_fraction": (report.clip_fraction, log["train/clip_fraction"]),
            "explained_variance": (report.explained_variance, log["train/explained_variance"]),
        },
        moved=largest_difference(before, parameters),
        num_steps=len(ours.gradients),
    )


def test_advantages_and_returns_are_theirs() -> None:
    training = training_of()
    ours = make_ours("discrete", training)
    fragment = make_fragment(ours)
    theirs = make_theirs("discrete", training, ours, fragment)
    values_TB, next_values_TB = fragment.values_TB[:-1], fragment.next_values(fragment.values_TB, fragment.final_values_F)
    terms = fragment.rewards_TB, values_TB, next_values_TB, fragment.terminateds_TB, fragment.truncateds_TB
    advantages_TB = advantages(*terms, gamma=training.gamma, lambda_=training.lambda_)
    np.testing.assert_allclose(advantages_TB, theirs.rollout_buffer.advantages, atol=1e-6)
    np.testing.assert_allclose(advantages_TB + values_TB, theirs.rollout_buffer.returns, atol=1e-6)
    # Negative control: with time limits taken for deaths they would differ.
    deaths_TB = fragment.terminateds_TB | fragment.truncateds_TB
    wrong_TB = advantages(*terms[:3], deaths_TB, fragment.truncateds_TB, gamma=training.gamma, lambda_=training.lambda_)
    assert np.abs(wrong_TB - theirs.rollout_buffer.advantages).max() > 0.1


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("action", ACTIONS)
def test_one_step_is_theirs(action: str, settings: dict[str, Any]) -> None:
    compared = compare(action, training_of(**settings))
    for name, (ours, theirs) in compared.reports.items():
        assert ours == pytest.approx(theirs, abs=1e-6), name
    assert 0.1 < compared.reports["clip_fraction"][0] < 0.9  # the clip had work to do
    assert compared.gradient < 1e-6
    assert compared.parameters < 1e-6 < 100e-6 < compared.moved


@pytest.mark.parametrize("action", ACTIONS)
def test_several_epochs_are_theirs(action: str) -> None:
    compared = compare(action, training_of(num_epochs=10, **SETTINGS["all"]))
    assert compared.num_steps == 10
    assert compared.parameters < 1e-6 < 1e-3 < compared.moved


@pytest.mark.parametrize("kl_target", [0.02, 0.025, 0.03])
def test_an_update_ends_before_the_same_step_as_theirs_when_the_policy_has_moved_too_far(kl_target: float) -> None:
    settings = {"num_epochs": 20, "lr": 0.01, "kl_target": kl_target}
    compared = compare("discrete", training_of(**settings))
    assert 0 < compared.num_steps < 20
    assert compared.parameters < 1e-6
    # Negative control: a limit that is hardly wider lets more steps pass.
    assert compare("discrete", training_of(**settings), ours_differs={"kl_target": kl_target + 0.01}).parameters > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"vf_clip_param": None},
        {"entropy_coeff": 0.0},
        {"vf_loss_coeff": 0.7},
        {"grad_clip": 0.5},
        {"lambda_": 0.95},
        {"clip_param": 0.3},
    ],
    ids=str,
)
def test_any_other_setting_is_another_update(changes: dict[str, Any]) -> None:
    """Negative control: the comparisons above can fail."""
    assert compare("discrete", training_of(**SETTINGS["all"]), ours_differs=changes).gradient > 1e-4
