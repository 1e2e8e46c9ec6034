"""Do calls that go together cost nobody anything but a short wait, and get everybody their own answer?"""

import asyncio
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from policies.errors import ClusterError, Overloaded, RequestInvalid, Unauthorized
from tests.scripted_server import Exchange, ScriptedServer, serving
from trimtab import calls, coalescing
from trimtab.async_client import AsyncClient
from trimtab.calls import single
from trimtab.client import Client
from trimtab.coalescing import MAX_TOGETHER, MAX_WAITING, Coalescer, Gathering, Kind, Ticket

KIND = Kind(None, False, False, 20.0)
FOR_EVER_MS = 60_000.0


def one(value: Any, **names: Any):
    return single([value], action_mask=None, unit_id=None, episode_id=None, request_id=None, **names)


# --- the rule ---


def test_a_lone_call_is_due_at_once_and_those_behind_it_when_it_is_back_or_the_window_is_over() -> None:
    gathering = Gathering()
    gathering.add(Ticket(one(0), 9.0, None), 0.0)
    assert gathering.due_in_s(0.0, 2.0) == 0.0
    assert len(gathering.take(0.0)) == 1
    gathering.add(Ticket(one(1), 9.0, None), 1.0)
    gathering.add(Ticket(one(2), 9.0, None), 2.5)
    assert gathering.due_in_s(1.0, 2.0) == 2.0 and gathering.due_in_s(2.5, 2.0) == 0.5  # since the first of them
    assert gathering.due_in_s(3.0, 2.0) == 0.0
    gathering.num_under_way = 0
    assert gathering.due_in_s(1.0, 2.0) == 0.0


def test_no_request_is_larger_than_the_limit_and_a_full_one_is_due() -> None:
    gathering = Gathering()
    gathering.num_under_way = 1
    for _ in range(MAX_TOGETHER + 3):
        gathering.add(Ticket(one(0), 9.0, None), 0.0)
    assert gathering.due_in_s(0.0, 2.0) == 0.0
    assert len(gathering.take(1.0)) == MAX_TOGETHER
    assert gathering.due_in_s(1.0, 2.0) == 2.0 and len(gathering.waiting) == 3  # a window of their own


# --- against a server ---


def answer_of(observation: Any, request_id: str) -> dict[str, Any]:
    """What the test's policy says: who asks can tell its own answer from any other."""
    if observation[0] == "bad":
        return {"error": {"status": 422, "message": "observation[0] is str"}}
    return {"action": observation[0], "decision_id": f"{request_id}.tag", "version": 1}


def respond(exchange: Exchange) -> None:
    body = exchange.body
    if "observations" in body:
        decisions = [answer_of(o, r) for o, r in zip(body["observations"], body["request_ids"])]
        return exchange.answer(200, {"policy": "demo", "decisions": decisions})
    item = answer_of(body["observation"], body["request_id"])
    if "error" in item:
        return exchange.refuse(422, item["error"]["message"])
    exchange.answer(200, {**item, "policy": "demo"})


def sizes(server: ScriptedServer) -> list[int]:
    return [len(body["observations"]) if "observations" in body else 1 for body in server.posts]


def ask_with_threads(url: str, asks: list[dict[str, Any]], *, window_ms: float, seed: int = 0) -> list[Any]:
    """Ask from a thread each, after a pause of up to 20 ms; return what each got, an answer or an error."""
    rng, results = random.Random(seed), [None] * len(asks)
    pauses_s = [rng.uniform(0, 0.02) for _ in asks]
    with Client(url, "key", timeout_s=20.0, direct=False, batch_window_ms=window_ms) as client:

        def run(index: int) -> None:
            threading.Event().wait(pauses_s[index])
            try:
                results[index] = client.decide(**asks[index])
            except Exception as error:
                results[index] = error

        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(asks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    return results


def ask_with_tasks(url: str, asks: list[dict[str, Any]], *, window_ms: float, seed: int = 0) -> list[Any]:
    rng = random.Random(seed)

    async def run() -> list[Any]:
        async with AsyncClient(url, "key", timeout_s=20.0, direct=False, batch_window_ms=window_ms) as client:

            async def ask(options: dict[str, Any], pause_s: float) -> dict[str, Any]:
                await asyncio.sleep(pause_s)
                return await client.decide(**options)

            return await asyncio.gather(*(ask(options, rng.uniform(0, 0.02)) for options in asks), return_exceptions=True)

    return asyncio.run(run())


AskAll = Callable[..., list[Any]]
both = pytest.mark.parametrize("ask_all", [ask_with_threads, ask_with_tasks])


def wrong_answers(ask_all: AskAll, seed: int) -> tuple[int, list[int]]:
    """Return how many of 60 concurrent callers did not get their own answer, and the sizes of the requests."""
    with serving(respond) as server:
        asks = [{"observation": [number], "request_id": f"r{number}"} for number in range(60)]
        results = ask_all(server.url, asks, window_ms=5.0, seed=seed)
        found = sizes(server)
    expected = [{"action": n, "decision_id": f"r{n}.tag", "version": 1, "policy": "demo"} for n in range(60)]
    return sum(result != right for result, right in zip(results, expected)), found


@both
@pytest.mark.parametrize("seed", range(5))
def test_everybody_gets_their_own_answer_whoever_they_go_with(ask_all: AskAll, seed: int) -> None:
    num_wrong, found = wrong_answers(ask_all, seed)
    assert num_wrong == 0 and sum(found) == 60
    assert max(found) > 1  # or nothing was tested


@both
def test_answers_in_another_order_would_be_noticed(ask_all: AskAll, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the answers of a request turned around."""
    answers_of = coalescing.answers_of
    for module in ("client", "async_client"):
        monkeypatch.setattr(f"trimtab.{module}.answers_of", lambda answer, num: answers_of(answer, num)[::-1])
    assert wrong_answers(ask_all, 0)[0] > 0


def one_held(release_when: Callable[[ScriptedServer], bool]) -> Callable[[ScriptedServer], Callable[[Exchange], None]]:
    """Return a behaviour that holds its first request until a condition is true of the server, 20 s at most."""

    def behave(exchange: Exchange) -> None:
        if exchange.number == 0:
            for _ in range(2000):
                if release_when(behave.server) or exchange.stopped.wait(0.01):
                    break
        respond(exchange)

    return behave


@both
def test_a_lone_caller_does_not_wait_for_the_window(ask_all: AskAll) -> None:
    with serving(respond) as server:
        [result] = ask_all(server.url, [{"observation": [7]}], window_ms=FOR_EVER_MS)
        assert result["action"] == 7 and sizes(server) == [1]  # with a window of a minute and 20 s to answer


@both
def test_who_waits_goes_when_the_request_before_is_back(ask_all: AskAll) -> None:
    with serving(respond) as server:
        results = ask_all(server.url, [{"observation": [n]} for n in range(20)], window_ms=FOR_EVER_MS)
        assert [result["action"] for result in results] == list(range(20))
        assert sum(sizes(server)) == 20


@both
def test_who_waits_goes_when_the_window_is_over_though_the_request_before_hangs(ask_all: AskAll) -> None:
    behave = one_held(lambda server: sum(sizes(server)) == 10)  # the first is answered when all others have arrived
    with serving(behave) as server:
        behave.server = server
        results = ask_all(server.url, [{"observation": [n]} for n in range(10)], window_ms=30.0)
        assert [result["action"] for result in results] == list(range(10))


@both
def test_one_bad_observation_is_nobody_elses(ask_all: AskAll) -> None:
    behave = one_held(lambda server: len(server.posts) > 1)
    with serving(behave) as server:
        behave.server = server
        asks = [{"observation": ["bad" if n == 5 else n]} for n in range(12)]
        results = ask_all(server.url, asks, window_ms=60.0)
        assert max(sizes(server)) > 1
    errors = {n: result for n, result in enumerate(results) if isinstance(result, Exception)}
    assert list(errors) == [5] and isinstance(errors[5], RequestInvalid) and "observation[0] is str" in str(errors[5])


@both
@pytest.mark.parametrize("culprit", [{"observation": [float("nan")]}, {"observation": [1], "unit_id": "too long"}])
def test_a_request_that_is_refused_because_of_one_is_not_refused_to_the_others(ask_all: AskAll, culprit: dict) -> None:
    def strict(exchange: Exchange) -> None:
        body = exchange.body
        if "too long" in (body.get("unit_ids") or [body.get("unit_id")]):
            return exchange.refuse(422, "Expected `str` of length <= 256")
        behave(exchange)

    behave = one_held(lambda server: len(server.posts) > 1)
    with serving(strict) as server:
        behave.server = server
        results = ask_all(server.url, [{"observation": [n]} for n in range(8)] + [culprit], window_ms=60.0)
        assert max(sizes(server)) > 1 or "unit_id" not in culprit  # NaN is no JSON: what holds it never left
    assert [result["action"] for result in results[:-1]] == list(range(8))
    assert isinstance(results[-1], RequestInvalid)


@both
def test_trouble_of_the_whole_request_is_tried_again_under_the_same_ids(ask_all: AskAll) -> None:
    def once_away(exchange: Exchange) -> None:
        body = exchange.body
        if "observations" in body and not seen:
            seen.append(sorted(body["request_ids"]))
            return exchange.refuse(503)
        seen.extend([sorted(body["request_ids"])] if "observations" in body else [])
        behave(exchange)

    seen: list[list[str]] = []
    behave = one_held(lambda server: len(server.posts) > 1)
    with serving(once_away) as server:
        behave.server = server
        results = ask_all(server.url, [{"observation": [n]} for n in range(8)], window_ms=60.0)
    assert [result["action"] for result in results] == list(range(8))
    assert seen[0] in seen[1:]


@both
def test_what_is_wrong_with_all_reaches_every_caller_as_an_error_of_its_own(ask_all: AskAll) -> None:
    with serving(lambda exchange: exchange.refuse(401, "the key is wrong")) as server:
        results = ask_all(server.url, [{"observation": [n]} for n in range(10)], window_ms=20.0)
    assert all(isinstance(result, Unauthorized) for result in results)
    assert len({id(result) for result in results}) == 10


@both
def test_calls_that_differ_in_what_is_said_once_do_not_go_together(ask_all: AskAll) -> None:
    with serving(respond) as server:
        modes = ["greedy", "sample", None]
        ask_all(server.url, [{"observation": [n], "mode": modes[n % 3]} for n in range(30)], window_ms=20.0)
        assert sum(sizes(server)) == 30
        by_mode = {
            mode: sum(size for body, size in zip(server.posts, sizes(server)) if body.get("mode") == mode) for mode in modes
        }
    assert by_mode == {"greedy": 10, "sample": 10, None: 10}


def test_units_and_episodes_are_said_as_the_endpoint_would_fill_them_in() -> None:
    def ask(**names):
        return single([0], **{"action_mask": None, "unit_id": None, "episode_id": None, **names})

    ones = [ask(unit_id="u", request_id="a"), ask(episode_id="e", request_id="b"), ask(request_id="c")]
    body = calls.together(ones, mode=None, explain=False).body
    assert (body["unit_ids"], body["episode_ids"], body["request_ids"]) == (["u", "e", "c"], [None, "e", None], ["a", "b", "c"])


# --- what threads do to each other ---


def test_a_bounded_number_waits() -> None:
    begun, release = threading.Event(), threading.Event()

    def send(ones, kind, timeout_s):
        begun.set()
        release.wait(20)
        return [{"action": o.observation[0]} for o in ones]

    coalescer = Coalescer(send, window_s=60.0)
    first = threading.Thread(target=coalescer.decide, args=(one(0), KIND))
    first.start()
    assert begun.wait(10)
    [gathering] = coalescer._gatherings.values()
    gathering.waiting = [Ticket(one(0), 9e9, threading.Condition(coalescer._lock)) for _ in range(MAX_WAITING)]
    with pytest.raises(Overloaded, match=f"{MAX_WAITING} decisions wait"):
        coalescer.decide(one(1), KIND)
    gathering.waiting = []
    release.set()
    first.join(10)
    assert not coalescer._gatherings  # nothing is kept of a kind that nobody asks for


def test_a_batch_may_take_as_long_as_the_most_hurried_of_its_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    limits_s: list[float] = []
    batch = [Ticket(one(n), deadline_s, None) for n, deadline_s in enumerate([105.0, 102.0, 109.0])]
    monkeypatch.setattr(coalescing.time, "monotonic", lambda: 100.0)
    coalescing.outcomes_of(batch, lambda ones, kind, timeout_s: limits_s.append(timeout_s) or [], KIND)
    assert limits_s == [2.0]


def test_who_is_interrupted_while_carrying_others_tells_them() -> None:
    """Ctrl-C reaches the thread that carries: without a word the others would wait for ever."""
    begun, release = threading.Event(), threading.Event()

    def send(ones, kind, timeout_s):
        if ones[0].observation == [0]:
            begun.set()
            release.wait(20)
            return [{"action": 0}]
        raise KeyboardInterrupt

    def ask(number: int) -> None:
        try:
            outcomes[number] = coalescer.decide(one(number), KIND)
        except BaseException as error:
            outcomes[number] = error

    coalescer, outcomes = Coalescer(send, window_s=0.2), {}
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    threads[0].start()
    assert begun.wait(10)
    for thread in threads[1:]:
        thread.start()
    for thread in threads[1:]:
        thread.join(10)
    release.set()
    threads[0].join(10)
    assert outcomes[0] == {"action": 0}
    kinds = sorted(type(outcomes[number]).__name__ for number in (1, 2, 3))
    assert kinds == ["ClusterError", "ClusterError", "KeyboardInterrupt"]
    assert all("interrupted" in str(o) for o in outcomes.values() if isinstance(o, ClusterError))


def test_a_cancelled_task_takes_nobody_with_it() -> None:
    async def run(url: str) -> list[Any]:
        async with AsyncClient(url, "key", timeout_s=20.0, direct=False, batch_window_ms=50.0) as client:
            tasks = [asyncio.create_task(client.decide([n])) for n in range(6)]
            await asyncio.sleep(0.02)  # the first is under way, the others wait
            tasks[0].cancel()
            tasks[1].cancel()
            await asyncio.sleep(0.1)
            tasks[2].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    behave = one_held(lambda server: len(server.posts) > 1)
    with serving(behave) as server:
        behave.server = server
        results = asyncio.run(run(server.url))
    assert all(isinstance(result, asyncio.CancelledError) for result in results[:2])
    assert [result["action"] for result in results[3:]] == [3, 4, 5]
