"""Which bodies a client may send, and what it gets back."""

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from policies.errors import RequestInvalid

MAX_FEEDBACKS = 1000
MAX_OBSERVATIONS = 4096
MAX_DEADLINE_MS = 600_000
# Of a value that is logged as it came: readers have less of the stack left than a replica, and could not read what it just could.
MAX_NESTING = 64

# `\Z`, not `$`: the dollar also matches before a final newline.
RequestId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Deadline = Annotated[float, Meta(gt=0, le=MAX_DEADLINE_MS)]
Item = TypeVar("Item")
Many = Annotated[list[Item], Meta(min_length=1, max_length=MAX_OBSERVATIONS)]


class DecideRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /v1/decide: one observation, or many. What an observation is, the policy's spaces say.

    With a `state` it is the newest frame of a policy with a history, see `policies.history`.
    """

    observation: Any = UNSET
    action_mask: Any = None
    unit_id: Name | None = None
    episode_id: Name | None = None
    request_id: RequestId | None = None
    deadline_ms: Deadline | None = None
    mode: Literal["greedy", "sample"] | None = None
    explain: bool = False
    observations: Many[Any] | None = None
    action_masks: Many[Any] | None = None
    unit_ids: Many[Name] | None = None
    episode_ids: Many[Name | None] | None = None
    request_ids: Many[RequestId] | None = None
    state: str | None = None
    states: Many[str | None] | None = None


class Explanation(msgspec.Struct):
    """Why an action was sent: the distribution of the version that answered, see `policies.distributions`, and the seed."""

    distribution: list[float] | None
    seed: int
    mode: str
    mixture_propensity: float
    rung: str
    shield: str | None


class DecideAnswer(msgspec.Struct, omit_defaults=True, gc=False):
    """Answer of POST /v1/decide. `propensity` is the probability (or density) of the action under the arm that answered.

    `policy` is said once where there are many answers.
    """

    decision_id: str
    action: Any
    policy: str | UnsetType
    version: int
    arm: str
    propensity: float
    fallback: str | None
    repair: str | None = None
    explanation: Explanation | None = None
    state: str | None = None


class DecideFailure(msgspec.Struct):
    """Stands in the place of one of many answers."""

    error: "Failure"


class Failure(msgspec.Struct):
    """What went wrong, as in every answer that is not 200."""

    status: int
    message: str


class DecideManyAnswer(msgspec.Struct):
    """Answer of POST /v1/decide with `observations`: for each a `DecideAnswer`, or a `DecideFailure` in its place."""

    policy: str
    decisions: list[Any]


class FeedbackRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /v1/feedback, or one item of it."""

    decision_id: Name
    reward: float
    final: bool = False


class OverrideRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /v1/decisions/<id>/override: what was done instead, any JSON value, and why."""

    action: Any
    reason: Name


Body = TypeVar("Body")


class BodyDecoder:
    """Decodes one kind of body; raises `RequestInvalid` with 400 for what is not JSON and 422 for what is not expected."""

    def __init__(self, body_type: type, expected: str) -> None:
        self._decoder = msgspec.json.Decoder(body_type)
        self._expected = expected

    def decode(self, body: bytes | bytearray) -> "Body":
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise RequestInvalid(f"{error}; expected {self._expected}", 422) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RequestInvalid(f"the body is not JSON: {error}; expected {self._expected}", 400) from None


decide_decoder = BodyDecoder(
    DecideRequest,
    '{"observation": what the policy takes, "action_mask"?: [0 or 1], "unit_id"?: text, "episode_id"?: text, '
    '"request_id"?: 1-64 of A-Z a-z 0-9 _ -, "deadline_ms"?: number, "mode"?: "greedy" or "sample", "explain"?: true or false, '
    '"state"?: text}; or "observations", "action_masks"?, "unit_ids"?, "episode_ids"?, "request_ids"?, "states"?: lists of equal '
    "length; and no other key",
)
feedback_decoder = BodyDecoder(
    FeedbackRequest | Annotated[list[FeedbackRequest], Meta(min_length=1, max_length=MAX_FEEDBACKS)],
    '{"decision_id": text, "reward": number, "final"?: true or false} and no other key, '
    f"or a list of 1 to {MAX_FEEDBACKS} of them",
)
override_decoder = BodyDecoder(OverrideRequest, '{"action": what was done instead, "reason": text} and no other key')
encode = msgspec.json.Encoder().encode


def is_nested_deeply(value: Any, levels: int = MAX_NESTING) -> bool:
    """Return whether a JSON value has more levels of lists and objects than may be logged."""
    if not isinstance(value, list | dict):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(is_nested_deeply(item, levels - 1) for item in items if isinstance(item, list | dict))
