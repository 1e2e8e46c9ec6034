"""An append-only chain of entries that many writers share without a lock: numbered, each naming the digest of the one before.

Entry 42 is the file `journal/00000042.json`, created if absent: of many writers that want the number exactly one gets it. Since
schema 2 an entry also has a random `id` and its own `sha256`, so that a change of the last one is found before another follows.

A crash of the machine that holds the files may leave a torn last entry: empty, cut off or filled up with zeros. It is never
written over: between looking and writing another writer may have mended it. The next entry takes its place under a name of
its own, `00000042.retry-1.json`, created if absent like all others, and notes the digest of what it stands in for.
"""

import os
import re
import secrets
import socket
from dataclasses import dataclass
from json import JSONDecodeError, loads
from typing import Any

from policies.errors import IntegrityError
from policies.integrity import canonical_json, parse_json, sha256_hex
from policies.registry_store import RegistryStore

FOLDER = "journal"
SCHEMA_VERSION = 2
READABLE_SCHEMAS = (1, 2)
CUT_TOKEN = re.compile(r"\.|e[+-]?|-|t|tr|tru|f|fa|fal|fals|n|nu|nul|\\?u[0-9a-f]{0,4}")  # of a number, literal or escape


@dataclass(frozen=True)
class Tail:
    """Where the journal ends: the number that comes next, what it follows, and the torn files at its place, by digest."""

    number: int
    previous_sha256: str
    torn: dict[str, str]

    @property
    def name(self) -> str:
        """The file that the next entry goes into."""
        return entry_name(self.number, len(self.torn))


@dataclass(frozen=True)
class Entry:
    """A whole entry: `body` as in its file, `sha256` of the file's bytes, `files` all that are at its place (itself last)."""

    body: dict[str, Any]
    sha256: str
    files: tuple[str, ...]


def entry_name(number: int, attempt: int = 0) -> str:
    """Return the file of an entry; a later attempt stands in for a torn one."""
    return f"{FOLDER}/{number:08d}.retry-{attempt}.json" if attempt else f"{FOLDER}/{number:08d}.json"


def read_next(store: RegistryStore, number: int, previous_sha256: str) -> Entry | Tail:
    """Return the entry with this number, or the journal's tail when it has not been written.

    Raises `IntegrityError` when it is not the one that follows, was changed, or is torn with others after it.
    """
    torn: dict[str, str] = {}
    has_next = False
    while (data := store.read(name := entry_name(number, len(torn)))) is not None:
        if not is_torn(data):
            body = _checked(data, f"{store}/{name}", number, previous_sha256, list(torn.values()))
            return Entry(body, sha256_hex(data), (*torn, name))
        torn[name] = sha256_hex(data)
        has_next = store.read(entry_name(number + 1)) is not None  # asked before the attempt that stands in, which is older
    if has_next:
        raise IntegrityError(f"{store}/{list(torn)[-1]} is cut off, and another entry follows it: this is no torn end")
    return Tail(number, previous_sha256, torn)


def read_all(store: RegistryStore) -> tuple[list[Entry], Tail]:
    """Return all entries from the first one, and where the journal ends; raises `IntegrityError` as `read_next` does."""
    entries: list[Entry] = []
    previous_sha256 = ""
    while isinstance(found := read_next(store, len(entries) + 1, previous_sha256), Entry):
        entries.append(found)
        previous_sha256 = found.sha256
    return entries, found


def encode(tail: Tail, decided: dict[str, Any], *, now: float) -> bytes:
    """Return the bytes of the entry that `decided` becomes at the journal's tail."""
    body = {
        "schema_version": SCHEMA_VERSION,
        "id": secrets.token_hex(16),  # tells two writers' entries apart, however equal
        "number": tail.number,
        "previous_sha256": tail.previous_sha256,
        "time_s": now,
        "author": author(),
        **({"replaces_torn": list(tail.torn.values())} if tail.torn else {}),
        **decided,
    }
    return canonical_json({**body, "sha256": sha256_hex(canonical_json(body))})


def decode(tail: Tail, data: bytes, source: str) -> Entry:
    """Read an entry as readers would at the journal's tail: what they would refuse must not be written."""
    body = _checked(data, source, tail.number, tail.previous_sha256, list(tail.torn.values()))
    return Entry(body, sha256_hex(data), (*tail.torn, tail.name))


def is_torn(data: bytes) -> bool:
    """Say whether bytes are only the beginning of an entry, as a crash leaves it: nothing, or JSON that ends too early.

    Zeros at the end are blocks that were never written. Whatever else is no JSON was changed, not torn: to ignore it would take
    an acknowledged entry back. In doubt it was changed, as when it ends with a brace inside a string.
    """
    try:
        text = data.rstrip(b"\0").decode("utf-8")
        loads(text)
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    except JSONDecodeError as error:
        is_cut_string = error.msg.startswith("Unterminated string") and not text.endswith("}")
        return is_cut_string or error.pos >= len(text) or CUT_TOKEN.fullmatch(text, error.pos) is not None
    except (ValueError, RecursionError):
        pass
    return False


def author() -> str:
    """Return who writes: user and machine."""
    user = os.environ.get("USER") or f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _checked(data: bytes, source: str, number: int, previous_sha256: str, torn: list[str]) -> dict[str, Any]:
    body = parse_json(data, source)
    try:
        schema = body["schema_version"]
        if schema not in READABLE_SCHEMAS or body["number"] != number:
            raise IntegrityError(
                f"{source}: entry {body['number']} of schema {schema}, expected {number} of schema 1 to {SCHEMA_VERSION}"
            )
        if body["previous_sha256"] != previous_sha256:
            raise IntegrityError(
                f"{source}: follows {body['previous_sha256']}, but the entry before it hashes to {previous_sha256}"
            )
        if schema == 1 and ("sha256" in body or torn):
            raise IntegrityError(f"{source}: says schema 1, but holds or replaces what only schema 2 has")
        if schema >= 2:
            rest = {key: value for key, value in body.items() if key != "sha256"}
            if sha256_hex(canonical_json(rest)) != body["sha256"] or canonical_json(body) != data:
                raise IntegrityError(f"{source}: was changed: it says sha256 {body['sha256']}, its content has another")
            if body.get("replaces_torn", []) != torn:
                raise IntegrityError(f"{source}: replaces torn entries {body.get('replaces_torn', [])}, found are {torn}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise IntegrityError(f"{source} is malformed: {error!r}") from error
    return body
