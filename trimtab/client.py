"""Ask a served policy for decisions and report what came of them."""

import random
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import requests
import urllib3

from policies.errors import RequestInvalid
from trimtab import calls
from trimtab.calls import FeedbackItem, Mode, Single
from trimtab.coalescing import Coalescer, Kind, answers_of
from trimtab.lanes import DirectLanes
from trimtab.retrying import Answered, Call, Failed, Pause, Send, Steps, exchange, retry_after_s
from trimtab.timely import timely_session

if TYPE_CHECKING:
    from trimtab.local_client import LocalClient


class Client:
    """A blocking client of one endpoint; keeps its connections open, use it as a context manager or call `close`.

        with Client("http://127.0.0.1:8000", key) as client:
            decision = client.decide([0.1, 0.0, -0.02, 0.0], unit_id="user-17")
            client.feedback(decision["decision_id"], reward=1.0, final=True)

    A call that fails on the way is repeated with the same `request_id` until `timeout_s` is over: the same id is the same
    decision, so repeating is safe. Where replicas have a direct lane the calls go there, in turn, and to the endpoint itself
    when none answers; `direct=False` only asks the endpoint. With `batch_window_ms`, `decide` calls of several threads that are
    under way at the same time go together (see `trimtab.coalescing` for what a call may have to wait).

    Threads may share one client: each has connections of its own. Forked processes may not, each makes its own.
    """

    def __init__(
        self, url: str, key: str, *, timeout_s: float = 5.0, direct: bool = True, batch_window_ms: float | None = None
    ) -> None:
        self._url = url.rstrip("/")
        self._key = key
        self._lanes = DirectLanes() if direct else None
        self._timeout_s = timeout_s
        self._rng = random.Random()
        self._coalescer = Coalescer(self._decide_together, window_s=batch_window_ms / 1000) if batch_window_ms else None
        self._threads = threading.local()
        self._sessions: dict[threading.Thread, requests.Session] = {}
        self._lock = threading.Lock()

    @staticmethod
    def local(url: str, key: str, **options: Any) -> "LocalClient":
        """Return a client that decides in this process, see `trimtab.local_client.LocalClient` for its options."""
        from trimtab.local_client import LocalClient  # here: who asks an endpoint needs no policy, and no numpy

        return LocalClient(url, key, **options)

    def decide(
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
        """Return the decision for one observation (a number, lists or an object, as the policy's spaces say).

        That is: action, decision_id, policy, version, arm, propensity, fallback. `action_mask` says which choices exist now,
        `mode` asks for another one than the version's own, `explain` for the reasons. `timeout_s` is this call's own limit.

        For a policy with a history `state` is "" with an episode's first observation, and with each later one the `state` of the
        decision before; `observation` is then the newest one alone.

        Raises `RequestInvalid`, `Unauthorized`, `Forbidden`, `Overloaded` as the endpoint answers, `RequestConflict` for a
        request id that was used for something else, `ClusterError` when nothing answers.
        """
        one = calls.single(
            observation, action_mask=action_mask, unit_id=unit_id, episode_id=episode_id, request_id=request_id, state=state
        )
        if self._coalescer is None:
            return self.call(calls.decide(one, mode=mode, explain=explain), timeout_s)
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        return self._coalescer.decide(one, Kind(mode, explain, action_mask is not None, limit_s))

    def decide_many(
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
        """Return a decision per observation, in one request; lists are of the same length, what is no list is for all.

        An observation whose state is None is a whole one.

        What is wrong with one of them is said in its place, `{"error": {"status": 422, "message": …}}`, and raised for none.
        Raises as `decide` does for what is wrong with all.
        """
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
        return answers_of(self.call(call, timeout_s), len(observations))

    def feedback(self, decision_id: str, *, reward: float, final: bool = False, timeout_s: float | None = None) -> dict[str, Any]:
        """Report the reward of a decision; `final` says that its episode is over. Sent twice it counts once."""
        return self.call(calls.feedback(decision_id, reward=reward, final=final), timeout_s)

    def feedback_many(self, items: Sequence[FeedbackItem], *, timeout_s: float | None = None) -> dict[str, Any]:
        """Report up to 1,000 rewards in one request: all are accepted, or none."""
        return self.call(calls.feedback_many(items), timeout_s)

    def override(self, decision_id: str, action: Any, reason: str, *, timeout_s: float | None = None) -> dict[str, Any]:
        """Record that `action` was done instead of what was decided, and why: its outcome is not the policy's."""
        return self.call(calls.override(decision_id, action, reason), timeout_s)

    def status(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """Return what the monitor knows: plan, arms, release, versions."""
        return self.call(calls.STATUS, timeout_s)

    def call(self, call: Call, timeout_s: float | None = None) -> Any:
        """Make any request with this client's retries; what the methods above are made of."""
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        return self._follow(
            exchange(call, url=self._url, lanes=self._lanes, timeout_s=limit_s, now_s=time.monotonic, rng=self._rng)
        )

    def close(self) -> None:
        """Close the connections of all threads."""
        with self._lock:
            for session in self._sessions.values():
                session.close()
            self._sessions = {}

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _decide_together(self, ones: list[Single], kind: Kind, timeout_s: float) -> list[Any]:
        if len(ones) == 1:  # as if there was no coalescing: the usual request is the cheapest
            return [self.call(calls.decide(ones[0], mode=kind.mode, explain=kind.explain), timeout_s)]
        answer = self.call(calls.together(ones, mode=kind.mode, explain=kind.explain), timeout_s)
        return answers_of(answer, len(ones))

    def _follow(self, steps: Steps) -> Any:
        """Do what the steps say, one after the other, and return what they come to."""
        outcome: Answered | Failed | None = None
        try:
            while True:
                step = steps.send(outcome)
                outcome = self._try(step) if isinstance(step, Send) else _pause(step)
        except StopIteration as end:
            return end.value

    def _try(self, send: Send) -> Answered | Failed:
        headers = {"Content-Type": "application/json"} if send.body is not None else {}
        # `total`: what connecting takes is not there for the answer any more.
        limits: Any = urllib3.Timeout(total=send.timeout_s, connect=send.connect_timeout_s)
        try:
            response = self._session().request(
                send.method, send.url, data=send.body, headers=headers, timeout=limits, allow_redirects=False
            )
            return Answered(response.status_code, response.content, retry_after_s(response.headers.get("Retry-After")))
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            if isinstance(error, ValueError):  # an address that is none, a header that cannot be: no try would be another one
                raise RequestInvalid(f"the request cannot be sent: {error}") from error
            return Failed(error)

    def _session(self) -> requests.Session:
        """Return this thread's session: `requests` does not promise that threads may share one."""
        session = getattr(self._threads, "session", None)
        if session is None:
            session = timely_session()
            session.headers["Authorization"] = f"Bearer {self._key}"
            session.trust_env = False  # a proxy from the environment has no business between us and our own endpoint
            self._threads.session = session
            with self._lock:
                self._close_those_of_ended_threads()
                self._sessions[threading.current_thread()] = session
        return session

    def _close_those_of_ended_threads(self) -> None:
        """A process that starts a thread per job would otherwise keep a connection for each that ever was."""
        for thread in [thread for thread in self._sessions if not thread.is_alive()]:
            self._sessions.pop(thread).close()


def _pause(pause: Pause) -> None:
    time.sleep(pause.seconds)
