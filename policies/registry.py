"""Which versions exist, who is champion and how traffic is split: a pure fold over an append-only journal.

Every entry is a file `journal/00000042.json`, created if absent: of many writers that want the same number exactly one gets
it, the others read what happened and decide again. Each entry names the digest of the one before, so the past cannot be
edited quietly. Champion, release and traffic plan are never stored: they are what the entries add up to.
"""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from policies.bundle import Bundle, read_bundle
from policies.errors import GateRefused, IntegrityError, NotFound, RegistryConflict, ReleaseRefused
from policies.integrity import canonical_json, create_if_absent, parse_json, sha256_hex
from policies.traffic import TrafficPlan, champion_only, with_canary
from policies.trust import TrustStore, require_made_for
from policies.verdicts import Verdict

SCHEMA_VERSION = 1
MAX_APPEND_TRIES = 50

ReleaseAction = Literal["advance", "promote", "rollback", "abort", "pause", "resume"]
ReleaseState = Literal["running", "paused", "promoted", "rolled_back", "aborted"]


@dataclass(frozen=True)
class Version:
    """A registered bundle. `gate_verdict` was made before registering; `override_gates` is the break-glass reason, if any."""

    number: int
    digest: str
    policy_sha256: str
    gate_verdict: Verdict
    override_gates: str | None
    registered_at: float


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
class RegistryState:
    """What the journal adds up to after `num_entries` entries."""

    num_entries: int = 0
    last_sha256: str = ""
    versions: dict[int, Version] = field(default_factory=dict)
    champion: int | None = None
    previous_champion: int | None = None
    releases: tuple[Release, ...] = ()
    plan: TrafficPlan | None = None

    @property
    def release(self) -> Release | None:
        """The last release, open or closed."""
        return self.releases[-1] if self.releases else None

    def version(self, number: int) -> Version:
        """Return a version or raise `NotFound` with the ones that exist."""
        if number not in self.versions:
            raise NotFound(f"version {number} does not exist; registered: {sorted(self.versions) or 'none'}")
        return self.versions[number]


# --- entries: pure checks that the state allows them; each returns the body to append ---


def register_version(state: RegistryState, bundle: Bundle) -> dict[str, Any]:
    """Return the entry that gives a bundle the next version number.

    Raises `RegistryConflict` when the same policy is registered already: two numbers for it would be compared with themselves.
    """
    policy_sha256 = bundle.policy.sha256()
    for version in state.versions.values():
        if version.policy_sha256 == policy_sha256 and version.gate_verdict is Verdict.PASS:
            raise RegistryConflict(f"this policy is version {version.number} already")
    return {
        "kind": "register",
        "version": len(state.versions) + 1,
        "digest": bundle.digest,
        "policy_sha256": policy_sha256,
        "gate_verdict": str(bundle.gate_report.verdict),
        "override_gates": bundle.manifest["override_gates"],
    }


def set_champion(state: RegistryState, version: int, reason: str) -> dict[str, Any]:
    """Return the entry that makes the *first* version champion; later champions come out of a release."""
    _require_passing(state.version(version), "cannot be champion")
    if state.champion is not None:
        raise ReleaseRefused(f"version {state.champion} is champion; replace it with `trimtab release start --version {version}`")
    return {"kind": "champion", "version": version, "reason": reason}


def start_release(
    state: RegistryState, candidate: int, *, weights: tuple[float, ...], override_gates: str | None, reason: str
) -> dict[str, Any]:
    """Return the entry that gives the candidate its first share of traffic."""
    version = state.version(candidate)
    if state.champion is None:
        raise ReleaseRefused("there is no champion to compare with; publish a first version")
    if state.release is not None and state.release.is_open:
        raise ReleaseRefused(
            f"release {state.release.number} of version {state.release.candidate} is still {state.release.state}"
        )
    if candidate == state.champion:
        raise ReleaseRefused(f"version {candidate} is the champion already")
    if (version.gate_verdict is not Verdict.PASS or override_gates) and weights[0] >= 1:
        raise GateRefused(f"version {candidate}: with --override-gates it can be canaried, not given all traffic at once")
    if version.gate_verdict is not Verdict.PASS and not override_gates:
        raise GateRefused(
            f"version {candidate}: gates said {version.gate_verdict}; it can be canaried, never promoted, with "
            '--override-gates "reason"'
        )
    return {
        "kind": "release_start",
        "release": len(state.releases) + 1,
        "candidate": candidate,
        "weights": list(weights),
        "override_gates": override_gates,
        "reason": reason,
    }


def change_release(
    state: RegistryState,
    action: ReleaseAction,
    *,
    reason: str,
    numbers: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the entry that moves the open release on; raises `ReleaseRefused` when there is none or the move is not allowed.

    `rollback` without an open release takes back the promotion of the present champion.
    """
    release = state.release
    if release is None:
        raise ReleaseRefused("there has been no release")
    if action == "rollback" and not release.is_open:
        release = next((r for r in reversed(state.releases) if r.state == "promoted" and r.candidate == state.champion), release)
    if action == "rollback" and release.state == "promoted":
        pass
    elif not release.is_open:
        raise ReleaseRefused(f"release {release.number} is {release.state}: nothing to {action}")
    if action == "advance" and release.step + 1 >= len(release.weights):
        raise ReleaseRefused(f"release {release.number} is at its last step; promote it")
    if action == "promote":
        _require_passing(state.version(release.candidate), "cannot be promoted")
        if release.override_gates:
            raise GateRefused(
                f"version {release.candidate} was released with --override-gates: it can be canaried, never promoted"
            )
    if (action == "pause" and release.state != "running") or (action == "resume" and release.state != "paused"):
        raise ReleaseRefused(f"release {release.number} is {release.state}: nothing to {action}")
    return {"kind": "release_change", "release": release.number, "action": action, "reason": reason, "numbers": numbers or {}}


# --- fold ---


def apply(state: RegistryState, entry: dict[str, Any]) -> RegistryState:
    """Return the state after one more entry; raises `IntegrityError` for an entry that cannot follow."""
    kind = entry["kind"]
    if kind == "register":
        version = Version(
            entry["version"],
            entry["digest"],
            entry["policy_sha256"],
            Verdict(entry["gate_verdict"]),
            entry["override_gates"],
            entry["time_s"],
        )
        return replace(state, versions={**state.versions, version.number: version})
    if kind == "champion":
        plan = champion_only(entry["number"], entry["version"])
        return replace(state, champion=entry["version"], previous_champion=state.champion, plan=plan)
    if kind == "release_start":
        return _apply_release_start(state, entry)
    if kind == "release_change":
        return _apply_release_change(state, entry)
    raise IntegrityError(f"journal entry {entry['number']} has the unknown kind {kind!r}; upgrade Trimtab")


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
    return replace(state, releases=(*state.releases, release), plan=_plan(release, entry["number"]))


def _apply_release_change(state: RegistryState, entry: dict[str, Any]) -> RegistryState:
    index, action, number = entry["release"] - 1, entry["action"], entry["number"]
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
    if changed.is_open:
        return replace(state, plan=_plan(changed, number))
    if action == "promote":
        return replace(
            state,
            champion=changed.candidate,
            previous_champion=changed.incumbent,
            plan=champion_only(number, changed.candidate),
        )
    if release.state == "promoted":  # a rollback after the promotion
        return replace(
            state, champion=changed.incumbent, previous_champion=changed.candidate, plan=champion_only(number, changed.incumbent)
        )
    return replace(state, plan=champion_only(number, changed.incumbent))


def _plan(release: Release, number: int) -> TrafficPlan:
    return with_canary(
        number, release.number, champion=release.incumbent, candidate=release.candidate, weight=release.weights[release.step]
    )


def _require_passing(version: Version, what: str) -> None:
    if version.gate_verdict is not Verdict.PASS:
        raise GateRefused(f"version {version.number} {what}: its gates said {version.gate_verdict}")


def _author() -> str:
    user = os.environ.get("USER") or f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


# --- the journal on disk ---


class Registry:
    """The registry of one policy in a directory. Reading is incremental: a poll without news costs one `stat`.

    With a trust store, only bundles come out whose signature counts: see `policies.trust`.
    """

    def __init__(self, root: Path, *, trust: TrustStore | None = None) -> None:
        self._policy, self._trust = root.name, trust
        self.bundles = root / "bundles"
        self._journal = root / "journal"
        self._state = RegistryState()

    def state(self) -> RegistryState:
        """Return the state after all entries on disk; raises `IntegrityError` when the chain is broken."""
        while True:
            path = self._path(self._state.num_entries + 1)
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                return self._state
            self._state = self._checked(path, data)

    def append(self, decide: Callable[[RegistryState], dict[str, Any]], *, now: float) -> RegistryState:
        """Append the entry that `decide` returns for the current state, deciding again when another writer was faster.

        `decide` raises to refuse. Raises `RegistryConflict` after many lost races.
        """
        self._journal.mkdir(parents=True, exist_ok=True)
        for _ in range(MAX_APPEND_TRIES):
            state = self.state()
            number = state.num_entries + 1
            entry = {
                "schema_version": SCHEMA_VERSION,
                "number": number,
                "previous_sha256": state.last_sha256,
                "time_s": now,
                "author": _author(),
                **decide(state),
            }
            data = canonical_json(entry)
            self._checked(self._path(number), data)  # an entry that readers would refuse never reaches the disk
            try:
                create_if_absent(self._path(number), data)
            except FileExistsError:
                continue
            return self.state()
        raise RegistryConflict(f"lost {MAX_APPEND_TRIES} races for the next journal entry in {self._journal}")

    def bundle(self, version: int) -> Bundle:
        """Read and verify the bundle of a version, after its signature where signatures are required."""
        digest = self.state().version(version).digest
        path = self.bundles / digest
        signed = self._trust.verify(path, now=time.time()) if self._trust else None
        bundle = read_bundle(path, expected_digest=digest)
        if signed is not None:
            require_made_for(signed, bundle, policy=self._policy, version=version)
        return bundle

    def _path(self, number: int) -> Path:
        return self._journal / f"{number:08d}.json"

    def _checked(self, path: Path, data: bytes) -> RegistryState:
        entry = parse_json(data, str(path))
        number = self._state.num_entries + 1
        try:
            if entry["schema_version"] != SCHEMA_VERSION or entry["number"] != number:
                raise IntegrityError(
                    f"{path}: entry {entry['number']} of schema {entry['schema_version']}, expected {number} of {SCHEMA_VERSION}"
                )
            if entry["previous_sha256"] != self._state.last_sha256:
                raise IntegrityError(
                    f"{path}: follows {entry['previous_sha256']}, but the entry before it hashes to {self._state.last_sha256}"
                )
            folded = apply(self._state, entry)
        except (KeyError, IndexError, TypeError, ValueError, AssertionError) as error:
            raise IntegrityError(f"{path} is malformed: {error!r}") from error
        return replace(folded, num_entries=number, last_sha256=sha256_hex(data))
