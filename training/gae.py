"""How much better than expected each action was: generalised advantage estimation."""

import numpy as np


def advantages(
    rewards_TB: np.ndarray,
    values_TB: np.ndarray,
    terminateds_TB: np.ndarray,
    truncateds_TB: np.ndarray,
    *,
    gamma: float,
    lambda_: float,
) -> np.ndarray:
    """Return advantages [T, B]; `values_TB` has T + 1 rows, row t + 1 being the value of what followed step t.

    A terminated episode has no future, a truncated one has the value of its final observation; neither takes anything from
    the episode that comes next. Equation 16 of https://arxiv.org/abs/1506.02438, with delta_t of equation 10:

        delta_t = r_t + gamma * (1 - terminated_t) * V_{t+1} - V_t
        A_t     = delta_t + gamma * lambda * (1 - terminated_t) * (1 - truncated_t) * A_{t+1}
    """
    assert len(values_TB) == len(rewards_TB) + 1
    delta_TB = rewards_TB + gamma * np.where(terminateds_TB, 0, values_TB[1:]) - values_TB[:-1]
    decay_TB = gamma * lambda_ * ~(terminateds_TB | truncateds_TB)
    advantage_B = np.zeros(rewards_TB.shape[1:])
    advantages_TB = np.empty(rewards_TB.shape, np.float32)
    for t in reversed(range(len(rewards_TB))):
        advantage_B = delta_TB[t] + decay_TB[t] * advantage_B
        advantages_TB[t] = advantage_B
    return advantages_TB
