"""How long do answers take when requests come at fixed times, whether the endpoint is ready for them or not?

A closed loop waits for an answer before it asks again, so a pause of the endpoint costs it one slow request. Here every request
has its time, and its latency counts from then on: those that were due during the pause are slow too.

Of the generators with a name, wrk2 is not packaged; autocannon's rate is a burst at the start of each second; oha and vegeta need
a compiler.
"""

import asyncio
import select
import selectors
import urllib.parse
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import httptools
import numpy as np

from benchmarks.serving.wrk import LoadFailed, Request

LAST_ANSWERS_S = 5.0
MAX_LAG_S = 0.02  # 1 % of requests may come later than that: a scheduler's turn or two; beyond, the generator measures itself
MIN_SHARE_KEPT = 0.95  # fewer answers than that per second is a peak, and not a load of so many per second

Slot = TypeVar("Slot")


class Timetable(Generic[Slot]):
    """Says which connection sends when, and what the latencies were. Holds no clock: every call says what time it is.

    A request that is due while all connections wait for an answer is sent by the first that gets one.
    """

    def __init__(
        self, slots: list[Slot], *, rate_per_s: float, num_requests: int, start_s: float, send: Callable[[Slot], None]
    ) -> None:
        self._idle = list(slots)
        self._rate_per_s = rate_per_s
        self._num_requests = num_requests
        self._start_s = start_s
        self._send = send
        self._num_due = 0
        self._overdue: deque[float] = deque()
        self._due_s: dict[Slot, float] = {}  # of the request that a connection is waiting for
        self.latencies_s: list[float] = []
        self.lags_s: list[float] = []  # by how much this generator came too late to its own times
        self.num_failed = 0

    @property
    def next_due_s(self) -> float | None:
        """When the next request is due; None after the last one."""
        return None if self._num_due == self._num_requests else self._start_s + self._num_due / self._rate_per_s

    @property
    def num_open(self) -> int:
        """How many requests were due and are not answered yet."""
        return len(self._overdue) + len(self._due_s)

    def tick(self, now_s: float) -> None:
        """Send what is due by now."""
        while (due_s := self.next_due_s) is not None and due_s <= now_s:
            self._num_due += 1
            self.lags_s.append(now_s - due_s)
            if self._idle:
                self._ask(self._idle.pop(), due_s)
            else:
                self._overdue.append(due_s)

    def answered(self, slot: Slot, now_s: float, *, is_good: bool) -> None:
        """Note an answer, and send the oldest request that waits for a connection."""
        latency_s = now_s - self._due_s.pop(slot)
        if is_good:
            self.latencies_s.append(latency_s)
        else:
            self.num_failed += 1
        if self._overdue:
            self._ask(slot, self._overdue.popleft())
        else:
            self._idle.append(slot)

    def _ask(self, slot: Slot, due_s: float) -> None:
        self._due_s[slot] = due_s
        self._send(slot)


def run_open_loop(request: Request, *, rate_per_s: float, connections: int, seconds: int) -> dict[str, Any]:
    """Load the endpoint at a fixed rate and return the row of it.

    Raises `LoadFailed` when a connection is lost, when the rate was not kept (the latencies are then those of a growing queue),
    and when the generator did not keep to its own times.
    """
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(PunctualSelector())) as runner:
        timetable = runner.run(_run(request, rate_per_s=rate_per_s, connections=connections, seconds=seconds))
    return row_of(timetable, rate_per_s=rate_per_s, seconds=seconds)


def row_of(timetable: Timetable[Any], *, rate_per_s: float, seconds: float) -> dict[str, Any]:
    """Return the figures of a run; raises `LoadFailed` when too few were answered, or asked too late."""
    per_s = len(timetable.latencies_s) / seconds
    if per_s < MIN_SHARE_KEPT * rate_per_s:
        raise LoadFailed(
            f"{per_s:.0f} good answers per second of {rate_per_s:.0f} asked for, {timetable.num_failed} bad ones and "
            f"{timetable.num_open} none: this load is more than the endpoint, or this generator, can do"
        )
    lag_s = float(np.percentile(timetable.lags_s, 99))
    if lag_s > MAX_LAG_S:
        raise LoadFailed(
            f"1 % of the requests were sent {lag_s * 1000:.1f} ms too late or more, the limit is {MAX_LAG_S * 1000:g} ms: this "
            "generator does not get enough of a processor; run nothing beside it, or ask for fewer requests per second"
        )
    p50_ms, p99_ms, p999_ms = (np.percentile(timetable.latencies_s, (50, 99, 99.9)) * 1000).round(3).tolist()
    return {
        "asked_per_s": round(rate_per_s, 1),
        "requests_per_s": round(per_s, 1),
        "p50_ms": p50_ms,
        "p99_ms": p99_ms,
        "p999_ms": p999_ms,
        "generator_lag_p99_ms": round(lag_s * 1000, 3),
        "not_2xx": timetable.num_failed,
        "unanswered": timetable.num_open,
    }


class PunctualSelector(selectors.EpollSelector):
    """Wakes up within microseconds: `epoll` rounds its timeouts up to milliseconds, `select` on its descriptor does not."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            select.select([self.fileno()], [], [], timeout)
        return super().select(0)


class _Connection(asyncio.Protocol):
    """One keep-alive connection; `on_answer` is called with it and the status of each answer."""

    def __init__(self, on_answer: "Callable[[_Connection, int], None]", on_lost: Callable[[Exception | None], None]) -> None:
        self._on_answer = on_answer
        self._on_lost = on_lost
        self._parser = httptools.HttpResponseParser(self)
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._on_lost(error)

    def on_message_complete(self) -> None:
        self._on_answer(self, self._parser.get_status_code())


async def _run(request: Request, *, rate_per_s: float, connections: int, seconds: int) -> Timetable[_Connection]:
    loop, url = asyncio.get_running_loop(), urllib.parse.urlsplit(request.url)
    message, lost = _message(request, url), loop.create_future()

    def on_lost(error: Exception | None) -> None:
        if not lost.done():
            lost.set_result(error)

    def on_answer(connection: _Connection, status: int) -> None:
        timetable.answered(connection, loop.time(), is_good=200 <= status < 300)

    opened = [
        await loop.create_connection(lambda: _Connection(on_answer, on_lost), url.hostname, url.port) for _ in range(connections)
    ]
    timetable: Timetable[_Connection] = Timetable(
        [connection for _, connection in opened],
        rate_per_s=rate_per_s,
        num_requests=round(rate_per_s * seconds),
        start_s=loop.time(),
        send=lambda connection: connection.transport.write(message),
    )
    while (due_s := timetable.next_due_s) is not None:
        await asyncio.sleep(due_s - loop.time())
        timetable.tick(loop.time())
        _require_connected(lost)
    deadline_s = loop.time() + LAST_ANSWERS_S
    while timetable.num_open and loop.time() < deadline_s:
        await asyncio.sleep(0.01)
        _require_connected(lost)
    for transport, _ in opened:
        transport.abort()
    return timetable


def _require_connected(lost: "asyncio.Future[Exception | None]") -> None:
    if lost.done():
        raise LoadFailed(f"the endpoint closed a connection under load: {lost.result()!r}")


def _message(request: Request, url: urllib.parse.SplitResult) -> bytes:
    headers = {"Host": url.netloc, "Content-Length": str(len(request.body)), **request.headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {url.path} HTTP/1.1\r\n{lines}\r\n".encode() + request.body
