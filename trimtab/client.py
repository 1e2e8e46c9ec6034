"""Ask a served policy for decisions and report what came of them."""

import time
import uuid
from types import TracebackType
from typing import Any

import requests

from policies.errors import ClusterError, DecisionUnknown, Forbidden, Overloaded, RequestInvalid, RequestRefused, Unauthorized

RETRY_STATUSES = (429, 500, 502, 503, 504)
CONNECT_TIMEOUT_S = 0.5  # to a replica's own port, which may be behind a firewall: then the endpoint is the way
LOOK_INTERVAL_S, LOOK_TIMEOUT_S = 5.0, 1.0  # how often the endpoint is asked where the replicas are, and how long that may take
ASIDE_S = 30.0
FIRST_PAUSE_S = 0.05  # doubles per try: a replica that restarts is back after some of these, a full queue after one or two


class Client:
    """A blocking client of one endpoint; keeps its connection open, use it as a context manager or call `close`.

        with Client("http://127.0.0.1:8000", key) as client:
            decision = client.decide([0.1, 0.0, -0.02, 0.0], unit_id="user-17")
            client.feedback(decision["decision_id"], reward=1.0, final=True)

    A call that fails on the way is repeated with the same `request_id` until `timeout_s` is over: the same id is the same
    decision, so repeating is safe. Where replicas have a direct lane the calls go there, in turn, and to the endpoint itself
    when none answers; `direct=False` only asks the endpoint.
    """

    def __init__(self, url: str, key: str, *, timeout_s: float = 5.0, direct: bool = True) -> None:
        self._url = url.rstrip("/")
        self._lanes = DirectLanes() if direct else None
        self._timeout_s = timeout_s
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {key}"
        self._session.trust_env = False  # a proxy from the environment has no business between us and our own endpoint

    def decide(
        self,
        observation: Any,
        *,
        action_mask: list[int] | None = None,
        unit_id: str | None = None,
        episode_id: str | None = None,
        request_id: str | None = None,
    ) -> dict[str, Any]:
        """Return the decision for one observation (a number, lists or an object, as the policy's spaces say).

        That is: action, decision_id, policy, version, arm, propensity, fallback. `action_mask` says which choices exist now.

        Raises `RequestInvalid`, `Unauthorized`, `Forbidden`, `Overloaded` as the endpoint answers, `ClusterError` when nothing
        answers.
        """
        body = {"observation": observation, "action_mask": action_mask, "unit_id": unit_id, "episode_id": episode_id}
        body = {key: value for key, value in body.items() if value is not None}
        return self._call("POST", "/v1/decide", {**body, "request_id": request_id or uuid.uuid4().hex})

    def feedback(self, decision_id: str, *, reward: float, final: bool = False) -> dict[str, Any]:
        """Report the reward of a decision; `final` says that its episode is over. Sent twice it counts once."""
        return self._call("POST", "/v1/feedback", {"decision_id": decision_id, "reward": reward, "final": final})

    def status(self) -> dict[str, Any]:
        """Return what the monitor knows: plan, arms, release, versions."""
        return self._call("GET", "/v1/status", None)

    def close(self) -> None:
        """Close the connection."""
        self._session.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        deadline, pause_s = time.monotonic() + self._timeout_s, FIRST_PAUSE_S
        while True:
            remaining_s = max(deadline - time.monotonic(), 0.001)
            url = self._next_url(remaining_s)
            is_direct = url != self._url
            # One frozen replica must leave time for another way.
            direct_s = min(remaining_s, self._timeout_s / 3)
            timeout = (min(CONNECT_TIMEOUT_S, direct_s), direct_s) if is_direct else remaining_s
            try:
                response = self._session.request(method, url + path, json=body, timeout=timeout)
                if response.status_code not in RETRY_STATUSES or remaining_s <= pause_s:
                    return _answer(response)
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                if is_direct:
                    self._lanes.set_aside(url, now_s=time.monotonic())
                    continue  # at once: there is another way
                if remaining_s <= pause_s:
                    raise ClusterError(f"{self._url} did not answer within {self._timeout_s:g} s: {error}") from error
            except (requests.RequestException, ValueError) as error:
                raise RequestInvalid(f"the request cannot be sent: {error}") from error
            time.sleep(pause_s)
            pause_s *= 2

    def _next_url(self, remaining_s: float) -> str:
        """Return where the next try goes: a replica's own port, or the endpoint."""
        if self._lanes is None or remaining_s <= 0.001:
            return self._url
        now_s = time.monotonic()
        if self._lanes.are_old(now_s):
            try:
                response = self._session.get(f"{self._url}/v1/endpoints", timeout=min(LOOK_TIMEOUT_S, remaining_s))
                urls = response.json()["endpoints"] if response.ok else None
                urls = [] if response.status_code == 404 else urls  # an endpoint without direct lanes
            except (requests.RequestException, ValueError, KeyError, TypeError):
                urls = None  # the endpoint is away; the replicas may be there
            self._lanes.replace(urls, now_s=now_s)
        return self._lanes.next(now_s) or self._url


class DirectLanes:
    """The replicas' own ports that are known, used in turn; one that failed is left alone for a while."""

    def __init__(self) -> None:
        self._urls: list[str] = []
        self._looked_s = float("-inf")
        self._aside_until_s: dict[str, float] = {}
        self._num_taken = 0

    def are_old(self, now_s: float) -> bool:
        return now_s - self._looked_s >= LOOK_INTERVAL_S

    def replace(self, urls: list[str] | None, *, now_s: float) -> None:
        """Take in what the endpoint says; None keeps what is known."""
        self._looked_s = now_s
        if urls is not None:
            self._urls = [str(url).rstrip("/") for url in urls]

    def set_aside(self, url: str, *, now_s: float) -> None:
        self._aside_until_s[url] = now_s + ASIDE_S

    def next(self, now_s: float) -> str | None:
        """Return the next one's URL, or None when there is none to use."""
        usable = [url for url in self._urls if self._aside_until_s.get(url, 0.0) <= now_s]
        if not usable:
            return None
        self._num_taken += 1
        return usable[self._num_taken % len(usable)]


def _answer(response: requests.Response) -> dict[str, Any]:
    if response.ok:
        return response.json()
    message = f"HTTP {response.status_code}: {_message(response)}"
    kinds: dict[int, type[RequestRefused]] = {401: Unauthorized, 403: Forbidden, 404: DecisionUnknown, 429: Overloaded}
    if response.status_code in kinds:
        raise kinds[response.status_code](message)
    if response.status_code < 500:
        raise RequestInvalid(message, response.status_code)
    raise ClusterError(message)


def _message(response: requests.Response) -> str:
    try:
        return response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
