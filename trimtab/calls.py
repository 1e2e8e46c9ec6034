"""Which request each method of a client is."""

import uuid
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypedDict
from urllib.parse import quote

from trimtab.retrying import Call

Mode = Literal["greedy", "sample"]

STATUS = Call("GET", "/v1/status")


class FeedbackItem(TypedDict, total=False):
    """The reward of one decision; without `final` its episode goes on."""

    decision_id: str
    reward: float
    final: bool


class Single(NamedTuple):
    """One decision that is asked for; its request id is there from the beginning, so that every try has the same."""

    observation: Any
    action_mask: Any
    unit_id: str | None
    episode_id: str | None
    request_id: str
    state: str | None = None


def single(
    observation: Any,
    *,
    action_mask: Any,
    unit_id: str | None,
    episode_id: str | None,
    request_id: str | None,
    state: str | None = None,
) -> Single:
    """Return a decision to ask for, under a new request id where none is given."""
    return Single(observation, action_mask, unit_id, episode_id, request_id or uuid.uuid4().hex, state)


def decide(one: Single, *, mode: Mode | None, explain: bool) -> Call:
    """Return the request for one decision."""
    return Call("POST", "/v1/decide", {**_given(one._asdict()), **_options(mode, explain)}, tells_deadline=True)


def decide_many(
    observations: Sequence[Any],
    *,
    action_masks: Sequence[Any] | None,
    unit_id: str | None,
    unit_ids: Sequence[str] | None,
    episode_ids: Sequence[str | None] | None,
    request_id: str | None,
    request_ids: Sequence[str] | None,
    states: Sequence[str | None] | None,
    mode: Mode | None,
    explain: bool,
) -> Call:
    """Return the request for many decisions."""
    if request_id is None and request_ids is None:
        request_id = uuid.uuid4().hex
    lists = {
        "action_masks": action_masks,
        "unit_ids": unit_ids,
        "episode_ids": episode_ids,
        "request_ids": request_ids,
        "states": states,
    }
    body = {name: list(values) for name, values in lists.items() if values is not None}
    body |= _given({"unit_id": unit_id, "request_id": request_id})
    return Call(
        "POST", "/v1/decide", {"observations": list(observations), **body, **_options(mode, explain)}, tells_deadline=True
    )


def together(ones: Sequence[Single], *, mode: Mode | None, explain: bool) -> Call:
    """Return one request for decisions that several callers ask for, each under its own request id.

    Among many a unit cannot be left out for one alone, so each is said as the endpoint would fill it in.
    """
    return decide_many(
        [one.observation for one in ones],
        action_masks=None if all(one.action_mask is None for one in ones) else [one.action_mask for one in ones],
        unit_id=None,
        unit_ids=[one.unit_id or one.episode_id or one.request_id for one in ones],
        episode_ids=None if all(one.episode_id is None for one in ones) else [one.episode_id for one in ones],
        request_id=None,
        request_ids=[one.request_id for one in ones],
        states=None if all(one.state is None for one in ones) else [one.state for one in ones],
        mode=mode,
        explain=explain,
    )


def feedback(decision_id: str, *, reward: float, final: bool) -> Call:
    """Return the request that reports one reward."""
    return Call("POST", "/v1/feedback", {"decision_id": decision_id, "reward": reward, "final": final})


def feedback_many(items: Sequence[FeedbackItem]) -> Call:
    """Return the request that reports many rewards: all are accepted or none."""
    return Call("POST", "/v1/feedback", [dict(item) for item in items])


def override(decision_id: str, action: Any, reason: str) -> Call:
    """Return the request that records what was done instead of a decision."""
    return Call("POST", f"/v1/decisions/{quote(decision_id, safe='')}/override", {"action": action, "reason": reason})


def _options(mode: Mode | None, explain: bool) -> dict[str, Any]:
    return _given({"mode": mode, "explain": explain or None})


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
