"""`trimtab arms`: who answers whom beside the release. Each change is a journal entry; the replicas follow within seconds."""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from policies.errors import UsageError
from policies.registry import Registry
from policies.registry_entries import end_holdout, set_holdout, set_shadows, switch_arm
from policies.registry_state import RegistryState, SwitchedArm
from trimtab.command import DEFAULT_LOOP_FILE, DONE, JsonOption, OverrideOption, ReasonOption, StorageOption, open_context, output
from trimtab.registry_text import plan_text, switches_text

# An option here, not the last argument: `shadow` takes any number of versions.
LoopFileOption = Annotated[Path, typer.Option("--loop-file", metavar="FILE", help="The loop file (YAML).")]
ArmName = Annotated[str, typer.Argument(metavar="ARM", help=f"One of {', '.join(get_args(SwitchedArm))}.")]


def list_arms(loop_file: LoopFileOption = DEFAULT_LOOP_FILE, storage: StorageOption = None, as_json: JsonOption = False) -> int:
    """Show who answers whom, who is held out, who answers in shadow, and what is switched off."""
    return _print_arms(_registry(loop_file, storage).state(), as_json)


def disable(
    arm: ArmName,
    loop_file: LoopFileOption = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in the journal and shown until it is enabled.")] = ...,
    as_json: JsonOption = False,
) -> int:
    """Take an arm out of the traffic at once: the champion answers its units, the previous champion the champion's."""
    return _append(_registry(loop_file, storage), partial(switch_arm, arm=arm, enabled=False, reason=reason), as_json)


def enable(
    arm: ArmName,
    loop_file: LoopFileOption = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    reason: ReasonOption = "enabled by hand",
    as_json: JsonOption = False,
) -> int:
    """Let an arm answer its units again."""
    return _append(_registry(loop_file, storage), partial(switch_arm, arm=arm, enabled=True, reason=reason), as_json)


def holdout(
    name: Annotated[str | None, typer.Argument(metavar="[VERSION]", help="Who answers the held-out units.")] = None,
    loop_file: LoopFileOption = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    weight: Annotated[float | None, typer.Option("--weight", help="Share of all units, up to 0.5.")] = None,
    end: Annotated[bool, typer.Option("--end", help="Hold nobody out any more.")] = False,
    override_gates: OverrideOption = None,
    reason: ReasonOption = "set by hand",
    as_json: JsonOption = False,
) -> int:
    """Give a version a share of units that no release reaches; growing it keeps its units."""
    if end != (name is None) or end == (weight is not None):
        raise UsageError("give either a VERSION with --weight 0.05, or --end")
    registry = _registry(loop_file, storage)
    if name is None or weight is None:
        return _append(registry, partial(end_holdout, reason=reason), as_json)
    version = _loadable(registry, name)
    entry = partial(set_holdout, version=version, weight=weight, override_gates=override_gates, reason=reason)
    return _append(registry, entry, as_json)


def shadow(
    names: Annotated[list[str] | None, typer.Argument(metavar="[VERSION]...", help="Exactly these from now on.")] = None,
    loop_file: LoopFileOption = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    end: Annotated[bool, typer.Option("--end", help="Let no version answer in shadow any more.")] = False,
    override_gates: OverrideOption = None,
    reason: ReasonOption = "set by hand",
    as_json: JsonOption = False,
) -> int:
    """Let versions answer every request in the background; what they would have done is logged, and nobody hears it."""
    if end == bool(names):
        raise UsageError("give either one or more VERSIONs, or --end")
    registry = _registry(loop_file, storage)
    versions = tuple(_loadable(registry, name) for name in names or ())
    entry = partial(set_shadows, versions=versions, override_gates=override_gates, reason=reason)
    return _append(registry, entry, as_json)


def _registry(loop_file: Path, storage: str | None) -> Registry:
    return open_context(loop_file, None, storage).registry()


def _loadable(registry: Registry, name: str) -> int:
    """Return the version that a name means; a bundle with a changed byte is refused here, not by the replicas later."""
    version = registry.state().resolve(name)
    if version.collected_at is None:  # else the entry is refused, with the reason
        registry.bundle(version.number)
    return version.number


def _append(registry: Registry, entry: Callable[[RegistryState], dict[str, Any]], as_json: bool) -> int:
    return _print_arms(registry.append(entry, now=time.time()), as_json)


def _print_arms(state: RegistryState, as_json: bool) -> int:
    document = {
        "champion": state.champion,
        "plan": state.plan and state.plan.to_json(),
        "holdout": state.holdout and dataclasses.asdict(state.holdout),
        "shadows": list(state.shadows),
        "switched_off": {arm: dataclasses.asdict(off) for arm, off in state.switched_off.items()},
    }
    if state.plan is None:
        text = "there is no champion yet, so there is no traffic to share"
    else:
        text = "\n".join(filter(None, [switches_text(state.switched_off), plan_text(state.plan)]))
    output(as_json, document, text)
    return DONE
