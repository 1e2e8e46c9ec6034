"""How the observations of a batch become features, and what is wrong with each of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from policies import history
from policies.errors import RequestInvalid
from policies.observations import Box
from policies.spaces import Spaces
from serve_app.repair import Repair


class Encoded(NamedTuple):
    """A batch that can be decided: N requests, of which the B rows are those with nothing wrong.

    `rows` are their places among the N, `refusals` says what is wrong with the others. `observations` are those of all N, mended
    where `repairs` says how (None: nothing was mended anywhere).
    """

    obs_BD: np.ndarray
    mask_BA: np.ndarray | None
    rows: Sequence[int]
    refusals: dict[int, RequestInvalid]
    observations: Sequence[Any]
    repairs: dict[int, str]

    def places(self, rows: Sequence[int]) -> Sequence[int]:
        """Return where in the features these rows are, all of which can be decided."""
        if len(rows) == len(self.rows):
            return range(len(rows))
        place = {row: index for index, row in enumerate(self.rows)}
        return [place[row] for row in rows]


def encode(
    spaces: Spaces,
    observations: Sequence[Any],
    masks: Sequence[Any] | None,
    *,
    is_numbers: bool,
    repair: Repair | None,
    states: Sequence[str | None] | None = None,
) -> Encoded:
    """Return the features of a batch. All at once if every observation is a list of numbers that fits, else one by one.

    Those with a state are frames; what is returned of them are whole observations.
    """
    if is_numbers and not spaces.has_mask and masks is None and states is None and isinstance(spaces.observation, Box):
        numbers_BD = spaces.observation.encode_many(observations)
        if numbers_BD is not None:
            return Encoded(numbers_BD.astype(np.float32), None, range(len(observations)), {}, observations, {})
    return _encode_each(spaces, observations, masks, repair, states)


def encode_numbers(spaces: Spaces, numbers: np.ndarray, *, repair: Repair | None) -> Encoded:
    """Return the features of float32 observations [N, *shape]; raises `RequestInvalid` unless the policy takes one such Box."""
    if not isinstance(spaces.observation, Box) or numbers.shape[1:] != spaces.observation.low.shape or spaces.has_mask:
        expected = list(spaces.observation.low.shape) if isinstance(spaces.observation, Box) else "not one array of numbers"
        raise RequestInvalid(f"observations have shape {list(numbers.shape[1:])}, this policy's {expected}")
    obs_ND = numbers.reshape(len(numbers), -1)
    if np.isfinite(obs_ND).all() and (obs_ND >= spaces.low_D).all() and (obs_ND <= spaces.high_D).all():
        return Encoded(obs_ND, None, range(len(obs_ND)), {}, numbers, {})
    each = _encode_each(spaces, numbers.tolist(), None, repair, None)
    with np.errstate(over="ignore"):  # of a `fill` that no float32 is: its row was refused
        return each._replace(observations=np.array(each.observations, np.float32))


def _encode_each(
    spaces: Spaces,
    observations: Sequence[Any],
    masks: Sequence[Any] | None,
    repair: Repair | None,
    states: Sequence[str | None] | None,
) -> Encoded:
    obs, mask_rows, rows = [], [], []
    refusals: dict[int, RequestInvalid] = {}
    repairs: dict[int, str] = {}
    mended = list(observations)
    for index, observation in enumerate(observations):
        state = states[index] if states is not None else None
        try:
            mended[index], mask = spaces.split_mask(observation, masks[index] if masks is not None else None)
            mask_A = spaces.check_mask(mask)
            if repair is not None:
                mended[index], note = repair.mend(mended[index], spaces.observation if state is None else spaces.frame)
                if note is not None:
                    repairs[index] = note
            if state is None:
                obs.append(spaces.check_observation(mended[index]))
            else:
                obs_D = history.with_frame(spaces.check_frame(mended[index]), state, spaces)
                mended[index], note = history.as_observation(obs_D, spaces), None
                if repair is not None:
                    mended[index], note = repair.mend(mended[index], spaces.observation)
                if note is not None:
                    repairs[index] = "; ".join(filter(None, (repairs.get(index), note)))
                    obs_D = spaces.check_observation(mended[index])
                history.require_bounds(obs_D, spaces)
                obs.append(obs_D)
        except RequestInvalid as error:
            refusals[index] = error
            continue
        rows.append(index)
        mask_rows.append(mask_A)
    obs_BD = np.stack(obs) if obs else np.empty((0, spaces.num_features), np.float32)
    mask_BA = np.stack(mask_rows) if spaces.has_mask and rows else None
    return Encoded(obs_BD, mask_BA, rows, refusals, mended, repairs)
