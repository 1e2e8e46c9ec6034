"""Ask a served policy for decisions and report what came of them."""

import time
import uuid
from types import TracebackType
from typing import Any

import requests

from policies.errors import ClusterError, DecisionUnknown, Overloaded, RequestInvalid, RequestRefused, Unauthorized

RETRY_STATUSES = (429, 500, 502, 503, 504)
FIRST_PAUSE_S = 0.05  # doubles per try: a replica that restarts is back after some of these, a full queue after one or two


class Client:
    """A blocking client of one endpoint; keeps its connection open, use it as a context manager or call `close`.

        with Client("http://127.0.0.1:8000", key) as client:
            decision = client.decide([0.1, 0.0, -0.02, 0.0], unit_id="user-17")
            client.feedback(decision["decision_id"], reward=1.0, final=True)

    A call that fails on the way is repeated with the same `request_id` until `timeout_s` is over: the same id is the same
    decision, so repeating is safe.
    """

    def __init__(self, url: str, key: str, *, timeout_s: float = 5.0) -> None:
        self._url = url.rstrip("/")
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

        Raises `RequestInvalid`, `Unauthorized`, `Overloaded` as the endpoint answers, `ClusterError` when nothing answers.
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
            remaining_s = deadline - time.monotonic()
            try:
                response = self._session.request(method, self._url + path, json=body, timeout=max(remaining_s, 0.001))
                if response.status_code not in RETRY_STATUSES or remaining_s <= pause_s:
                    return _answer(response)
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                if remaining_s <= pause_s:
                    raise ClusterError(f"{self._url} did not answer within {self._timeout_s:g} s: {error}") from error
            except (requests.RequestException, ValueError) as error:
                raise RequestInvalid(f"the request cannot be sent: {error}") from error
            time.sleep(pause_s)
            pause_s *= 2


def _answer(response: requests.Response) -> dict[str, Any]:
    if response.ok:
        return response.json()
    message = f"HTTP {response.status_code}: {_message(response)}"
    kinds: dict[int, type[RequestRefused]] = {401: Unauthorized, 404: DecisionUnknown, 429: Overloaded}
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
