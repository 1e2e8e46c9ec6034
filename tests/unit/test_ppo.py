"""PPO: gradients against plain torch, what time limits do to values, and that no step is dropped or invented."""

import dataclasses

import numpy as np
import pytest
import torch

from policies.errors import TrainingFailed
from policies.policy import Architecture
from policies.spaces import Spaces
from training.config import EnvironmentConfig, TrainingConfig
from training.environment import read_spaces
from training.learner_state import LearnerState
from training.network import Layout, initial_parameters, parameters_sha256
from training.ppo import PPO, Batch, action_probabilities, ppo_loss
from training.rollout import Rollout, Shard

SPACES = Spaces(np.full(3, -np.inf, np.float32), np.full(3, np.inf, np.float32), num_actions=4)
LAYOUT = Layout(SPACES, Architecture((8, 8), "tanh"))
SMALL = {"num_envs_per_shard": 8, "num_shards": 1, "num_env_runners": 1, "rollout_fragment_length": 16, "minibatch_size": 32}


def fixed_batch(num_steps: int = 20) -> Batch:
    rng = np.random.default_rng(0)
    return Batch(
        x_ND=torch.from_numpy(rng.standard_normal((num_steps, 3)).astype(np.float32)),
        actions_N=torch.from_numpy(rng.integers(0, 4, num_steps)),
        logp_N=torch.from_numpy(np.log(rng.uniform(0.1, 0.5, num_steps)).astype(np.float32)),
        advantages_N=torch.from_numpy(rng.standard_normal(num_steps).astype(np.float32)),
        returns_N=torch.from_numpy(rng.standard_normal(num_steps).astype(np.float32)),
    )


def plain_torch_gradient(parameters_P: np.ndarray, training: TrainingConfig, batch: Batch) -> dict[str, np.ndarray]:
    """The same loss written with torch.nn modules and torch.distributions, knowing nothing of the flat vector."""
    tensors = LAYOUT.split(parameters_P)
    towers = {}
    for name, outputs in (("policy", 4), ("value", 1)):
        towers[name] = torch.nn.Sequential(
            torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, outputs)
        )
        for layer in range(3):
            linear = towers[name][2 * layer]
            linear.weight.data = torch.from_numpy(tensors[f"{name}.{layer}.weight"].T.copy())
            linear.bias.data = torch.from_numpy(tensors[f"{name}.{layer}.bias"].copy())
    distribution = torch.distributions.Categorical(logits=towers["policy"](batch.x_ND))
    ratio = torch.exp(distribution.log_prob(batch.actions_N) - batch.logp_N)
    unclipped = ratio * batch.advantages_N
    clipped = torch.clamp(ratio, 1 - training.clip_param, 1 + training.clip_param) * batch.advantages_N
    value_loss = torch.nn.functional.mse_loss(towers["value"](batch.x_ND).flatten(), batch.returns_N)
    loss = -torch.min(unclipped, clipped).mean() + training.vf_loss_coeff * value_loss
    loss = loss - training.entropy_coeff * distribution.entropy().mean()
    loss.backward()
    gradients = {}
    for name, network in towers.items():
        for layer in range(3):
            gradients[f"{name}.{layer}.weight"] = network[2 * layer].weight.grad.numpy().T
            gradients[f"{name}.{layer}.bias"] = network[2 * layer].bias.grad.numpy()
    return gradients


def flat_gradient(parameters_P: np.ndarray, training: TrainingConfig, batch: Batch) -> dict[str, np.ndarray]:
    flat_P = torch.from_numpy(parameters_P).requires_grad_()
    loss, _ = ppo_loss(flat_P, LAYOUT, training, batch)
    return LAYOUT.split(torch.autograd.grad(loss, flat_P)[0].numpy())


def test_flat_gradient_equals_plain_torch():
    training = TrainingConfig(entropy_coeff=0.01, vf_loss_coeff=0.7)
    parameters_P = LearnerState.initial(LAYOUT, 3).parameters_P
    parameters_P += np.random.default_rng(1).standard_normal(LAYOUT.size).astype(np.float32) * 0.3
    expected = plain_torch_gradient(parameters_P, training, fixed_batch())
    actual = flat_gradient(parameters_P, training, fixed_batch())
    for name, gradient in expected.items():
        np.testing.assert_allclose(actual[name], gradient, atol=1e-6, err_msg=name)  # sums of 20 float32 terms of size 1
    # Negative control: a loss with another clip range has another gradient, so the comparison can fail.
    other = flat_gradient(parameters_P, training.model_copy(update={"clip_param": 0.9}), fixed_batch())
    assert max(np.abs(other[name] - expected[name]).max() for name in expected) > 1e-3


def test_adam_equals_torch_optim():
    learner = PPO(LAYOUT, TrainingConfig(lr=0.01), LearnerState.initial(LAYOUT, 0))
    reference_P = torch.from_numpy(learner.state.parameters_P.copy()).requires_grad_()
    adam = torch.optim.Adam([reference_P], lr=0.01, eps=1e-5)
    for step in range(5):
        gradient_P = torch.from_numpy(np.random.default_rng(step).standard_normal(LAYOUT.size).astype(np.float32))
        reference_P.grad = gradient_P
        adam.step()
        learner._adam_step(gradient_P)
    np.testing.assert_allclose(learner.state.parameters_P, reference_P.detach().numpy(), atol=1e-6)


def time_limits_as_deaths(rollout: Rollout) -> Rollout:
    """The classical mistake, as a negative control."""
    return dataclasses.replace(rollout, terminateds_TB=rollout.terminateds_TB | rollout.truncateds_TB)


def learned_value(environment: EnvironmentConfig, change=lambda rollout: rollout) -> float:
    """Train on `Constant-v0` with gamma 0.9 and return the value of its only observation."""
    training = TrainingConfig(
        **SMALL, gamma=0.9, lambda_=0.9, lr=0.01, num_epochs=4, vf_loss_coeff=1.0, grad_clip=100, hidden=(8,)
    )
    layout = Layout(read_spaces(environment), Architecture(training.hidden))
    learner = PPO(layout, training, LearnerState.initial(layout, 0))
    shard = Shard(environment, training, 0, update=0, attempt=0)
    for update in range(80):
        rollout = shard.collect(learner.state.weights(), update=update)
        learner.update([change(rollout)])
    return float(rollout.values_TB.mean())


def test_truncation_bootstraps_but_termination_does_not():
    truncated = EnvironmentConfig(id="tests.training_environments:Constant-v0", max_episode_steps=5)
    terminated = EnvironmentConfig(id="tests.training_environments:Constant-v0", kwargs={"terminate_after": 5})
    # Reward 1 for ever: 1 / (1 - 0.9) = 10, whatever the time limit.
    assert learned_value(truncated) == pytest.approx(10, abs=0.3)
    # Ends after 5 steps, and all states look the same: no value can exceed 1 + 0.9 + ... + 0.9^4 = 4.1.
    assert learned_value(terminated) < 4.1
    # Negative control: with the time limit taken for a death, the first assertion would fail by far.
    assert learned_value(truncated, time_limits_as_deaths) < 4.1


def cartpole_rollout(training: TrainingConfig, layout: Layout) -> Rollout:
    shard = Shard(EnvironmentConfig(id="CartPole-v1", max_episode_steps=5), training, 0, update=0, attempt=0)
    return shard.collect(LearnerState.initial(layout, 0).weights(), update=0)


@pytest.fixture
def cartpole() -> tuple[Layout, TrainingConfig, Rollout]:
    training = TrainingConfig(**SMALL, normalize_observations=True)
    layout = Layout(read_spaces(EnvironmentConfig(id="CartPole-v1")), Architecture(training.hidden))
    return layout, training, cartpole_rollout(training, layout)


def hash_after_update(layout: Layout, training: TrainingConfig, rollout: Rollout) -> str:
    learner = PPO(layout, training, LearnerState.initial(layout, 0))
    learner.update([rollout])
    return parameters_sha256(learner.state.weights().tensors(layout))


def test_reset_steps_are_never_learned_from(cartpole):
    layout, training, rollout = cartpole
    assert not rollout.valid_TB.all()
    garbage = {
        "obs_TBD": rollout.obs_TBD.copy(),
        "actions_TB": np.where(rollout.valid_TB, rollout.actions_TB, 1 - rollout.actions_TB),
        "logp_TB": np.where(rollout.valid_TB, rollout.logp_TB, -50).astype(np.float32),
        "rewards_TB": np.where(rollout.valid_TB, rollout.rewards_TB, 1e6).astype(np.float32),
    }
    expected = hash_after_update(layout, training, rollout)
    for name in ("actions_TB", "logp_TB", "rewards_TB"):
        assert hash_after_update(layout, training, dataclasses.replace(rollout, **{name: garbage[name]})) == expected
    # Negative control: learning from all steps gives other parameters.
    all_valid = dataclasses.replace(rollout, valid_TB=np.ones_like(rollout.valid_TB))
    assert hash_after_update(layout, training, all_valid) != expected


def test_minibatches_use_every_valid_step_once_per_epoch(cartpole, monkeypatch):
    layout, training, rollout = cartpole
    learner = PPO(layout, training, LearnerState.initial(layout, 0))
    seen: list[np.ndarray] = []
    step = learner._minibatch_step
    monkeypatch.setattr(learner, "_minibatch_step", lambda batch, index_M: seen.append(index_M.numpy()) or step(batch, index_M))
    learner.update([rollout])
    counts = np.bincount(np.concatenate(seen))
    assert counts.tolist() == [training.num_epochs] * rollout.num_env_steps
    assert rollout.num_env_steps % training.minibatch_size != 0  # so an even split was not possible
    assert max(map(len, seen)) - min(map(len, seen)) <= 1


def test_normaliser_is_the_mean_and_spread_of_all_valid_observations(cartpole):
    layout, training, rollout = cartpole
    learner = PPO(layout, training, LearnerState.initial(layout, 0))
    learner.update([rollout])
    learner.update([dataclasses.replace(rollout, obs_TBD=rollout.obs_TBD * 2 + 1)])
    obs_ND = rollout.obs_TBD[:-1][rollout.valid_TB].astype(np.float64)
    both_ND = np.concatenate([obs_ND, obs_ND * 2 + 1])
    weights = learner.state.weights()
    np.testing.assert_allclose(weights.normaliser_mean_D, both_ND.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(weights.normaliser_scale_D, 1 / both_ND.std(axis=0), rtol=1e-5)


def test_order_of_fragments_does_not_change_the_bits(cartpole):
    layout, training, rollout = cartpole
    second = dataclasses.replace(rollout, shard=1, rewards_TB=rollout.rewards_TB * 2)
    hashes = set()
    for rollouts in ([rollout, second], [second, rollout]):
        learner = PPO(layout, training, LearnerState.initial(layout, 0))
        learner.update(rollouts)
        hashes.add(parameters_sha256(learner.state.weights().tensors(layout)))
    assert len(hashes) == 1


def test_training_and_serving_agree_on_probabilities(cartpole):
    layout, training, rollout = cartpole
    learner = PPO(layout, training, LearnerState.initial(layout, 0))
    learner.update([rollout])
    policy = learner.state.weights().policy(layout)
    obs_ND = rollout.obs_TBD.reshape(-1, 4)
    expected = action_probabilities(policy, obs_ND)
    assert expected.dtype == np.float64
    np.testing.assert_allclose(policy.probabilities(obs_ND), expected, atol=1e-6)
    # Negative control: without its normaliser the policy acts differently, and this comparison notices.
    bare = dataclasses.replace(policy, tensors=policy.tensors | {"normaliser.scale": np.ones(4, np.float32)})
    assert np.abs(bare.probabilities(obs_ND) - expected).max() > 1e-3


def test_initial_policy_is_nearly_uniform_and_seeded():
    policy = LearnerState.initial(LAYOUT, 0).weights().policy(LAYOUT)
    obs_ND = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    assert np.abs(policy.probabilities(obs_ND) - 0.25).max() < 0.02
    assert not np.array_equal(initial_parameters(LAYOUT, 0), initial_parameters(LAYOUT, 1))


def test_diverged_parameters_end_the_run_with_a_remedy(cartpole):
    layout, training, rollout = cartpole
    learner = PPO(layout, training, LearnerState.initial(layout, 0))
    with pytest.raises(TrainingFailed, match="lower lr"):
        learner.update([dataclasses.replace(rollout, rewards_TB=np.full_like(rollout.rewards_TB, np.inf))])
