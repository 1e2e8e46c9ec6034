"""The quick half of `make bench-learning`: one seed of the tasks that take seconds reaches what is asked of all of them."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import ray

from benchmarks.learning import TASKS, Task, interquartile_mean, summary, train_once

pytestmark = pytest.mark.ray
ASKED = {"cartpole": 475, "pendulum": -200}  # of a single seed; the benchmark asks for more, of a mean over seeds


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def after(task: Task, env_steps: int) -> Task:
    return dataclasses.replace(task, training={**task.training, "max_env_steps": env_steps})


@pytest.mark.parametrize("name", ASKED)
def test_a_task_is_learned(name: str):
    row = train_once(TASKS[name], seed=0)
    assert row["score"] >= ASKED[name]
    assert row["env_steps"] >= TASKS[name].training["max_env_steps"]


@pytest.mark.parametrize("name", ASKED)
def test_what_has_hardly_learned_does_not_pass(name: str):
    assert train_once(after(TASKS[name], 1), seed=0)["score"] < ASKED[name]


def test_the_interquartile_mean_leaves_out_the_best_and_the_worst_quarter():
    assert interquartile_mean(np.array([100.0, 3, 1, 2, -50, 4, 2, 4])) == np.mean([2, 2, 3, 4])
    rows = [{"score": score, "seed": seed} for seed, score in enumerate([1.0, 2, 3, 4, 100])]
    result = summary(TASKS["pendulum"], rows)
    assert result["interquartile_mean"] == 3 and result["low"] <= 3 <= result["high"] and result["is_reached"]
