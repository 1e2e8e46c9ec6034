"""How an observation that does not fit is mended before anybody sees it, if the loop file declares it."""

from typing import Any, Literal

from policies.observations import Box, Observation

Way = Literal["clip", "missing"]


class Repair:
    """Mends observations of one Box: `clip` cuts numbers at their bounds, `missing` puts `fill` where a number is null.

    A tensor has no null: NaN stands for it there, and nowhere else, for JSON has no NaN.

    Whatever else is wrong with an observation stays wrong: text in the place of a number is no measurement.
    """

    def __init__(self, ways: tuple[Way, ...], fill: float) -> None:
        self._clips = "clip" in ways
        self._fill = fill if "missing" in ways else None

    def mend(self, observation: Any, space: Observation) -> tuple[Any, str | None]:
        """Return the observation and what was mended; itself and None when nothing was."""
        if not isinstance(space, Box):
            return observation, None
        bounds = space.low.tolist(), space.high.tolist()
        notes: list[str] = []
        mended = self._mend(observation, *bounds, "observation", notes)
        return (mended, "; ".join(notes)) if notes else (observation, None)

    def _mend(self, value: Any, low: Any, high: Any, path: str, notes: list[str]) -> Any:
        if isinstance(value, list) and isinstance(low, list) and len(value) == len(low):
            return [self._mend(v, lo, hi, f"{path}[{i}]", notes) for i, (v, lo, hi) in enumerate(zip(value, low, high))]
        if isinstance(low, list):
            return value
        is_missing = value is None or value != value
        if is_missing and self._fill is not None:
            notes.append(f"{path} was missing, {self._fill:g} is taken")
            return self._fill
        if self._clips and not is_missing and type(value) in (int, float) and not low <= value <= high:
            bound = low if value < low else high
            notes.append(f"{path} = {value!s:.24} was cut to {bound:g}")
            return bound
        return value
