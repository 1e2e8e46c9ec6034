"""What a request body asks for: one decision or many, each with its name."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from policies.distributions import Mode, seed_of
from policies.errors import RequestInvalid
from policies.history import require_history
from policies.observations import Box
from policies.records import unit_id_of
from policies.spaces import Spaces
from serve_app.decision_ids import DecisionIds
from serve_app.wire import DecideRequest, Many, decide_decoder

NO_DEADLINE_S = float("inf")
# Of the bodies of requests whose decisions share a line. Written again they may be five times as long (1e15 as a float), but are
# usually shorter. Of four numbers some 3,000 requests would fit.
LINE_BYTES = 128 << 10


class Ask(NamedTuple):
    """One decision that a body of `num_bytes` asks for. Times are `time.perf_counter`'s; `deadline_s` is infinite without one.

    `is_numbers`: the observation is nested lists of nothing but floats. `is_named`: the client gave the request's id, so it may
    send it again. `arm` is a tester's choice, else None. With a `state` the observation is the newest frame, to be put behind
    those of the state.
    """

    decision_id: str
    seed: int
    unit_id: str
    episode_id: str | None
    observation: Any
    mask: Any
    is_numbers: bool
    is_named: bool
    mode: Mode | None
    explain: bool
    arm: str | None
    started_s: float
    deadline_s: float
    state: str | None
    num_bytes: int

    @property
    def num_rows(self) -> int:
        return 1

    @property
    def name(self) -> str:
        return self.decision_id

    @property
    def names(self) -> Sequence[str]:
        """All that is asked for under a name that the client gave."""
        return (self.decision_id,) if self.is_named else ()


class ManyAsk(NamedTuple):
    """Many decisions: of one request, or of requests for one that are answered together. What is no list is the same for all.

    `batch_id` is the request's id if the decisions are named after it, else empty. A binary request has `numbers` [N, *shape] in
    place of `observations`. `is_all_or_nothing`: if one of them cannot be decided, none is.
    """

    batch_id: str
    decision_ids: list[str]
    seeds: list[int]
    unit_ids: str | list[str] | None  # see `policies.records.unit_id_of`
    episode_ids: list[str | None] | None
    observations: Sequence[Any]
    numbers: np.ndarray | None
    masks: Sequence[Any] | None
    is_numbers: bool
    is_named: bool
    mode: Mode | list[Mode | None] | None
    explain: bool | list[bool]
    arm: str | list[str | None] | None
    started_s: float | list[float]
    deadline_s: float
    is_all_or_nothing: bool
    states: Sequence[str | None] | None

    @property
    def num_rows(self) -> int:
        return len(self.decision_ids)

    @property
    def name(self) -> str:
        """What the request as a whole may be known by; empty where its decisions have names of their own."""
        return self.batch_id

    @property
    def names(self) -> Sequence[str]:
        """All that is asked for under a name that the client gave: the request for many, or its decisions."""
        if not self.is_named:
            return ()
        return (self.batch_id,) if self.batch_id else self.decision_ids


def together(asks: list[Ask]) -> ManyAsk:
    """Return requests for one decision each as one for many."""
    columns = map(list, zip(*asks))
    ids, seeds, units, episodes, observations, masks, are_numbers, _, modes, explains, arms, started_s, _, states, _ = columns
    return ManyAsk(
        "",
        ids,
        seeds,
        units,
        unless_all_none(episodes),
        observations,
        None,
        unless_all_none(masks),
        all(are_numbers),
        False,  # some may be
        unless_all_none(modes),
        any(explains) and explains,
        unless_all_none(arms),
        started_s,
        NO_DEADLINE_S,
        False,
        unless_all_none(states),
    )


def that_share_a_line(asks: Sequence[tuple[int, Ask]]) -> Iterator[list[int]]:
    """Cut a batch, given with its places in it, into parts whose decisions may be one line of the log; return their places.

    A line is read as a whole, by whoever looks for one decision in it, and replicas read along with each other between requests.
    """
    part: list[int] = []
    num_bytes = 0
    for place, ask in asks:
        num_bytes += ask.num_bytes
        if part and num_bytes > LINE_BYTES:
            yield part
            part, num_bytes = [], ask.num_bytes
        part.append(place)
    if part:
        yield part


def chosen(column: Any, rows: Sequence[int]) -> Any:
    """Return the items of these rows of a request for many; the column itself where that is all of them, or one for all."""
    return column if not isinstance(column, list) or len(rows) == len(column) else [column[row] for row in rows]


def unless_all_none(values: list[Any]) -> list[Any] | None:
    return None if values.count(None) == len(values) else values


class AskReader:
    """Reads bodies. A policy of one Box has a decoder of its own, which knows that every item must be a number."""

    def __init__(self, decision_ids: DecisionIds) -> None:
        self._decision_ids = decision_ids
        self._spaces: Spaces | None = None
        self._number_decoder: msgspec.json.Decoder | None = None

    def read(self, body: bytes, spaces: Spaces, started_s: float, arm: str | None = None) -> Ask | ManyAsk:
        """Return what is asked for; raises `RequestInvalid` for what is no request. Observations are checked in the batch."""
        asked, is_numbers = self._decode(body, spaces)
        if asked.state is not None or asked.states is not None:
            require_history(spaces)
        if asked.observations is not None:
            return self._many(asked, is_numbers, started_s, arm)
        if asked.observation is UNSET:
            raise RequestInvalid("the body has neither `observation` nor `observations`; send one of them")
        if asked.action_masks or asked.unit_ids or asked.episode_ids or asked.request_ids or asked.states:
            raise RequestInvalid("action_masks, unit_ids, episode_ids, request_ids and states belong to `observations`")
        if asked.request_id is None:
            request_id, decision_id, seed = self._decision_ids.next()
        else:
            request_id, decision_id = asked.request_id, self._decision_ids.name(asked.request_id)
            seed = seed_of(decision_id)
        return Ask(
            decision_id,
            seed,
            asked.unit_id or asked.episode_id or request_id,  # an episode without a unit keeps its arm too
            asked.episode_id,
            asked.observation,
            asked.action_mask,
            is_numbers,
            asked.request_id is not None,
            asked.mode,
            asked.explain,
            arm,
            started_s,
            NO_DEADLINE_S if asked.deadline_ms is None else started_s + asked.deadline_ms / 1000,
            asked.state,
            len(body),
        )

    def _decode(self, body: bytes, spaces: Spaces) -> tuple[DecideRequest, bool]:
        if spaces is not self._spaces:
            self._spaces, self._number_decoder = spaces, _number_decoder(spaces)
        if self._number_decoder is not None:
            try:
                return self._number_decoder.decode(body), True
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                pass  # read again for a message that says which item of which observation is wrong
        return decide_decoder.decode(body), False

    def _many(self, asked: DecideRequest, is_numbers: bool, started_s: float, arm: str | None) -> ManyAsk:
        observations = asked.observations
        assert observations is not None
        lone = (asked.action_mask, asked.episode_id, asked.state)
        if asked.observation is not UNSET or any(value is not None for value in lone):
            raise RequestInvalid(
                "observation, action_mask, episode_id and state belong to one observation, this body has `observations`"
            )
        return self.many(
            len(observations),
            observations=observations,
            is_numbers=is_numbers,
            masks=asked.action_masks,
            unit_ids=asked.unit_ids or asked.unit_id,
            episode_ids=asked.episode_ids,
            request_id=asked.request_id,
            request_ids=asked.request_ids,
            states=asked.states,
            mode=asked.mode,
            explain=asked.explain,
            arm=arm,
            started_s=started_s,
            deadline_ms=asked.deadline_ms,
        )

    def many(
        self,
        num: int,
        *,
        started_s: float,
        observations: Sequence[Any] = (),
        numbers: np.ndarray | None = None,
        is_numbers: bool = False,
        masks: Sequence[Any] | None = None,
        unit_ids: str | list[str] | None = None,
        episode_ids: list[str | None] | None = None,
        request_id: str | None = None,
        request_ids: list[str] | None = None,
        states: Sequence[str | None] | None = None,
        mode: Mode | None = None,
        explain: bool = False,
        arm: str | None = None,
        deadline_ms: float | None = None,
        is_all_or_nothing: bool = False,
    ) -> ManyAsk:
        """Return a request for `num` decisions; raises `RequestInvalid` for lists of another length, or for ids that clash."""
        columns = {
            "action_masks": masks,
            "unit_ids": unit_ids,
            "episode_ids": episode_ids,
            "request_ids": request_ids,
            "states": states,
        }
        for name, values in columns.items():
            if values is not None and not isinstance(values, str) and len(values) != num:
                raise RequestInvalid(f"{name} has {len(values)} items for {num} observations; give one for each")
        if request_id is not None and request_ids is not None:
            raise RequestInvalid("both request_id and request_ids are given; leave one of them away")
        batch_id, decision_ids, seeds = self._names(num, request_id=request_id, request_ids=request_ids)
        if unit_ids is None and episode_ids is not None:  # an episode without a unit keeps its arm too
            unit_ids = [episode or unit_id_of(None, row, decision_ids[row]) for row, episode in enumerate(episode_ids)]
        return ManyAsk(
            batch_id,
            decision_ids,
            seeds,
            unit_ids,
            episode_ids,
            observations,
            numbers,
            masks,
            is_numbers,
            request_id is not None or request_ids is not None,
            mode,
            explain,
            arm,
            started_s,
            NO_DEADLINE_S if deadline_ms is None else started_s + deadline_ms / 1000,
            is_all_or_nothing,
            states,
        )

    def _names(self, num: int, *, request_id: str | None, request_ids: list[str] | None) -> tuple[str, list[str], list[int]]:
        """Return the batch's id, and the decisions' ids and seeds."""
        if request_ids is not None:
            if len(set(request_ids)) != num:
                raise RequestInvalid("request_ids holds an id twice; every decision needs one of its own")
            decision_ids = [self._decision_ids.name(name) for name in request_ids]
            return "", decision_ids, [seed_of(name) for name in decision_ids]
        batch_id = request_id or self._decision_ids.new_batch()
        return batch_id, *self._decision_ids.names_within(batch_id, num)


def _number_decoder(spaces: Spaces) -> msgspec.json.Decoder | None:
    """Return a decoder that takes exactly nested lists of numbers for observations, None where they are something else."""
    if not isinstance(spaces.observation, Box):
        return None
    numbers: Any = float
    for _ in spaces.observation.low.shape:
        numbers = list[numbers]
    request = msgspec.defstruct(
        "DecideNumbersRequest",
        [("observation", numbers | UnsetType, UNSET), ("observations", Many[numbers] | None, None)],
        bases=(DecideRequest,),
        forbid_unknown_fields=True,
    )
    return msgspec.json.Decoder(request)
