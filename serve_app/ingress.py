"""How one request becomes one logged decision: key, body, batch, features, arm and action, log line, answer."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from policies.errors import DeadlineExceeded, RequestInvalid, RequestRefused, ServiceUnavailable, TrimtabError
from serve_app.answers import Answers, sorted_out
from serve_app.asgi import Request
from serve_app.asks import Ask, AskReader, ManyAsk, chosen, that_share_a_line, together, unless_all_none
from serve_app.batcher import Batcher, Deliver, deliver_each
from serve_app.config import ServingConfig
from serve_app.deciding import Decider, Rows
from serve_app.decision_ids import DecisionIds
from serve_app.drafts import Columns, Draft, Line, Moment, batch_of, failure_of, repairs_of, told_of_many
from serve_app.durable_log import DecisionLog, Place
from serve_app.features import Encoded, encode_numbers
from serve_app.features import encode as encode_features
from serve_app.keys import ApiKey, require
from serve_app.recall import Recall
from serve_app.repair import Repair
from serve_app.repetitions import Repetitions
from serve_app.shadowing import Shadowing
from serve_app.tally import Tally
from serve_app.variants import Snapshot, VariantStore
from serve_app.wire import DecideManyAnswer, encode

ARM_HEADER = b"x-trimtab-arm"  # with a key of scope operate: which arm is to answer, for testers

logger = logging.getLogger(__name__)


class Ingress:
    """Answers POST /v1/decide."""

    def __init__(
        self,
        policy: str,
        *,
        decision_ids: DecisionIds,
        variants: VariantStore,
        log: DecisionLog,
        recall: Recall,
        shadowing: Shadowing,
        config: ServingConfig,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._policy = policy
        self.reader = AskReader(decision_ids)
        self._variants = variants
        self._log = log
        self._shadowing = shadowing
        self.decider = Decider(config, now_s=time.perf_counter)
        self._repair = Repair(config.fallback.repair, config.fallback.fill) if config.fallback.repair else None
        self._request_modes = config.request_modes
        self._max_body_bytes = config.max_body_bytes
        self._wall_clock = wall_clock
        self.tally = Tally()
        self.batcher: Batcher[Ask | ManyAsk] = Batcher(
            self._answer_batch, max_batch_size=config.max_batch_size, max_queue=config.max_queue
        )
        self.repetitions = Repetitions(
            policy, log, recall, lambda ask, deliver: self.batcher.submit_again(ask, deliver, num_rows=ask.num_rows)
        )

    async def decide(self, request: Request, key: ApiKey) -> bytes:
        """Return the answer's JSON; raises `RequestRefused` for whatever is not answered with an action."""
        started_s = time.perf_counter()
        body = await request.body(self._max_body_bytes)
        ask = self.ask(body, key, started_s=started_s, arm=request.header(ARM_HEADER))
        return encode(await self.batcher.answer(ask, num_rows=ask.num_rows))

    def ask(self, body: bytes, key: ApiKey, *, started_s: float, arm: bytes | None = None) -> Ask | ManyAsk:
        """Return what a body asks for; raises `RequestRefused`. A tester may name the `arm` that is to answer."""
        snapshot, name = self.snapshot(), None
        if arm is not None:
            require(key, "operate")
            name = arm.decode("latin-1")
            if all(name != found.name for found in snapshot.plan.arms):
                arms = ", ".join(found.name for found in snapshot.plan.arms)
                raise RequestInvalid(f"the plan has no arm {name!r:.80}; it has {arms}")
        ask = self.reader.read(body, snapshot.champion.policy.spaces, started_s, name)
        if ask.mode is not None:
            self.check_mode(ask.mode)
        if ask.explain:
            require(key, "read")
        return ask

    def check_mode(self, mode: str) -> None:
        """Raise `RequestInvalid` for a mode that the loop file does not let requests choose."""
        if mode not in self._request_modes:
            allowed = ", ".join(self._request_modes) or "none, every request gets its version's own"
            raise RequestInvalid(f"mode {mode!r} cannot be asked for; serving.request_modes allows {allowed}")

    def snapshot(self) -> Snapshot:
        """Return the plan in force; raises `ServiceUnavailable` while no champion is loaded."""
        return self._variants.in_force(self._policy)

    def _answer_batch(self, asks: list[Ask | ManyAsk], delivers: list[Deliver]) -> None:
        """Decide for all, write all down, and only then let the answers go.

        The snapshot is read once: a new plan comes into force between batches, never within one.
        """
        snapshot, now_s = self.snapshot(), time.perf_counter()
        asks, delivers, drafts, repeated = self.repetitions.sort_out(asks, delivers, snapshot.champion.policy.spaces)
        for index, ask in enumerate(asks):
            if ask.deadline_s < now_s:
                late_ms = 1000 * (now_s - ask.deadline_s)
                drafts[index] = Draft(DeadlineExceeded(f"the request's deadline was over {late_ms:.0f} ms ago; ask again"))
        single = [(index, ask) for index, ask in enumerate(asks) if index not in drafts and isinstance(ask, Ask)]
        for part in that_share_a_line(single):
            drafts.update(zip(part, self._decide_singles([asks[index] for index in part], snapshot)))
        for index, ask in enumerate(asks):
            if index not in drafts:
                drafts[index] = self._decide_many(ask, snapshot)
        ordered = [drafts[index] for index in range(len(asks))]
        delivers = [self.repetitions.once_flushed(draft, deliver) for draft, deliver in zip(ordered, delivers)]
        started_s = [ask.started_s for ask, draft in zip(asks, ordered) if draft.line]
        self._write_down(ordered, delivers, snapshot, started_s)
        self.repetitions.postpone(repeated)  # last: when something above raises, everybody in the batch is told so, and only once

    def _decide_singles(self, asks: list[Ask], snapshot: Snapshot) -> list[Draft]:
        """Return a draft for each of the requests for one decision: they are decided together, and share a line."""
        many = together(asks)
        encoded = self._encode_many(many, snapshot)
        made = self._decide_rows(many, encoded, encoded.rows, snapshot)
        drafts = {row: Draft(refusal) for row, refusal in (encoded.refusals | made.errors).items()}
        if made.answers is not None:
            names = [asks[row].decision_id for row in made.rows if asks[row].is_named]
            line = self._line(many, encoded, made, names, snapshot)
            told = told_of_many(many, encoded, made.rows, made.answers, self._policy)
            drafts.update({row: Draft(answer, line) for row, answer in zip(made.rows, told)})
        return [drafts[row] for row in range(len(asks))]

    def _decide_many(self, ask: ManyAsk, snapshot: Snapshot) -> Draft:
        """Return the draft of one request for many decisions: one answer, one line."""
        try:
            encoded = self._encode_many(ask, snapshot)
        except RequestRefused as error:
            return Draft(error)
        if ask.is_all_or_nothing and encoded.refusals:
            return Draft(_first_of(encoded.refusals))
        again, told_from = self.repetitions.rows_told_again(ask, encoded.rows, snapshot.champion.policy.spaces)
        rows = [row for row in encoded.rows if row not in again] if again else encoded.rows
        made = self._decide_rows(ask, encoded, rows, snapshot)
        if ask.is_all_or_nothing and made.errors:
            return Draft(_first_of(made.errors))
        told = again | {row: failure_of(error) for row, error in (encoded.refusals | made.errors).items()}
        if made.answers is None:
            return Draft(self._told_in_order(ask, told), told_from=told_from)
        names = [] if not ask.is_named else [ask.batch_id] if ask.batch_id else made.asked.decision_ids
        line = self._line(ask, encoded, made, names, snapshot)
        if ask.is_all_or_nothing and not told:
            result: Any = Columns(ask.decision_ids, made.answers, repairs_of(encoded, made.rows))
        else:
            told |= zip(made.rows, told_of_many(ask, encoded, made.rows, made.answers))
            result = self._told_in_order(ask, told)
        return Draft(result, line, told_from)

    def _told_in_order(self, ask: ManyAsk, told: dict[int, Any]) -> DecideManyAnswer:
        return DecideManyAnswer(self._policy, [told[row] for row in range(ask.num_rows)])

    def _encode_many(self, ask: ManyAsk, snapshot: Snapshot) -> Encoded:
        spaces = snapshot.champion.policy.spaces
        if ask.numbers is not None:
            return encode_numbers(spaces, ask.numbers, repair=self._repair)
        return encode_features(
            spaces, ask.observations, ask.masks, is_numbers=ask.is_numbers, repair=self._repair, states=ask.states
        )

    def _decide_rows(self, ask: ManyAsk, encoded: Encoded, rows: Sequence[int], snapshot: Snapshot) -> "_Made":
        asked = _rows_of(ask, encoded, rows)
        answers, errors = sorted_out(self.decider.decide(asked, snapshot) if rows else [])
        if not errors:
            return _Made(rows, asked, answers, {})
        answered = [place for place in range(len(rows)) if place not in errors]
        return _Made(
            [rows[place] for place in answered], asked.only(answered), answers, {rows[place]: e for place, e in errors.items()}
        )

    def _line(self, ask: ManyAsk, encoded: Encoded, made: "_Made", names: Sequence[str], snapshot: Snapshot) -> Line:
        assert made.answers is not None
        at = Moment(snapshot.plan, self._wall_clock(), time.perf_counter(), snapshot.engines)
        data = encode(batch_of(ask, encoded, made.rows, made.answers, at)) + b"\n"
        num_repaired = sum([row in encoded.repairs for row in made.rows]) if encoded.repairs else 0
        return Line(data, names, made.asked, made.answers, num_repaired)

    def _write_down(self, drafts: list[Draft], delivers: list[Deliver], snapshot: Snapshot, started_s: list[float]) -> None:
        """Have the batch logged with one write, and let the answers go once it is: what is not logged is not answered.

        What became of the log may be known at once or, where it is flushed to the disk, a little later.
        """
        lines = list(dict.fromkeys([draft.line for draft in drafts if draft.line]))
        if not lines:
            return deliver_each([draft.result for draft in drafts], delivers)
        end_logging = self.repetitions.begin_logging(lines)

        def logged(error: TrimtabError | None, place: Place | None) -> None:
            if error is not None:
                deliver_each([error if draft.line else draft.result for draft in drafts], delivers)
                return end_logging()
            if place is not None:
                self.repetitions.remember(written, place)
            deliver_each([draft.result for draft in drafts], delivers)
            end_logging()
            try:
                self._note(lines, started_s, snapshot)
            except Exception:  # raised from here, it would be told to all who have their answers
                logger.exception("event=batch_not_counted")

        # On its own: where a failing log keeps it for later, it must not keep the rest of the batch.
        written = [(line.names, line.data) for line in lines]
        data, num_decisions = b"".join([line.data for line in lines]), sum([line.num_decisions for line in lines])
        try:
            self._log.append(data, num_decisions, logged, lambda where: self.repetitions.remember(written, where))
        except BaseException:  # a mistake of ours: repetitions would wait for ever
            end_logging()
            raise

    def _note(self, lines: list[Line], started_s: list[float], snapshot: Snapshot) -> None:
        """Count what has been answered, and have the shadows asked about it."""
        self.tally.add_requests(started_s, time.perf_counter())
        for line in lines:
            rows, answers = line.rows, line.answers
            self.tally.add_answers(answers, line.num_repaired)
            if snapshot.shadows:
                self._shadowing.offer(snapshot.shadows, rows.decision_ids, rows.seeds, answers.actions, rows.obs_BD, rows.mask_BA)


class _Made(NamedTuple):
    """What became of rows of requests that were decided together: `rows` have `answers` and were `asked`, the others `errors`."""

    rows: Sequence[int]
    asked: Rows
    answers: Answers | None
    errors: dict[int, ServiceUnavailable]


def _first_of(refusals: dict[int, Any]) -> RequestRefused:
    """Return what is wrong with the first of many that cannot be decided, with its place."""
    row = min(refusals)
    error = refusals[row]
    where = f"observation {row} of the request: {error}"
    return RequestInvalid(where, error.status) if isinstance(error, RequestInvalid) else type(error)(where)


def _rows_of(ask: ManyAsk, encoded: Encoded, rows: Sequence[int]) -> Rows:
    """Return rows of a request, to be decided."""
    keeps_all, places = len(rows) == len(encoded.rows), encoded.places(rows)
    return Rows(
        chosen(ask.decision_ids, rows),
        chosen(ask.seeds, rows),
        chosen(ask.unit_ids, rows),
        encoded.obs_BD if keeps_all else encoded.obs_BD[places],
        encoded.mask_BA if keeps_all or encoded.mask_BA is None else encoded.mask_BA[places],
        _each(ask.mode, rows),
        _each(ask.arm, rows),
        bool(ask.explain),
    )


def _each(column: Any, rows: Sequence[int]) -> list[Any] | None:
    """Return what each of these rows asks for; None where none of them asks for anything."""
    if column is None:
        return None
    return unless_all_none(chosen(column, rows)) if isinstance(column, list) else [column] * len(rows)
