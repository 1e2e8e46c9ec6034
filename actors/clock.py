"""Where a run's time goes: the phases of an update."""

import time

from training.phases import PHASES


class Clock:
    """Measures the phases of an update and the time since the first environment step, earlier sessions included."""

    def __init__(self, earlier_s: float) -> None:
        self._began_s = self._lap_began_s = time.monotonic()
        self._earlier_s = earlier_s
        self.evaluated_s = earlier_s  # when the last evaluation ended
        self._laps = dict.fromkeys(PHASES, 0.0)
        self._taken = dict.fromkeys(PHASES, 0.0)

    @property
    def session_s(self) -> float:
        return time.monotonic() - self._began_s

    @property
    def elapsed_s(self) -> float:
        return self._earlier_s + self.session_s

    @property
    def totals(self) -> dict[str, float]:
        """Everything booked so far."""
        return {phase: self._taken[phase] + self._laps[phase] for phase in PHASES}

    def lap(self, phase: str) -> None:
        """Book the time since the last lap to a phase."""
        now_s = time.monotonic()
        self._laps[phase] += now_s - self._lap_began_s
        self._lap_began_s = now_s
        if phase == "evaluate_s":
            self.evaluated_s = self.elapsed_s

    def computed(self, **seconds: float) -> None:
        """Book what other processes say they computed."""
        for phase, value in seconds.items():
            self._laps[phase] += value

    def take_laps(self) -> dict[str, float]:
        """Return what was booked since the last call."""
        self._taken, laps = self.totals, self._laps
        self._laps = dict.fromkeys(PHASES, 0.0)
        return laps
