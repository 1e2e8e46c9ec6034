"""Which requests of a batch were made before, and what they are told: the same id is the same decision.

Only requests that their client named can be asked for again. Such a one may be in the log already, of this replica or of another;
it may be in the same batch twice; or its line may be on its way to the disk. B asks of a batch.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from policies.errors import RequestInvalid, RequestRefused, ServiceUnavailable
from policies.records import Decision
from policies.spaces import Spaces
from serve_app.asks import Ask, ManyAsk
from serve_app.batcher import Deliver, deliver_each
from serve_app.drafts import Draft, Line, failure_of, row_told_again, told_again
from serve_app.durable_log import DecisionLog, Where
from serve_app.recall import Recall
from serve_app.wire import DecideManyAnswer

Waiting = list[tuple[Ask | ManyAsk, Deliver]]
SubmitAgain = Callable[[Ask | ManyAsk, Deliver], None]


class SortedOut(NamedTuple):
    """A batch without what must wait, which is `repeated`; `drafts` are those that need not be decided, by their place."""

    asks: list[Ask | ManyAsk]
    delivers: list[Deliver]
    drafts: dict[int, Draft]
    repeated: Waiting


class Repetitions:
    """Knows what was decided, and who waits for a line that is being flushed. `submit_again` puts an ask into a later batch."""

    def __init__(self, policy: str, log: DecisionLog, recall: Recall, submit_again: SubmitAgain) -> None:
        self._policy = policy
        self._log = log
        self._recall = recall
        self._submit_again = submit_again
        # Names of decisions whose lines are being flushed, and who asks for one of them again meanwhile.
        self._being_logged: dict[str, Waiting] = {}
        self._is_stopping = False

    def sort_out(self, asks: list[Ask | ManyAsk], delivers: list[Deliver], spaces: Spaces) -> SortedOut:
        """Take out of a batch what is being logged, or is asked for by an earlier one of it; and say what is in the log."""
        if not any([ask.is_named for ask in asks]):
            return SortedOut(asks, delivers, {}, [])
        unreadable = self._catch_up()
        times = Counter([name for ask in asks for name in ask.names])
        wanted = {ask.name for ask in asks if ask.is_named} | {name for name, number in times.items() if number > 1}
        logged = self._recall.find(wanted)
        seen: set[str] = set()
        first: list[int] = []
        repeated: Waiting = []
        for index, ask in enumerate(asks):
            names = ask.names
            if any([name in self._being_logged or (name in seen and name not in logged) for name in names]):
                repeated.append((ask, delivers[index]))
            else:
                first.append(index)
                seen.update(names)
        asks, delivers = [asks[index] for index in first], [delivers[index] for index in first]
        if unreadable is not None:
            return SortedOut(asks, delivers, {i: Draft(unreadable) for i, ask in enumerate(asks) if ask.is_named}, repeated)
        before = {index: ask for index, ask in enumerate(asks) if ask.is_named and ask.name in logged}
        drafts = {index: self._told_again(ask, logged[ask.name], spaces) for index, ask in before.items()}
        return SortedOut(asks, delivers, drafts, repeated)

    def rows_told_again(self, ask: ManyAsk, rows: Iterable[int], spaces: Spaces) -> tuple[dict[int, Any], tuple[Path, ...]]:
        """Return what is told of those rows that were asked for before under names of their own, and where it was found."""
        if not ask.is_named or ask.batch_id:
            return {}, ()
        row_of = {ask.decision_ids[row]: row for row in rows}
        logged = self._recall.find(row_of)
        told = {row_of[name]: row_told_again(ask, row_of[name], found[0], spaces) for name, found in logged.items()}
        return told, self._others_segments(logged)

    def postpone(self, repeated: Waiting) -> None:
        """Have requests answered when what they repeat is in the log: in the next batch, or once it is flushed."""
        for ask, deliver in repeated:
            waiting = next((self._being_logged[name] for name in ask.names if name in self._being_logged), None)
            if waiting is None:
                self._submit_again(ask, deliver)
            elif self._is_stopping:
                deliver_each([_stopping()], [deliver])
            else:
                waiting.append((ask, deliver))

    def begin_logging(self, lines: Sequence[Line]) -> Callable[[], None]:
        """Let repetitions of these wait from now on, until what is returned is called."""
        names = [name for line in lines for name in line.names]
        waiting: Waiting = []
        self._being_logged.update(dict.fromkeys(names, waiting))

        def end() -> None:
            for name in names:
                self._being_logged.pop(name, None)
            self.postpone(waiting)

        return end

    def once_flushed(self, draft: Draft, deliver: Deliver) -> Deliver:
        """Return what delivers a draft's result; what another replica has logged, only once that is durable too."""
        if not draft.told_from:
            return deliver
        return lambda result: self._log.tell(draft.told_from, lambda error: deliver_each([error or result], [deliver]))

    def remember(self, written: Sequence[tuple[Sequence[str], bytes]], where: Where) -> None:
        """Have what was decided told again, from wherever it is: names and lines; `where` is the place of the first line."""
        offset = 0
        for names, data in written:
            if where == "kept":
                self._recall.keep(names, data)
            elif where == "dropped":
                self._recall.forget(names)
            elif names:
                self._recall.remember(names, where[0], where[1] + offset)
            offset += len(data)

    def stop(self) -> None:
        """Send whoever waits for another request's flush elsewhere, from now on at once: the flush may outlive this replica."""
        self._is_stopping = True
        for waiting in self._being_logged.values():
            deliver_each([_stopping()] * len(waiting), [deliver for _, deliver in waiting])
            waiting.clear()

    def _catch_up(self) -> ServiceUnavailable | None:
        """Learn what other replicas have logged; return why named requests are refused where that is not possible."""
        try:
            self._recall.catch_up()
        except OSError as error:  # who has no name is answered nevertheless
            return ServiceUnavailable(f"what other replicas have logged cannot be read: {error}")
        return None

    def _told_again(self, ask: Ask | ManyAsk, logged: list[Decision], spaces: Spaces) -> Draft:
        try:
            result = self._result_again(ask, logged, spaces)
        except RequestRefused as error:
            return Draft(error)
        return Draft(result, told_from=self._others_segments([ask.name]))

    def _result_again(self, ask: Ask | ManyAsk, logged: list[Decision], spaces: Spaces) -> Any:
        if isinstance(ask, Ask):
            return told_again(ask, logged[0], self._policy, spaces)
        by_id = {decision.decision_id: decision for decision in logged}
        refused = RequestInvalid("this one was not answered when the request came before; ask for it under a new id")
        rows = [
            row_told_again(ask, row, by_id[name], spaces) if name in by_id else failure_of(refused)
            for row, name in enumerate(ask.decision_ids)
        ]
        return DecideManyAnswer(self._policy, rows)

    def _others_segments(self, names: Iterable[str]) -> tuple[Path, ...]:
        found = {self._recall.others_segment(name) for name in names}
        return tuple(path for path in found if path is not None)


def _stopping() -> ServiceUnavailable:
    return ServiceUnavailable("this replica stops, and the request that this one repeats is not in the log yet; ask again")
