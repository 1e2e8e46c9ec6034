"""What a registry's journal adds up to: a pure fold over its entries, of all of them or of those before a moment.

Champion, release, traffic plan, aliases, tags and approvals are never stored: they are what the entries say, in their order.
"""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from policies.errors import IntegrityError, NotFound
from policies.traffic import TrafficPlan, champion_only, with_canary, with_holdout, without
from policies.verdicts import Verdict

ReleaseAction = Literal["advance", "promote", "rollback", "abort", "pause", "resume"]
ReleaseState = Literal["running", "paused", "promoted", "rolled_back", "aborted"]
SwitchedArm = Literal["canary", "champion", "holdout", "shadow"]

DERIVED_ALIASES = ("champion", "challenger", "previous")  # they follow from releases; nobody sets them
MIN_DIGEST_PREFIX = 6


@dataclass(frozen=True)
class Approval:
    """Somebody's word for a version."""

    approver: str
    reason: str
    time_s: float


@dataclass(frozen=True)
class Version:
    """A registered bundle. `gate_verdict` was made before registering; `override_gates` is the break-glass reason, if any.

    `collected_at` is when `registry gc` gave its bundle up, else None: nothing can be served or replayed with it any more.
    """

    number: int
    digest: str
    policy_sha256: str
    gate_verdict: Verdict
    override_gates: str | None
    registered_at: float
    tags: dict[str, str] = field(default_factory=dict)
    approvals: tuple[Approval, ...] = ()
    collected_at: float | None = None


@dataclass(frozen=True)
class ReleaseStep:
    """One change of a release with its reason, in the order of the journal."""

    time_s: float
    action: str
    step: int
    reason: str
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Release:
    """The delivery of a candidate: `weights` are the canary's shares of units, `step` the index of the current one."""

    number: int
    candidate: int
    incumbent: int
    weights: tuple[float, ...]
    step: int
    state: ReleaseState
    override_gates: str | None
    started_at: float
    history: tuple[ReleaseStep, ...]

    @property
    def is_open(self) -> bool:
        return self.state in ("running", "paused")


@dataclass(frozen=True)
class Holdout:
    """Units that no release reaches: `weight` of all are answered by `version` for as long as it lasts."""

    version: int
    weight: float
    reason: str
    time_s: float


@dataclass(frozen=True)
class SwitchOff:
    """Why and since when an arm is switched off."""

    reason: str
    time_s: float


@dataclass(frozen=True)
class RegistryState:
    """What the journal adds up to after `num_entries` entries.

    `torn` names the unfinished file behind the last entry that a crash left, if any: it counts for nothing. `plans` are all
    traffic plans, the present one last: the log names them by their numbers. `holdout` and `shadows` are what was asked for,
    also while they are switched off. `former_champions` are those before the present one, in their order, without any that was
    taken back.
    """

    num_entries: int = 0
    last_sha256: str = ""
    versions: dict[int, Version] = field(default_factory=dict)
    champion: int | None = None
    former_champions: tuple[int, ...] = ()
    releases: tuple[Release, ...] = ()
    plans: tuple[TrafficPlan, ...] = ()
    holdout: Holdout | None = None
    shadows: tuple[int, ...] = ()
    switched_off: dict[SwitchedArm, SwitchOff] = field(default_factory=dict)
    served_at: dict[int, float] = field(default_factory=dict)  # when a version last became or stopped to be holdout or shadow
    set_aliases: dict[str, int] = field(default_factory=dict)
    torn: str | None = None

    @property
    def plan(self) -> TrafficPlan | None:
        """The traffic plan in force; None before the first champion."""
        return self.plans[-1] if self.plans else None

    @property
    def previous_champion(self) -> int | None:
        """The last champion before the present one whose bundle is still there; None when there is none."""
        others = (version for version in reversed(self.former_champions) if version != self.champion)
        return next((version for version in others if self.versions[version].collected_at is None), None)

    def plan_numbered(self, number: int) -> TrafficPlan | None:
        """Return the plan that a journal entry made, or None when it made none."""
        index = bisect_right(self.plans, number, key=lambda plan: plan.number) - 1
        return self.plans[index] if index >= 0 and self.plans[index].number == number else None

    @property
    def release(self) -> Release | None:
        """The last release, open or closed."""
        return self.releases[-1] if self.releases else None

    @property
    def aliases(self) -> dict[str, int]:
        """All names of versions: those that follow from releases, and those that somebody set."""
        challenger = self.release.candidate if self.release is not None and self.release.is_open else None
        derived = dict(zip(DERIVED_ALIASES, (self.champion, challenger, self.previous_champion), strict=True))
        return {name: version for name, version in derived.items() if version is not None} | self.set_aliases

    def version(self, number: int) -> Version:
        """Return a version or raise `NotFound` with the ones that exist."""
        if number not in self.versions:
            raise NotFound(f"version {number} does not exist; registered: {sorted(self.versions) or 'none'}")
        return self.versions[number]

    def resolve(self, name: str) -> Version:
        """Return the version that a number, an alias or the beginning of a digest names, looked for in this order.

        Raises `NotFound` for what names none, or several.
        """
        if name.isdecimal() and int(name) in self.versions:
            return self.versions[int(name)]
        if name in self.aliases:
            return self.versions[self.aliases[name]]
        found = [version for version in self.versions.values() if version.digest.startswith(name)]
        if len(name) < MIN_DIGEST_PREFIX or not found:
            raise NotFound(
                f"{name!r} names no version; registered: {sorted(self.versions) or 'none'}, aliases: "
                f"{', '.join(sorted(self.aliases)) or 'none'}, or at least {MIN_DIGEST_PREFIX} characters of a digest"
            )
        if len({version.digest for version in found}) > 1:
            raise NotFound(f"the digests of versions {[v.number for v in found]} start with {name!r}: name more of it")
        return found[-1]

    def rollback_target(self) -> int | None:
        """Return the version that a rollback of the present champion's promotion would bring back."""
        promoted = (r for r in reversed(self.releases) if r.state == "promoted" and r.candidate == self.champion)
        return next((release.incumbent for release in promoted), None)

    def in_use(self, number: int) -> str | None:
        """Return why a version's bundle must stay, or None when nothing asks for it."""
        names = sorted(name for name, version in self.aliases.items() if version == number)
        if names:
            return " and ".join(names)
        if number == self.rollback_target():
            return "what a rollback brings back"
        if self.release is not None and self.release.is_open and number == self.release.incumbent:
            return "the open release's incumbent"
        if self.holdout is not None and number == self.holdout.version:
            return "the holdout"
        if number in self.shadows:
            return "a shadow"
        return None

    def last_used_at(self, number: int) -> float:
        """Return when a version was last registered, released, replaced, holdout or shadow, in seconds since 1970."""
        times = [self.version(number).registered_at, self.served_at.get(number, 0.0)]
        times += [r.history[-1].time_s for r in self.releases if number in (r.candidate, r.incumbent)]
        return max(times)


def fold(entries: Iterable[dict[str, Any]]) -> RegistryState:
    """Return what entries add up to, from the first one on."""
    state = RegistryState()
    for entry in entries:
        state = replace(apply(state, entry), num_entries=entry["number"])
    return state


def until(entries: list[dict[str, Any]], time_s: float) -> list[dict[str, Any]]:
    """Return the entries that were in force at a moment: those before the first one that is later.

    Writers' clocks differ. An entry takes effect after all before it, whatever its own clock said.
    """
    later = (index for index, entry in enumerate(entries) if entry["time_s"] > time_s)
    return entries[: next(later, len(entries))]


def crowning(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the entry that made the last champion champion, or None when there is none."""
    state, found = RegistryState(), None
    for entry in entries:
        after = apply(state, entry)
        if after.champion != state.champion:
            found = entry
        state = after
    return found


def apply(state: RegistryState, entry: dict[str, Any]) -> RegistryState:
    """Return the state after one more entry; raises `IntegrityError` for an entry that cannot follow."""
    kind = entry["kind"]
    if kind == "register":
        return _with_version(
            state,
            Version(
                entry["version"],
                entry["digest"],
                entry["policy_sha256"],
                Verdict(entry["gate_verdict"]),
                entry["override_gates"],
                entry["time_s"],
            ),
        )
    if kind == "champion":
        return _planned(_crowned(state, entry["version"]), entry)
    if kind == "release_start":
        return _apply_release_start(state, entry)
    if kind == "release_change":
        return _apply_release_change(state, entry)
    if kind == "holdout":
        return _planned(_apply_holdout(state, entry), entry)
    if kind == "shadows":
        return _planned(_apply_shadows(state, entry), entry)
    if kind == "arm_switch":
        return _planned(_apply_arm_switch(state, entry), entry)
    if kind == "alias":
        return _apply_alias(state, entry)
    if kind == "tag":
        version = state.versions[entry["version"]]
        others = {key: value for key, value in version.tags.items() if key != entry["key"]}
        added = {} if entry["value"] is None else {entry["key"]: entry["value"]}
        return _with_version(state, replace(version, tags=others | added))
    if kind == "approve":
        version = state.versions[entry["version"]]
        approval = Approval(entry["approver"], entry["reason"], entry["time_s"])
        return _with_version(state, replace(version, approvals=(*version.approvals, approval)))
    if kind == "collect":
        return _with_version(state, replace(state.versions[entry["version"]], collected_at=entry["time_s"]))
    raise IntegrityError(f"journal entry {entry['number']} has the unknown kind {kind!r}; upgrade Trimtab")


def _with_version(state: RegistryState, version: Version) -> RegistryState:
    return replace(state, versions={**state.versions, version.number: version})


def _apply_alias(state: RegistryState, entry: dict[str, Any]) -> RegistryState:
    others = {name: version for name, version in state.set_aliases.items() if name != entry["alias"]}
    if entry["version"] is None:
        return replace(state, set_aliases=others)
    return replace(state, set_aliases=others | {entry["alias"]: state.versions[entry["version"]].number})


def _apply_release_start(state: RegistryState, entry: dict[str, Any]) -> RegistryState:
    assert state.champion is not None
    weights = tuple(entry["weights"])
    release = Release(
        number=entry["release"],
        candidate=entry["candidate"],
        incumbent=state.champion,
        weights=weights,
        step=0,
        state="running",
        override_gates=entry["override_gates"],
        started_at=entry["time_s"],
        history=(ReleaseStep(entry["time_s"], "start", 0, entry["reason"], {}),),
    )
    return _planned(replace(state, releases=(*state.releases, release)), entry)


def _apply_release_change(state: RegistryState, entry: dict[str, Any]) -> RegistryState:
    index, action = entry["release"] - 1, entry["action"]
    release = state.releases[index]
    step = release.step + (action == "advance")
    history = (*release.history, ReleaseStep(entry["time_s"], action, step, entry["reason"], entry["numbers"]))
    release_state: ReleaseState = {
        "advance": "running",
        "resume": "running",
        "pause": "paused",
        "promote": "promoted",
        "rollback": "rolled_back",
        "abort": "aborted",
    }[action]
    if release.state == "paused" and action == "advance":
        release_state = "paused"
    changed = replace(release, step=step, state=release_state, history=history)
    state = replace(state, releases=(*state.releases[:index], changed, *state.releases[index + 1 :]))
    if action == "promote":
        state = _crowned(state, changed.candidate)
    elif release.state == "promoted":  # a rollback after the promotion
        state = _restored(state, changed)
    return _planned(state, entry)


def _crowned(state: RegistryState, version: int) -> RegistryState:
    """Return the state with another champion. Who switched the champion off meant the one before: its switch ends with it.

    Otherwise a rollback would put the version that was switched off into the place of the good one that it brings back.
    """
    switched_off = {arm: off for arm, off in state.switched_off.items() if arm != "champion"}
    former = (*state.former_champions, state.champion) if state.champion is not None else ()
    return replace(state, champion=version, former_champions=former, switched_off=switched_off)


def _restored(state: RegistryState, release: Release) -> RegistryState:
    """Return the state with a release's incumbent as champion again.

    What was taken back is no former champion: it would stand in for the one that replaced it, as soon as that fails.
    """
    former = tuple(version for version in state.former_champions if version != release.candidate)
    former = former[:-1] if former[-1:] == (release.incumbent,) else former
    return replace(_crowned(state, release.incumbent), former_champions=former)


def _apply_holdout(state: RegistryState, entry: dict[str, Any]) -> RegistryState:
    number, weight = state.versions[entry["version"]].number, entry["weight"]
    before = () if state.holdout is None else (state.holdout.version,)
    holdout = None if weight is None else Holdout(number, float(weight), entry["reason"], entry["time_s"])
    return replace(state, holdout=holdout, served_at=_served(state, (number, *before), entry))


def _apply_shadows(state: RegistryState, entry: dict[str, Any]) -> RegistryState:
    shadows = tuple(state.versions[version].number for version in entry["versions"])
    return replace(state, shadows=shadows, served_at=_served(state, (*shadows, *state.shadows), entry))


def _served(state: RegistryState, versions: tuple[int, ...], entry: dict[str, Any]) -> dict[int, float]:
    return state.served_at | dict.fromkeys(versions, entry["time_s"])


def _apply_arm_switch(state: RegistryState, entry: dict[str, Any]) -> RegistryState:
    arm = entry["arm"]
    if arm not in get_args(SwitchedArm):
        raise ValueError(f"{arm!r} is no arm")
    others = {name: off for name, off in state.switched_off.items() if name != arm}
    added = {} if entry["enabled"] else {arm: SwitchOff(entry["reason"], entry["time_s"])}
    return replace(state, switched_off=others | added)


def _planned(state: RegistryState, entry: dict[str, Any]) -> RegistryState:
    """Return the state with the plan that follows from it: champion, open release, holdout, shadows and switches."""
    assert state.champion is not None
    champion, release = state.champion, state.release
    if "champion" in state.switched_off:
        # Who was taken back counted as the previous champion once, and stood in for the next: there the champion itself stays.
        assert state.previous_champion is not None or any(taken.state == "rolled_back" for taken in state.releases)
        champion = state.previous_champion or champion
    if release is not None and release.is_open:
        weight = release.weights[release.step]
        plan = with_canary(entry["number"], release.number, champion=champion, candidate=release.candidate, weight=weight)
    else:
        plan = champion_only(entry["number"], champion)
    if state.holdout is not None:
        plan = with_holdout(plan, state.holdout.version, state.holdout.weight)
    for arm in ("canary", "holdout"):
        plan = without(plan, arm) if arm in state.switched_off else plan
    # Who has an arm is no shadow meanwhile: it is asked already, or somebody switched it off to have it asked no more.
    busy = {arm.version for arm in plan.arms} | {state.champion}
    busy |= {release.candidate} if release is not None and release.is_open else set()
    shadows = () if "shadow" in state.switched_off else tuple(v for v in state.shadows if v not in busy)
    return replace(state, plans=(*state.plans, replace(plan, shadows=shadows)))
