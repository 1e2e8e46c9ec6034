"""Where a bundle came from and what became of it: pure documents out of its manifest, its gate report and the journal."""

from typing import Any

from policies.bundle import Bundle
from policies.registry_state import RegistryState, apply

NOT_RECORDED = "not recorded"


def lineage(bundle: Bundle, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what led to a bundle and what was done with it; what nobody wrote down is None.

    `entries` are the journal's, as far as the question goes. A bundle may have been registered several times, or never.
    """
    state, registered, crowned = _follow(bundle.digest, entries)
    versions = [version for version in state.versions.values() if version.digest == bundle.digest]
    numbers = [version.number for version in versions]
    origin = bundle.manifest["origin"]
    return {
        "versions": numbers,
        "digest": bundle.digest,
        "policy_sha256": bundle.policy.sha256(),
        "aliases": sorted(name for name, number in state.aliases.items() if number in numbers),
        "tags": {key: value for version in versions for key, value in version.tags.items()},
        "run_id": origin.get("run_id"),
        "checkpoint": origin.get("checkpoint"),
        "config": origin.get("loop"),
        "seeds": _seeds(origin),
        "code_commit": origin.get("code_commit"),
        "python": origin.get("python"),
        "packages": origin.get("packages"),
        "data_range": origin.get("data_range"),
        "parents": origin.get("parents"),
        "gates": bundle.gate_report.to_json(),
        "override_gates": bundle.manifest["override_gates"],
        "registered": registered,
        "approvals": [vars(approval) for version in versions for approval in version.approvals],
        "releases": _releases(state, numbers),
        "champion": crowned,
        "collected_at": versions[-1].collected_at if versions else None,
    }


def comparable(bundle: Bundle) -> dict[str, Any]:
    """Return what two bundles are compared by: where they came from, what they take and give, and how they were judged."""
    origin, report = bundle.manifest["origin"], bundle.gate_report
    return {
        "policy_sha256": bundle.policy.sha256(),
        "run_id": origin.get("run_id"),
        "config": origin.get("loop"),
        "seeds": _seeds(origin),
        "data_range": origin.get("data_range"),
        "code_commit": origin.get("code_commit"),
        "python": origin.get("python"),
        "packages": origin.get("packages"),
        "spaces": bundle.manifest["spaces"],
        "network": bundle.manifest["network"],
        "serving_mode": bundle.manifest["serving_mode"],
        "override_gates": bundle.manifest["override_gates"],
        "gates": {
            result.gate: {"verdict": str(result.verdict), "reason": result.reason, "numbers": result.numbers}
            for result in report.results
        },
        "incumbent_version": report.incumbent_version,
    }


def differences(a: Any, b: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the dotted paths at which two JSON values differ, with both values; None stands for what one does not have."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(key for key in b if key not in a)]
        parts = [differences(a.get(key), b.get(key), f"{path}.{key}" if path else str(key)) for key in keys]
        return {key: pair for part in parts for key, pair in part.items()}
    if isinstance(a, dict) and b is None:
        return differences(a, {}, path)
    if isinstance(b, dict) and a is None:
        return differences({}, b, path)
    return {} if type(a) is type(b) and a == b else {path: (a, b)}


def _seeds(origin: dict[str, Any]) -> dict[str, int] | None:
    """Bundles of schema 1 have the seeds in the loop's settings only."""
    loop = origin.get("loop") or {}
    sections = {name: (loop.get(name) or {}).get("seed") for name in ("training", "gates")}
    return origin.get("seeds") or {name: seed for name, seed in sections.items() if seed is not None} or None


def _follow(digest: str, entries: list[dict[str, Any]]) -> tuple[RegistryState, list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the final state, by which entries the bundle was registered, and when and why it was champion."""
    state = RegistryState()
    registered: list[dict[str, Any]] = []
    crowned: list[dict[str, Any]] = []
    for entry in entries:
        after = apply(state, entry)
        why = {"entry": entry["number"], "author": entry["author"], "time_s": entry["time_s"]}
        if entry["kind"] == "register" and entry["digest"] == digest:
            registered.append(why)
        if after.champion != state.champion:
            if crowned and crowned[-1]["until_s"] is None:
                crowned[-1]["until_s"] = entry["time_s"]
            if after.champion is not None and after.versions[after.champion].digest == digest:
                crowned.append({**why, "reason": entry["reason"], "until_s": None})
        state = after
    return state, registered, crowned


def _releases(state: RegistryState, numbers: list[int]) -> list[dict[str, Any]]:
    return [
        {
            "release": release.number,
            "role": "candidate" if release.candidate in numbers else "incumbent",
            "candidate": release.candidate,
            "incumbent": release.incumbent,
            "state": release.state,
            "started_at": release.started_at,
            "changed_at": release.history[-1].time_s,
            "reason": release.history[-1].reason,
        }
        for release in state.releases
        if release.candidate in numbers or release.incumbent in numbers
    ]
