"""How concurrent decisions of one process become one request, and how each caller gets its own answer.

A call that finds none on its way leaves at once: alone, a caller waits for nothing. Calls that come while one is on its way wait
for each other, until it is back, until the window since the first of them is over, or until they are as many as fit into one
request. So the window is the most that a decision can be late by, and only where several are asked for at the same time.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from policies.errors import ClusterError, Overloaded, RequestConflict, RequestInvalid, TrimtabError
from trimtab.calls import Mode, Single
from trimtab.retrying import RETRY_STATUSES, error_of

MAX_TOGETHER = 256  # the endpoint's own batches are no larger by default: more in one request would not be faster
MAX_WAITING = 4 * MAX_TOGETHER  # as many as the endpoint's queue takes; beyond, waiting calls would only grow old


class Kind(NamedTuple):
    """What calls must share to go together. With the same limit, their deadlines are no further apart than the window."""

    mode: Mode | None
    explain: bool
    has_mask: bool
    timeout_s: float


class Ticket:
    """One caller's place; `outcome` is its answer or error, and None until then."""

    __slots__ = ("deadline_s", "one", "outcome", "waker")

    def __init__(self, one: Single, deadline_s: float, waker: Any) -> None:
        self.one = one
        self.deadline_s = deadline_s
        self.waker = waker
        self.outcome: dict[str, Any] | BaseException | None = None


class Gathering:
    """The calls of one kind that wait, and how many requests of them are on their way. Holds no lock and no clock."""

    def __init__(self) -> None:
        self.waiting: list[Ticket] = []
        self.num_under_way = 0
        self._opened_s = 0.0

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.num_under_way

    def add(self, ticket: Ticket, now_s: float) -> None:
        if not self.waiting:
            self._opened_s = now_s
        self.waiting.append(ticket)

    def due_in_s(self, now_s: float, window_s: float) -> float:
        """Return how long the first of those who wait may still wait for others; 0 is not at all."""
        if not self.num_under_way or len(self.waiting) >= MAX_TOGETHER:
            return 0.0
        return max(self._opened_s + window_s - now_s, 0.0)

    def take(self, now_s: float) -> list[Ticket]:
        """Return the calls of the next request; for who is left a new window begins."""
        taken, self.waiting = self.waiting[:MAX_TOGETHER], self.waiting[MAX_TOGETHER:]
        self._opened_s = now_s
        self.num_under_way += 1
        return taken


class Coalescer:
    """Lets threads' calls go together. Whoever waits first carries the others: there is no thread of its own.

    `send` asks for several decisions within a time limit and returns an answer per decision (see `answers_of`); it raises for
    what went wrong with all of them.
    """

    def __init__(self, send: Callable[[list[Single], Kind, float], list[Any]], *, window_s: float) -> None:
        self._send = send
        self._window_s = window_s
        self._lock = threading.Lock()
        self._gatherings: dict[Kind, Gathering] = {}

    def decide(self, one: Single, kind: Kind) -> dict[str, Any]:
        """Return the answer to one call; raises its own error, `Overloaded` when too many wait."""
        ticket = Ticket(one, time.monotonic() + kind.timeout_s, threading.Condition(self._lock))
        with self._lock:
            gathering = self._gatherings.setdefault(kind, Gathering())
            require_room(gathering)
            gathering.add(ticket, time.monotonic())
            if len(gathering.waiting) == MAX_TOGETHER:
                gathering.waiting[0].waker.notify()
            try:
                batch = self._wait(ticket, gathering)
            except BaseException:  # Ctrl-C: somebody else must be the first now
                self._withdraw(ticket, gathering)
                raise
        if batch:
            self._carry(batch, gathering, kind)
        return result_of(ticket, self._send, kind)

    def _wait(self, ticket: Ticket, gathering: Gathering) -> list[Ticket]:
        """Wait for the answer, or to be the first when calls are due: then return those to carry."""
        while ticket.outcome is None:
            timeout_s = None
            if gathering.waiting and gathering.waiting[0] is ticket:
                now_s = time.monotonic()
                timeout_s = gathering.due_in_s(now_s, self._window_s)
                if not timeout_s:
                    batch = gathering.take(now_s)
                    if gathering.waiting:
                        gathering.waiting[0].waker.notify()
                    return batch
            ticket.waker.wait(timeout_s)
        return []

    def _withdraw(self, ticket: Ticket, gathering: Gathering) -> None:
        gathering.waiting = [other for other in gathering.waiting if other is not ticket]
        if gathering.waiting:
            gathering.waiting[0].waker.notify()

    def _carry(self, batch: list[Ticket], gathering: Gathering, kind: Kind) -> None:
        """Send a batch and give each its outcome, whatever happens to this thread: the others wait for it."""
        outcomes: list[Any] = [ClusterError("the call that carried this one was interrupted; ask again")] * len(batch)
        try:
            outcomes = outcomes_of(batch, self._send, kind)
        finally:
            with self._lock:
                gathering.num_under_way -= 1
                for ticket, outcome in zip(batch, outcomes):
                    ticket.outcome = outcome
                    ticket.waker.notify()
                if gathering.waiting:
                    gathering.waiting[0].waker.notify()
                elif gathering.is_idle:
                    self._gatherings.pop(kind, None)


def require_room(gathering: Gathering) -> None:
    """Raise `Overloaded` when as many calls wait as may."""
    if len(gathering.waiting) >= MAX_WAITING:
        raise Overloaded(
            f"{len(gathering.waiting)} decisions wait in this client, the limit; ask for fewer at a time, or with decide_many"
        )


def outcomes_of(batch: list[Ticket], send: Callable[[list[Single], Kind, float], list[Any]], kind: Kind) -> list[Any]:
    """Return an answer per ticket, or what went wrong with all."""
    try:
        return send([ticket.one for ticket in batch], kind, earliest_s(batch) - time.monotonic())
    except TrimtabError as error:
        return [error] * len(batch)


def earliest_s(batch: list[Ticket]) -> float:
    """Return until when a batch may take: no caller's deadline is passed for another's."""
    return min(ticket.deadline_s for ticket in batch)


def result_of(ticket: Ticket, send: Callable[[list[Single], Kind, float], list[Any]], kind: Kind) -> dict[str, Any]:
    """Return a caller's answer; ask again, for it alone, where what went wrong may have been another's or may pass."""
    if asks_alone(ticket.outcome):
        [ticket.outcome] = send([ticket.one], kind, ticket.deadline_s - time.monotonic())
    return own_result(ticket.outcome)


def asks_alone(outcome: Any) -> bool:
    """Say whether a call has to go again by itself.

    One caller's unreadable request is refused with all that are in it; each alone, only that one is. And a single decision that
    would be tried again if it had come alone is tried again.
    """
    if isinstance(outcome, RequestInvalid | RequestConflict):
        return True
    return isinstance(outcome, dict) and "error" in outcome and outcome["error"]["status"] in RETRY_STATUSES


def own_result(outcome: Any) -> dict[str, Any]:
    """Return an answer, or raise the error in its place; each caller gets an exception of its own."""
    if isinstance(outcome, BaseException):
        raise type(outcome)(*outcome.args)
    if "error" in outcome:
        raise error_of(outcome["error"]["status"], f"HTTP {outcome['error']['status']}: {outcome['error']['message']}")
    return outcome


def answers_of(answer: dict[str, Any], num: int) -> list[dict[str, Any]]:
    """Return the answers within an answer for many, each like one for a single decision, or `{"error": …}` in its place."""
    decisions = answer.get("decisions") if isinstance(answer, dict) else None
    if not isinstance(decisions, list) or len(decisions) != num:
        found = len(decisions) if isinstance(decisions, list) else "no"
        raise ClusterError(f"the endpoint answered {found} decisions to {num} observations; is it an older Trimtab?")
    return [item if "error" in item else {**item, "policy": answer["policy"]} for item in decisions]
