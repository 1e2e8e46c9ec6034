"""How registry entries, versions and lineages read for a person."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from policies.registry_state import SwitchOff
from policies.traffic import TrafficPlan
from trimtab.lineage import NOT_RECORDED

SHORT = 12  # characters of a digest that tell any two apart


def moment(time_s: float) -> str:
    """Return a time as UTC to the second."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def describe(entry: dict[str, Any]) -> str:
    """Return what a journal entry did, in a few words."""
    kind = entry["kind"]
    if kind == "register":
        return f"version {entry['version']} registered, gates said {entry['gate_verdict']}"
    if kind == "champion":
        return f"version {entry['version']} became champion"
    if kind == "release_start":
        return f"release {entry['release']} of version {entry['candidate']} started"
    if kind == "release_change":
        return f"release {entry['release']}: {entry['action']}"
    if kind == "holdout":
        what = "ended" if entry["weight"] is None else f"of {100 * entry['weight']:.4g}% of the units"
        return f"holdout {what}, version {entry['version']}"
    if kind == "shadows":
        versions = ", ".join(map(str, entry["versions"]))
        return f"versions in shadow: {versions}" if versions else "shadows ended"
    if kind == "arm_switch":
        return f"{entry['arm']} switched {'on' if entry['enabled'] else 'off'}"
    if kind == "alias":
        return f"alias {entry['alias']} removed" if entry["version"] is None else f"alias {entry['alias']} → {entry['version']}"
    if kind == "tag":
        value = "removed" if entry["value"] is None else f"= {entry['value']}"
        return f"tag {entry['key']} of version {entry['version']} {value}"
    if kind == "approve":
        return f"version {entry['version']} approved by {entry['approver']}"
    assert kind == "collect"  # the fold refused all others
    return f"version {entry['version']} given up"


def plan_text(plan: TrafficPlan) -> str:
    """Return who answers whom, on one line."""
    shares = [f"{arm.name} v{arm.version} {100 * arm.weight:.4g}%" for arm in plan.arms]
    return ", ".join([*shares, *(f"shadow v{version}" for version in plan.shadows)])


def switches_text(switched_off: Mapping[str, SwitchOff]) -> str:
    """Return a line for each arm that is switched off, loud enough not to be forgotten."""
    return "\n".join(
        f"{arm.upper()} SWITCHED OFF since {moment(off.time_s)}: {off.reason} (`trimtab arms enable {arm}`)"
        for arm, off in switched_off.items()
    )


def numbers_text(numbers: dict[str, Any]) -> str:
    """Return an entry's numbers on one line."""
    return ", ".join(f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}" for name, value in numbers.items())


def lineage_text(found: dict[str, Any]) -> str:
    """Return a lineage as lines of `what: value`, from the run to the releases."""
    checkpoint, gates = found["checkpoint"], found["gates"]
    lines = [
        ("version", ", ".join(map(str, found["versions"])) or "never registered"),
        ("digest", found["digest"]),
        ("aliases", ", ".join(found["aliases"]) or "none"),
        ("tags", ", ".join(f"{key}={value}" for key, value in found["tags"].items()) or "none"),
        ("run", _or_not(found["run_id"])),
        ("checkpoint", _or_not(checkpoint and _scalars(checkpoint))),
        ("seeds", _or_not(found["seeds"] and _scalars(found["seeds"]))),
        ("code commit", _or_not(found["code_commit"])),
        ("packages", _or_not(found["packages"] and _scalars(found["packages"]))),
        ("data range", _or_not(found["data_range"] and _data_range(found["data_range"]))),
        ("parents", NOT_RECORDED if found["parents"] is None else "; ".join(map(_scalars, found["parents"])) or "none"),
        ("config", _or_not(found["config"] and "; ".join(_config_lines(found["config"])))),
        ("gates", f"{gates['verdict']}, compared with {_incumbent(gates['incumbent_version'])}"),
        *(("", f"{result['gate']} {result['verdict']}: {result['reason']}") for result in gates["results"]),
        *([("break-glass", found["override_gates"])] if found["override_gates"] else []),
        *(("registered", f"{moment(r['time_s'])} by {r['author']}, entry {r['entry']}") for r in found["registered"]),
        *(("approved", f"{moment(a['time_s'])} by {a['approver']}: {a['reason']}") for a in found["approvals"]),
        *([] if found["approvals"] else [("approved", "by nobody")]),
        *(("release", _release_text(release)) for release in found["releases"]),
        *([] if found["releases"] else [("release", "none")]),
        *(("champion", _period_text(period)) for period in found["champion"]),
        *([("given up", moment(found["collected_at"]))] if found["collected_at"] is not None else []),
    ]
    return "\n".join(f"{name + ':' if name else '':13}{value}" for name, value in lines)


def _or_not(value: str | None) -> str:
    return value or NOT_RECORDED


def _scalars(values: dict[str, Any]) -> str:
    """Return the plain values of a mapping; longer parts are in the JSON."""
    plain = {key: value for key, value in values.items() if isinstance(value, str | int | float) and len(str(value)) <= 64}
    return ", ".join(f"{key} {value}" for key, value in plain.items())


def _data_range(values: dict[str, Any]) -> str:
    times = {key: moment(value) for key, value in values.items() if key in ("from", "to") and isinstance(value, int | float)}
    return _scalars(values | times)


def _config_lines(config: dict[str, Any]) -> list[str]:
    sections = {name: value for name, value in config.items() if isinstance(value, dict)}
    return [f"{name}: {_scalars(value)}" for name, value in sections.items() if _scalars(value)]


def _incumbent(version: int | None) -> str:
    return "no incumbent" if version is None else f"version {version}"


def _release_text(release: dict[str, Any]) -> str:
    return (
        f"{release['release']}, of version {release['candidate']} against {release['incumbent']}: {release['state']} "
        f"{moment(release['changed_at'])}: {release['reason']}"
    )


def _period_text(period: dict[str, Any]) -> str:
    until = "now" if period["until_s"] is None else moment(period["until_s"])
    return f"{moment(period['time_s'])} to {until}: {period['reason']} ({period['author']}, entry {period['entry']})"
