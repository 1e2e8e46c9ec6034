"""When a version that gives bad answers is not asked any more, and when it is tried again."""

from collections import deque

WINDOW = 10  # of the last answers of a version …
MAX_BAD = 5  # … this many bad ones open the breaker, so one that only fails is out after five
FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 60.0


class Breaker:
    """One version's breaker in one replica; no other process is asked. `now_s` is any clock that does not go back.

    Open, it lets nobody through until its pause is over, and then one batch: a good one closes it, a bad one doubles the pause.
    """

    def __init__(self) -> None:
        self._last: deque[bool] = deque(maxlen=WINDOW)
        self._open_until_s: float | None = None
        self._pause_s = FIRST_PAUSE_S
        self.num_opened = 0
        self.reason = ""

    def allows(self, now_s: float) -> bool:
        """Return whether the version may be asked now."""
        return self._open_until_s is None or now_s >= self._open_until_s

    @property
    def is_open(self) -> bool:
        return self._open_until_s is not None

    def note(self, num_good: int, num_bad: int, now_s: float, reason: str) -> None:
        """Take in a batch's answers; which of them were the bad ones, nobody knows, so the bad ones count last."""
        if self._open_until_s is None:
            if num_bad == 0 and not any(self._last):
                return  # nearly always
            self._last.extend([False] * min(num_good, WINDOW) + [True] * min(num_bad, WINDOW))
            if sum(self._last) >= MAX_BAD:
                self._open(now_s, reason)
        elif num_bad > num_good:
            self._pause_s = min(2 * self._pause_s, LAST_PAUSE_S)
            self._open(now_s, reason)
        else:
            self._open_until_s, self._pause_s = None, FIRST_PAUSE_S
            self._last.clear()

    def _open(self, now_s: float, reason: str) -> None:
        self._open_until_s, self.reason = now_s + self._pause_s, reason
        self.num_opened += 1
        self._last.clear()
