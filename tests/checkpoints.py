"""Small real runs and checkpoints for tests that need one but are not about how it was trained."""

from pathlib import Path
from typing import Any

import numpy as np

from policies.network import Architecture
from training.checkpoint import save_checkpoint
from training.config import EnvironmentConfig, TrainingConfig
from training.environment import read_spaces
from training.learner_state import LearnerState
from training.network import NORMALISER, Layout
from training.runs import RunConfig

CONFIG = RunConfig(EnvironmentConfig(id="CartPole-v1"), TrainingConfig(seed=5))
LAYOUT = Layout(read_spaces(CONFIG.environment), Architecture((8,)))


def generation(update: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the tensors and the state of a learner whose parameters depend on the update."""
    state = LearnerState.initial(LAYOUT, update)
    state.update = update
    layout = {"spaces": LAYOUT.spaces.to_json(), "network": LAYOUT.architecture.to_json(), "vf_share_layers": False}
    metadata = {**state.counters(), **layout}
    return state.to_tensors(LAYOUT), metadata


def save_generation(run_dir: Path, update: int, *, keep: int = 3) -> Path:
    """Commit what `generation` returns; its best weights are its own."""
    tensors, state = generation(update)
    best = {name: tensors[name] for name in (*LAYOUT.shapes, *NORMALISER)}
    return save_checkpoint(run_dir, update=update, tensors=tensors, best=best, state=state, keep=keep)
