"""How one request becomes one logged decision: key, body, arm, batch, action, log line, answer."""

import logging
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from policies.distributions import seed_of
from policies.errors import ServiceUnavailable
from policies.records import Decision
from policies.traffic import Arm, assign
from serve_app.asgi import Request
from serve_app.batcher import Batcher
from serve_app.config import ServingConfig
from serve_app.decision_ids import DecisionIds
from serve_app.decision_log import SegmentWriter
from serve_app.keys import ApiKey, KeyRing
from serve_app.variants import Snapshot, Variant, VariantStore
from serve_app.wire import DecideAnswer, decide_decoder, encode

logger = logging.getLogger(__name__)


class Ask(NamedTuple):
    """One request that waits for its batch. `started_s` is the monotonic time of its receipt."""

    decision_id: str
    unit_id: str
    episode_id: str | None
    observation: Any
    obs_D: np.ndarray
    mask_A: np.ndarray | None
    started_s: float


@dataclass(frozen=True)
class Distribution:
    """What one version says of a batch: a distribution per row [B, P], and for each whether it can be used."""

    variant: Variant
    parameters_BP: np.ndarray
    is_usable_B: list[bool]
    failure: str


class Ingress:
    """Answers POST /v1/decide."""

    def __init__(
        self,
        policy: str,
        *,
        keys: KeyRing,
        decision_ids: DecisionIds,
        variants: VariantStore,
        log: SegmentWriter,
        config: ServingConfig,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._policy = policy
        self._keys = keys
        self._decision_ids = decision_ids
        self._variants = variants
        self._log = log
        self._max_body_bytes = config.max_body_bytes
        self._wall_clock = wall_clock
        self.batcher: Batcher[Ask, DecideAnswer] = Batcher(
            self._answer_batch, max_batch_size=config.max_batch_size, max_queue=config.max_queue
        )

    async def decide(self, request: Request) -> bytes:
        """Return the answer's JSON; raises `RequestRefused` for whatever is not answered with an action."""
        started_s = time.perf_counter()
        self.check_key(request.header(b"authorization"))  # before a byte of the body is read
        body = await request.body(self._max_body_bytes)
        return encode(await self.batcher.submit(self.ask(body, started_s=started_s)))

    def check_key(self, authorization: bytes | None) -> ApiKey:
        """Return the key in an Authorization header; raises `RequestRefused` unless it may decide now."""
        return self._keys.check(authorization, "decide")

    def ask(self, body: bytes, *, started_s: float) -> Ask:
        """Return what a body asks for; raises `RequestRefused`."""
        asked = decide_decoder.decode(body)
        spaces = self._snapshot().champion.policy.spaces
        observation, mask = spaces.split_mask(asked.observation, asked.action_mask)
        request_id = asked.request_id or secrets.token_hex(12)
        return Ask(
            decision_id=self._decision_ids.name(request_id),
            unit_id=asked.unit_id or asked.episode_id or request_id,  # an episode without a unit keeps its arm too
            episode_id=asked.episode_id,
            observation=observation,
            obs_D=spaces.check_observation(observation),
            mask_A=spaces.check_mask(mask),
            started_s=started_s,
        )

    def _answer_batch(self, asks: list[Ask]) -> list[DecideAnswer | Exception]:
        """Decide for all, write all down, and only then let the answers go.

        The snapshot is read once: a new plan comes into force between batches, never within one.
        """
        snapshot = self._snapshot()
        distributions = _distributions(snapshot, asks)
        outcomes = [self._decide_one(ask, row, snapshot, distributions) for row, ask in enumerate(asks)]
        self._write_down([outcome for outcome in outcomes if isinstance(outcome, Decision)])
        return [self._answer(outcome) if isinstance(outcome, Decision) else outcome for outcome in outcomes]

    def _decide_one(
        self, ask: Ask, row: int, snapshot: Snapshot, distributions: dict[int, Distribution]
    ) -> Decision | ServiceUnavailable:
        """Draw the action of one row; what is wrong with it is its own answer and nobody else's."""
        arm = assign(ask.unit_id, snapshot.plan)
        effective = {a.version: _effective(distributions, a, snapshot, row) for a in snapshot.plan.arms}
        answering = effective[arm.version]
        if answering is None:
            return ServiceUnavailable(f"no version can answer this observation: {distributions[arm.version].failure}")
        variant = answering.variant
        seed = seed_of(ask.decision_id)
        action, propensity = variant.policy.distribution.choose(answering.parameters_BP[row], variant.mode, seed)
        mixture_propensity = _mixture_propensity(action, row, snapshot, effective)
        if not (0 < propensity < math.inf and 0 < mixture_propensity < math.inf):  # densities of hundreds of narrow components
            return ServiceUnavailable(
                f"the action's propensity is {propensity:g}, and {mixture_propensity:g} over all arms: nothing can be learned "
                "from that; serve this policy greedily"
            )
        return Decision(
            decision_id=ask.decision_id,
            time_s=self._wall_clock(),
            unit_id=ask.unit_id,
            episode_id=ask.episode_id,
            plan=snapshot.plan.number,
            release=snapshot.plan.release,
            arm=arm.name,
            version=variant.version,
            digest=variant.digest,
            observation=ask.observation,
            action=action,
            mode=variant.mode,
            seed=seed,
            propensity=propensity,
            mixture_propensity=mixture_propensity,
            fallback=None if variant.version == arm.version else distributions[arm.version].failure,
            latency_s=time.perf_counter() - ask.started_s,
            action_mask=None if ask.mask_A is None else ask.mask_A.tolist(),
        )

    def _write_down(self, decisions: list[Decision]) -> None:
        """Append the batch to the log with one write; raises `ServiceUnavailable`: what is not logged is not answered."""
        if not decisions:
            return
        try:
            self._log.append(b"".join([encode(decision) + b"\n" for decision in decisions]))
        except OSError as error:
            logger.error("event=decisions_not_logged num_decisions=%d error=%r", len(decisions), str(error))
            raise ServiceUnavailable(f"the decision log cannot be written: {error}") from error

    def _answer(self, decision: Decision) -> DecideAnswer:
        return DecideAnswer(
            decision_id=decision.decision_id,
            action=decision.action,
            policy=self._policy,
            version=decision.version,
            arm=decision.arm,
            propensity=decision.propensity,
            fallback=decision.fallback,
        )

    def _snapshot(self) -> Snapshot:
        snapshot = self._variants.snapshot
        if snapshot is None:
            raise ServiceUnavailable(f"no champion of {self._policy} is loaded: {self._variants.why_not_ready()}")
        return snapshot


def _distributions(snapshot: Snapshot, asks: list[Ask]) -> dict[int, Distribution]:
    """Ask every version of the plan about every row: the mixture needs them all, and a fallback has its answer at hand."""
    obs_BD = np.stack([ask.obs_D for ask in asks])
    mask_BA = np.stack([ask.mask_A for ask in asks]) if snapshot.champion.policy.spaces.has_mask else None
    return {version: _distribution(variant, obs_BD, mask_BA) for version, variant in snapshot.variants.items()}


def _distribution(variant: Variant, obs_BD: np.ndarray, mask_BA: np.ndarray | None) -> Distribution:
    try:
        parameters_BP = variant.distributions(obs_BD, mask_BA)
    except Exception as error:  # a version's failure is not the request's: the champion answers instead
        logger.exception("event=version_failed version=%d", variant.version)
        nothing = np.empty((len(obs_BD), 0))
        return Distribution(variant, nothing, [False] * len(obs_BD), f"version {variant.version} raised {error!r}")
    is_usable_B = np.isfinite(parameters_BP).all(axis=1).tolist()
    return Distribution(variant, parameters_BP, is_usable_B, f"version {variant.version} gave NaN")


def _effective(distributions: dict[int, Distribution], arm: Arm, snapshot: Snapshot, row: int) -> Distribution | None:
    """Return the distribution that answers this row in this arm: its own version's, else the champion's, else None."""
    for version in (arm.version, snapshot.champion.version):
        if distributions[version].is_usable_B[row]:
            return distributions[version]
    return None


def _mixture_propensity(action: Any, row: int, snapshot: Snapshot, effective: dict[int, Distribution | None]) -> float:
    """Return the probability of the action before the unit's arm was known: the sum over arms of weight times propensity.

    An arm that could not have answered this row sends no action, so it adds nothing. Of real-valued actions the terms are
    densities; a greedy arm beside a sampling one adds its point mass only to exactly its own action.
    """
    total = 0.0
    for arm in snapshot.plan.arms:
        answering = effective[arm.version]
        if answering is not None:
            variant = answering.variant
            total += arm.weight * variant.policy.distribution.propensity(action, answering.parameters_BP[row], variant.mode)
    return total
