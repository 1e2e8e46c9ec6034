"""Who may use the endpoint, as commands: make, list, rotate and revoke API keys."""

import datetime
import time
from typing import Annotated, Any

import msgspec
import typer

from policies.api_keys import DEFAULT_OVERLAP_S, OWNER, SCOPES, ApiKeyStore, KeyRecord
from trimtab.command import (
    DEFAULT_LOOP_FILE,
    DONE,
    ExpiresOption,
    JsonOption,
    LoopFile,
    StorageOption,
    open_context,
    output,
    say,
    start_of_day,
)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The key's name, such as that of the service that uses it.")]
KNOWN_WITHIN = "replicas know it within 2 s"


def create(
    name: NameArgument,
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    scopes: Annotated[
        list[str], typer.Option("--scope", metavar="SCOPE", help=f"What it may do: {', '.join(SCOPES)}; repeat for more.")
    ] = ...,
    expires: ExpiresOption = None,
    requests_per_s: Annotated[
        float | None, typer.Option("--requests-per-s", help="At most this many to each replica, a second's worth at once.")
    ] = None,
    max_concurrent: Annotated[
        int | None, typer.Option("--max-concurrent", min=1, help="At most this many unanswered at once at each replica.")
    ] = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> int:
    """Make an API key and print it: now, and never again, for only its SHA-256 is kept."""
    store = open_context(loop_file, None, storage).storage.api_keys
    record, key = store.create(
        name,
        scopes,
        now=time.time(),
        expires_at=start_of_day(expires),
        requests_per_s=requests_per_s,
        max_concurrent=max_concurrent,
    )
    _show_new(store, record, key, as_json=as_json, note=KNOWN_WITHIN)
    return DONE


def list_keys(loop_file: LoopFile = DEFAULT_LOOP_FILE, storage: StorageOption = None, as_json: JsonOption = False) -> int:
    """Show every API key: what it may do, its limits, and whether it is valid."""
    keys, now = open_context(loop_file, None, storage).storage.api_keys.read(), time.time()
    output(as_json, {"keys": [_document(record, now) for record in keys]}, "\n".join(_line(record, now) for record in keys))
    return DONE


def rotate(
    name: NameArgument,
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    overlap_s: Annotated[
        float, typer.Option("--overlap", min=0, metavar="SECONDS", help="For so long the old key goes on being valid.")
    ] = DEFAULT_OVERLAP_S,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> int:
    """Make the key that follows another, with the same scopes and limits, and print it. The old one expires after the overlap."""
    store = open_context(loop_file, None, storage).storage.api_keys
    record, key = store.rotate(name, now=time.time(), overlap_s=overlap_s)
    _show_new(store, record, key, as_json=as_json, note=f"{KNOWN_WITHIN}; the old one expires in {overlap_s:g} s")
    return DONE


def revoke(
    name_or_id: Annotated[str, typer.Argument(metavar="NAME|ID", help="All keys of a name, or the one with this id.")],
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> int:
    """Make an API key open nothing any more, within seconds. There is no way back."""
    store, now = open_context(loop_file, None, storage).storage.api_keys, time.time()
    records = store.revoke(name_or_id, now=now)
    output(as_json, {"keys": [_document(record, now) for record in records]}, "\n".join(_line(record, now) for record in records))
    return DONE


def _show_new(store: ApiKeyStore, record: KeyRecord, key: str, *, as_json: bool, note: str) -> None:
    """Print the key alone on standard output, so that a script can take it, and what it is beside it."""
    if not as_json:
        copied = f"; {store.owner_file} holds it" if record.name == OWNER else ""
        say(f"{_line(record, record.created_at)}; {note}{copied}; it is not shown again:")
    output(as_json, _document(record, record.created_at) | {"key": key}, key)


def _document(record: KeyRecord, now: float) -> dict[str, Any]:
    document = msgspec.to_builtins(record) | {"is_valid": record.why_refused(now) is None}
    return {name: value for name, value in document.items() if name != "sha256"}


def _line(record: KeyRecord, now: float) -> str:
    until = "" if record.expires_at is None else f", until {_moment(record.expires_at)}"
    rate = "" if record.requests_per_s is None else f", {record.requests_per_s:g} requests/s"
    places = "" if record.max_concurrent is None else f", {record.max_concurrent} at once"
    what = f"key {record.name!r} ({record.id}) may {', '.join(record.scopes)}{rate}{places}{until}"
    return record.why_refused(now) or what


def _moment(time_s: float) -> str:
    return datetime.datetime.fromtimestamp(time_s, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
