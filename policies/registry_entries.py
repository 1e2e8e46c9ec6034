"""What may be written next into a registry's journal: each function checks that the state allows it and returns the entry.

They are pure: `Registry.append` calls one with the state that it read, and again with the next one when it lost a race.
"""

from typing import Any, get_args

from policies.bundle import Bundle
from policies.errors import GateRefused, NotFound, RegistryConflict, ReleaseRefused, UsageError
from policies.registry_state import DERIVED_ALIASES, RegistryState, ReleaseAction, SwitchedArm, Version
from policies.storage import NAME_PATTERN
from policies.traffic import BUCKETS, MAX_HOLDOUT
from policies.verdicts import Verdict

MAX_SHADOWS = 4  # each costs as much to compute as the answer itself
MAX_TEXT = 1000  # characters of a reason or a tag's value: the journal is read as a whole


def register_version(state: RegistryState, bundle: Bundle) -> dict[str, Any]:
    """Return the entry that gives a bundle the next version number.

    Raises `RegistryConflict` when the same policy is registered already: two numbers for it would be compared with themselves.
    """
    policy_sha256 = bundle.policy.sha256()
    for version in state.versions.values():
        is_same = version.policy_sha256 == policy_sha256 and version.collected_at is None
        if is_same and version.gate_verdict is Verdict.PASS:
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
    _require_bundle(state.version(version))
    _require_passing(state.version(version), "cannot be champion")
    if state.champion is not None:
        raise ReleaseRefused(f"version {state.champion} is champion; replace it with `trimtab release start --version {version}`")
    return {"kind": "champion", "version": version, "reason": reason}


def start_release(
    state: RegistryState, candidate: int, *, weights: tuple[float, ...], override_gates: str | None, reason: str
) -> dict[str, Any]:
    """Return the entry that gives the candidate its first share of traffic."""
    version = state.version(candidate)
    _require_bundle(version)
    if state.champion is None:
        raise ReleaseRefused("there is no champion to compare with; publish a first version")
    if state.release is not None and state.release.is_open:
        raise ReleaseRefused(
            f"release {state.release.number} of version {state.release.candidate} is still {state.release.state}"
        )
    if candidate == state.champion:
        raise ReleaseRefused(f"version {candidate} is the champion already")
    _require_switched_on(state, "canary", f"version {candidate} cannot be its next one")
    if "champion" in state.switched_off:
        raise ReleaseRefused(
            f"the champion, version {state.champion}, is switched off: there is nothing to compare with; make the previous one "
            "champion with `trimtab release rollback`, or switch this one on with `trimtab arms enable champion`"
        )
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
        _require_bundle(state.version(release.incumbent))
    elif not release.is_open:
        raise ReleaseRefused(f"release {release.number} is {release.state}: nothing to {action}")
    if action == "advance" and release.step + 1 >= len(release.weights):
        raise ReleaseRefused(f"release {release.number} is at its last step; promote it")
    if action in ("advance", "promote"):
        _require_switched_on(state, "canary", f"release {release.number} cannot {action}")
    if action == "promote":
        _require_passing(state.version(release.candidate), "cannot be promoted")
        if release.override_gates:
            raise GateRefused(
                f"version {release.candidate} was released with --override-gates: it can be canaried, never promoted"
            )
    if (action == "pause" and release.state != "running") or (action == "resume" and release.state != "paused"):
        raise ReleaseRefused(f"release {release.number} is {release.state}: nothing to {action}")
    return {"kind": "release_change", "release": release.number, "action": action, "reason": reason, "numbers": numbers or {}}


def set_holdout(state: RegistryState, version: int, *, weight: float, override_gates: str | None, reason: str) -> dict[str, Any]:
    """Return the entry that gives a version a share of units that no release reaches, instead of the holdout there may be."""
    _require_deliverable(state, version, override_gates, "the holdout")
    _require_switched_on(state, "holdout", f"version {version} cannot be the next one")
    if not 1 / BUCKETS <= weight <= MAX_HOLDOUT:
        raise UsageError(f"weight {weight:g} of the holdout must be between {1 / BUCKETS:g} and {MAX_HOLDOUT:g} of the units")
    what = {"version": version, "weight": weight, "override_gates": override_gates}
    return {"kind": "holdout", **what, "reason": _text("reason", reason)}


def end_holdout(state: RegistryState, reason: str) -> dict[str, Any]:
    """Return the entry after which nobody is held out: these units take part in releases as all others do."""
    if state.holdout is None:
        raise ReleaseRefused("there is no holdout to end; begin one with `trimtab arms holdout VERSION --weight 0.05`")
    what = {"version": state.holdout.version, "weight": None, "override_gates": None}
    return {"kind": "holdout", **what, "reason": _text("reason", reason)}


def set_shadows(state: RegistryState, versions: tuple[int, ...], *, override_gates: str | None, reason: str) -> dict[str, Any]:
    """Return the entry that lets exactly these versions answer in the background; none ends it.

    Whether they take what the champion takes is checked by each replica when it loads them.
    """
    if not versions and not state.shadows:
        raise ReleaseRefused("there is no shadow to end; begin with `trimtab arms shadow VERSION`")
    if len(versions) > MAX_SHADOWS or len(set(versions)) != len(versions):
        raise UsageError(f"shadows {list(versions)}: at most {MAX_SHADOWS} different versions are allowed")
    for version in versions:
        _require_deliverable(state, version, override_gates, "a shadow")
        if version == state.champion:
            raise ReleaseRefused(f"version {version} is the champion: it answers every request already")
    if versions:
        _require_switched_on(state, "shadow", f"versions {list(versions)} would not be asked")
    what = {"versions": list(versions), "override_gates": override_gates}
    return {"kind": "shadows", **what, "reason": _text("reason", reason)}


def switch_arm(state: RegistryState, arm: SwitchedArm, *, enabled: bool, reason: str) -> dict[str, Any]:
    """Return the entry that takes an arm out of the traffic at once, or lets it in again.

    A canary's or holdout's units are then the champion's, a champion's units the previous champion's.
    """
    if arm not in get_args(SwitchedArm):
        raise UsageError(f"arm {arm!r} does not exist; there are {', '.join(get_args(SwitchedArm))}")
    _require_champion(state)
    if enabled and arm not in state.switched_off:
        raise ReleaseRefused(f"the {arm} is not switched off: nothing to enable")
    if not enabled and arm in state.switched_off:
        raise ReleaseRefused(f"the {arm} is switched off already: {state.switched_off[arm].reason}")
    if not enabled and arm == "champion":
        _require_stand_in(state)
    return {"kind": "arm_switch", "arm": arm, "enabled": enabled, "reason": _text("reason", reason)}


def set_alias(state: RegistryState, alias: str, version: int, reason: str) -> dict[str, Any]:
    """Return the entry that makes a name mean a version; a name that means another one moves."""
    _require_alias_name(alias)
    _require_bundle(state.version(version))
    return {"kind": "alias", "alias": alias, "version": version, "reason": _text("reason", reason)}


def remove_alias(state: RegistryState, alias: str, reason: str) -> dict[str, Any]:
    """Return the entry that takes a name away; raises `NotFound` when nobody set it."""
    _require_alias_name(alias)
    if alias not in state.set_aliases:
        raise NotFound(f"alias {alias!r} does not exist; set: {', '.join(sorted(state.set_aliases)) or 'none'}")
    return {"kind": "alias", "alias": alias, "version": None, "reason": _text("reason", reason)}


def tag_version(state: RegistryState, version: int, key: str, value: str | None) -> dict[str, Any]:
    """Return the entry that notes `key = value` on a version, or with None takes the key away."""
    if not NAME_PATTERN.fullmatch(key):
        raise UsageError(f"tag {key!r} must be 1-63 of a-z 0-9 . _ - and start with a letter or digit")
    tags = state.version(version).tags
    if value is None and key not in tags:
        raise NotFound(f"version {version} has no tag {key!r}; it has: {', '.join(sorted(tags)) or 'none'}")
    return {"kind": "tag", "version": version, "key": key, "value": None if value is None else _text("value", value)}


def approve_version(state: RegistryState, version: int, *, approver: str, reason: str) -> dict[str, Any]:
    """Return the entry that keeps somebody's word for a version; one approver's word counts once."""
    _require_bundle(state.version(version))
    if approver in {approval.approver for approval in state.version(version).approvals}:
        raise RegistryConflict(f"{approver} approved version {version} already")
    return {
        "kind": "approve",
        "version": version,
        "approver": _text("approver", approver),
        "reason": _text("reason", reason),
    }


def collect_version(state: RegistryState, version: int, reason: str) -> dict[str, Any]:
    """Return the entry that gives a version's bundle up, so that it may be removed; raises `ReleaseRefused` while in use.

    The entry comes before the removal: nobody can start to use what is about to go, and `verify` knows why it is missing.
    """
    _require_bundle(state.version(version))
    use = state.in_use(version)
    if use is not None:
        raise ReleaseRefused(f"version {version} is {use}: its bundle stays")
    return {"kind": "collect", "version": version, "reason": _text("reason", reason)}


def _require_champion(state: RegistryState) -> None:
    if state.champion is None:
        raise ReleaseRefused("there is no champion, so there is no traffic to share; publish a first version")


def _require_deliverable(state: RegistryState, number: int, override_gates: str | None, what: str) -> None:
    version = state.version(number)
    _require_bundle(version)
    _require_champion(state)
    if version.gate_verdict is not Verdict.PASS and not override_gates:
        raise GateRefused(
            f'version {number}: gates said {version.gate_verdict}; it can be {what} only with --override-gates "reason"'
        )


def _require_switched_on(state: RegistryState, arm: SwitchedArm, consequence: str) -> None:
    if arm in state.switched_off:
        raise ReleaseRefused(
            f"the {arm} is switched off ({state.switched_off[arm].reason}): {consequence}; `trimtab arms enable {arm}` first"
        )


def _require_stand_in(state: RegistryState) -> None:
    """Raise `ReleaseRefused` unless the previous champion can answer for this one."""
    previous, release = state.previous_champion, state.release
    if previous is None:
        raise ReleaseRefused(
            f"there is no champion before version {state.champion} that was not taken back or given up: nobody could answer "
            "instead; release another version, or end serving with `trimtab down`"
        )
    if release is not None and release.is_open and previous == release.candidate:
        raise ReleaseRefused(
            f"version {previous}, the previous champion, is the canary of release {release.number}: it cannot be compared with "
            "itself; end the release first with `trimtab release promote` or `trimtab release rollback`"
        )


def _require_alias_name(alias: str) -> None:
    if alias in DERIVED_ALIASES:
        raise UsageError(f"alias {alias!r} follows from releases and cannot be set; see `trimtab release`")
    if not NAME_PATTERN.fullmatch(alias) or alias.isdecimal():
        raise UsageError(f"alias {alias!r} must be 1-63 of a-z 0-9 . _ -, start with a letter or digit, and not be a number")


def _text(what: str, value: str) -> str:
    if not 0 < len(value.strip()) <= MAX_TEXT or not value.isprintable():
        raise UsageError(f"{what} of {len(value)} characters: 1-{MAX_TEXT} printable characters on one line are allowed")
    return value


def _require_bundle(version: Version) -> None:
    if version.collected_at is not None:
        raise ReleaseRefused(f"version {version.number} was given up by `registry gc`: publish the policy again")


def _require_passing(version: Version, what: str) -> None:
    if version.gate_verdict is not Verdict.PASS:
        raise GateRefused(f"version {version.number} {what}: its gates said {version.gate_verdict}")
