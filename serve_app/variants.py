"""Keep every live version of the policy in memory, as the registry's traffic plan asks, and never less than what worked."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from policies.distributions import Mode
from policies.errors import IntegrityError, TrimtabError
from policies.policy import Policy
from policies.registry import Registry, RegistryState
from policies.spaces import Spaces
from policies.traffic import Arm, TrafficPlan

POLL_INTERVAL_S = 0.5  # a plan change must be everywhere within 2 s; without news a poll is one failed `open`
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0  # verifying a bundle reads all of it: a broken one is not tried twice a second

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """One version, verified and ready to answer."""

    version: int
    digest: str
    policy: Policy
    mode: Mode

    def distributions(self, obs_BD: np.ndarray, mask_BA: np.ndarray | None) -> np.ndarray:
        """Return a distribution over actions per row [B, P] for float32 observations [B, D]."""
        return self.policy.distributions(obs_BD, mask_BA)


@dataclass(frozen=True)
class Snapshot:
    """A traffic plan with all of its variants: what one batch is answered with."""

    plan: TrafficPlan
    champion: Variant
    variants: MappingProxyType[int, Variant]  # exactly the versions of the plan's arms
    previous: Variant | None = None  # the previous champion, if it is in memory
    shadows: tuple[Variant, ...] = ()


@dataclass
class _Failure:
    message: str
    delay_s: float
    retry_at: float


@dataclass
class VariantStore:
    """Follows the registry. `snapshot` is replaced as a whole, so whoever reads it once has one consistent plan.

    `refresh` does the work and may run in a thread; only one at a time. Readers need no lock. `snapshot` is None until a
    champion has been loaded; after that it is always the newest plan whose versions all loaded, whatever becomes of the disk.
    """

    registry: Registry
    check: Callable[[Variant], None] = lambda variant: (
        None
    )  # raises a `TrimtabError` for a version that this replica cannot serve
    snapshot: Snapshot | None = None
    registry_error: str | None = None
    _loaded: dict[int, Variant] = field(default_factory=dict)
    _failures: dict[int, _Failure] = field(default_factory=dict)

    @property
    def load_failures(self) -> dict[int, str]:
        """The versions that are wanted but did not load, and why."""
        return {version: failure.message for version, failure in list(self._failures.items())}

    @property
    def versions(self) -> list[int]:
        """The versions in memory."""
        return sorted(list(self._loaded))

    def why_not_ready(self) -> str:
        """Say why there is no snapshot."""
        failures = [f"version {version}: {message}" for version, message in self.load_failures.items()]
        return self.registry_error or "; ".join(failures) or "no version has been made champion; publish one"

    async def follow(self) -> None:
        """Refresh for ever, off the event loop: reading and verifying a bundle takes from milliseconds to seconds."""
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            await asyncio.to_thread(self.refresh, now=time.monotonic())

    def refresh(self, *, now: float) -> None:
        """Read the registry, load what its plan needs, and replace the snapshot if all of that works."""
        try:
            state = self.registry.state()
        except (TrimtabError, OSError) as error:
            if self.registry_error is None:
                logger.error("event=registry_unreadable error=%r", str(error))
            self.registry_error = f"{type(error).__name__}: {error}"
            return
        self.registry_error = None
        if state.plan is None:
            return
        self._forget_unwanted(state)
        for version in _wanted(state):
            if version not in self._loaded:
                self._try_load(version, now=now)
            self._swap(state.plan)

    def _swap(self, plan: TrafficPlan) -> None:
        if self.snapshot is None:
            plan = _what_loaded(plan, self._loaded)
        versions = {arm.version for arm in plan.arms}
        champion = plan.arm("champion")
        if champion is None or not versions <= set(self._loaded):
            return
        if self.snapshot is None or self.snapshot.plan != plan:
            variants = MappingProxyType({version: self._loaded[version] for version in versions})
            self.snapshot = Snapshot(plan, variants[champion.version], variants)
            logger.info("event=plan_in_force plan=%d versions=%s", plan.number, sorted(versions))

    def _try_load(self, version: int, *, now: float) -> None:
        failure = self._failures.get(version)
        if failure is not None and now < failure.retry_at:
            return
        try:
            bundle = self.registry.bundle(version)  # verifies every byte and runs the golden vectors, which also warms it up
            self._require_same_spaces(version, bundle.policy.spaces)
            variant = Variant(version, bundle.digest, bundle.policy, bundle.manifest["serving_mode"])
            self.check(variant)
        except (TrimtabError, OSError) as error:
            delay_s = min(2 * failure.delay_s, LAST_RETRY_S) if failure else FIRST_RETRY_S
            self._failures[version] = _Failure(f"{type(error).__name__}: {error}", delay_s, now + delay_s)
            logger.error("event=version_not_loaded version=%d retry_in_s=%g error=%r", version, delay_s, str(error))
            return
        self._loaded[version] = variant
        self._failures.pop(version, None)

    def _require_same_spaces(self, version: int, spaces: Spaces) -> None:
        """One endpoint takes one kind of request: a policy with another interface is another policy, under its own name."""
        if self.snapshot is None:
            return
        champion = self.snapshot.champion
        theirs, ours = spaces.interface(), champion.policy.spaces.interface()
        if theirs != ours:
            raise IntegrityError(
                f"version {version} takes and gives {theirs}, version {champion.version} {ours}; "
                "publish it under another policy name"
            )

    def _forget_unwanted(self, state: RegistryState) -> None:
        in_force = set(self.snapshot.variants) if self.snapshot else set()
        keep = in_force.union(_wanted(state))
        self._loaded = {version: variant for version, variant in self._loaded.items() if version in keep}
        self._failures = {version: failure for version, failure in self._failures.items() if version in keep}


def _wanted(state: RegistryState) -> list[int]:
    """The champion, the plan's other versions, and the previous champion: a rollback must not wait for a load."""
    assert state.plan is not None
    versions = [state.champion, *(arm.version for arm in state.plan.arms), state.previous_champion]
    return list(dict.fromkeys(version for version in versions if version is not None))


def _what_loaded(plan: TrafficPlan, loaded: dict[int, Variant]) -> TrafficPlan:
    """Return the plan, or the champion alone when a replica starts during a release whose candidate does not load."""
    if all(arm.version in loaded for arm in plan.arms):
        return plan
    champion = plan.arm("champion")
    assert champion is not None, "every plan has a champion"
    return TrafficPlan(plan.number, plan.release, (Arm("champion", champion.version, 1.0),))
