"""PPO: what time limits do to values, and that no step is dropped or invented. Gradients are in `test_gradients.py`."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from policies.errors import TrainingFailed
from policies.network import Architecture
from tests.bundles import vector_spaces
from training.config import EnvironmentConfig, TrainingConfig
from training.environment import read_spaces
from training.learner_state import LearnerState
from training.network import Layout, initial_parameters, layout_of, outputs_as_trained, parameters_sha256
from training.ppo import PPO, Batch, LossSettings, ppo_loss
from training.rollout import Rollout, Shard

LAYOUT = Layout(vector_spaces(3, 4), Architecture((8, 8), "tanh"))
SMALL = {"num_envs_per_shard": 8, "num_shards": 1, "num_env_runners": 1, "rollout_fragment_length": 16, "minibatch_size": 32}


def test_adam_equals_torch_optim():
    learner = PPO(LAYOUT, TrainingConfig(lr=0.01), LearnerState.initial(LAYOUT, 0))
    reference_P = torch.from_numpy(learner.state.parameters_P.copy()).requires_grad_()
    adam = torch.optim.Adam([reference_P], lr=0.01, eps=1e-5)
    for step in range(5):
        gradient_P = torch.from_numpy(np.random.default_rng(step).standard_normal(LAYOUT.size).astype(np.float32))
        reference_P.grad = gradient_P
        adam.step()
        learner._adam_step(gradient_P.numpy().copy(), 0.01)
    np.testing.assert_allclose(learner.state.parameters_P, reference_P.detach().numpy(), atol=1e-6)


def time_limits_as_deaths(rollout: Rollout) -> Rollout:
    """The classical mistake, as a negative control."""
    return dataclasses.replace(rollout, terminateds_TB=rollout.terminateds_TB | rollout.truncateds_TB)


def learned_values(environment: EnvironmentConfig, change=lambda rollout: rollout, *, gamma: float = 0.9) -> dict[float, float]:
    """Train for a while and return the value of each thing that the environment shows (one number)."""
    training = TrainingConfig(
        **SMALL, gamma=gamma, lambda_=0.9, lr=0.02, num_epochs=4, vf_loss_coeff=1.0, grad_clip=100, hidden=(8,)
    )
    layout = layout_of(read_spaces(environment), training)
    learner = PPO(layout, training, LearnerState.initial(layout, 0))
    shard = Shard(environment, training, 0, update=0, attempt=0)
    for update in range(40):
        rollout = shard.collect(learner.state.weights(), update=update)
        learner.update([change(rollout)])
    shown, values = rollout.obs_TBD[:-1][rollout.valid_TB][:, 0], rollout.values_TB[:-1][rollout.valid_TB]
    return {float(x): float(values[shown == x].mean()) for x in np.unique(shown)}


def test_truncation_bootstraps_but_termination_does_not():
    truncated = EnvironmentConfig(id="tests.training_environments:Constant-v0", max_episode_steps=5)
    terminated = EnvironmentConfig(id="tests.training_environments:Constant-v0", kwargs={"terminate_after": 5})
    # Reward 1 for ever: 1 / (1 - 0.9) = 10, whatever the time limit.
    assert learned_values(truncated)[1] == pytest.approx(10, abs=0.3)
    # Ends after 5 steps, and all states look the same: no value can exceed 1 + 0.9 + ... + 0.9^4 = 4.1.
    assert learned_values(terminated)[1] < 4.1
    # Negative control: with the time limit taken for a death, the first assertion would fail by far.
    assert learned_values(truncated, time_limits_as_deaths)[1] < 4.1


def without_final_observations(rollout: Rollout) -> Rollout:
    """The other classical mistake: what is seen next is taken for what came last, though it is another episode."""
    nothing = {name: getattr(rollout, name)[:0] for name in ("final_F", "final_obs_FD", "final_values_F")}
    return dataclasses.replace(rollout, **nothing)


@pytest.mark.parametrize("name", ["Warming-v0", "WarmingInTheSameStep-v0"])  # autoreset modes NEXT_STEP and SAME_STEP
def test_both_autoreset_modes_give_a_cut_off_episode_the_value_of_what_it_saw_last(name: str):
    environment = EnvironmentConfig(id=f"tests.training_environments:{name}", max_episode_steps=4)
    # 2 pays 1 for ever: 1 / (1 - 0.8) = 5. Before, 1 and 0 pay nothing: 0.8 * 5 = 4 and 0.8 * 4 = 3.2.
    assert learned_values(environment, gamma=0.8) == pytest.approx({0: 3.2, 1: 4, 2: 5}, abs=0.3)
    # Negative control. Of the two steps from 2 the second ends the episode, so v_2 = ((1 + 0.8 v_2) + 1) / 2 = 1.67 by one-step
    # targets, and less by longer ones.
    assert learned_values(environment, time_limits_as_deaths, gamma=0.8)[2] < 1.9
    terminated = EnvironmentConfig(id=f"tests.training_environments:{name}", kwargs={"terminate_after": 4})
    assert learned_values(terminated, gamma=0.8)[2] < 1.9


def test_a_reset_in_the_same_step_needs_its_final_observation():
    """Negative control: bootstrapping from the next episode's 0 gives v_2 = ((1 + 0.8 v_2) + (1 + 0.8 * 0.64 v_2)) / 2 = 2.9."""
    environment = EnvironmentConfig(id="tests.training_environments:WarmingInTheSameStep-v0", max_episode_steps=4)
    assert learned_values(environment, without_final_observations, gamma=0.8)[2] < 3.5


def cartpole_rollout(training: TrainingConfig, layout: Layout) -> Rollout:
    shard = Shard(EnvironmentConfig(id="CartPole-v1", max_episode_steps=5), training, 0, update=0, attempt=0)
    return shard.collect(LearnerState.initial(layout, 0).weights(), update=0)


@pytest.fixture
def cartpole() -> tuple[Layout, TrainingConfig, Rollout]:
    training = TrainingConfig(**SMALL, normalize_observations=True)
    layout = layout_of(read_spaces(EnvironmentConfig(id="CartPole-v1")), training)
    return layout, training, cartpole_rollout(training, layout)


def hash_after_update(layout: Layout, training: TrainingConfig, rollout: Rollout) -> str:
    learner = PPO(layout, training, LearnerState.initial(layout, 0))
    learner.update([rollout])
    return parameters_sha256(learner.state.weights().tensors(layout))


def test_reset_steps_are_never_learned_from(cartpole):
    layout, training, rollout = cartpole
    assert not rollout.valid_TB.all()
    garbage = {
        "actions_TBK": np.where(rollout.valid_TB[..., None], rollout.actions_TBK, 1 - rollout.actions_TBK),
        "logp_TB": np.where(rollout.valid_TB, rollout.logp_TB, -50).astype(np.float32),
        "rewards_TB": np.where(rollout.valid_TB, rollout.rewards_TB, 1e6).astype(np.float32),
    }
    expected = hash_after_update(layout, training, rollout)
    for name, values in garbage.items():
        assert hash_after_update(layout, training, dataclasses.replace(rollout, **{name: values})) == expected, name
    # Negative control: learning from all steps gives other parameters.
    all_valid = dataclasses.replace(rollout, valid_TB=np.ones_like(rollout.valid_TB))
    assert hash_after_update(layout, training, all_valid) != expected


def test_minibatches_use_every_valid_step_once_per_epoch(cartpole, monkeypatch):
    layout, training, rollout = cartpole
    learner = PPO(layout, training, LearnerState.initial(layout, 0))
    minibatches: list[list[bytes]] = []  # CartPole never shows the same twice, so an observation names its step
    step = learner._minibatch_step

    def recording(batch: Batch, *settings: object) -> tuple[float, ...]:
        minibatches.append([row.tobytes() for row in batch.x_ND])
        return step(batch, *settings)

    monkeypatch.setattr(learner, "_minibatch_step", recording)
    learner.update([rollout])
    counts = Counter(row for minibatch in minibatches for row in minibatch)
    assert len(counts) == rollout.num_env_steps and set(counts.values()) == {training.num_epochs}
    assert rollout.num_env_steps % training.minibatch_size != 0  # so an even split was not possible
    sizes = list(map(len, minibatches))
    assert max(sizes) - min(sizes) <= 1
    assert minibatches[0] != minibatches[len(minibatches) // training.num_epochs]  # each epoch in an order of its own


@pytest.mark.parametrize("rows_at_once", [1, 48, 1000])
def test_a_minibatch_in_parts_has_the_gradient_and_statistics_of_the_whole(cartpole, rows_at_once: int):
    layout, training, rollout = cartpole
    learner = PPO(layout, training, LearnerState.initial(layout, 0))
    batch = learner._batch([rollout])
    batch = dataclasses.replace(batch, logp_N=batch.logp_N + 0.3)  # so that some ratios are clipped
    settings = LossSettings(0.2, 0.5, None, 0.01)
    outputs_NO, values_N = learner._network.forward(batch.x_ND)
    loss = ppo_loss(learner._head, outputs_NO, values_N, batch, settings)
    whole_P = learner._network.backward(loss.d_outputs_NO, loss.d_values_N).copy()
    learner._network.rows_at_once = rows_at_once
    gradient_P, statistics = learner._gradient(batch, settings)
    assert np.abs(gradient_P - whole_P).max() < 1e-6 * np.abs(whole_P).max()
    assert statistics == pytest.approx((loss.policy_loss, loss.value_loss, loss.entropy, loss.kl, loss.clip_fraction), rel=1e-5)


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
    expected = policy.distribution.parameters(outputs_as_trained(policy, obs_ND), None)
    assert expected.dtype == np.float64
    np.testing.assert_allclose(policy.distributions(obs_ND), expected, atol=1e-6)
    # Negative control: without its normaliser the policy acts differently, and this comparison notices.
    bare = dataclasses.replace(policy, tensors=policy.tensors | {"normaliser.scale": np.ones(4, np.float32)})
    assert np.abs(bare.distributions(obs_ND) - expected).max() > 1e-3


def test_initial_policy_is_nearly_uniform_and_seeded():
    policy = LearnerState.initial(LAYOUT, 0).weights().policy(LAYOUT)
    obs_ND = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    assert np.abs(policy.distributions(obs_ND) - 0.25).max() < 0.02
    assert not np.array_equal(initial_parameters(LAYOUT, 0), initial_parameters(LAYOUT, 1))


def test_diverged_parameters_end_the_run_with_a_remedy(cartpole):
    layout, training, rollout = cartpole
    learner = PPO(layout, training, LearnerState.initial(layout, 0))
    with pytest.raises(TrainingFailed, match="lower lr"):
        learner.update([dataclasses.replace(rollout, rewards_TB=np.full_like(rollout.rewards_TB, np.inf))])
