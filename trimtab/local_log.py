"""How decisions that were made in this process come into the endpoint's log: later, in order, from a bounded buffer."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import msgspec

from policies.errors import DecisionUnknown, Overloaded, RequestConflict, RequestInvalid, ServiceUnavailable, TrimtabError
from policies.records import Decision
from trimtab.retrying import Call

logger = logging.getLogger(__name__)

OnFull = Literal["drop", "block"]

FLUSH_S = 0.2  # how long a decision waits for others; what a killed process loses
MAX_ITEMS = 1000  # of one request, as the endpoint takes
MAX_BYTES = 512 << 10  # of one request; the endpoint takes 1 MiB by default
SEND_TIMEOUT_S = 5.0
FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 10.0  # between tries while the endpoint is away

_encode = msgspec.json.Encoder().encode


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """The reward of one decision, as the endpoint takes it."""

    decision_id: str
    reward: float
    final: bool = False


@dataclass(frozen=True)
class LogCounts:
    """What became of decisions and rewards. `refused`: not JSON, or wrong, as the endpoint says; `error` is the last."""

    buffered: int
    sent: int
    dropped: int
    refused: int
    error: str | None


class LocalLog:
    """A buffer of at most `max_buffered` decisions and rewards, and the thread that empties it.

    A reward is sent after its decision: the endpoint must know what it belongs to. `send` makes a request within a time limit.
    """

    def __init__(self, send: Callable[[Call, float], Any], *, max_buffered: int, on_full: OnFull, timeout_s: float) -> None:
        self._send = send
        self._max_buffered = max_buffered
        self._on_full = on_full
        self._timeout_s = timeout_s
        self._items: deque[Decision | Report] = deque()
        self._num_in_hand = 0  # taken from the buffer, and not yet known to have arrived
        self._num_sent = self._num_dropped = self._num_refused = 0
        self._error: str | None = None
        self._changed = threading.Condition()
        self._closes_at_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="trimtab-local-log", daemon=True)
        self._thread.start()

    def add(self, item: Decision | Report) -> None:
        """Take a record over. When the buffer is full it is dropped and counted, or waited for, as `on_full` says.

        Raises `Overloaded` when there is no room within the time limit, `ServiceUnavailable` when the log was closed: then
        nothing is written of what was decided.
        """
        with self._changed:
            self._require_open()
            if len(self._items) + self._num_in_hand >= self._max_buffered and not self._makes_room():
                return
            self._require_open()  # it may have been closed while this one waited for room
            self._items.append(item)

    def counts(self) -> LogCounts:
        with self._changed:
            buffered, error = len(self._items) + self._num_in_hand, self._error
            if self._closes_at_s is None and not self._thread.is_alive():
                error = "the thread that sends has ended; its traceback was printed"
            return LogCounts(buffered, self._num_sent, self._num_dropped, self._num_refused, error)

    def close(self, timeout_s: float) -> None:
        """Send what is left, for as long as `timeout_s`; what then still is here is lost, and said so."""
        with self._changed:
            self._closes_at_s = time.monotonic() + timeout_s
            self._changed.notify_all()
        self._thread.join(timeout_s)
        counts = self.counts()
        if counts.buffered:
            logger.error("event=local_log_not_flushed num_lost=%d error=%r", counts.buffered, counts.error)

    def _require_open(self) -> None:
        if self._closes_at_s is not None:  # nobody sends any more
            raise ServiceUnavailable("this local client is closed: nothing is decided or reported any more; make a new one")

    def _makes_room(self) -> bool:
        """Wait for room, or count one more as dropped."""
        if self._on_full == "block":
            if self._changed.wait_for(lambda: len(self._items) + self._num_in_hand < self._max_buffered, self._timeout_s):
                return True
            raise Overloaded(
                f"{self._max_buffered} decisions wait for the endpoint, the limit, and none left within {self._timeout_s:g} s: "
                f"this one does not count; see that the endpoint is back ({self._error}), or raise max_buffered"
            )
        self._num_dropped += 1
        return False

    def _run(self) -> None:
        is_closing = False
        while not is_closing:
            with self._changed:
                is_closing = self._changed.wait_for(lambda: self._closes_at_s is not None, FLUSH_S)
            while items := self._take():
                decisions = self._encoded([item for item in items if isinstance(item, Decision)])
                reports = self._encoded([item for item in items if isinstance(item, Report)])
                parts = [*_parts(decisions, b'{"decisions":[%b]}', "/v1/decisions"), *_parts(reports, b"[%b]", "/v1/feedback")]
                if not all(self._deliver(part) for part in parts):  # in this order, and none after one that did not arrive
                    return

    def _take(self) -> list[Decision | Report]:
        with self._changed:
            items = [self._items.popleft() for _ in range(min(len(self._items), MAX_ITEMS))]
            self._num_in_hand = len(items)
            return items

    def _encoded(self, items: list[Any]) -> list[bytes]:
        """Return the records as JSON, without those that JSON cannot say, such as a name with half a surrogate pair."""
        records = []
        for item in items:
            try:
                records.append(_encode(item))
            except (ValueError, TypeError, OverflowError) as error:
                logger.error("event=local_record_refused record=%.300r error=%r", item, str(error))
                self._note(error)
                self._settle(num_refused=1)
        return records

    def _deliver(self, part: "_Part") -> bool:
        """Send records until they have arrived, or are known to be wrong; False when there is no time left for that."""
        pause_s = FIRST_PAUSE_S
        while (limit_s := self._time_left_s()) > 0:
            try:
                self._send(part.call(), limit_s)
            except (RequestInvalid, DecisionUnknown, RequestConflict) as error:
                return self._isolate(part, error)
            except Exception as error:  # away, full, or a key that is not valid now and may be again
                if not isinstance(error, TrimtabError):  # a mistake of ours: without this thread nothing would be sent any more
                    logger.exception("event=local_log_failed path=%s", part.path)
                self._note(error)
                self._wait(pause_s)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
            else:
                self._settle(num_sent=len(part.records))
                return True
        return False

    def _isolate(self, part: "_Part", error: TrimtabError) -> bool:
        """Find the records that are wrong: one of them has all that came with it refused."""
        if len(part.records) == 1:
            logger.error("event=local_record_refused path=%s error=%r", part.path, str(error))
            self._note(error)
            self._settle(num_refused=1)
            return True
        middle = len(part.records) // 2
        halves = (part._replace(records=part.records[:middle]), part._replace(records=part.records[middle:]))
        return all(self._deliver(half) for half in halves)

    def _time_left_s(self) -> float:
        return SEND_TIMEOUT_S if self._closes_at_s is None else min(self._closes_at_s - time.monotonic(), SEND_TIMEOUT_S)

    def _wait(self, pause_s: float) -> None:
        """Pause; whoever closes the log has waited enough."""
        with self._changed:
            if self._closes_at_s is None:
                self._changed.wait_for(lambda: self._closes_at_s is not None, pause_s)
                return
        time.sleep(max(min(pause_s, self._closes_at_s - time.monotonic()), 0.0))

    def _note(self, error: Exception) -> None:
        with self._changed:
            self._error = f"{type(error).__name__}: {error}"

    def _settle(self, *, num_sent: int = 0, num_refused: int = 0) -> None:
        with self._changed:
            self._num_in_hand -= num_sent + num_refused
            self._num_sent += num_sent
            self._num_refused += num_refused
            if num_sent:
                self._error = None
            self._changed.notify_all()  # there is room again


class _Part(NamedTuple):
    """Records that go in one request, as JSON."""

    records: list[bytes]
    envelope: bytes
    path: str

    def call(self) -> Call:
        return Call("POST", self.path, self.envelope % b",".join(self.records))


def _parts(encoded: list[bytes], envelope: bytes, path: str) -> Iterator[_Part]:
    """Return the requests for records, none larger than the endpoint takes."""
    records: list[bytes] = []
    size_bytes = 0
    for record in encoded:
        if records and size_bytes + len(record) > MAX_BYTES:
            yield _Part(records, envelope, path)
            records, size_bytes = [], 0
        records.append(record)
        size_bytes += len(record) + 1
    if records:
        yield _Part(records, envelope, path)
