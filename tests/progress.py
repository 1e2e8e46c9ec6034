"""Updates of a training run as the controller reports them, for tests of what shows and keeps them."""

from dataclasses import asdict, replace
from typing import Any

from actors.controller import Progress
from training.learner_state import UpdateReport

LOSSES = UpdateReport(
    num_env_steps=1_000,
    policy_loss=-0.0123,
    value_loss=4.56,
    entropy=0.67,
    kl=0.0089,
    clip_fraction=0.101,
    grad_norm=1.2,
    explained_variance=0.34,
    num_epochs=8,
    lr=0.003,
    lag_mean=0.5,
    lag_max=2,
)
# A second per update: 0.3 s of it waiting for fragments that took 0.25 s, 0.5 s learning with 0.45 s in the learner.
FIRST = Progress(
    run_id="run-1",
    update=1,
    env_steps=1_000,
    env_steps_per_s=1_000.0,
    elapsed_s=1.0,
    num_episodes=10,
    return_mean=21.0,
    return_low=19.5,
    return_high=22.5,
    evaluation_return_mean=None,
    best_return_mean=None,
    losses=LOSSES,
    worker_restarts=0,
    environment_failures=0,
    learner_restarts=0,
    collect_s=0.3,
    learn_s=0.5,
    evaluate_s=0.15,
    checkpoint_s=0.05,
    worker_s=0.25,
    learner_s=0.45,
)


def progress(update: int, **changes: Any) -> Progress:
    """Return a run's update: a thousand steps and a second per update, the training return 20 above their number."""
    counted = {"update": update, "env_steps": 1_000 * update, "elapsed_s": float(update), "return_mean": 20.0 + update}
    return replace(FIRST, **{**counted, **changes})


def row(update: int, **changes: Any) -> dict[str, Any]:
    """Return the same as the metrics log is given it."""
    return asdict(progress(update, **changes))
