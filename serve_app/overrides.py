"""How it is recorded that somebody did something else than what was decided."""

import logging
import time
from collections.abc import Callable

from policies.errors import DecisionUnknown, RequestInvalid, ServiceUnavailable
from policies.records import Override
from serve_app.asgi import Request
from serve_app.decision_ids import DecisionIds
from serve_app.record_log import RecordLog
from serve_app.wire import MAX_NESTING, OverrideRequest, encode, is_nested_deeply, override_decoder

logger = logging.getLogger(__name__)


class OverrideIntake:
    """Answers POST /v1/decisions/<id>/override. The decision stays in the log; its outcome is not the policy's."""

    def __init__(
        self,
        *,
        decision_ids: DecisionIds,
        log: RecordLog,
        max_body_bytes: int,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._decision_ids = decision_ids
        self._log = log
        self._max_body_bytes = max_body_bytes
        self._wall_clock = wall_clock
        self.num_accepted = 0

    async def accept(self, decision_id: str, request: Request, *, key_name: str) -> bytes:
        """Return `{"accepted": 1}`; raises `DecisionUnknown` for a decision that we never made."""
        asked: OverrideRequest = override_decoder.decode(await request.body(self._max_body_bytes))
        if not self._decision_ids.is_ours(decision_id):
            raise DecisionUnknown(f"decision {decision_id!r:.300} was not made by this deployment; nothing was recorded")
        if is_nested_deeply(asked.action):
            raise RequestInvalid(f"the action has more than {MAX_NESTING} levels of lists and objects; nothing was recorded")
        record = Override(decision_id, self._wall_clock(), asked.action, asked.reason, key_name)
        try:
            await self._log.append(encode(record) + b"\n")
        except OSError as error:
            logger.error("event=override_not_logged decision_id=%s error=%r", decision_id, str(error))
            raise ServiceUnavailable(f"the log of overrides cannot be written: {error}") from error
        self.num_accepted += 1
        return encode({"accepted": 1})
