"""`trimtab log`: which segments the decision log has, sealing them by hand, and the decisions of a time range."""

import itertools
import math
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.table import Table

from policies.errors import IntegrityError, TrimtabError, UsageError
from policies.log_range import decisions_between
from policies.log_reader import segments
from policies.records import Decision
from policies.sealed_segments import SUFFIX, SealedFile
from policies.sealing import SEAL_AFTER_S, examine, finished_segments, remove_leftovers
from policies.sealing import seal as seal_segment
from trimtab.command import (
    DEFAULT_LOOP_FILE,
    DONE,
    NEGATIVE,
    JsonOption,
    LoopFile,
    StorageOption,
    escape,
    open_context,
    output,
    rendered,
    say,
)
from trimtab.registry_text import moment

TimeHelp = "'2026-11-27 14:03' (local time), or ISO 8601 with a zone."


def list_segments(loop_file: LoopFile = DEFAULT_LOOP_FILE, storage: StorageOption = None, as_json: JsonOption = False) -> int:
    """List the segments: sealed, finished (to be sealed) or open, their decisions and bytes; exit code 1 if one is damaged."""
    found = [_describe(path) for path in segments(_directory(loop_file, storage)).values()]
    table = Table(box=None, pad_edge=False)
    for title in ("segment", "state", "decisions", "duplicates", "torn bytes", "bytes", "from", "to"):
        table.add_column(title)
    for row in found:
        times = [moment(row[key]) if row.get(key) is not None else "" for key in ("first_time_s", "last_time_s")]
        numbers = [str(row.get(key, "")) for key in ("num_rows", "num_duplicates", "num_torn_bytes", "num_bytes")]
        table.add_row(*map(escape, (row["segment"], row["state"], *numbers, *times)))
    output(as_json, {"segments": found}, rendered(table) if found else "the log has no segments")
    return _say_damage([row["error"] for row in found if "error" in row])


def seal(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    after: Annotated[float, typer.Option(min=0, help="Only segments that nobody wrote to for this many seconds.")] = SEAL_AFTER_S,
    as_json: JsonOption = False,
) -> int:
    """Seal finished segments to Parquet now; the monitor does it by itself. Exit code 1 if one cannot be sealed."""
    sealed: list[dict[str, Any]] = []
    errors: list[str] = []
    directory, now = _directory(loop_file, storage), time.time()
    remove_leftovers(directory, now=now, min_age_s=after)
    for path in finished_segments(directory, now=now, min_age_s=after):
        try:
            info = seal_segment(path)
        except TrimtabError as error:
            errors.append(str(error))
            continue
        if info is not None:  # else a writer holds it
            sealed.append({"segment": path.stem, **msgspec.structs.asdict(info)})
    lines = [
        f"{row['segment']}: {row['num_rows']:,} decisions, {row['num_duplicates']} duplicates and {row['num_torn_bytes']} torn "
        "bytes left out"
        for row in sealed
    ]
    output(as_json, {"sealed": sealed, "errors": errors}, "\n".join([*lines, f"{len(sealed)} segment(s) sealed"]))
    return _say_damage(errors)


def show(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help=f"The first moment: {TimeHelp}")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help=f"The first moment after them: {TimeHelp}")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many, the first ones.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document per decision and line, all fields.")] = False,
) -> int:
    """Show the decisions of a time range in the order of time; exit code 1 if some cannot be read."""
    errors: list[IntegrityError] = []
    times = [_moment_of("--since", since, -math.inf), _moment_of("--until", until, math.inf)]
    found = decisions_between(_directory(loop_file, storage), *times, note_error=errors.append)
    chosen = itertools.islice(found, limit)
    if as_json:
        for decision in chosen:
            sys.stdout.write(msgspec.json.encode(decision).decode() + "\n")
        sys.stdout.flush()
    else:
        print(_decision_table(list(chosen)), flush=True)
    if next(found, None) is not None:
        say(f"there are more; the first {limit} are shown: --limit N, or --since and --until")
    return _say_damage([str(error) for error in errors])


def _describe(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == SUFFIX:
            info, state = SealedFile(path).info, "sealed"
        else:
            info, is_held = examine(path)
            state = "open" if is_held else "finished"
        return {"segment": path.stem, "state": state, "num_bytes": path.stat().st_size, **msgspec.structs.asdict(info)}
    except FileNotFoundError:  # sealed since it was listed
        return _describe(path.with_suffix(SUFFIX))
    except TrimtabError as error:  # a `StorageError`: whether somebody holds it cannot be known here
        state = "damaged" if isinstance(error, IntegrityError) else "unknown"
        return {"segment": path.stem, "state": state, "num_bytes": path.stat().st_size, "error": str(error)}


def _decision_table(decisions: list[Decision]) -> str:
    table = Table(box=None, pad_edge=False)
    for title in ("time", "decision", "unit", "version", "arm", "rung", "action", "propensity"):
        table.add_column(title, overflow="fold")
    for decision in decisions:
        action, propensity = msgspec.json.encode(decision.action).decode(), f"{decision.propensity:.6g}"
        names = (decision.decision_id, decision.unit_id, str(decision.version), decision.arm, decision.rung)
        table.add_row(*map(escape, (moment(decision.time_s), *names, action, propensity)))
    return rendered(table) if decisions else "no decision was made in that time"


def _say_damage(errors: list[str]) -> int:
    for error in errors:
        say(error)
    return NEGATIVE if errors else DONE


def _directory(loop_file: Path, storage: str | None) -> Path:
    context = open_context(loop_file, None, storage)
    return context.storage.decisions(context.loop.name)


def _moment_of(option: str, text: str | None, default: float) -> float:
    if text is None:
        return default
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is no time: expected {TimeHelp}") from error
