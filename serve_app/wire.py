"""Which bodies a client may send, and what it gets back."""

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from policies.errors import RequestInvalid

MAX_FEEDBACKS = 1000

# `\Z`, not `$`: the dollar also matches before a final newline.
RequestId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
Name = Annotated[str, Meta(min_length=1, max_length=256)]


class DecideRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /v1/decide. The policy's spaces say what an observation is; the ingress checks it."""

    observation: Any
    action_mask: list[bool | int] | None = None
    unit_id: Name | None = None
    episode_id: Name | None = None
    request_id: RequestId | None = None


class DecideAnswer(msgspec.Struct):
    """Answer of POST /v1/decide. `propensity` is the probability (or density) of the action under the arm that answered."""

    decision_id: str
    action: Any
    policy: str
    version: int
    arm: str
    propensity: float
    fallback: str | None


class FeedbackRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /v1/feedback, or one item of it."""

    decision_id: Name
    reward: float
    final: bool = False


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
    '"request_id"?: 1-64 of A-Z a-z 0-9 _ -} and no other key',
)
feedback_decoder = BodyDecoder(
    FeedbackRequest | Annotated[list[FeedbackRequest], Meta(min_length=1, max_length=MAX_FEEDBACKS)],
    '{"decision_id": text, "reward": number, "final"?: true or false} and no other key, '
    f"or a list of 1 to {MAX_FEEDBACKS} of them",
)
encode = msgspec.json.Encoder().encode
