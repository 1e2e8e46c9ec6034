"""Do both clients get through, or give up in time, whatever a real socket does to them?"""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import requests
import urllib3

from policies.errors import ClusterError, Overloaded, RequestInvalid, TrimtabError, Unauthorized
from tests.scripted_server import Exchange, serving
from trimtab.async_client import AsyncClient
from trimtab.client import Client

ANSWER = {"action": 1, "policy": "demo", "decision_id": "r.1"}
SLACK_S = 3.0  # for a busy machine; without limits these calls would take a minute

Ask = Callable[..., dict]


def ask_sync(url: str, timeout_s: float, *, own_s: float | None = None) -> dict:
    with Client(url, "key", timeout_s=timeout_s, direct=False) as client:
        return client.decide([0.0], timeout_s=own_s)


def ask_async(url: str, timeout_s: float, *, own_s: float | None = None) -> dict:
    async def ask() -> dict:
        async with AsyncClient(url, "key", timeout_s=timeout_s, direct=False) as client:
            return await client.decide([0.0], timeout_s=own_s)

    return asyncio.run(ask())


both = pytest.mark.parametrize("ask", [ask_sync, ask_async])


def first(trouble: Callable[[Exchange], None]) -> Callable[[Exchange], None]:
    """Return a server's behaviour: trouble for the first request, and an answer to the others."""
    return lambda exchange: exchange.answer(200, ANSWER) if exchange.number else trouble(exchange)


def killed(exchange: Exchange) -> None:
    exchange.half()
    exchange.hang_up()


PASSING = {
    "503 and Retry-After": lambda exchange: exchange.refuse(503, Retry_After="0.01"),
    "429": lambda exchange: exchange.refuse(429),
    "the 404 of a proxy that has no routes yet": lambda exchange: exchange.answer(
        404, {"detail": "Path '/v1/decide' not found."}
    ),
    "500": lambda exchange: exchange.refuse(500),
    "hangs up": lambda exchange: exchange.hang_up(),
    "killed in the middle of its answer": killed,
    "a proxy that knows no policy yet": lambda exchange: exchange.answer(404, "Path '/v1/decide' not found."),
}


@both
@pytest.mark.parametrize("trouble", PASSING.values(), ids=PASSING)
def test_trouble_that_passes_is_not_seen_and_every_try_has_the_same_request_id(ask: Ask, trouble) -> None:
    with serving(first(trouble)) as server:
        assert ask(server.url, 10.0) == ANSWER
    assert len(server.posts) == 2
    assert server.posts[0]["request_id"] == server.posts[1]["request_id"]
    assert 10_000 >= server.posts[0]["deadline_ms"] > server.posts[1]["deadline_ms"] > 0


@both
def test_an_answer_in_small_chunks_is_read_whole(ask: Ask) -> None:
    with serving(lambda exchange: exchange.answer_in_chunks(ANSWER)) as server:
        assert ask(server.url, 10.0) == ANSWER


NEVER = {
    "says nothing": lambda exchange: exchange.say_nothing(),
    "stops in the middle": lambda exchange: (exchange.half(), exchange.say_nothing()),
    "drips": lambda exchange: exchange.drip(),
    "drips headers": lambda exchange: exchange.drip_headers(),
    "drips the size of a chunk": lambda exchange: exchange.drip_chunk(),
    "always busy": lambda exchange: exchange.refuse(503),
    "always killed": killed,
}


@both
@pytest.mark.parametrize("trouble", NEVER.values(), ids=NEVER)
def test_an_endpoint_that_never_answers_is_given_up_at_the_deadline(ask: Ask, trouble) -> None:
    with serving(trouble) as server:
        started_s = time.monotonic()
        with pytest.raises(ClusterError):
            ask(server.url, 0.4)
        assert time.monotonic() - started_s < 0.4 + SLACK_S
    assert server.posts


@pytest.mark.parametrize("trouble", [name for name in NEVER if name.startswith("drips")])
def test_a_limit_for_each_piece_alone_would_never_end_against_one_that_drips(
    trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: what `requests` does by itself; after 2 s it still reads, with a limit of 0.4 s."""
    monkeypatch.setattr("trimtab.client.timely_session", requests.Session)
    with serving(NEVER[trouble]) as server:

        def ask() -> None:
            with pytest.raises(Exception):  # noqa: B017 - only that it comes, and when
                ask_sync(server.url, 0.4)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(2.0)
        assert thread.is_alive()
    thread.join(10)


def test_what_connecting_takes_is_not_there_for_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first packet that is lost comes again after a second; with a limit for each of the two a call takes twice as long."""

    def slowly(*args: Any, **options: Any) -> Any:
        time.sleep(2.0)
        return connect(*args, **options)

    connect = urllib3.util.connection.create_connection
    monkeypatch.setattr(urllib3.util.connection, "create_connection", slowly)
    with serving(NEVER["says nothing"]) as server:
        started_s = time.monotonic()
        with pytest.raises(ClusterError):
            ask_sync(server.url, 2.5)
        assert time.monotonic() - started_s < 3.7  # 4.5 with a limit for each


@both
def test_a_call_may_have_a_limit_of_its_own(ask: Ask) -> None:
    with serving(NEVER["says nothing"]) as server:
        started_s = time.monotonic()
        with pytest.raises(ClusterError, match=r"within 0\.2 s"):
            ask(server.url, 60.0, own_s=0.2)
        assert time.monotonic() - started_s < SLACK_S


@both
def test_a_longer_wait_than_there_is_time_is_told_at_once(ask: Ask) -> None:
    full = serving(lambda exchange: exchange.refuse(429, "full", Retry_After="3600"))
    with full as server, pytest.raises(Overloaded, match="full"):
        ask(server.url, 30.0)
    assert len(server.posts) == 1


@both
@pytest.mark.parametrize(("status", "kind"), [(401, Unauthorized), (422, RequestInvalid)])
def test_both_raise_what_the_endpoint_says(ask: Ask, status: int, kind: type[TrimtabError]) -> None:
    with serving(lambda exchange: exchange.refuse(status, "no")) as server, pytest.raises(kind, match=f"HTTP {status}: no"):
        ask(server.url, 30.0)
    assert len(server.posts) == 1


@both
@pytest.mark.parametrize("url", ["no-scheme:8000/x", "http://", "ftp://host/"])
def test_an_address_that_is_none_is_the_callers_mistake(ask: Ask, url: str) -> None:
    with pytest.raises(RequestInvalid, match="cannot be sent"):
        ask(url, 30.0)


@both
def test_a_frozen_lane_and_a_dead_one_lead_to_the_endpoint(ask: Ask) -> None:
    with serving(NEVER["says nothing"]) as frozen, serving(lambda exchange: exchange.answer(200, ANSWER)) as endpoint:
        endpoint.lanes = [frozen.url, "http://127.0.0.1:9"]

        def with_lanes(client_type):
            return client_type(endpoint.url, "key", timeout_s=3.0)

        if ask is ask_sync:
            with with_lanes(Client) as client:
                assert client.decide([0.0]) == ANSWER
        else:

            async def run() -> None:
                async with with_lanes(AsyncClient) as client:
                    assert await client.decide([0.0]) == ANSWER

            asyncio.run(run())


def test_threads_share_a_client_and_each_has_its_own_connection() -> None:
    """The server answers none of four requests before all have come: with one connection in turns that would never be."""
    all_there = threading.Barrier(4, timeout=20)

    def answer(exchange: Exchange) -> None:
        all_there.wait()
        exchange.answer(200, {**ANSWER, "action": exchange.body["observation"][0]})

    with serving(answer) as server, Client(server.url, "key", timeout_s=20.0, direct=False) as client:
        answers: dict[int, dict] = {}
        threads = [threading.Thread(target=lambda i=i: answers.update({i: client.decide([i])})) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {i: answer["action"] for i, answer in answers.items()} == {0: 0, 1: 1, 2: 2, 3: 3}
        assert len(client._sessions) == 4
        all_there = threading.Barrier(1)
        client.decide([9])
        assert len(client._sessions) == 1  # those of threads that have ended are closed
