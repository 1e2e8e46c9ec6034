"""PPO in one file, read top to bottom: CleanRL's `ppo.py` in structure and hyper-parameters, written anew.

    python -m benchmarks.peers.cleanrl --variant cleanrl|cleanrl_big [--seed 0]

`cleanrl` is the published one: 4 Python environments, 128 steps. `cleanrl_big` steps 16 environments in one numpy call.

CleanRL is a collection of files to copy from and no package to install, so this file is what a reader of CleanRL would
run: its network, initialisation, losses, annealing and its way to treat time limits as deaths. Source of structure and
settings: https://docs.cleanrl.dev/rl-algorithms/ppo/#ppopy (MIT).

Shapes: T time, B environment, N = T * B samples, D feature.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import nn

from benchmarks.peers.judge import MAX_ENV_STEPS, Judge, print_row


@dataclasses.dataclass(frozen=True)
class Settings:
    """CleanRL's arguments under CleanRL's names; the defaults are those of its `ppo.py`, whose environment is CartPole-v1."""

    num_envs: int = 4
    num_steps: int = 128
    total_timesteps: int = MAX_ENV_STEPS
    learning_rate: float = 2.5e-4
    anneal_lr: bool = True
    gamma: float = 0.99
    gae_lambda: float = 0.95
    num_minibatches: int = 4
    update_epochs: int = 4
    clip_coef: float = 0.2
    clip_vloss: bool = True
    ent_coef: float = 0.01
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps


SETTINGS = {
    "cleanrl": Settings(),
    # The same loop on Gymnasium's native vector environment, for which CleanRL publishes no settings. A random search of 68
    # candidates (sizes, lr, annealing, epochs, gamma, lambda, clipping, entropy, evaluation interval) by median processor time to
    # the target over four seeds found these, on a busy machine; on more seeds they beat the search's second (medians 3.4 and
    # 3.9 s), and none of eight variants was clearly better. No benchmark uses those seeds.
    "cleanrl_big": Settings(
        num_envs=16, num_steps=128, learning_rate=1e-2, anneal_lr=False, gae_lambda=0.8, num_minibatches=4, update_epochs=4
    ),
}

# Called after each update with the agent and the environment steps so far; True ends the training.
AfterUpdate = Callable[["Agent", int], bool]


class Agent(nn.Module):
    """Two towers of 64 tanh units, orthogonally initialised."""

    def __init__(self, num_features: int, num_actions: int) -> None:
        super().__init__()
        self.critic = _tower(num_features, 1, last_std=1.0)
        self.actor = _tower(num_features, num_actions, last_std=0.01)

    def distribution(self, obs_ND: torch.Tensor) -> torch.distributions.Categorical:
        return torch.distributions.Categorical(logits=self.actor(obs_ND), validate_args=False)

    def values(self, obs_ND: torch.Tensor) -> torch.Tensor:
        return self.critic(obs_ND).flatten()

    @torch.no_grad()
    def act_greedily(self, obs_BD: np.ndarray) -> np.ndarray:
        return self.actor(torch.from_numpy(np.asarray(obs_BD, np.float32))).argmax(dim=1).numpy()


def _tower(num_features: int, num_outputs: int, *, last_std: float) -> nn.Sequential:
    return nn.Sequential(
        _orthogonal(nn.Linear(num_features, 64), std=2**0.5),
        nn.Tanh(),
        _orthogonal(nn.Linear(64, 64), std=2**0.5),
        nn.Tanh(),
        _orthogonal(nn.Linear(64, num_outputs), std=last_std),
    )


def _orthogonal(layer: nn.Linear, *, std: float) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Rollout:
    """What one rollout fills; the next one overwrites it."""

    def __init__(self, settings: Settings, num_features: int) -> None:
        shape = (settings.num_steps, settings.num_envs)
        self.obs_TBD = torch.zeros((*shape, num_features))
        self.actions_TB = torch.zeros(shape, dtype=torch.long)
        self.log_probs_TB, self.rewards_TB, self.values_TB, self.dones_TB = (torch.zeros(shape) for _ in range(4))
        self.advantages_TB = torch.zeros(shape)
        self.num_steps = settings.num_steps


def train(
    environments: Any, settings: Settings, *, seed: int, resets_on_next_step: bool, start: Callable[[], None], after: AfterUpdate
) -> None:
    """Run PPO until `after` returns True or `total_timesteps` are used up; `start` is called before the first step.

    `environments` has the interface of a Gymnasium vector environment. CleanRL was written for environments that reset in the
    step that ends the episode. With `resets_on_next_step` the step after an end is a reset that ignores its action: it is
    neither counted nor learned from.
    """
    torch.set_num_threads(1)  # faster than the default for networks of this size
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    num_features = int(np.prod(environments.single_observation_space.shape))
    agent = Agent(num_features, int(environments.single_action_space.n))
    optimizer = torch.optim.Adam(agent.parameters(), lr=settings.learning_rate, eps=1e-5)
    rollout = Rollout(settings, num_features)
    num_updates = settings.total_timesteps // settings.batch_size
    env_steps = 0

    start()
    obs_BD = torch.as_tensor(environments.reset(seed=seed)[0], dtype=torch.float32)
    done_B = torch.zeros(settings.num_envs)
    for update in range(num_updates):
        if settings.anneal_lr:
            optimizer.param_groups[0]["lr"] = (1 - update / num_updates) * settings.learning_rate
        obs_BD, done_B = _collect(environments, agent, rollout, obs_BD, done_B)
        _estimate_advantages(agent, rollout, obs_BD, done_B, settings)
        valid_TB = rollout.dones_TB == 0 if resets_on_next_step else torch.ones_like(rollout.dones_TB, dtype=torch.bool)
        _update(agent, optimizer, rollout, valid_TB.flatten().nonzero().flatten().numpy(), settings, rng)
        env_steps += int(valid_TB.sum())
        if after(agent, env_steps):
            return


@torch.no_grad()
def _collect(
    environments: Any, agent: Agent, rollout: Rollout, obs_BD: torch.Tensor, done_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill the rollout and return what follows it; `dones_TB[t]` says that `obs_TBD[t]` follows the end of an episode."""
    for t in range(rollout.num_steps):
        distribution = agent.distribution(obs_BD)
        actions_B = distribution.sample()
        rollout.obs_TBD[t], rollout.dones_TB[t], rollout.actions_TB[t] = obs_BD, done_B, actions_B
        rollout.log_probs_TB[t], rollout.values_TB[t] = distribution.log_prob(actions_B), agent.values(obs_BD)
        obs_BD, rewards_B, terminateds_B, truncateds_B, _ = environments.step(actions_B.numpy())
        rollout.rewards_TB[t] = torch.as_tensor(rewards_B)
        obs_BD = torch.as_tensor(obs_BD, dtype=torch.float32)
        done_B = torch.as_tensor(terminateds_B | truncateds_B, dtype=torch.float32)
    return obs_BD, done_B


@torch.no_grad()
def _estimate_advantages(
    agent: Agent, rollout: Rollout, next_obs_BD: torch.Tensor, next_done_B: torch.Tensor, settings: Settings
) -> None:
    """Generalized advantage estimation, https://arxiv.org/abs/1506.02438."""
    next_value_B, adv_B = agent.values(next_obs_BD), torch.zeros(settings.num_envs)
    for t in reversed(range(rollout.num_steps)):
        alive_B = 1 - next_done_B
        delta_B = rollout.rewards_TB[t] + settings.gamma * next_value_B * alive_B - rollout.values_TB[t]
        adv_B = delta_B + settings.gamma * settings.gae_lambda * alive_B * adv_B
        rollout.advantages_TB[t] = adv_B
        next_value_B, next_done_B = rollout.values_TB[t], rollout.dones_TB[t]


def _update(
    agent: Agent,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    valid_N: np.ndarray,
    settings: Settings,
    rng: np.random.Generator,
) -> None:
    obs_ND = rollout.obs_TBD.flatten(0, 1)
    actions_N, log_probs_N = rollout.actions_TB.flatten(), rollout.log_probs_TB.flatten()
    advantages_N, values_N = rollout.advantages_TB.flatten(), rollout.values_TB.flatten()
    returns_N = advantages_N + values_N
    for _ in range(settings.update_epochs):
        for indices in np.array_split(rng.permutation(valid_N), settings.num_minibatches):
            index = torch.from_numpy(indices)
            distribution, new_values = agent.distribution(obs_ND[index]), agent.values(obs_ND[index])
            ratio = (distribution.log_prob(actions_N[index]) - log_probs_N[index]).exp()
            adv = advantages_N[index]
            adv = (adv - adv.mean()) / (adv.std() + 1e-8)
            policy_loss = torch.max(-adv * ratio, -adv * ratio.clamp(1 - settings.clip_coef, 1 + settings.clip_coef)).mean()
            value_loss = _value_loss(new_values, values_N[index], returns_N[index], settings)
            loss = policy_loss - settings.ent_coef * distribution.entropy().mean() + settings.vf_coef * value_loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), settings.max_grad_norm)
            optimizer.step()


def _value_loss(new_values: torch.Tensor, values: torch.Tensor, returns: torch.Tensor, settings: Settings) -> torch.Tensor:
    squared = (new_values - returns) ** 2
    if not settings.clip_vloss:
        return 0.5 * squared.mean()
    clipped = values + (new_values - values).clamp(-settings.clip_coef, settings.clip_coef)
    return 0.5 * torch.max(squared, (clipped - returns) ** 2).mean()


def train_cartpole(variant: str, seed: int, settings: Settings | None = None) -> dict[str, Any]:
    """Train one variant until 20 greedy episodes return the target, and return the row of results."""
    settings = settings or SETTINGS[variant]
    judge = Judge()

    def after(agent: Agent, env_steps: int) -> bool:
        return judge.is_due(env_steps) and judge.evaluate(agent.act_greedily, env_steps=env_steps)

    native = variant == "cleanrl_big"
    if native:
        environments = gymnasium.make_vec("CartPole-v1", settings.num_envs, vectorization_mode="vector_entry_point")
    else:
        environments = gymnasium.make_vec(
            "CartPole-v1",
            settings.num_envs,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP},
        )
    train(environments, settings, seed=seed, resets_on_next_step=native, start=judge.start, after=after)
    return judge.row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=SETTINGS, default="cleanrl")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print_row(train_cartpole(arguments.variant, arguments.seed), distribution="torch")


if __name__ == "__main__":
    main()
