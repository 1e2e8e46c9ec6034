"""How much better than expected each action was: generalised advantage estimation, corrected for what is out of date."""

import numpy as np


def advantages(
    rewards_TB: np.ndarray,
    values_TB: np.ndarray,
    next_values_TB: np.ndarray,
    terminateds_TB: np.ndarray,
    truncateds_TB: np.ndarray,
    *,
    gamma: float,
    lambda_: float,
) -> np.ndarray:
    """Return advantages [T, B]; `next_values_TB` are the values of what followed each step, also of a final observation.

    A terminated episode has no future, a truncated one has the value of its final observation; neither takes anything from
    the episode that comes next. Equation 16 of https://arxiv.org/abs/1506.02438, with delta_t of equation 10:

        delta_t = r_t + gamma * (1 - terminated_t) * V_{t+1} - V_t
        A_t     = delta_t + gamma * lambda * (1 - terminated_t) * (1 - truncated_t) * A_{t+1}
    """
    delta_TB = rewards_TB + gamma * np.where(terminateds_TB, 0, next_values_TB) - values_TB
    return _discounted(delta_TB, gamma * lambda_ * ~(terminateds_TB | truncateds_TB))


def vtrace(
    ratios_TB: np.ndarray,
    rewards_TB: np.ndarray,
    values_TB: np.ndarray,
    next_values_TB: np.ndarray,
    terminateds_TB: np.ndarray,
    truncateds_TB: np.ndarray,
    *,
    gamma: float,
    lambda_: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return advantages and value targets [T, B] when the policy has moved on since the actions were drawn.

    `ratios_TB` are the probabilities of the actions now, divided by those with which they were drawn. V-trace, equation 1 and
    remark 2 of https://arxiv.org/abs/1802.01561 with both clips at 1:

        rho_t = min(1, ratio_t)          c_t = lambda * min(1, ratio_t)
        v_t - V_t = rho_t * delta_t + gamma * c_t * (v_{t+1} - V_{t+1})

    The advantage of an action is what it earned beyond the value, with V-trace's correction of everything after it; its own
    ratio is left to the loss:

        A_t = delta_t + gamma * lambda * (v_{t+1} - V_{t+1})

    With all ratios 1 these are the advantages of `advantages`, and the targets V_t + A_t.
    """
    rho_TB = np.minimum(1, ratios_TB)
    delta_TB = rewards_TB + gamma * np.where(terminateds_TB, 0, next_values_TB) - values_TB
    decay_TB = gamma * lambda_ * ~(terminateds_TB | truncateds_TB)
    corrections_TB = _discounted(rho_TB * delta_TB, decay_TB * rho_TB)  # v_t - V_t
    following_TB = np.concatenate([corrections_TB[1:], np.zeros_like(corrections_TB[:1])])
    return (delta_TB + decay_TB * following_TB).astype(np.float32), values_TB + corrections_TB


def _discounted(terms_TB: np.ndarray, decay_TB: np.ndarray) -> np.ndarray:
    """Return x with x_t = terms_t + decay_t * x_{t+1} and nothing behind the last row."""
    sum_B = np.zeros(terms_TB.shape[1:])
    sums_TB = np.empty(terms_TB.shape, np.float32)
    for t in reversed(range(len(terms_TB))):
        sum_B = terms_TB[t] + decay_TB[t] * sum_B
        sums_TB[t] = sum_B
    return sums_TB
