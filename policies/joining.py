"""Which reward belongs to which decision, and which decisions make one outcome."""

import heapq
import itertools
from collections import deque
from dataclasses import dataclass

from policies.records import Decision, Feedback

SETTLE_S = 2.0  # after a final feedback: others of the same episode may come through another replica's file
WAIT_S = 10.0  # feedback without a decision: decisions are written before they are answered, so none is later than a flush
MAX_PENDING = 500_000  # decisions without feedback, about 300 bytes each: 150 MB
MIN_REMEMBERED = 250_000  # ids of joined decisions, about 150 bytes each, up to twice as many: 75 MB
MAX_OPEN_EPISODES = 100_000
MAX_QUEUED_EPISODES = 500_000  # episodes that are over and wait for an older one of the same arm


@dataclass(frozen=True)
class Outcome:
    """The sum of an episode's rewards. It is mixed, and says nothing of a version, when more than one answered.

    `time_s` is when it was over: it says where the outcome stands in a time series, not in which order outcomes come.
    """

    release: int
    version: int
    value: float
    time_s: float
    is_mixed: bool


class _Episode:
    __slots__ = (
        "episode_id",
        "final_s",
        "first_s",
        "has_reward",
        "is_closed",
        "is_mixed",
        "last_s",
        "release",
        "reward",
        "version",
    )

    def __init__(self, decision: Decision, version: int) -> None:
        self.episode_id = decision.episode_id
        self.release = decision.release
        self.version = version
        self.is_mixed = False
        self.is_closed = False
        self.has_reward = False
        self.reward = 0.0
        self.first_s = self.last_s = decision.time_s
        self.final_s = 0.0

    def add(self, decision: Decision, version: int) -> None:
        """Take in one more decision; the first in time, not the first that was read, says whose episode it is."""
        if decision.fallback is not None or version != self.version:
            self.is_mixed = True
        if decision.time_s < self.first_s:
            self.first_s, self.release, self.version = decision.time_s, decision.release, version
        self.last_s = max(self.last_s, decision.time_s)


class Joiner:
    """Joins feedback to decisions in whatever order the two logs are read, in bounded memory.

    A decision belongs to the release and version of its episode's first decision; one without an episode is an episode of
    its own. All times are those of the records, so a log is joined the same way live and years later. What is not
    joined is counted: `late` came after the reward window or after its episode was closed, `duplicate` is a second feedback
    of one decision, `unknown` names no decision we saw, `abandoned` episodes got no final feedback, `evicted` decisions or
    episodes were too many to remember.

    Outcomes leave in the order in which their episodes *began*, per release and version: one that is over waits for those
    that began before it. In the order of ending, short episodes would come first, and whoever looks early would compare
    arms by their short episodes alone. An abandoned episode is over when its reward window is; it is worth what it had
    earned, and nothing at all if it never got a reward: no feedback is no evidence.
    """

    def __init__(self, reward_window_s: float) -> None:
        self._window_s = reward_window_s
        self._pending: dict[str, tuple[float, _Episode]] = {}
        self._open: dict[str, _Episode] = {}  # least recently active first
        self._closing: list[tuple[float, int, _Episode]] = []  # a heap by time: two files are read one after the other
        self._serial = itertools.count()
        self._waiting: dict[str, Feedback] = {}
        self._joined = _RecentIds(reward_window_s)
        self._expired = _RecentIds(reward_window_s)
        self._cut = _RecentIds(reward_window_s)  # episodes we forgot while they may go on: their sum would lack its first part
        self._queues: dict[tuple[int, int], deque[_Episode]] = {}  # per release and version, in the order of beginning
        self._num_queued = 0
        self.counts = dict.fromkeys(("joined", "duplicate", "unknown", "late", "duplicate_decisions", "abandoned", "evicted"), 0)

    @property
    def num_waiting(self) -> int:
        """Feedback whose decision was not read yet."""
        return len(self._waiting)

    def decision(self, decision: Decision, version: int) -> bool:
        """Take in a decision that `version` should have answered; False for one that was logged before (a repeated request)."""
        decision_id = decision.decision_id
        if decision_id in self._pending or decision_id in self._joined or decision_id in self._expired:
            self.counts["duplicate_decisions"] += 1
            return False
        episode = self._episode(decision, version)
        episode.add(decision, version)
        self._pending[decision_id] = (decision.time_s, episode)
        if len(self._pending) > MAX_PENDING:
            self._expire_first()
            self.counts["evicted"] += 1
        waiting = self._waiting.pop(decision_id, None)
        if waiting is not None:
            self.feedback(waiting)
        return True

    def feedback(self, feedback: Feedback) -> None:
        """Take in a feedback: join it, or keep it until its decision was read."""
        decision_id = feedback.decision_id
        entry = self._pending.pop(decision_id, None)
        if entry is not None:
            self._join(feedback, *entry)
        elif decision_id in self._joined or decision_id in self._waiting:
            self.counts["duplicate"] += 1
        elif decision_id in self._expired:
            self.counts["late"] += 1
        else:
            self._waiting[decision_id] = feedback
            if len(self._waiting) > MAX_PENDING:
                _pop_first(self._waiting)
                self.counts["unknown"] += 1

    def settle(self, until_s: float) -> list[Outcome]:
        """Return the outcomes that are complete, given that all records of before `until_s` were taken in."""
        while self._closing and self._closing[0][0] + SETTLE_S <= until_s:
            self._close(heapq.heappop(self._closing)[2])
        while self._waiting and next(iter(self._waiting.values())).time_s + WAIT_S < until_s:
            _pop_first(self._waiting)
            self.counts["unknown"] += 1
        while self._pending and next(iter(self._pending.values()))[0] + self._window_s < until_s:
            self._expire_first()
        while self._open and next(iter(self._open.values())).last_s + self._window_s + SETTLE_S < until_s:
            self._abandon_first()
            self.counts["abandoned"] += 1
        for recent in (self._joined, self._expired, self._cut):
            recent.forget(until_s)
        return self._take_outcomes()

    def _episode(self, decision: Decision, version: int) -> _Episode:
        if decision.episode_id is None:
            return self._begin(decision, version)
        episode = self._open.pop(decision.episode_id, None)
        if episode is None:
            episode = self._begin(decision, version)
            episode.is_mixed = decision.episode_id in self._cut
        self._open[decision.episode_id] = episode
        if len(self._open) > MAX_OPEN_EPISODES:
            self._abandon_first()
            self.counts["evicted"] += 1
        return episode

    def _begin(self, decision: Decision, version: int) -> _Episode:
        episode = _Episode(decision, version)
        self._queues.setdefault((decision.release, version), deque()).append(episode)
        self._num_queued += 1
        return episode

    def _expire_first(self) -> None:
        """Give up waiting for the oldest decision's feedback; that ends its episode if it was one of its own."""
        decision_id = next(iter(self._pending))
        _, episode = self._pending.pop(decision_id)
        self._expired.add(decision_id)
        if episode.episode_id is None:
            episode.is_closed = True

    def _abandon_first(self) -> None:
        """End the episode that was silent for longest."""
        episode_id = next(iter(self._open))
        episode = self._open.pop(episode_id)
        self._cut.add(episode_id)
        episode.is_closed, episode.final_s = True, episode.last_s

    def _take_outcomes(self) -> list[Outcome]:
        """Return the outcomes of closed episodes, as far as no older one of the same release and version is still open."""
        outcomes = []
        for key, queue in list(self._queues.items()):
            while queue and (queue[0].is_closed or self._num_queued > MAX_QUEUED_EPISODES):
                episode = queue.popleft()
                self._num_queued -= 1
                if not episode.is_closed:
                    self.counts["evicted"] += 1  # it may go on and will be counted nowhere
                elif episode.has_reward:
                    outcomes.append(Outcome(episode.release, episode.version, episode.reward, episode.final_s, episode.is_mixed))
            if not queue:
                del self._queues[key]
        return outcomes

    def _join(self, feedback: Feedback, decided_s: float, episode: _Episode) -> None:
        if episode.is_closed or feedback.time_s - decided_s > self._window_s:
            self._expired.add(feedback.decision_id)
            self.counts["late"] += 1
            return
        self._joined.add(feedback.decision_id)
        self.counts["joined"] += 1
        episode.reward += feedback.reward
        episode.has_reward = True
        if episode.episode_id is None:
            episode.final_s = feedback.time_s
            self._close(episode)
        elif feedback.final and not episode.final_s:
            episode.final_s = feedback.time_s
            heapq.heappush(self._closing, (episode.final_s, next(self._serial), episode))

    def _close(self, episode: _Episode) -> None:
        episode.is_closed = True
        if episode.episode_id is not None and self._open.get(episode.episode_id) is episode:
            del self._open[episode.episode_id]


class _RecentIds:
    """Remembers ids for `keep_s` to twice as long, or the last `MIN_REMEMBERED` where that would be more.

    Two sets, the older of which is thrown away whole.
    """

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._newer: set[str] = set()
        self._older: set[str] = set()
        self._turned_s: float | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._newer or name in self._older

    def add(self, name: str) -> None:
        self._newer.add(name)

    def forget(self, until_s: float) -> None:
        if self._turned_s is None or until_s - self._turned_s > self._keep_s or len(self._newer) > MIN_REMEMBERED:
            self._newer, self._older, self._turned_s = set(), self._newer, until_s


def _pop_first(entries: dict) -> None:
    del entries[next(iter(entries))]
