"""Keep every live version of the policy in memory, as the registry's traffic plan asks, and never less than what worked."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

import numpy as np

from policies.distributions import Mode
from policies.errors import IntegrityError, ServiceUnavailable, TrimtabError
from policies.onnx_engine import OnnxEngine
from policies.policy import Policy
from policies.registry import Registry, RegistryState
from policies.spaces import Spaces
from policies.traffic import TrafficPlan, without
from serve_app.engines import NUMPY, EngineSetting, engine_for

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
    engine: OnnxEngine | None = None  # what computes it in numpy's place; goes with the variant

    @property
    def engine_name(self) -> str:
        return NUMPY if self.engine is None else self.engine.name

    def distributions(self, obs_BD: np.ndarray, mask_BA: np.ndarray | None) -> np.ndarray:
        """Return a distribution over actions per row [B, P] for float32 observations [B, D]."""
        return (self.engine or self.policy).distributions(obs_BD, mask_BA)


@dataclass(frozen=True)
class Snapshot:
    """A traffic plan with all of its variants: what one batch is answered with.

    `plan` names the arms and shadows that are loaded. `champion` is the variant of its champion arm; `previous` that of the
    champion before it, None when there is none, it did not load, or it stands in for the champion already.
    """

    plan: TrafficPlan
    champion: Variant
    variants: MappingProxyType[int, Variant]  # exactly the versions of the plan's arms: what may become an answer
    shadows: tuple[Variant, ...] = ()  # asked in the background, never an answer
    previous: Variant | None = None

    @cached_property
    def engines(self) -> dict[int, str] | None:
        """The engines of the versions that answer or may stand in, where that is not numpy; None where it is for all."""
        variants = [*self.variants.values(), *filter(None, [self.previous])]
        return {variant.version: variant.engine_name for variant in variants if variant.engine} or None


@dataclass
class _Failure:
    message: str
    delay_s: float
    retry_at: float


@dataclass
class VariantStore:
    """Follows the registry. `snapshot` is replaced as a whole, so whoever reads it once has one consistent plan.

    `refresh` does the work and may run in a thread; only one at a time. Readers need no lock. `snapshot` is None until a
    champion has been loaded; after that it is always the newest plan whose champion loaded, whatever becomes of the disk. Of
    its other arms one that does not load is answered for by the champion, as if it were switched off: a broken canary or
    holdout must not keep a rollback or a switch from coming into force. A shadow that does not load is left out.
    """

    registry: Registry
    check: Callable[[Variant], None] = lambda variant: (
        None
    )  # raises a `TrimtabError` for a version that this replica cannot serve
    engine: EngineSetting = "numpy"
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

    @property
    def engines(self) -> dict[int, str]:
        """What computes each version in memory."""
        return {version: variant.engine_name for version, variant in sorted(list(self._loaded.items()))}

    def in_force(self, policy: str) -> Snapshot:
        """Return the snapshot; raises `ServiceUnavailable` while no champion is loaded."""
        if self.snapshot is None:
            raise ServiceUnavailable(f"no champion of {policy} is loaded: {self.why_not_ready()}")
        return self.snapshot

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
            if self.snapshot is None or _is_loaded(state.plan, self._loaded):
                self._swap(state, state.plan)
            if self.snapshot is None:
                return  # the champion did not load: the others would have nothing to be compared with
        self._swap(state, state.plan)

    def _swap(self, state: RegistryState, plan: TrafficPlan) -> None:
        plan = _what_loaded(plan, self._loaded)
        champion = plan.arm("champion")
        assert champion is not None, "every plan has a champion"
        if champion.version not in self._loaded:
            return
        previous = None
        if state.previous_champion is not None and champion.version == state.champion:
            previous = self._loaded.get(state.previous_champion)
        if self.snapshot is None or self.snapshot.plan != plan or self.snapshot.previous is not previous:
            variants = MappingProxyType({arm.version: self._loaded[arm.version] for arm in plan.arms})
            shadows = tuple(self._loaded[version] for version in plan.shadows)
            self.snapshot = Snapshot(plan, variants[champion.version], variants, shadows, previous)
            logger.info("event=plan_in_force plan=%d versions=%s shadows=%s", plan.number, sorted(variants), list(plan.shadows))

    def _try_load(self, version: int, *, now: float) -> None:
        failure = self._failures.get(version)
        if failure is not None and now < failure.retry_at:
            return
        try:
            bundle = self.registry.bundle(version)  # verifies every byte and runs the golden vectors, which also warms it up
            self._require_same_spaces(version, bundle.policy.spaces)
            engine = engine_for(version, bundle, self.engine)
            variant = Variant(version, bundle.digest, bundle.policy, bundle.manifest["serving_mode"], engine)
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
        in_force: set[int] = set()
        if self.snapshot is not None:
            in_force.update(self.snapshot.variants, self.snapshot.plan.shadows)
        keep = in_force.union(_wanted(state))
        self._loaded = {version: variant for version, variant in self._loaded.items() if version in keep}
        self._failures = {version: failure for version, failure in self._failures.items() if version in keep}


def _wanted(state: RegistryState) -> list[int]:
    """The plan's versions, champion first, and what may be called at any moment: then nothing must wait for a load.

    That is the previous champion, for a rollback, and whatever is switched off; last the shadows, which nobody waits for.
    """
    plan = state.plan
    assert plan is not None
    release = state.release if state.release is not None and state.release.is_open else None
    versions = [
        *(arm.version for arm in reversed(plan.arms)),  # the champion is the last one
        state.champion,
        state.previous_champion,
        release.candidate if release else None,
        state.holdout.version if state.holdout else None,
        *plan.shadows,
    ]
    return list(dict.fromkeys(version for version in versions if version is not None))


def _is_loaded(plan: TrafficPlan, loaded: dict[int, Variant]) -> bool:
    return all(arm.version in loaded for arm in plan.arms)


def _what_loaded(plan: TrafficPlan, loaded: dict[int, Variant]) -> TrafficPlan:
    """Return the plan without the arms and shadows that are not loaded; the champion stays in it in any case."""
    for arm in plan.arms:
        if arm.name != "champion" and arm.version not in loaded:
            plan = without(plan, arm.name)
    return replace(plan, shadows=tuple(version for version in plan.shadows if version in loaded))
