"""Which observations golden vectors are made of: some that the policy really meets, and edge cases.

N row, D feature, A choices of an action mask, K components of an action, S row with a single choice, C corner.
"""

import numpy as np

from policies.errors import IntegrityError
from policies.golden import NUM_GOLDEN, Golden
from policies.spaces import Choices, Spaces

NUM_CORNERS = 5
MAX_SINGLE_CHOICES = 64
OBSERVATIONS, DISTRIBUTIONS = "golden.observations", "golden.distributions"


def golden_inputs(
    spaces: Spaces, obs_ND: np.ndarray, masks_NA: np.ndarray | None, *, seed: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Draw `NUM_GOLDEN` rows from the observations (and action masks) of episodes, and add edge cases.

    Of fewer observations each is there several times. With masks there follow rows whose mask leaves a single choice. The last
    `NUM_CORNERS` rows are zeros and corners of the space, far out where it is open.
    """
    rng = np.random.default_rng(seed)
    drawn = np.resize(rng.permutation(len(obs_ND)), NUM_GOLDEN)
    corners_CD = _corners(spaces, obs_ND)
    if masks_NA is None:
        return np.concatenate([obs_ND[drawn], corners_CD]).astype(np.float32), None
    single_SA = _single_choices(spaces)
    inputs_ND = np.concatenate([obs_ND[drawn], obs_ND[drawn[: len(single_SA)]], corners_CD])
    return inputs_ND.astype(np.float32), np.concatenate(
        [masks_NA[drawn], single_SA, np.ones((NUM_CORNERS, spaces.mask_size), bool)]
    )


def _corners(spaces: Spaces, obs_ND: np.ndarray) -> np.ndarray:
    """Return zeros, the lowest and the highest corner, and the two in which low and high take turns."""
    far_D = 10 * np.abs(obs_ND).max(axis=0) + 1
    low_D = np.where(np.isfinite(spaces.low_D), spaces.low_D, -far_D)
    high_D = np.where(np.isfinite(spaces.high_D), spaces.high_D, far_D)
    is_even_D = np.arange(spaces.num_features) % 2 == 0
    turns = (np.where(is_even_D, low_D, high_D), np.where(is_even_D, high_D, low_D))
    return np.stack([np.zeros_like(low_D), low_D, high_D, *turns])


def _single_choices(spaces: Spaces) -> np.ndarray:
    """Return masks that allow one choice per component: every choice is the only one in some row, up to a limit."""
    assert isinstance(spaces.action, Choices)  # real numbers cannot be masked
    nvec, num_rows = np.array(spaces.action.nvec), min(max(spaces.action.nvec), MAX_SINGLE_CHOICES)
    starts_K = np.cumsum(nvec) - nvec
    single_SA = np.zeros((num_rows, spaces.mask_size), bool)
    row_S1 = np.arange(num_rows)[:, None]
    single_SA[row_S1, starts_K + row_S1 % nvec] = True
    return single_SA


def to_tensors(golden: Golden) -> dict[str, np.ndarray]:
    """Return golden vectors as tensors of a checkpoint."""
    return {OBSERVATIONS: golden.observations_ND, DISTRIBUTIONS: golden.distributions_NP}


def from_tensors(tensors: dict[str, np.ndarray]) -> Golden:
    """Read what `to_tensors` returned."""
    try:
        return Golden(tensors[OBSERVATIONS], tensors[DISTRIBUTIONS])
    except KeyError as error:
        raise IntegrityError(f"checkpoint has no tensor {error}") from error
