"""Which reward belongs to which decision, and which decisions make one outcome."""

import heapq
import itertools
from dataclasses import dataclass
from typing import Literal

from policies.records import Decision, Feedback, Override

SETTLE_S = 2.0  # after a final feedback: others of the same episode may come through another replica's file
WAIT_S = 10.0  # feedback without a decision: decisions are written before they are answered, so none is later than a flush
MAX_PENDING = 500_000  # decisions without feedback, about 300 bytes each: 150 MB
MIN_REMEMBERED = 250_000  # ids of joined decisions, about 150 bytes each, up to twice as many: 75 MB
MAX_OPEN_EPISODES = 100_000
MAX_QUEUED_EPISODES = 500_000  # episodes that are over and wait for an older one of the same arm


Account = Literal["plan", "holdout", "request"]


def account_of(decision: Decision) -> Account:
    """Return what a decision counts for: its version in the plan and its releases, the holdout, or nothing at all.

    The last is for decisions whose arm the request chose: who sends them is no sample of anybody.
    """
    if decision.assigned == "request":
        return "request"
    return "holdout" if decision.arm == "holdout" else "plan"


@dataclass(frozen=True)
class Outcome:
    """The sum of an episode's rewards. It is mixed, and says nothing of a version, when more than one answered.

    `account` is that of the episode's first decision. `time_s` is when it was over: it says where the outcome stands in a time
    series, not in which order outcomes come.
    """

    release: int
    version: int
    value: float
    time_s: float
    is_mixed: bool
    account: Account = "plan"


class _Episode:
    __slots__ = (
        "account",
        "episode_id",
        "final_s",
        "first_s",
        "has_reward",
        "is_closed",
        "is_mixed",
        "last_s",
        "overridden_s",
        "release",
        "reward",
        "version",
    )

    def __init__(self, decision: Decision, version: int) -> None:
        self.episode_id = decision.episode_id
        self.account = account_of(decision)
        self.release = decision.release
        self.version = version
        self.overridden_s: dict[str, float] | None = None  # by decision; rarely needed
        self.is_mixed = False
        self.is_closed = False
        self.has_reward = False
        self.reward = 0.0
        self.first_s = self.last_s = decision.time_s
        self.final_s = 0.0

    def add(self, decision: Decision, version: int) -> None:
        """Take in one more decision; the first in time, not the first that was read, says whose episode it is."""
        account = account_of(decision)
        if decision.is_stood_in_for or version != self.version or account != self.account:
            self.is_mixed = True
        if decision.time_s < self.first_s:
            self.first_s, self.release, self.version, self.account = decision.time_s, decision.release, version, account
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

    An override makes its decision's episode mixed, unless it is later than that decision's feedback, its reward window or the
    end of the episode (`override_late`). That is a rule of the records' times: live, such an episode has been counted already.
    """

    def __init__(self, reward_window_s: float) -> None:
        self._window_s = reward_window_s
        self._pending: dict[str, tuple[float, _Episode]] = {}
        self._open: dict[str, _Episode] = {}  # least recently active first
        self._closing: list[tuple[float, int, _Episode]] = []  # a heap by time: two files are read one after the other
        self._serial = itertools.count()
        self._waiting: dict[str, Feedback] = {}
        self._waiting_overrides: dict[str, Override] = {}
        self._joined = _RecentIds(reward_window_s)
        self._expired = _RecentIds(reward_window_s)
        self._cut = _RecentIds(reward_window_s)  # episodes we forgot while they may go on: their sum would lack its first part
        # Per account, release and version, in the order of beginning.
        # Heaps by the time of their first decision: after a restart episodes are not read in the order of their beginning.
        self._queues: dict[tuple[Account, int, int], list[tuple[float, int, _Episode]]] = {}
        self._num_queued = 0
        names = ("joined", "duplicate", "unknown", "late", "duplicate_decisions", "abandoned", "evicted")
        self.counts = dict.fromkeys((*names, "overridden", "override_late", "override_unknown"), 0)

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
        override = self._waiting_overrides.pop(decision_id, None)
        if override is not None:
            self._override(override, decision.time_s, episode)
        waiting = self._waiting.pop(decision_id, None)
        if waiting is not None:
            self.feedback(waiting)
        return True

    def override(self, override: Override) -> None:
        """Take in that a decision was not carried out: what became of its episode is not the version's doing."""
        decision_id = override.decision_id
        entry = self._pending.get(decision_id)
        if entry is not None:
            self._override(override, *entry)
        elif decision_id in self._joined or decision_id in self._expired:
            self.counts["override_late"] += 1
        else:
            self._waiting_overrides.setdefault(decision_id, override)
            if len(self._waiting_overrides) > MAX_PENDING:
                _pop_first(self._waiting_overrides)
                self.counts["override_unknown"] += 1

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
            episode = heapq.heappop(self._closing)[2]
            self._close(episode, episode.final_s + SETTLE_S)
        while self._waiting and next(iter(self._waiting.values())).time_s + WAIT_S < until_s:
            _pop_first(self._waiting)
            self.counts["unknown"] += 1
        while self._waiting_overrides and next(iter(self._waiting_overrides.values())).time_s + WAIT_S < until_s:
            _pop_first(self._waiting_overrides)
            self.counts["override_unknown"] += 1
        while self._pending and next(iter(self._pending.values()))[0] + self._window_s < until_s:
            self._expire_first()
        while self._open and next(iter(self._open.values())).last_s + self._window_s + SETTLE_S < until_s:
            self._abandon_first()
            self.counts["abandoned"] += 1
        for recent in (self._joined, self._expired, self._cut):
            recent.forget(until_s)
        return self._take_outcomes(until_s)

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
        queue = self._queues.setdefault((episode.account, decision.release, version), [])
        heapq.heappush(queue, (episode.first_s, next(self._serial), episode))
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
        episode.final_s = episode.last_s
        self._close(episode, episode.last_s + self._window_s + SETTLE_S)

    def _take_outcomes(self, until_s: float) -> list[Outcome]:
        """Return the outcomes of closed episodes, as far as no older one of the same release and version is still open.

        One that began after `until_s` may have an older one that was not read yet.
        """
        outcomes = []
        for key, queue in list(self._queues.items()):
            while queue and ((queue[0][2].is_closed and queue[0][0] <= until_s) or self._num_queued > MAX_QUEUED_EPISODES):
                episode = heapq.heappop(queue)[2]
                self._num_queued -= 1
                if not episode.is_closed:
                    self.counts["evicted"] += 1  # it may go on and will be counted nowhere
                elif episode.has_reward:
                    what = episode.release, episode.version, episode.reward, episode.final_s, episode.is_mixed
                    outcomes.append(Outcome(*what, account=episode.account))
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
        overridden_s = (episode.overridden_s or {}).get(feedback.decision_id)
        if overridden_s is not None and overridden_s > feedback.time_s:
            self._take_back_override(episode, feedback.decision_id)
        episode.reward += feedback.reward
        episode.has_reward = True
        if episode.episode_id is None:
            episode.final_s = feedback.time_s
            self._close(episode, episode.final_s)
        elif feedback.final and not episode.final_s:
            episode.final_s = feedback.time_s
            heapq.heappush(self._closing, (episode.final_s, next(self._serial), episode))

    def _override(self, override: Override, decided_s: float, episode: _Episode) -> None:
        if episode.is_closed or override.time_s - decided_s > self._window_s:
            self.counts["override_late"] += 1
            return
        if episode.overridden_s is None:
            episode.overridden_s = {}
        if override.decision_id not in episode.overridden_s:
            episode.overridden_s[override.decision_id] = override.time_s
            self.counts["overridden"] += 1

    def _take_back_override(self, episode: _Episode, decision_id: str) -> None:
        assert episode.overridden_s is not None
        del episode.overridden_s[decision_id]
        self.counts["overridden"] -= 1
        self.counts["override_late"] += 1

    def _close(self, episode: _Episode, end_s: float) -> None:
        for decision_id, overridden_s in list((episode.overridden_s or {}).items()):
            if overridden_s > end_s:
                self._take_back_override(episode, decision_id)
        episode.is_mixed = episode.is_mixed or bool(episode.overridden_s)
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
