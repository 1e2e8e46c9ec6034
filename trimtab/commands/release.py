"""`trimtab release`: each command is a journal entry; the release manager and the replicas follow the journal."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from policies.errors import NotFound, TrimtabError
from policies.registry import RegistryState, Release, ReleaseAction, change_release, start_release
from policies.verdicts import Verdict
from trimtab import session as sessions
from trimtab.command import (
    DEFAULT_LOOP_FILE,
    DONE,
    NEGATIVE,
    Context,
    JsonOption,
    LoopFile,
    OverrideOption,
    ReasonOption,
    Sets,
    StorageOption,
    connect,
    open_context,
    output,
)

RELEASE_POLL_S = 0.5


def start(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    sets: Sets = None,
    storage: StorageOption = None,
    version: Annotated[int, typer.Option(min=1, help="The version to deliver.")] = ...,
    override_gates: OverrideOption = None,
    reason: ReasonOption = "started by hand",
    as_json: JsonOption = False,
) -> int:
    """Give a version its first share of traffic; from there it advances, holds or rolls back by itself."""
    context = open_context(loop_file, sets, storage)
    weights = context.loop.release.weights
    context.registry().bundle(version)  # a bundle with a changed byte is refused here, not by the replicas later
    return _change(
        context,
        lambda state: start_release(state, version, weights=weights, override_gates=override_gates, reason=reason),
        as_json,
    )


def status(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    wait: Annotated[float, typer.Option(min=0, help="Wait up to this many seconds for the release to end.")] = 0.0,
    as_json: JsonOption = False,
) -> int:
    """Show the release; with --wait the exit code is 0 only when it ended in a promotion."""
    context = open_context(loop_file, None, storage)
    registry, deadline = context.registry(), time.monotonic() + wait
    release = _require_release(registry.state())
    while release.is_open and time.monotonic() < deadline:
        time.sleep(RELEASE_POLL_S)
        release = _require_release(registry.state())
    _print_release(context, registry.state(), as_json)
    return NEGATIVE if wait and release.state != "promoted" else DONE


def promote(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    reason: ReasonOption = "promoted by hand",
    as_json: JsonOption = False,
) -> int:
    """Make the candidate champion now, without waiting for more evidence; its gates must have passed."""
    return _change_release(loop_file, storage, "promote", reason, as_json)


def pause(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    reason: ReasonOption = "paused by hand",
    as_json: JsonOption = False,
) -> int:
    """Keep the shares of traffic from growing until `resume`; proven harm still rolls back."""
    return _change_release(loop_file, storage, "pause", reason, as_json)


def resume(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    reason: ReasonOption = "resumed by hand",
    as_json: JsonOption = False,
) -> int:
    """Let a paused release go on."""
    return _change_release(loop_file, storage, "resume", reason, as_json)


def abort(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    reason: ReasonOption = "aborted by hand",
    as_json: JsonOption = False,
) -> int:
    """Give all traffic back to the champion, without a verdict on the candidate."""
    return _change_release(loop_file, storage, "abort", reason, as_json)


def rollback(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    reason: ReasonOption = "rolled back by hand",
    as_json: JsonOption = False,
) -> int:
    """Take the candidate back; after a promotion, make the previous champion champion again."""
    return _change(
        open_context(loop_file, None, storage), lambda state: change_release(state, "rollback", reason=reason), as_json
    )


def _change_release(loop_file: Path, storage: str | None, action: ReleaseAction, reason: str, as_json: bool) -> int:
    context = open_context(loop_file, None, storage)
    return _change(context, lambda state: change_release(state, action, reason=reason), as_json)


def _change(context: Context, decide_entry: Callable[[RegistryState], dict[str, Any]], as_json: bool) -> int:
    state = context.registry().append(decide_entry, now=time.time())
    _print_release(context, state, as_json)
    return DONE


def _print_release(context: Context, state: RegistryState, as_json: bool) -> None:
    document = _release_document(context, state)
    shares = " → ".join(f"{weight:.0%}" for weight in document["weights"])
    text = (
        f"release {document['release']} of version {document['version']} ({shares}): {document['state']}, "
        f"step {document['step'] + 1} of {len(document['weights'])}\n{document['verdict']}: {document['reason']}"
    )
    output(as_json, document, text)


def _release_document(context: Context, state: RegistryState) -> dict[str, Any]:
    """Combine the journal, which is the truth, with the monitor's live verdict where there is one."""
    release = _require_release(state)
    last = release.history[-1]
    verdicts = {"promote": Verdict.PASS, "advance": Verdict.PASS, "rollback": Verdict.FAIL}
    document: dict[str, Any] = {
        "release": release.number,
        "state": release.state,
        "version": release.candidate,
        "incumbent": release.incumbent,
        "champion": state.champion,
        "step": release.step,
        "weights": list(release.weights),
        "canary_weight": release.weights[release.step] if release.is_open else None,
        "override_gates": release.override_gates,
        "verdict": str(verdicts.get(last.action, Verdict.INCONCLUSIVE)),
        "reason": last.reason,
        "history": [dataclasses.asdict(step) for step in release.history],
    }
    if release.is_open and sessions.running_session(context.storage) is not None:
        live = None  # the journal is enough to answer; the endpoint only knows more
        with contextlib.suppress(TrimtabError), connect(context) as client:
            live = client.status().get("release")
        if live and live["number"] == release.number:
            document |= {key: live[key] for key in ("verdict", "reason", "evidence") if live.get(key) is not None}
    return document


def _require_release(state: RegistryState) -> Release:
    if state.release is None:
        raise NotFound("there has been no release; start one with `trimtab release start --version N`")
    return state.release
