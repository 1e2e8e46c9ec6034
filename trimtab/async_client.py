"""The client for programs that run on asyncio: the same methods and rules as `trimtab.Client`, awaited."""

import asyncio
import random
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import aiohttp

from policies.errors import ClusterError, RequestInvalid, TrimtabError
from trimtab import calls
from trimtab.calls import FeedbackItem, Mode, Single
from trimtab.coalescing import Gathering, Kind, Ticket, answers_of, asks_alone, earliest_s, own_result, require_room
from trimtab.lanes import DirectLanes
from trimtab.retrying import Answered, Call, Failed, Pause, Send, Steps, exchange, retry_after_s


class AsyncClient:
    """A client of one endpoint for one event loop: make it, use it and `close` it there.

        async with AsyncClient("http://127.0.0.1:8000", key) as client:
            decision = await client.decide([0.1, 0.0, -0.02, 0.0], unit_id="user-17")

    See `trimtab.Client` for arguments, retries and errors. Any number of tasks may share it; threads may not.
    """

    def __init__(
        self, url: str, key: str, *, timeout_s: float = 5.0, direct: bool = True, batch_window_ms: float | None = None
    ) -> None:
        self._url = url.rstrip("/")
        self._lanes = DirectLanes() if direct else None
        self._timeout_s = timeout_s
        self._rng = random.Random()
        self._coalescer = _TaskCoalescer(self._decide_together, batch_window_ms / 1000) if batch_window_ms else None
        connector = aiohttp.TCPConnector(limit=0)  # who asks for many at once is bounded by the endpoint, which says 429
        self._session = aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}, connector=connector)

    async def decide(
        self,
        observation: Any,
        *,
        action_mask: list[int] | None = None,
        unit_id: str | None = None,
        episode_id: str | None = None,
        request_id: str | None = None,
        state: str | None = None,
        mode: Mode | None = None,
        explain: bool = False,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Return the decision for one observation, see `Client.decide`."""
        one = calls.single(
            observation, action_mask=action_mask, unit_id=unit_id, episode_id=episode_id, request_id=request_id, state=state
        )
        if self._coalescer is None:
            return await self._call(calls.decide(one, mode=mode, explain=explain), timeout_s)
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        return await self._coalescer.decide(one, Kind(mode, explain, action_mask is not None, limit_s))

    async def decide_many(
        self,
        observations: Sequence[Any],
        *,
        action_masks: Sequence[Any] | None = None,
        unit_id: str | None = None,
        unit_ids: Sequence[str] | None = None,
        episode_ids: Sequence[str | None] | None = None,
        request_id: str | None = None,
        request_ids: Sequence[str] | None = None,
        states: Sequence[str | None] | None = None,
        mode: Mode | None = None,
        explain: bool = False,
        timeout_s: float | None = None,
    ) -> list[dict[str, Any]]:
        """Return a decision per observation, see `Client.decide_many`."""
        call = calls.decide_many(
            observations,
            action_masks=action_masks,
            unit_id=unit_id,
            unit_ids=unit_ids,
            episode_ids=episode_ids,
            request_id=request_id,
            request_ids=request_ids,
            states=states,
            mode=mode,
            explain=explain,
        )
        return answers_of(await self._call(call, timeout_s), len(observations))

    async def feedback(
        self, decision_id: str, *, reward: float, final: bool = False, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Report the reward of a decision, see `Client.feedback`."""
        return await self._call(calls.feedback(decision_id, reward=reward, final=final), timeout_s)

    async def feedback_many(self, items: Sequence[FeedbackItem], *, timeout_s: float | None = None) -> dict[str, Any]:
        """Report up to 1,000 rewards in one request: all are accepted, or none."""
        return await self._call(calls.feedback_many(items), timeout_s)

    async def override(self, decision_id: str, action: Any, reason: str, *, timeout_s: float | None = None) -> dict[str, Any]:
        """Record that `action` was done instead of what was decided, and why."""
        return await self._call(calls.override(decision_id, action, reason), timeout_s)

    async def status(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """Return what the monitor knows: plan, arms, release, versions."""
        return await self._call(calls.STATUS, timeout_s)

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def _decide_together(self, ones: list[Single], kind: Kind, timeout_s: float) -> list[Any]:
        if len(ones) == 1:
            return [await self._call(calls.decide(ones[0], mode=kind.mode, explain=kind.explain), timeout_s)]
        answer = await self._call(calls.together(ones, mode=kind.mode, explain=kind.explain), timeout_s)
        return answers_of(answer, len(ones))

    async def _call(self, call: Call, timeout_s: float | None) -> Any:
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        return await self._follow(
            exchange(call, url=self._url, lanes=self._lanes, timeout_s=limit_s, now_s=time.monotonic, rng=self._rng)
        )

    async def _follow(self, steps: Steps) -> Any:
        outcome: Answered | Failed | None = None
        try:
            while True:
                step = steps.send(outcome)
                outcome = await self._try(step) if isinstance(step, Send) else await _pause(step)
        except StopIteration as end:
            return end.value

    async def _try(self, send: Send) -> Answered | Failed:
        headers = {"Content-Type": "application/json"} if send.body is not None else {}
        limits = aiohttp.ClientTimeout(total=send.timeout_s, sock_connect=send.connect_timeout_s)
        try:
            async with self._session.request(
                send.method, send.url, data=send.body, headers=headers, timeout=limits, allow_redirects=False
            ) as response:
                return Answered(response.status, await response.read(), retry_after_s(response.headers.get("Retry-After")))
        except (ValueError, aiohttp.NonHttpUrlClientError) as error:  # an address that is none; first: they are ClientErrors too
            raise RequestInvalid(f"the request cannot be sent: {error}") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return Failed(error if str(error) else TimeoutError(f"{type(error).__name__} after {send.timeout_s:.3g} s"))


class _TaskCoalescer:
    """Lets tasks' calls go together, see `trimtab.coalescing`. A batch has a task of its own: a caller may be cancelled."""

    def __init__(self, send: Any, window_s: float) -> None:
        self._send = send
        self._window_s = window_s
        self._gatherings: dict[Kind, Gathering] = {}
        self._timers: dict[Kind, asyncio.TimerHandle] = {}
        self._carriers: set[asyncio.Task[None]] = set()

    async def decide(self, one: Single, kind: Kind) -> dict[str, Any]:
        loop, now_s = asyncio.get_running_loop(), time.monotonic()
        gathering = self._gatherings.setdefault(kind, Gathering())
        require_room(gathering)
        ticket = Ticket(one, now_s + kind.timeout_s, loop.create_future())
        gathering.add(ticket, now_s)
        self._carry_if_due(gathering, kind)
        await ticket.waker
        if asks_alone(ticket.outcome):
            [ticket.outcome] = await self._send([one], kind, ticket.deadline_s - time.monotonic())
        return own_result(ticket.outcome)

    def _carry_if_due(self, gathering: Gathering, kind: Kind) -> None:
        """Send those who wait if it is time, else see to it that somebody looks again when it will be."""
        gathering.waiting = [ticket for ticket in gathering.waiting if not ticket.waker.done()]  # without who was cancelled
        if not gathering.waiting:
            return
        now_s = time.monotonic()
        due_in_s = gathering.due_in_s(now_s, self._window_s)
        if due_in_s:
            if kind not in self._timers:
                self._timers[kind] = asyncio.get_running_loop().call_later(due_in_s, self._wake, gathering, kind)
            return
        carrier = asyncio.create_task(self._carry(gathering.take(now_s), gathering, kind))
        self._carriers.add(carrier)
        carrier.add_done_callback(self._carriers.discard)

    def _wake(self, gathering: Gathering, kind: Kind) -> None:
        self._timers.pop(kind, None)
        self._carry_if_due(gathering, kind)

    async def _carry(self, batch: list[Ticket], gathering: Gathering, kind: Kind) -> None:
        outcomes: list[Any] = [ClusterError("the client was closed meanwhile; ask again")] * len(batch)
        try:
            outcomes = await self._send([ticket.one for ticket in batch], kind, earliest_s(batch) - time.monotonic())
        except TrimtabError as error:
            outcomes = [error] * len(batch)
        finally:
            gathering.num_under_way -= 1
            for ticket, outcome in zip(batch, outcomes):
                ticket.outcome = outcome
                if not ticket.waker.done():
                    ticket.waker.set_result(None)
            self._carry_if_due(gathering, kind)
            if gathering.is_idle:
                self._forget(kind)

    def _forget(self, kind: Kind) -> None:
        """Keep nothing of a kind that nobody asks for any more: there may be as many as there are time limits."""
        self._gatherings.pop(kind, None)
        timer = self._timers.pop(kind, None)
        if timer is not None:
            timer.cancel()


async def _pause(pause: Pause) -> None:
    await asyncio.sleep(pause.seconds)
