"""What clients that decide in their own process get from a replica, and how their decisions come into the log.

They get the traffic plan, the bundles of its versions and a lease, under which they name decisions. What they send back later is
written as it came, once it was checked: that its id was made under a lease, at a time when that lease was in force, that its
seed is that of its id, that its plan has this arm with this version, the version this digest, that something can be learned from
its propensities, and that whoever reads the log can read it. Trusted is the rest: observation, action and propensity are what
the client says. `trimtab replay` recomputes them.
"""

import asyncio
import math
import re
import time
from collections.abc import Callable
from typing import Annotated

import msgspec
from msgspec import Meta

from policies.bundle_reader import read_file_of
from policies.distributions import seed_of
from policies.errors import DecisionUnknown, NotFound, Overloaded, RequestInvalid, ServiceUnavailable, TrimtabError
from policies.records import Decision
from policies.registry import Registry, RegistryState
from serve_app.asgi import BYTES, Request, Response
from serve_app.config import ServingConfig
from serve_app.decision_ids import LEASE_S, DecisionIds, lease_began_at
from serve_app.durable_log import DecisionLog, Place
from serve_app.variants import Snapshot, VariantStore
from serve_app.wire import MAX_NESTING, BodyDecoder, encode, is_nested_deeply

MAX_DECISIONS = 1000
MAX_FILES = 4  # of bundles that are read or sent at once: each has up to 200 MB, and is in memory until its client has read it
MAX_CLOCK_SKEW_S = 300.0  # between a client's clock and ours; the log's times are what rewards are joined by
MAX_NAME_LENGTH = 256  # of units and episodes, as in requests
_LEASED_ID = re.compile(r"[A-Za-z0-9_-]{1,64}(:[0-9]{1,19})?\.[0-9a-f]{16}\.[0-9a-f]{12}")


class LocalDecisionsRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /v1/decisions."""

    decisions: Annotated[list[Decision], Meta(min_length=1, max_length=MAX_DECISIONS)]


_decoder = BodyDecoder(LocalDecisionsRequest, f'{{"decisions": [1 to {MAX_DECISIONS} decision records]}} and no other key')


class LocalDecisions:
    """Answers GET /v1/plan, GET /v1/bundles/<digest>/<file> and POST /v1/decisions.

    `registry` is one of its own: it is read in a thread while the variants' is read in another.
    """

    def __init__(
        self,
        policy: str,
        *,
        decision_ids: DecisionIds,
        variants: VariantStore,
        registry: Registry,
        log: DecisionLog,
        config: ServingConfig,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._policy = policy
        self._decision_ids = decision_ids
        self._variants = variants
        self._registry = registry
        self._reading = asyncio.Lock()
        self._log = log
        self._max_body_bytes = config.max_body_bytes
        self._has_shield = config.shield.is_on
        self._wall_clock = wall_clock
        self._known: RegistryState | None = None  # as it was when a decision last named something newer
        self.num_accepted = 0
        self._num_files = 0

    def plan(self) -> bytes:
        """Return the plan in force, its versions and a new lease.

        Raises `RequestInvalid` where a shield stands between the versions and their callers: nobody takes it along.
        """
        if self._has_shield:
            raise RequestInvalid("this policy is served behind a shield, which a local client does not have; ask the endpoint")
        snapshot, lease = self._snapshot(), self._decision_ids.lease(now=self._wall_clock())
        versions = {
            str(version): {"digest": variant.digest, "mode": variant.mode} for version, variant in snapshot.variants.items()
        }
        return encode(
            {
                "policy": self._policy,
                "plan": snapshot.plan.to_json(),
                "versions": versions,
                "lease": {"id": lease.id, "key": lease.key, "expires_at": lease.expires_at},
            }
        )

    async def bundle_file(self, digest: str, name: str) -> Response:
        """Return a file of a bundle that is in force.

        Raises `RequestInvalid` with 404 for any other, `Overloaded` while `MAX_FILES` have not left yet.
        """
        if digest not in [variant.digest for variant in self._snapshot().variants.values()]:
            raise RequestInvalid(f"bundle {digest!r:.100} is not in force; GET /v1/plan says which are", 404)
        if self._num_files >= MAX_FILES:
            raise Overloaded(f"{self._num_files} bundle files are being sent by this replica, the limit; try again in a moment")
        self._num_files += 1
        try:
            body = await asyncio.to_thread(read_file_of, self._registry.bundles / digest, name, digest=digest)
        except BaseException as error:
            self._file_left()
            if isinstance(error, NotFound):
                raise RequestInvalid(str(error), 404) from error
            raise
        return Response(200, body, BYTES, left=self._file_left)

    def _file_left(self) -> None:
        self._num_files -= 1

    async def accept(self, request: Request) -> bytes:
        """Write down decisions that were made elsewhere, all with one write or none; return `{"accepted": n}`.

        Raises `RequestInvalid` or `DecisionUnknown` that name the first wrong one, `ServiceUnavailable` for those that this
        replica cannot judge yet.
        """
        asked: LocalDecisionsRequest = _decoder.decode(await request.body(self._max_body_bytes))
        now, newest_plan = self._wall_clock(), self._snapshot().plan.number
        for index, decision in enumerate(asked.decisions):
            where = f"decision {index} ({decision.decision_id!r:.200})"
            if decision.plan > newest_plan:
                raise ServiceUnavailable(f"{where}: this replica is at plan {newest_plan}, it is of {decision.plan}; send again")
            if not (_LEASED_ID.fullmatch(decision.decision_id) and self._decision_ids.is_ours(decision.decision_id)):
                raise DecisionUnknown(f"{where} was not named under a lease of this deployment; nothing was accepted")
            problem = _problem(decision, await self._state_with(decision), now)
            if problem:
                raise RequestInvalid(f"{where}: {problem}; nothing was accepted")
        await self._write_down(asked.decisions)
        self.num_accepted += len(asked.decisions)
        return encode({"accepted": len(asked.decisions)})

    def _snapshot(self) -> Snapshot:
        return self._variants.in_force(self._policy)

    async def _state_with(self, decision: Decision) -> RegistryState:
        """Return a state of the registry that has the decision's plan and version, if there ever were such.

        The snapshot would not do: it has one plan, without the arms that did not load here. Raises `ServiceUnavailable` when the
        registry cannot be read.
        """
        async with self._reading:
            known = self._known
            if known is None or decision.plan > known.num_entries or decision.version not in known.versions:
                try:
                    self._known = await asyncio.to_thread(self._registry.state)
                except (TrimtabError, OSError) as error:
                    why = f"the registry cannot be read to check decisions against: {error}"
                    raise ServiceUnavailable(f"{why}; send them again") from error
            return self._known

    async def _write_down(self, decisions: list[Decision]) -> None:
        """Append them with one write, and wait until they are as durable as was asked for."""
        logged: asyncio.Future[TrimtabError | None] = asyncio.get_running_loop().create_future()

        def then(error: TrimtabError | None, place: Place | None) -> None:
            if not logged.done():  # the client may be gone
                logged.set_result(error)

        self._log.append(b"".join([encode(decision) + b"\n" for decision in decisions]), len(decisions), then)
        error = await logged
        if error is not None:
            raise error


def _problem(decision: Decision, state: RegistryState, now: float) -> str | None:
    """Say what is wrong with a decision; None when nothing is."""
    began_at = lease_began_at(decision.decision_id)
    assert began_at is not None, "its id was checked"
    ended_at = min(began_at + LEASE_S, now)
    if not began_at - MAX_CLOCK_SKEW_S <= decision.time_s <= ended_at + MAX_CLOCK_SKEW_S:
        return (
            f"time_s is {decision.time_s:.0f}, expected {began_at:.0f} to {ended_at:.0f}, when its lease was in force, and "
            f"{MAX_CLOCK_SKEW_S:.0f} s around that; set the client's clock"
        )
    version = state.versions.get(decision.version)
    if version is None or decision.digest != version.digest:
        return f"version {decision.version} is {version and version.digest}, not {decision.digest!r:.80}"
    if decision.seed != seed_of(decision.decision_id):
        return f"seed is {decision.seed}, expected that of its id, {seed_of(decision.decision_id)}"
    if not (0 < decision.propensity < math.inf and 0 < decision.mixture_propensity < math.inf):
        return f"propensities are {decision.propensity} and {decision.mixture_propensity}, expected positive numbers"
    names = (decision.unit_id, decision.episode_id or "-")
    if not all(0 < len(name) <= MAX_NAME_LENGTH for name in names):
        return f"unit_id and episode_id have {len(names[0])} and {len(names[1])} characters, expected 1 to {MAX_NAME_LENGTH}"
    plan = state.plan_numbered(decision.plan)
    if plan is None or decision.release != plan.release:
        of_release = "no plan" if plan is None else f"of release {plan.release}"
        return f"plan {decision.plan!s:.24} is {of_release}, the decision's release is {decision.release!s:.24}"
    # A version that failed is answered for by the champion, whichever arm the unit has.
    answering = {arm.name: arm.version for arm in plan.arms}
    if decision.arm in answering and decision.fallback is not None:
        answering[decision.arm] = answering["champion"]
    if decision.version != answering.get(decision.arm):
        whose = f"arm {decision.arm!r:.80}{' after a fallback' if decision.fallback is not None else ''}"
        return f"version {decision.version} is not that of {whose} in plan {plan.number}: {plan.arms!s:.400}"
    if is_nested_deeply(decision.observation) or is_nested_deeply(decision.action):
        return f"observation or action has more than {MAX_NESTING} levels of lists and objects"
    expected_rung = "arm" if decision.fallback is None else "champion"
    terms = (decision.rung, decision.shield, decision.assigned, decision.repair, decision.engines)
    if terms != (expected_rung, None, "plan", None, None):
        return f"rung, shield, assigned, repair and engines are {terms}, expected {(expected_rung, None, 'plan', None, None)}"
    return None
