"""What is written down of each decision and each feedback.

A log is a directory of append-only segments, one per writer, `<name>.jsonl`: a header line, then one JSON object per line.
A segment that a killed writer left may end in half a line: readers stop before it (`policies.log_reader`). Finished segments of
decisions are sealed to Parquet (`policies.sealing`).
"""

import base64
import itertools
from collections.abc import Iterable
from typing import Any, Literal

import msgspec
import numpy as np

# 1: without `rung`, `shield`, `assigned` and without batches. 2: batches of one request only. Both are still read.
SCHEMA_VERSION = 3
BATCH_PREFIX = b'{"batch_id":'  # how a line begins that holds many decisions


SegmentKind = Literal["decisions", "feedback", "shadows", "overrides"]
Rung = Literal["arm", "champion", "previous", "rule", "fixed"]
Assigned = Literal["plan", "request"]


class SegmentHeader(msgspec.Struct, frozen=True):
    """First line of every segment."""

    schema_version: int
    kind: SegmentKind
    writer: str


class Decision(msgspec.Struct, frozen=True):
    """One answered request: enough to recompute the action bit for bit and to learn from it off-policy.

    `observation` and `action_mask` are those of the request; a mask that was a part of the observation is only in the latter.
    `action` is the environment's own value (an integer, a number, or
    lists of them), as it was answered. `propensity` is its probability under the arm that answered, of real numbers its
    density; `mixture_propensity` is that under the traffic plan as a whole (`policies.distributions.mixed`).
    `seed` (53 bits) is the sampling seed of the draw that was sent. `rung` says who answered: the arm's own version, or which
    step of the fallback ladder; `fallback` why, null for the arm's own. A rule or a fixed action is no version: then `version` is
    0 and `digest` empty. `shield` names what the arm's own action would have violated, is "" when it was in force and nothing was
    violated, and null without a shield. `assigned` says who chose the arm: the plan by the unit, or the request (a tester's
    header), whose mixture propensity is that of its arm alone. `repair` says what was mended in the observation before anybody
    saw it; `observation` is the mended one.
    `latency_s` is receipt to just before this line was written. `engines` names what computed each version that may have answered
    or whose propensity is in the mixture, where that was not numpy (`policies.onnx_engine`): other engines give other last bits.
    """

    decision_id: str
    time_s: float
    unit_id: str
    episode_id: str | None
    plan: int
    release: int
    arm: str
    version: int
    digest: str
    observation: Any
    action: Any
    mode: Literal["greedy", "sample"]
    seed: int
    propensity: float
    mixture_propensity: float
    fallback: str | None
    latency_s: float
    action_mask: list[bool] | None = None
    rung: Rung = "arm"
    shield: str | None = None
    assigned: Assigned = "plan"
    repair: str | None = None
    engines: dict[int, str] | None = None

    @property
    def is_stood_in_for(self) -> bool:
        """Whether somebody else than the arm's own version answered: an error of that version."""
        return self.fallback is not None or self.rung != "arm"


class DecisionBatch(msgspec.Struct, frozen=True):
    """Decisions that were made together, in one line; `rows` are they, each a `Decision` of its own.

    They are those of one request for many, or of the requests for one that a replica answered in one go: a line for each would
    cost three times as much. A list has an item per decision; what is not a list is the same for all. `observations` is what
    was sent, a list of JSON values, or of a binary request the float32 numbers as base64 text, with `shape` for one of them.
    """

    batch_id: str  # first: see BATCH_PREFIX. The request's own, empty where it gave each decision one, or where there are several
    decision_ids: list[str]
    time_s: float
    unit_ids: str | list[str] | None  # see `unit_id_of`
    episode_ids: list[str | None] | None
    plan: int
    release: int
    arms: str | list[str]
    versions: int | list[int]
    digests: dict[int, str]
    observations: list[Any] | str
    shape: list[int] | None
    actions: list[Any]
    modes: str | list[str]
    seeds: list[int]
    propensities: list[float]
    mixture_propensities: list[float] | None
    fallbacks: list[str | None] | None
    latency_s: float | list[float]
    action_masks: list[list[bool]] | None = None
    rungs: list[Rung] | None = None
    shields: list[str | None] | None = None
    assigned: Assigned | list[Assigned] = "plan"
    repairs: list[str | None] | None = None
    engines: dict[int, str] | None = None  # one for all, as of a `Decision`

    def rows(self) -> list[Decision]:
        """Return the decisions one by one; raises `ValueError` for columns of different lengths."""
        columns = (  # in the record's order
            self.decision_ids,
            self.time_s,
            self._units(),
            self.episode_ids,
            self.plan,
            self.release,
            self.arms,
            self.versions,
            self._each_digest(),
            self._observations(),
            self.actions,
            self.modes,
            self.seeds,
            self.propensities,
            self.mixture_propensities or self.propensities,
            self.fallbacks,
            self.latency_s,
            self.action_masks,
            self.rungs or "arm",
            self.shields,
            self.assigned,
            self.repairs,
            self.engines,
        )
        if any([isinstance(column, list) and len(column) != len(self.decision_ids) for column in columns]):
            raise ValueError(f"columns of {len(self.decision_ids)} decisions have other lengths")
        return list(map(Decision, *map(per_row, columns)))

    def _each_digest(self) -> str | list[str]:
        versions, digests = self.versions, self.digests
        return [digests.get(version, "") for version in versions] if isinstance(versions, list) else digests.get(versions, "")

    def _units(self) -> str | list[str]:
        if self.unit_ids is not None:
            return self.unit_ids
        return [unit_id_of(None, row, name) for row, name in enumerate(self.decision_ids)]

    def _observations(self) -> list[Any]:
        if isinstance(self.observations, list):
            return self.observations
        array = np.frombuffer(base64.b64decode(self.observations), "<f4")
        return array.reshape(-1, *(self.shape or ())).tolist()


def unit_id_of(unit_ids: str | list[str] | None, row: int, decision_id: str) -> str:
    """Return whose decision one of many is. Where nobody said so (None), each is a unit of its own, named as its request."""
    if unit_ids is None:
        return decision_id.rpartition(".")[0]
    return unit_ids[row] if isinstance(unit_ids, list) else unit_ids


def per_row(column: Any) -> Iterable[Any]:
    """Return a column's items, without end where all rows have the same."""
    return column if isinstance(column, list) else itertools.repeat(column)


class Shadow(msgspec.Struct, frozen=True):
    """What a version that answers in the background would have answered to a decision's observation.

    `distribution` is that of its actions (see `policies.distributions`), `action` what it would have sent with the decision's
    seed in its own mode, and `propensity` that action's; all three are null where it failed, and `failure` says how. `agrees`
    says whether that is the action that was sent, and `sent_propensity` with which probability the shadow would have sent that
    one, null for real-valued actions.
    """

    decision_id: str
    time_s: float
    version: int
    digest: str
    mode: Literal["greedy", "sample"]
    distribution: list[float] | None
    action: Any
    propensity: float | None
    failure: str | None = None
    agrees: bool | None = None
    sent_propensity: float | None = None


class Override(msgspec.Struct, frozen=True):
    """That somebody did something else than what was decided. `key` names the API key that said so."""

    decision_id: str
    time_s: float
    action: Any
    reason: str
    key: str


class Feedback(msgspec.Struct, frozen=True):
    """What a client reports of one decision. `final` closes the decision's episode; without an episode it is always final."""

    decision_id: str
    time_s: float
    reward: float
    final: bool


Record = Decision | Shadow | Override | Feedback
KINDS: dict[type, SegmentKind] = {Decision: "decisions", Feedback: "feedback", Shadow: "shadows", Override: "overrides"}
