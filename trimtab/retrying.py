"""What a call does next: send where, pause how long, answer, or give up.

`exchange` is a call from beginning to end without a socket or a clock of its own: it yields what is to be done and is sent what
came of it. `Client` does that with threads and `AsyncClient` with tasks, so both try, wait and fail alike.
"""

import json
import random
from collections.abc import Callable, Generator
from enum import Enum
from typing import Any, NamedTuple

from policies.errors import (
    ClusterError,
    DecisionUnknown,
    Forbidden,
    Overloaded,
    RequestConflict,
    RequestInvalid,
    RequestRefused,
    TrimtabError,
    Unauthorized,
)
from trimtab.lanes import ASIDE_S, LOOK_TIMEOUT_S, DirectLanes

RETRY_STATUSES = frozenset((429, 500, 502, 503, 504))
CONNECT_TIMEOUT_S = 0.5  # to a replica's own port, which may be behind a firewall: then the endpoint is the way
# Pauses double per try and are drawn from nothing to their whole ("full jitter"): clients that failed together do not come back
# together. A replica that restarts is back after some of these, a full queue after one or two.
FIRST_PAUSE_S, MAX_PAUSE_S = 0.05, 2.0
MAX_DEADLINE_MS = 600_000  # what the endpoint takes
LEAST_TIMEOUT_S = 0.001  # a timeout of zero means none at all to a socket

_KINDS: dict[int, type[RequestRefused]] = {
    401: Unauthorized,
    403: Forbidden,
    404: DecisionUnknown,
    409: RequestConflict,
    429: Overloaded,
}


class Call(NamedTuple):
    """One request of a caller; bytes are JSON already. With `tells_deadline` each try says how many milliseconds are left."""

    method: str
    path: str
    body: dict[str, Any] | list[Any] | bytes | None = None
    tells_deadline: bool = False
    is_file: bool = False  # the answer is bytes, not JSON


class Send(NamedTuple):
    """One try: send this and answer `Answered` or `Failed`, at the latest when `timeout_s` is over."""

    method: str
    url: str
    body: bytes | None
    connect_timeout_s: float
    timeout_s: float


class Pause(NamedTuple):
    """Wait before the next try."""

    seconds: float


class Answered(NamedTuple):
    """Somebody answered, whatever it was."""

    status: int
    body: bytes
    retry_after_s: float | None = None


class Failed(NamedTuple):
    """Nobody answered, or not to the end: no connection, a timeout, a connection that broke."""

    error: Exception


class Verdict(Enum):
    ANSWER = "answer"
    AGAIN = "again"
    GIVE_UP = "give up"


class Judgement(NamedTuple):
    """What follows from an outcome. `aside_s`: how long the lane it came from is left alone, 0 for not at all."""

    verdict: Verdict
    pause_s: float = 0.0
    aside_s: float = 0.0


Steps = Generator[Send | Pause, Answered | Failed | None, Any]


def judge(outcome: Answered | Failed, *, is_direct: bool, num_pauses: int, remaining_s: float, rng: random.Random) -> Judgement:
    """Return what to do after an outcome.

    A direct lane that failed is set aside and another way taken at once; a full one (429) is waited for. A pause is never shorter
    than the answer's Retry-After, and one that would not end before the deadline is not begun.
    """
    is_answer = isinstance(outcome, Answered)
    if is_answer and outcome.status not in RETRY_STATUSES and not _is_a_proxys(outcome.status, outcome.body):
        return Judgement(Verdict.ANSWER)
    retry_after_s = outcome.retry_after_s if is_answer else None
    if is_direct and not (is_answer and outcome.status == 429):
        return Judgement(Verdict.AGAIN, aside_s=ASIDE_S if retry_after_s is None else max(retry_after_s, LEAST_TIMEOUT_S))
    longest_s = min(FIRST_PAUSE_S * 2 ** min(num_pauses, 16), MAX_PAUSE_S)
    pause_s = (retry_after_s or 0.0) + rng.uniform(0.0, longest_s)
    if pause_s < remaining_s:
        return Judgement(Verdict.AGAIN, pause_s)
    return Judgement(Verdict.ANSWER if is_answer else Verdict.GIVE_UP)


def exchange(
    call: Call, *, url: str, lanes: DirectLanes | None, timeout_s: float, now_s: Callable[[], float], rng: random.Random
) -> Steps:
    """Yield the steps of a call and return the answer's JSON.

    Raises what the answer says (`error_of`), `ClusterError` when nobody answers in time, `RequestInvalid` for what is no JSON.
    """
    deadline_s, num_pauses, written = now_s() + timeout_s, 0, _written(call.body)
    while True:
        base = yield from _next_base(url, lanes, deadline_s - now_s(), now_s)
        remaining_s, is_direct = max(deadline_s - now_s(), LEAST_TIMEOUT_S), base != url
        # One frozen replica must leave time for another way.
        try_s = min(remaining_s, timeout_s / 3) if is_direct else remaining_s
        body = _with_deadline(written, remaining_s) if call.tells_deadline else written
        connect_s = min(CONNECT_TIMEOUT_S, try_s) if is_direct else try_s
        outcome = yield Send(call.method, base + call.path, body, connect_s, try_s)
        assert outcome is not None
        judgement = judge(outcome, is_direct=is_direct, num_pauses=num_pauses, remaining_s=deadline_s - now_s(), rng=rng)
        if judgement.aside_s and lanes is not None:
            lanes.set_aside(base, now_s=now_s(), seconds=judgement.aside_s)
        if judgement.verdict is Verdict.ANSWER:
            assert isinstance(outcome, Answered)
            return read_answer(outcome.status, outcome.body, is_file=call.is_file)
        if judgement.verdict is Verdict.GIVE_UP or now_s() >= deadline_s:
            raise _out_of_time(outcome, url, timeout_s)
        if judgement.pause_s:
            num_pauses += 1
            yield Pause(judgement.pause_s)


def read_answer(status: int, body: bytes, *, is_file: bool = False) -> Any:
    """Return an answer's JSON, or the bytes of a file.

    Raises `error_of` an answer that is none of success, `ClusterError` for one that is not JSON.
    """
    if _is_a_proxys(status, body):
        raise ClusterError(f"HTTP {status}: {_message(body)}; the proxy knows no policy here: see whether the endpoint runs")
    if not 200 <= status < 300:
        raise error_of(status, f"HTTP {status}: {_message(body)}")
    try:
        return body if is_file else json.loads(body)
    except ValueError as error:
        raise ClusterError(f"the answer is not JSON: {error}; is this a Trimtab endpoint? {body[:100]!r}") from error


def _is_a_proxys(status: int, body: bytes) -> bool:
    """Say whether a 404 is that of the proxy in front, which knows no application yet; the endpoint's own are JSON."""
    return status == 404 and not body.startswith(b'{"error"')


def error_of(status: int, message: str) -> TrimtabError:
    """Return the error that a status stands for: the caller's mistake, or the endpoint's trouble."""
    if status in _KINDS:
        return _KINDS[status](message)
    return RequestInvalid(message, status) if status < 500 else ClusterError(message)


def retry_after_s(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header; None for none, or for a date, which we never send."""
    try:
        seconds = float(header) if header is not None else None
    except ValueError:
        return None
    return seconds if seconds is None or 0.0 <= seconds < float("inf") else None


def _next_base(url: str, lanes: DirectLanes | None, remaining_s: float, now_s: Callable[[], float]) -> Steps:
    """Return where the next try goes, a replica's own port or the endpoint; now and then ask where they are.

    The proxy in front may be away for longer than a replica lives, so then one of the replicas is asked where the others are.
    """
    if lanes is None or remaining_s <= LEAST_TIMEOUT_S:
        return url
    if lanes.are_old(now_s()):
        lanes.begin_look(now_s())
        limit_s = min(LOOK_TIMEOUT_S, remaining_s / 3)  # for both: there must be time left for two ways
        ends_s = now_s() + limit_s
        told = _endpoints((yield Send("GET", f"{url}/v1/endpoints", None, limit_s, limit_s)))
        if told is not None:
            lanes.replace(told, now_s=now_s())
        elif (left_s := ends_s - now_s()) > LEAST_TIMEOUT_S and (lane := lanes.next(now_s())) is not None:
            lanes.add(_endpoints((yield Send("GET", f"{lane}/v1/endpoints", None, left_s, left_s))) or [])
    return lanes.next(now_s()) or url


def _endpoints(outcome: Answered | Failed | None) -> list[str] | None:
    """Return the URLs in an answer; None when the endpoint is in trouble, for the replicas may be there all the same."""
    if not isinstance(outcome, Answered):
        return None
    if outcome.status == 404 and not _is_a_proxys(outcome.status, outcome.body):
        return []  # an endpoint without direct lanes
    try:
        urls = json.loads(outcome.body)["endpoints"] if outcome.status == 200 else None
    except (ValueError, KeyError, TypeError):
        return None
    return urls if isinstance(urls, list) else None


def _written(body: dict[str, Any] | list[Any] | bytes | None) -> bytes | None:
    try:
        return (
            body if body is None or isinstance(body, bytes) else json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestInvalid(f"the request cannot be sent: {error}") from error


def _with_deadline(written: bytes | None, remaining_s: float) -> bytes:
    assert written is not None and written[-1:] == b"}"
    return b'%b,"deadline_ms":%.3f}' % (written[:-1], min(1000 * remaining_s, MAX_DEADLINE_MS))


def _out_of_time(outcome: Answered | Failed, url: str, timeout_s: float) -> ClusterError:
    why = outcome.error if isinstance(outcome, Failed) else f"the last answer was HTTP {outcome.status}: {_message(outcome.body)}"
    return ClusterError(f"{url} did not answer within {timeout_s:g} s: {why}; see whether it runs, or raise timeout_s")


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
