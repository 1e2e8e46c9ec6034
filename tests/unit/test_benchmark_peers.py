"""The peers of the training benchmarks are judged by the game that is named, and none is weakened or dropped silently."""

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.peers import cleanrl, environments, judge
from benchmarks.train_cartpole import absent_trainers


def balance(obs_BD: np.ndarray) -> np.ndarray:
    """Push to where the pole falls: a linear policy that holds CartPole for all 500 steps."""
    return (obs_BD @ np.array([0.1, 0.3, 1.0, 0.5]) > 0).astype(np.int64)


def test_the_judge_knows_a_policy_that_holds_the_pole_from_one_that_does_not() -> None:
    assert judge.greedy_return(balance, seed=0) == 500
    assert judge.greedy_return(lambda obs_BD: 1 - balance(obs_BD), seed=0) < 12
    assert 8 < judge.greedy_return(lambda obs_BD: np.zeros(len(obs_BD), np.int64), seed=0) < 11


def test_the_judge_ends_at_the_target_and_at_the_limit_of_steps() -> None:
    verdict = judge.Judge()
    assert not verdict.evaluate(lambda obs_BD: 1 - balance(obs_BD), env_steps=4_000)
    assert verdict.row["time_to_target_s"] is None and verdict.row["evaluation_return_mean"] < 12
    assert verdict.evaluate(balance, env_steps=8_000)
    assert verdict.row["time_to_target_s"] > 0 and verdict.row["env_steps"] == 8_000
    assert verdict.evaluate(lambda obs_BD: 1 - balance(obs_BD), env_steps=judge.MAX_ENV_STEPS)
    assert verdict.row["time_to_target_s"] is None


def rollout_of_four_steps() -> tuple[cleanrl.Agent, cleanrl.Rollout, cleanrl.Settings]:
    settings = cleanrl.Settings(num_envs=1, num_steps=4, gamma=0.5, gae_lambda=0.5)
    agent, rollout = cleanrl.Agent(2, 2), cleanrl.Rollout(settings, 2)
    agent.critic = torch.nn.Linear(2, 1)
    torch.nn.init.zeros_(agent.critic.weight)
    torch.nn.init.constant_(agent.critic.bias, 8.0)  # the value of what follows the rollout
    rollout.rewards_TB[:, 0] = torch.tensor([1.0, 1.0, 0.0, 1.0])
    rollout.values_TB[:, 0] = torch.tensor([2.0, 4.0, 6.0, 8.0])
    return agent, rollout, settings


def test_advantages_stop_at_the_end_of_an_episode() -> None:
    agent, rollout, settings = rollout_of_four_steps()
    rollout.dones_TB[2] = 1  # step 1 ended the episode
    cleanrl._estimate_advantages(agent, rollout, torch.zeros(1, 2), torch.zeros(1), settings)
    # t=3: 1 + .5*8 - 8 = -3 · t=2: 0 + .5*8 - 6 + .25*(-3) = -2.75 · t=1, the last of its episode: 1 - 4 = -3
    # t=0: 1 + .5*4 - 2 + .25*(-3) = .25
    assert rollout.advantages_TB[:, 0].tolist() == [0.25, -3.0, -2.75, -3.0]


def test_without_the_end_the_next_episode_would_leak_in() -> None:
    agent, rollout, settings = rollout_of_four_steps()
    cleanrl._estimate_advantages(agent, rollout, torch.zeros(1, 2), torch.zeros(1), settings)
    assert rollout.advantages_TB[1, 0].item() == 1 + 0.5 * 6 - 4 + 0.25 * -2.75


class CountingEnvironments:
    """Two environments whose episodes last three steps and which reset in the step after; observations count the steps."""

    single_observation_space = type("Space", (), {"shape": (1,)})()
    single_action_space = type("Space", (), {"n": 2})()

    def reset(self, seed: int) -> tuple[np.ndarray, dict[str, object]]:
        self.step_B = np.zeros(2, int)
        return self.step_B[:, None].astype(np.float32), {}

    def step(self, actions_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, object]]:
        self.step_B = np.where(self.step_B == 3, 0, self.step_B + 1)
        reward_B = (self.step_B > 0).astype(np.float32)
        return self.step_B[:, None].astype(np.float32), reward_B, self.step_B == 3, np.zeros(2, bool), {}


@pytest.mark.parametrize(("resets_on_next_step", "steps"), [(True, 6 * 2), (False, 8 * 2)])
def test_a_reset_is_neither_counted_nor_learned_from(monkeypatch, resets_on_next_step: bool, steps: int) -> None:
    learned: list[np.ndarray] = []
    monkeypatch.setattr(cleanrl, "_update", lambda agent, optimizer, rollout, valid_N, *_: learned.append(valid_N))
    settings = cleanrl.Settings(num_envs=2, num_steps=8, total_timesteps=16)
    counted: list[int] = []
    cleanrl.train(
        CountingEnvironments(),
        settings,
        seed=0,
        resets_on_next_step=resets_on_next_step,
        start=lambda: None,
        after=lambda agent, env_steps: counted.append(env_steps) is not None,
    )
    assert counted == [steps] and [len(valid_N) for valid_N in learned] == [steps]


def test_cleanrl_runs_with_the_defaults_that_cleanrl_publishes() -> None:
    published = {
        "num_envs": 4,
        "num_steps": 128,
        "learning_rate": 2.5e-4,
        "num_minibatches": 4,
        "update_epochs": 4,
        "ent_coef": 0.01,
    }
    settings = dataclasses.asdict(cleanrl.SETTINGS["cleanrl"])
    assert {name: settings[name] for name in published} == published


def test_an_environment_that_cannot_be_made_is_absent_with_its_reason(monkeypatch, tmp_path: Path) -> None:
    def fail(environment: environments.Environment, target: Path, python: Path) -> None:
        environments._run([sys.executable, "-c", "raise SystemExit('no wheel for this machine')"], dict(os.environ))

    monkeypatch.setattr(environments, "DIRECTORY", tmp_path)
    monkeypatch.setattr(environments, "_install", fail)
    absent = absent_trainers(["trimtab", "cleanrl", "pufferlib"])
    assert list(absent) == ["pufferlib"]
    assert "no wheel for this machine" in absent["pufferlib"] and sys.executable in absent["pufferlib"]


def test_an_installed_environment_is_used_again_until_its_requirements_change(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environments, "DIRECTORY", tmp_path)
    monkeypatch.setitem(environments.ENVIRONMENTS, "envpool", environments.Environment(()))
    installations: list[Path] = []
    monkeypatch.setattr(
        environments, "_install", lambda environment, target, python: (target.mkdir(), installations.append(python))
    )
    first = environments.ready_python("envpool")
    assert environments.ready_python("envpool") == first == tmp_path / "envpool" / "bin" / "python"
    assert len(installations) == 1
    monkeypatch.setitem(environments.ENVIRONMENTS, "envpool", environments.Environment(("six",)))
    environments.ready_python("envpool")
    assert len(installations) == 2
