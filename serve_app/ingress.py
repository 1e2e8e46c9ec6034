"""How one request becomes one logged decision: key, body, batch, features, arm and action, log line, answer."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from policies.errors import DeadlineExceeded, RequestInvalid, RequestRefused, TrimtabError
from serve_app.answers import Decided, each, sorted_out
from serve_app.asgi import Request
from serve_app.asks import Ask, AskReader, ManyAsk, chosen
from serve_app.batcher import Batcher, Deliver, deliver_each
from serve_app.config import ServingConfig
from serve_app.deciding import Decider, Rows
from serve_app.decision_ids import DecisionIds
from serve_app.drafts import Columns, Draft, Moment, answer_of, batch_of, decision_of, failure_of, repairs_of, told_of_many
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
        # What of this batch is counted, and shown to shadows, when its answers have left.
        self._decided: list[tuple[Rows, Decided]] = []
        self._num_repaired = 0
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
        self._decided, self._num_repaired = [], 0
        asks, delivers, drafts, repeated = self.repetitions.sort_out(asks, delivers, snapshot.champion.policy.spaces)
        for index, ask in enumerate(asks):
            if ask.deadline_s < now_s:
                late_ms = 1000 * (now_s - ask.deadline_s)
                drafts[index] = Draft(DeadlineExceeded(f"the request's deadline was over {late_ms:.0f} ms ago; ask again"))
        single = [index for index, ask in enumerate(asks) if index not in drafts and isinstance(ask, Ask)]
        if single:
            drafts.update(zip(single, self._decide_singles([asks[index] for index in single], snapshot)))
        for index, ask in enumerate(asks):
            if index not in drafts:
                drafts[index] = self._decide_many(ask, snapshot)
        ordered = [drafts[index] for index in range(len(asks))]
        delivers = [self.repetitions.once_flushed(draft, deliver) for draft, deliver in zip(ordered, delivers)]
        num_decisions = sum([ask.num_rows for ask, draft in zip(asks, ordered) if draft.line])
        started_s = [ask.started_s for ask, draft in zip(asks, ordered) if draft.line]
        self._write_down(ordered, delivers, num_decisions, snapshot, started_s)
        self.repetitions.postpone(repeated)  # last: when something above raises, everybody in the batch is told so, and only once

    def _decide_singles(self, asks: list[Ask], snapshot: Snapshot) -> list[Draft]:
        """Return a draft for each of the requests for one decision, which are decided together."""
        encoded = encode_features(
            snapshot.champion.policy.spaces,
            [ask.observation for ask in asks],
            [ask.mask for ask in asks] if any([ask.mask is not None for ask in asks]) else None,
            is_numbers=all([ask.is_numbers for ask in asks]),
            repair=self._repair,
            states=_unless_all_none([ask.state for ask in asks]) if snapshot.champion.policy.spaces.history > 1 else None,
        )
        drafts = {row: Draft(refusal) for row, refusal in encoded.refusals.items()}
        decided = [asks[row] for row in encoded.rows]
        rows = Rows(
            [ask.decision_id for ask in decided],
            [ask.seed for ask in decided],
            [ask.unit_id for ask in decided],
            encoded.obs_BD,
            encoded.mask_BA,
            _unless_all_none([ask.mode for ask in decided]),
            _unless_all_none([ask.arm for ask in decided]),
            any([ask.explain for ask in decided]),
        )
        answers = each(self._decide(rows, snapshot)) if decided else []
        at = Moment(snapshot.plan, self._wall_clock(), time.perf_counter(), snapshot.engines)
        for place, (row, answer) in enumerate(zip(encoded.rows, answers)):
            ask = asks[row]
            if isinstance(answer, RequestRefused):
                drafts[row] = Draft(answer)
                continue
            mask_A = None if encoded.mask_BA is None else encoded.mask_BA[place]
            self._num_repaired += row in encoded.repairs
            decision = decision_of(ask, encoded.observations[row], mask_A, encoded.repairs.get(row), answer, at)
            told = answer_of(decision, self._policy, answer.parameters_P, explain=ask.explain, state=ask.state)
            drafts[row] = Draft(told, encode(decision) + b"\n", (ask.decision_id,) if ask.is_named else ())
        return [drafts[row] for row in range(len(asks))]

    def _decide_many(self, ask: ManyAsk, snapshot: Snapshot) -> Draft:
        """Return the draft of one request for many decisions: one answer, one line."""
        try:
            encoded = self._encode_many(ask, snapshot)
        except RequestRefused as error:
            return Draft(error)
        if ask.is_all_or_nothing and encoded.refusals:
            return Draft(_first_of(encoded.refusals))
        told: dict[int, Any] = {row: failure_of(refusal) for row, refusal in encoded.refusals.items()}
        asked_again = (row for row in range(ask.num_rows) if row not in told)
        again, told_from = self.repetitions.rows_told_again(ask, asked_again, snapshot.champion.policy.spaces)
        told |= again
        keep = [place for place, row in enumerate(encoded.rows) if row not in again] if again else range(len(encoded.rows))
        rows = [encoded.rows[place] for place in keep] if again else encoded.rows
        answers, undecided = sorted_out(self._decide(_rows_of(ask, encoded, keep, rows), snapshot)) if rows else (None, {})
        errors = {rows[place]: error for place, error in undecided.items()}
        if ask.is_all_or_nothing and errors:
            self._decided.pop()
            return Draft(_first_of(errors))
        told |= {row: failure_of(error) for row, error in errors.items()}
        if answers is None:
            return Draft(self._told_in_order(ask, told), told_from=told_from)
        rows = [row for row in rows if row not in errors] if errors else rows
        at = Moment(snapshot.plan, self._wall_clock(), time.perf_counter(), snapshot.engines)
        line = encode(batch_of(ask, encoded, rows, answers, at)) + b"\n"
        names = [ask.batch_id] if ask.batch_id else [ask.decision_ids[row] for row in rows]
        self._num_repaired += sum([row in encoded.repairs for row in rows]) if encoded.repairs else 0
        if ask.is_all_or_nothing and not told:
            result: Any = Columns(ask.decision_ids, answers, repairs_of(encoded, rows))
        else:
            result = self._told_in_order(ask, told | dict(zip(rows, told_of_many(ask, encoded, rows, answers))))
        return Draft(result, line, names if ask.is_named else (), told_from)

    def _told_in_order(self, ask: ManyAsk, told: dict[int, Any]) -> DecideManyAnswer:
        return DecideManyAnswer(self._policy, [told[row] for row in range(ask.num_rows)])

    def _encode_many(self, ask: ManyAsk, snapshot: Snapshot) -> Encoded:
        spaces = snapshot.champion.policy.spaces
        if ask.numbers is not None:
            return encode_numbers(spaces, ask.numbers, repair=self._repair)
        return encode_features(
            spaces, ask.observations, ask.masks, is_numbers=ask.is_numbers, repair=self._repair, states=ask.states
        )

    def _decide(self, rows: Rows, snapshot: Snapshot) -> Decided:
        decided = self.decider.decide(rows, snapshot)
        self._decided.append((rows, decided))
        return decided

    def _offer_to_shadows(self, rows: Rows, decided: Decided, snapshot: Snapshot) -> None:
        answers, errors = sorted_out(decided)
        if answers is None:
            return
        ids, seeds, obs_BD, mask_BA = rows.decision_ids, rows.seeds, rows.obs_BD, rows.mask_BA
        if errors:
            answered = [row for row in range(len(ids)) if row not in errors]
            ids, seeds, obs_BD = [ids[row] for row in answered], [seeds[row] for row in answered], obs_BD[answered]
            mask_BA = mask_BA[answered] if mask_BA is not None else None
        self._shadowing.offer(snapshot.shadows, ids, seeds, answers.actions, obs_BD, mask_BA)

    def _write_down(
        self, drafts: list[Draft], delivers: list[Deliver], num_decisions: int, snapshot: Snapshot, started_s: list[float]
    ) -> None:
        """Have the batch logged with one write, and let the answers go once it is: what is not logged is not answered.

        What became of the log may be known at once or, where it is flushed to the disk, a little later.
        """
        decided, self._decided, num_repaired = self._decided, [], self._num_repaired
        lines = b"".join([draft.line for draft in drafts])
        if not lines:
            return deliver_each([draft.result for draft in drafts], delivers)
        end_logging = self.repetitions.begin_logging(drafts)

        def logged(error: TrimtabError | None, place: Place | None) -> None:
            if error is not None:
                deliver_each([error if draft.line else draft.result for draft in drafts], delivers)
                return end_logging()
            if place is not None:
                self.repetitions.remember(drafts, place)
            deliver_each([draft.result for draft in drafts], delivers)
            end_logging()
            try:
                self._note(decided, num_repaired, started_s, snapshot)
            except Exception:  # raised from here, it would be told to all who have their answers
                logger.exception("event=batch_not_counted")

        try:
            self._log.append(lines, num_decisions, logged, lambda where: self.repetitions.remember(drafts, where))
        except BaseException:  # a mistake of ours: repetitions would wait for ever
            end_logging()
            raise

    def _note(self, decided: list[tuple[Rows, Decided]], num_repaired: int, started_s: list[float], snapshot: Snapshot) -> None:
        """Count what has been answered, and have the shadows asked about it."""
        self.tally.add_requests(started_s, time.perf_counter())
        self.tally.num_repaired += num_repaired
        for rows, answers in decided:
            self.tally.add_answers(answers)
            if snapshot.shadows:
                self._offer_to_shadows(rows, answers, snapshot)


def _first_of(refusals: dict[int, Any]) -> RequestRefused:
    """Return what is wrong with the first of many that cannot be decided, with its place."""
    row = min(refusals)
    error = refusals[row]
    where = f"observation {row} of the request: {error}"
    return RequestInvalid(where, error.status) if isinstance(error, RequestInvalid) else type(error)(where)


def _rows_of(ask: ManyAsk, encoded: Encoded, keep: Sequence[int], rows: Sequence[int]) -> Rows:
    """Return rows of a request for many, to be decided; `keep` are their places among those that are encoded."""
    keeps_all = len(keep) == len(encoded.rows)
    return Rows(
        chosen(ask.decision_ids, rows),
        chosen(ask.seeds, rows),
        chosen(ask.unit_ids, rows) if isinstance(ask.unit_ids, list) else ask.unit_ids,
        encoded.obs_BD if keeps_all else encoded.obs_BD[keep],
        encoded.mask_BA if keeps_all or encoded.mask_BA is None else encoded.mask_BA[keep],
        None if ask.mode is None else [ask.mode] * len(rows),
        None if ask.arm is None else [ask.arm] * len(rows),
        ask.explain,
    )


def _unless_all_none(values: list[Any]) -> list[Any] | None:
    return values if any([value is not None for value in values]) else None
