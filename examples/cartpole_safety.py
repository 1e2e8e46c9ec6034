"""What CartPole must not do: run off its track."""

import numpy as np

TRACK_END = 2.4  # metres; the environment ends the episode there
MARGIN = 0.3
RIGHT = 1


def stays_on_track(obs_D: np.ndarray, action: int) -> bool:
    """Accept every push except one that accelerates the cart outwards when it is near the end and already moving outwards."""
    position, velocity = float(obs_D[0]), float(obs_D[1])
    is_near_end = abs(position) > TRACK_END - MARGIN
    moves_outwards = position * velocity > 0
    pushes_outwards = (action == RIGHT) == (position > 0)
    return not (is_near_end and moves_outwards and pushes_outwards)
