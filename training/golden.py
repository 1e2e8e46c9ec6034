"""Which observations golden vectors are made of: some that the policy really meets, and the corners of their space."""

import numpy as np

from policies.bundle import Golden
from policies.errors import IntegrityError
from policies.spaces import Spaces

NUM_GOLDEN = 256
NUM_CORNERS = 3
OBSERVATIONS, DISTRIBUTIONS = "golden.observations", "golden.distributions"


def golden_inputs(
    spaces: Spaces, obs_ND: np.ndarray, masks_NA: np.ndarray | None, *, seed: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Draw from the observations (and action masks) of episodes; the last `NUM_CORNERS` rows are zeros and far out."""
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(obs_ND), min(NUM_GOLDEN, len(obs_ND)), replace=False)
    far_D = 10 * np.abs(obs_ND).max(axis=0) + 1
    low_D = np.where(np.isfinite(spaces.low_D), spaces.low_D, -far_D)
    high_D = np.where(np.isfinite(spaces.high_D), spaces.high_D, far_D)
    corners_CD = np.stack([np.zeros_like(low_D), low_D, high_D])
    inputs_ND = np.concatenate([obs_ND[drawn], corners_CD]).astype(np.float32)
    if masks_NA is None:
        return inputs_ND, None
    return inputs_ND, np.concatenate([masks_NA[drawn], np.ones((NUM_CORNERS, spaces.mask_size), bool)])


def to_tensors(golden: Golden) -> dict[str, np.ndarray]:
    """Return golden vectors as tensors of a checkpoint."""
    return {OBSERVATIONS: golden.observations_ND, DISTRIBUTIONS: golden.distributions_NP}


def from_tensors(tensors: dict[str, np.ndarray]) -> Golden:
    """Read what `to_tensors` returned."""
    try:
        return Golden(tensors[OBSERVATIONS], tensors[DISTRIBUTIONS])
    except KeyError as error:
        raise IntegrityError(f"checkpoint has no tensor {error}") from error
