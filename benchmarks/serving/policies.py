"""Which policies the serving benchmarks serve, what they are asked, and what they must answer.

N observations, D features, A actions.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from policies.distributions import Mode
from policies.policy import Policy
from policies.storage import Storage
from tests.serving_helpers import NAME, publish, random_policy

SEED = 1
MIN_MARGIN = 1e-3  # between the two most likely actions: below, float32 in another order of sums may prefer the other one


@dataclass(frozen=True)
class Size:
    """The sizes of a network: features, hidden layers, actions."""

    num_features: int
    num_actions: int
    hidden: tuple[int, ...]


SIZES = {"small": Size(4, 2, (64, 64)), "large": Size(128, 18, (512, 512))}


def policy_of(size: str, *, seed: int = SEED) -> Policy:
    """Return the policy of that size; two seeds are two policies."""
    sizes = SIZES[size]
    return random_policy(seed, num_features=sizes.num_features, num_actions=sizes.num_actions, hidden=sizes.hidden)


def publish_policy(storage: Storage, size: str, *, mode: Mode = "sample", seed: int = SEED) -> int:
    """Register it as `NAME` and return its version."""
    return publish(storage, policy_of(size, seed=seed), mode=mode)


def draw_observations(size: str, num: int, *, seed: int = 0) -> np.ndarray:
    """Return observations float32 [N, D] within the policy's bounds."""
    return np.random.default_rng(seed).normal(size=(num, SIZES[size].num_features)).clip(-4, 4).astype(np.float32)


def clear_observations(policy: Policy, obs_ND: np.ndarray, num: int) -> np.ndarray:
    """Return the first `num` observations whose greedy action every honest runtime agrees on."""
    two_best_N2 = np.sort(policy.distributions(obs_ND), axis=1)[:, -2:]
    clear_ND = obs_ND[two_best_N2[:, 1] - two_best_N2[:, 0] > MIN_MARGIN]
    assert len(clear_ND) >= num, f"{len(clear_ND)} of {len(obs_ND)} observations are clear, {num} are needed; draw more"
    return clear_ND[:num]


def as_json(obs_D: np.ndarray) -> list[float]:
    """Return an observation with as many digits as float32 has, as a client would send it."""
    return [float(str(value)) for value in obs_D]


def export_onnx(size: str, directory: Path) -> Path:
    """Write the policy as ONNX into `directory` and return the file that the peers read."""
    from policies.exports import ARTIFACTS, write_export
    from policies.registry import Registry
    from policies.storage import open_storage

    storage = open_storage(str(directory / f"storage-{size}"))
    version = publish_policy(storage, size, mode="greedy")
    bundle = Registry(storage.registry(NAME)).bundle(version)
    return write_export(bundle, "onnx", directory / f"export-{size}").path / ARTIFACTS["onnx"]
