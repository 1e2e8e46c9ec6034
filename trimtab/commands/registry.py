"""`trimtab registry` and `trimtab lineage`: what the journal says, now or at a moment, and what a person adds to it."""

import dataclasses
import json
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from policies.bundle import Bundle
from policies.errors import NotFound, UsageError
from policies.journal import author
from policies.registry import Registry
from policies.registry_entries import approve_version, remove_alias, set_alias, tag_version
from policies.registry_gc import DAY_S, bundle_ages_s, collect, find_garbage
from policies.registry_state import MIN_DIGEST_PREFIX, RegistryState, Version, crowning, fold, until
from policies.registry_store import BUNDLES
from policies.registry_verify import verify as verify_registry
from policies.trust import TrustStore
from trimtab.command import (
    DEFAULT_LOOP_FILE,
    DONE,
    NEGATIVE,
    JsonOption,
    LoopFile,
    ReasonOption,
    StorageOption,
    escape,
    open_context,
    output,
    rendered,
    say,
)
from trimtab.lineage import comparable, differences, lineage
from trimtab.registry_text import SHORT, describe, lineage_text, moment, numbers_text, plan_text, switches_text

VersionName = Annotated[str, typer.Argument(metavar="VERSION", help="A version's number, alias, or beginning of its digest.")]
AtOption = Annotated[
    str | None, typer.Option("--at", metavar="TIME", help="As of then: '2026-11-27 14:03' (local time), or ISO 8601 with a zone.")
]


def list_versions(
    loop_file: LoopFile = DEFAULT_LOOP_FILE, storage: StorageOption = None, at: AtOption = None, as_json: JsonOption = False
) -> int:
    """List the versions with their verdicts, aliases, tags and approvals."""
    registry = _registry(loop_file, storage)
    state = _state(registry, at)
    rows = [_version_document(state, version) for version in state.versions.values()]
    table = Table(box=None, pad_edge=False)
    for title in ("version", "digest", "verdict", "aliases", "tags", "approved by", "registered"):
        table.add_column(title)
    for row in rows:
        names, tags = ", ".join(row["aliases"]), ", ".join(f"{key}={value}" for key, value in row["tags"].items())
        approvers = ", ".join(approval["approver"] for approval in row["approvals"])
        registered = moment(row["registered_at"]) + (" (given up)" if row["collected_at"] is not None else "")
        cells = (str(row["version"]), row["digest"][:SHORT], row["verdict"], names, tags, approvers, registered)
        table.add_row(*map(escape, cells))
    _warn_of_torn(state)
    output(as_json, {"versions": rows, "torn": state.torn}, rendered(table) if rows else "no version is registered")
    return DONE


def show(
    name: VersionName,
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    at: AtOption = None,
    as_json: JsonOption = False,
) -> int:
    """Show one version, and what the journal says of it."""
    registry = _registry(loop_file, storage)
    entries = _entries(registry, at)
    state = fold(entries)
    version = state.resolve(name)
    about = [entry for entry in entries if _is_about(entry, version, state)]
    document = {**_version_document(state, version), "entries": about}
    lines = [f"{key + ':':16}{_plain(value)}" for key, value in document.items() if key != "entries"]
    output(as_json, document, "\n".join([*lines, *map(_entry_line, about)]))
    return DONE


def history(
    loop_file: LoopFile = DEFAULT_LOOP_FILE, storage: StorageOption = None, at: AtOption = None, as_json: JsonOption = False
) -> int:
    """List the journal; with --at say who was champion then, since when, by whom and why."""
    registry = _registry(loop_file, storage)
    entries = _entries(registry, at)
    if at is None:
        _warn_of_torn(registry.state())
        output(as_json, {"entries": entries}, "\n".join(map(_entry_line, entries)) or "the journal is empty")
        return DONE
    state, why = fold(entries), crowning(entries)
    document = {
        "at": _moment_of(at),
        "champion": None if state.champion is None else _version_document(state, state.version(state.champion)),
        "why": why,
        "plan": state.plan and state.plan.to_json(),
        "num_entries": len(entries),
    }
    output(as_json, document, f"{moment(document['at'])}: {_champion_text(state, why)}")
    return DONE


def diff(
    a: VersionName,
    b: VersionName,
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> int:
    """Show what differs between two versions: settings, seeds, packages, spaces, network and gates."""
    registry = _registry(loop_file, storage)
    bundles = [_find_bundle(registry, name) for name in (a, b)]
    found = differences(*map(comparable, bundles))
    document = {"a": bundles[0].digest, "b": bundles[1].digest, "differences": found}
    lines = [f"{path}: {_plain(before)} → {_plain(after)}" for path, (before, after) in found.items()]
    output(as_json, document, "\n".join(lines) or "nothing differs but when they were made")
    return DONE


def verify(loop_file: LoopFile = DEFAULT_LOOP_FILE, storage: StorageOption = None, as_json: JsonOption = False) -> int:
    """Check the journal's chain and every byte of every bundle, golden vectors included; exit code 1 when anything is wrong."""
    context = open_context(loop_file, None, storage)
    found = verify_registry(context.registry(), TrustStore(context.storage.trust))
    summary = (
        f"{found.num_entries} entries, {found.num_bundles} bundles: {len(found.problems)} problems, {len(found.remarks)} remarks"
    )
    lines = [*(f"problem: {text}" for text in found.problems), *(f"remark: {text}" for text in found.remarks), summary]
    output(as_json, dataclasses.asdict(found), "\n".join(lines))
    return NEGATIVE if found.problems else DONE


def gc(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    keep_days: Annotated[float, typer.Option(min=1, help="Leave what was used or put there since.")] = 30.0,
    apply: Annotated[bool, typer.Option("--apply", help="Remove them; without it they are only listed.")] = False,
    as_json: JsonOption = False,
) -> int:
    """List bundles that were never registered, or are of versions long out of use; without them decisions cannot be replayed."""
    registry, now = _registry(loop_file, storage), time.time()
    found = find_garbage(registry.state(), bundle_ages_s(registry), keep_s=keep_days * DAY_S, now=now)
    if apply:
        found = collect(registry, found, now=now)
    lines = [f"{item.name[:SHORT]} {_versions_text(item.versions)}{item.reason}" for item in found]
    verb = "removed" if apply else "would be removed; --apply does it"
    document = {"applied": apply, "bundles": [dataclasses.asdict(item) for item in found]}
    output(as_json, document, "\n".join([*lines, f"{len(found)} bundle(s) {verb}"]))
    return DONE


def alias(
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="A name for a version, such as `eu`.")],
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    version: Annotated[int | None, typer.Option(min=1, help="The version that the name means from now on.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the name away.")] = False,
    reason: ReasonOption = "set by hand",
    as_json: JsonOption = False,
) -> int:
    """Give a version a name, move the name, or take it away."""
    if remove == (version is not None):
        raise UsageError(f"alias {alias!r}: give either --version N or --remove")
    entry = partial(remove_alias, alias=alias) if version is None else partial(set_alias, alias=alias, version=version)
    state = _append(_registry(loop_file, storage), partial(entry, reason=reason))
    output(as_json, {"aliases": state.aliases}, ", ".join(f"{name} → {number}" for name, number in state.aliases.items()))
    return DONE


def tag(
    name: VersionName,
    key: Annotated[str, typer.Argument(metavar="KEY")],
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    value: Annotated[str | None, typer.Option("--value", help="What to note under the key.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the key away.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Note something on a version, as a key with a value."""
    if remove == (value is not None):
        raise UsageError(f"tag {key!r}: give either --value TEXT or --remove")
    registry = _registry(loop_file, storage)
    number = registry.state().resolve(name).number
    return _print_changed(_append(registry, partial(tag_version, version=number, key=key, value=value)), number, as_json)


def approve(
    name: VersionName,
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    reason: Annotated[str, typer.Option("--reason", help="What the approval rests on; kept in the journal.")] = ...,
    approver: Annotated[str | None, typer.Option("--approver", help="Who approves; default: user@machine.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Keep somebody's word for a version; it says who reviewed it and changes nothing else."""
    registry = _registry(loop_file, storage)
    number = registry.state().resolve(name).number
    entry = partial(approve_version, version=number, approver=approver or author(), reason=reason)
    return _print_changed(_append(registry, entry), number, as_json)


def show_lineage(
    name: VersionName,
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw it as well: .svg or .png.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Show where a version came from and what became of it: settings, seed, commit, data, gates, approvals, releases."""
    registry = _registry(loop_file, storage)
    document = lineage(_find_bundle(registry, name), _entries(registry, None))
    if plot is not None:
        from trimtab.lineage_picture import save_lineage

        save_lineage(document, plot)
    output(as_json, {**document, "plot": plot}, lineage_text(document))
    return DONE


def _registry(loop_file: Path, storage: str | None) -> Registry:
    return open_context(loop_file, None, storage).registry()


def _entries(registry: Registry, at: str | None) -> list[dict[str, Any]]:
    entries = [entry.body for entry in registry.entries()]
    return entries if at is None else until(entries, _moment_of(at))


def _state(registry: Registry, at: str | None) -> RegistryState:
    return registry.state() if at is None else fold(_entries(registry, at))


def _moment_of(text: str) -> float:
    """Return seconds since 1970; a time without a zone is this machine's local time."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError as error:
        raise UsageError(f"--at {text!r} is no time: expected '2026-11-27 14:03', or ISO 8601 with a zone") from error


def _append(registry: Registry, entry: Callable[[RegistryState], dict[str, Any]]) -> RegistryState:
    return registry.append(entry, now=time.time())


def _find_bundle(registry: Registry, name: str) -> Bundle:
    """Return the bundle of a version, or one that was never registered by the beginning of its digest."""
    try:
        digest = registry.state().resolve(name).digest
    except NotFound:
        found = [digest for digest in registry.store.names(BUNDLES) if digest.startswith(name)]
        if len(name) < MIN_DIGEST_PREFIX or len(found) != 1:
            raise
        digest = found[0]
    return registry.bundle_of(digest)


def _version_document(state: RegistryState, version: Version) -> dict[str, Any]:
    return {
        "version": version.number,
        "digest": version.digest,
        "verdict": str(version.gate_verdict),
        "override_gates": version.override_gates,
        "aliases": [name for name, number in state.aliases.items() if number == version.number],
        "tags": version.tags,
        "approvals": [dataclasses.asdict(approval) for approval in version.approvals],
        "registered_at": version.registered_at,
        "collected_at": version.collected_at,
    }


def _is_about(entry: dict[str, Any], version: Version, state: RegistryState) -> bool:
    if entry["kind"] in ("release_start", "release_change"):
        release = state.releases[entry["release"] - 1]
        return version.number in (release.candidate, release.incumbent)
    if entry["kind"] == "shadows":
        return version.number in entry["versions"]
    return entry.get("version") == version.number  # of a switch there is none: it is the arm's


def _entry_line(entry: dict[str, Any]) -> str:
    reason = f": {entry['reason']}" if entry.get("reason") else ""
    return f"{entry['number']:>4}  {moment(entry['time_s'])}  {entry['author']}  {describe(entry)}{reason}"


def _champion_text(state: RegistryState, why: dict[str, Any] | None) -> str:
    if why is None or state.champion is None or state.plan is None:
        return "there was no champion yet"
    version = state.version(state.champion)
    lines = [
        f"champion was version {version.number} ({version.digest[:SHORT]})",
        f"since {moment(why['time_s'])}, by entry {why['number']} of {why['author']}: {describe(why)}",
        f"because: {why['reason']}",
        *([f"numbers: {numbers_text(why['numbers'])}"] if why.get("numbers") else []),
        f"traffic: {plan_text(state.plan)}",
        *([switches_text(state.switched_off)] if state.switched_off else []),
    ]
    return "\n".join(lines)


def _print_changed(state: RegistryState, number: int, as_json: bool) -> int:
    document = _version_document(state, state.version(number))
    text = ", ".join(f"{key} {_plain(document[key])}" for key in ("version", "aliases", "tags", "approvals"))
    output(as_json, document, text)
    return DONE


def _versions_text(numbers: tuple[int, ...]) -> str:
    return f"(version {', '.join(map(str, numbers))}) " if numbers else ""


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _warn_of_torn(state: RegistryState) -> None:
    if state.torn is not None:
        say(f"warning: {state.torn} is torn and counts for nothing; see `trimtab registry verify`")
