"""What a policy with memory saw before, as a token that its caller keeps between decisions.

Such a policy looks at the last k observations, its *frames*, oldest first. A caller who sends one frame at a time also sends the
`state` of the answer before: a version byte and the last k-1 frames as little-endian float32 in C order, as base64url without
padding. Nobody else keeps anything, so any replica can go on with an episode. The token is no secret and not signed: who may
send frames may send any others as well.

F numbers of a frame, D = k * F features.
"""

import base64
import binascii
from typing import Any

import numpy as np

from policies.errors import RequestInvalid
from policies.spaces import Spaces

BEGINNING = ""  # the state before an episode's first frame, which then stands in for those before it
VERSION = 1
REMEDY = 'send the `state` of the answer before as it came, or "" to begin an episode'


def require_history(spaces: Spaces) -> None:
    """Raise `RequestInvalid` (400) for a policy that looks at one observation, for which a request has a state nevertheless."""
    if spaces.history == 1:
        raise RequestInvalid("state is given, but this policy has no history: it looks at one observation; leave state away", 400)


def with_frame(frame_F: np.ndarray, state: str, spaces: Spaces) -> np.ndarray:
    """Return the features [D] of a checked frame after what a state holds; raises `RequestInvalid` (400) for no such state.

    The state's frames are finite. Whether they are within bounds, `require_bounds` says, after repairs: a version may have
    narrower ones than that which the state is from.
    """
    if state == BEGINNING:
        return np.tile(frame_F, spaces.history)
    return np.concatenate([_frames_of(state, spaces), frame_F])


def require_bounds(obs_D: np.ndarray, spaces: Spaces) -> None:
    """Raise `RequestInvalid` (400) unless a state's frames, in front of a checked one, are within the policy's bounds."""
    is_fit_D = (obs_D >= spaces.low_D) & (obs_D <= spaces.high_D)
    if not is_fit_D.all():
        place = int(np.argmin(is_fit_D))
        raise _invalid(f"holds {obs_D[place]:g}, outside [{spaces.low_D[place]:g}, {spaces.high_D[place]:g}]")


def as_observation(obs_D: np.ndarray, spaces: Spaces) -> list[Any]:
    """Return features as the observation that a request may hold: k frames in nested lists."""
    return obs_D.reshape(spaces.history, *spaces.frame.low.shape).tolist()


def state_after(observation: list[Any]) -> str:
    """Return the state for the next frame, after a whole observation of k frames in nested lists."""
    return _encoded(np.array(observation[1:], np.float64).astype("<f4"))


def _encoded(frames: np.ndarray) -> str:
    return base64.urlsafe_b64encode(bytes([VERSION]) + frames.tobytes()).decode().rstrip("=")


def _frames_of(state: str, spaces: Spaces) -> np.ndarray:
    """Return the k-1 frames of a state, one after the other."""
    num_features = spaces.frame.num_features
    num_bytes = 1 + 4 * (spaces.num_features - num_features)
    length = -(-4 * num_bytes // 3)
    if not isinstance(state, str):
        raise _invalid(f"is {type(state).__name__}, not text")
    if len(state) != length:
        raise _invalid(f"has {len(state)} characters, this policy's have {length}")
    try:
        data = base64.urlsafe_b64decode(state.encode("ascii") + b"=" * (-length % 4))
    except (binascii.Error, UnicodeEncodeError):
        data = b""
    frames = np.frombuffer(data[1:], "<f4") if len(data) == num_bytes else np.empty(0, "<f4")
    if len(data) == num_bytes and data[0] != VERSION:
        raise _invalid(f"is of version {data[0]}, this Trimtab writes and reads {VERSION}")
    if _encoded(frames) != state:  # the decoder passes over characters that are none of base64url's
        raise _invalid("is not base64url")
    if not np.isfinite(frames).all():
        raise _invalid("holds a number that is not finite")
    return frames.astype(np.float32)


def _invalid(problem: str) -> RequestInvalid:
    return RequestInvalid(f"state {problem}; {REMEDY}", 400)
