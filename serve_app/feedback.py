"""How a reported reward becomes a line of the feedback log."""

import logging
import time
from collections.abc import Callable

from policies.errors import DecisionUnknown, ServiceUnavailable
from policies.records import Feedback
from serve_app.asgi import Request
from serve_app.config import ServingConfig
from serve_app.decision_ids import DecisionIds
from serve_app.record_log import RecordLog
from serve_app.wire import FeedbackRequest, encode, feedback_decoder

logger = logging.getLogger(__name__)


class FeedbackIntake:
    """Answers POST /v1/feedback: all of a request's items are written with one write, or none is accepted."""

    def __init__(
        self,
        *,
        decision_ids: DecisionIds,
        log: RecordLog,
        config: ServingConfig,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._decision_ids = decision_ids
        self._log = log
        self._max_body_bytes = config.max_body_bytes
        self._wall_clock = wall_clock
        self.num_accepted = 0

    async def accept(self, request: Request) -> bytes:
        """Return `{"accepted": n}`; raises `DecisionUnknown` naming the item whose decision we never made."""
        decoded = feedback_decoder.decode(await request.body(self._max_body_bytes))
        items: list[FeedbackRequest] = decoded if isinstance(decoded, list) else [decoded]
        for index, item in enumerate(items):
            if not self._decision_ids.is_ours(item.decision_id):
                where = f"item {index}: " if isinstance(decoded, list) else ""
                raise DecisionUnknown(
                    f"{where}decision {item.decision_id!r} was not made by this deployment; nothing was accepted"
                )
        await self._write_down(items)
        self.num_accepted += len(items)
        return encode({"accepted": len(items)})

    async def _write_down(self, items: list[FeedbackRequest]) -> None:
        now = self._wall_clock()
        lines = [encode(Feedback(item.decision_id, now, item.reward, item.final)) + b"\n" for item in items]
        try:
            await self._log.append(b"".join(lines))
        except OSError as error:
            logger.error("event=feedback_not_logged num_items=%d error=%r", len(items), str(error))
            raise ServiceUnavailable(f"the feedback log cannot be written: {error}") from error
