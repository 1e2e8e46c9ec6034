"""Who may do what at this endpoint: whoever presents a key that was made for it, within the key's limits.

A replica knows keys by their SHA-256 only. What was presented is hashed and looked up, so how long a refusal takes says nothing
about how much of a guess was right.
"""

import asyncio
import hashlib
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from policies.api_keys import KeyRecord, Keys, parse_keys
from policies.errors import Forbidden, IntegrityError, Overloaded, ServiceUnavailable, Unauthorized
from policies.storage import Storage

POLL_INTERVAL_S = 1.0  # a revocation must be in force within 5 s; without news a poll is one `stat`
BURST_S = 1.0  # a key that was idle may send what it may send in this time at once

_SCHEME = b"Bearer "
_MISSING = "the API key is missing: send `Authorization: Bearer <key>`; `trimtab apikey create` makes one"
# The same words for a key that never was, that expired and that was revoked: a finder of old keys learns nothing.
_NOT_VALID = "the API key is not valid: send `Authorization: Bearer <key>`; `trimtab apikey list` shows which keys are"

logger = logging.getLogger(__name__)


class Usage:
    """How much of its limits a key has used up at this replica; as a context manager, one request that is being answered."""

    __slots__ = ("_capacity", "_checked_s", "_num_in_flight", "_tokens", "max_concurrent", "name", "requests_per_s")

    def __init__(self, name: str, *, requests_per_s: float | None, max_concurrent: int | None, now: float) -> None:
        self.name = name
        self.requests_per_s = requests_per_s
        self.max_concurrent = max_concurrent
        self._capacity = self._tokens = 0.0 if requests_per_s is None else max(BURST_S * requests_per_s, 1.0)
        self._checked_s = now
        self._num_in_flight = 0

    def take(self, now: float) -> None:
        """Count one request; raises `Overloaded` that says when there is room for the next."""
        if self.requests_per_s is None:
            return
        tokens, elapsed_s = self._tokens, now - self._checked_s
        self._checked_s = now
        if elapsed_s > 0.0:  # time can go backwards
            tokens += elapsed_s * self.requests_per_s
            tokens = tokens if tokens < self._capacity else self._capacity
        self._tokens = tokens
        if tokens < 1.0 - 1e-6:  # the clock's resolution: a tenth of a second ten times is a little less than one
            retry_after_s = math.ceil((1.0 - tokens) / self.requests_per_s)
            raise Overloaded(
                f"key {self.name!r} may send {self.requests_per_s:g} requests per second to each replica; "
                f"try again in {retry_after_s} s, or ask for a key with a higher --requests-per-s",
                retry_after_s,
            )
        self._tokens = tokens - 1.0

    def begin(self) -> None:
        """Count a request that is being answered from now on; raises `Overloaded` when there are as many as may be."""
        if self.max_concurrent is not None and self._num_in_flight >= self.max_concurrent:
            raise Overloaded(
                f"key {self.name!r} has {self._num_in_flight} requests in flight at this replica, the limit; "
                "wait for an answer, or ask for a key with a higher --max-concurrent"
            )
        self._num_in_flight += 1

    def end(self) -> None:
        """Count a request that was begun as answered."""
        self._num_in_flight -= 1

    __enter__ = begin

    def __exit__(self, *_: object) -> None:
        self.end()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key that is in force: what it may do, until when, and how much of its limits it has used up here."""

    id: str
    name: str
    scopes: frozenset[str]
    expires_at: float | None
    usage: Usage

    def in_flight(self) -> Usage:
        """Return a context manager for the time of one request; entering it raises `Overloaded` at the key's limit."""
        return self.usage


@dataclass(frozen=True, slots=True)
class _Table:
    """The keys of one state of the file. What was recognised goes into the same table, and is forgotten with it."""

    by_sha256: dict[bytes, ApiKey]
    # By the header's value as it came: a lookup instead of a SHA-256. Only valid keys in the one usual spelling get in, so there
    # are never more than there are keys. A guess is compared with a key byte by byte only if all 64 bits of Python's hash agree,
    # and who can bring that about has no need to guess.
    by_header: dict[bytes | None, ApiKey] = field(default_factory=dict)
    ids: frozenset[str] = frozenset()


class KeyRing:
    """Follows the file of keys. `check` belongs to the event loop; `refresh` may run in a thread, only one at a time.

    When the file is missing or damaged, the last good keys stay in force and `error` says why; they still expire. A ring that has
    never read a good file refuses everybody with 503 and `is_loaded` is False.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.error: str | None = None
        self._path = path
        self._clock = clock
        self._seen: tuple[int, int, int] | None = None
        self._table: _Table | None = None
        self.refresh()

    @classmethod
    def of(cls, storage: Storage) -> "KeyRing":
        return cls(storage.api_keys.path)

    @property
    def is_loaded(self) -> bool:
        return self._table is not None

    def check(self, authorization: bytes | None, scope: str, *alternatives: str) -> ApiKey:
        """Return the key in an Authorization header and count a request of it.

        Raises `Unauthorized` unless it is valid now, and what `admit` raises.
        """
        key = self.recognise(authorization)
        self.admit(key, scope, *alternatives)
        return key

    def admit(self, key: ApiKey, scope: str, *alternatives: str) -> None:
        """Count a request of a key that was recognised.

        Raises `Unauthorized` if it is not in force any more, `Forbidden` unless it has the scope or one of the alternatives,
        `Overloaded` when it has sent as many as it may.
        """
        self.require_in_force(key)
        require(key, scope, *alternatives)
        if key.usage.requests_per_s is not None:
            key.usage.take(self._clock())

    def require_in_force(self, key: ApiKey) -> None:
        """Raise `Unauthorized` for a key that was recognised and has been revoked or expired since.

        Who may send is looked at when a request's head is there. Its body may take seconds more, and requests that were sent
        ahead wait until their client reads its answers.
        """
        assert self._table is not None, "it was recognised"
        if key.id not in self._table.ids or (key.expires_at is not None and self._clock() >= key.expires_at):
            raise Unauthorized(_NOT_VALID)

    def recognise(self, authorization: bytes | None) -> ApiKey:
        """Return the key in an Authorization header, whatever it may do; raises `Unauthorized` unless it is valid now."""
        table = self._table  # once: `refresh` replaces it, and what belongs to the old one must not get into the new one
        if table is None:
            raise ServiceUnavailable("this replica could not read the API keys; its log says why")
        key = table.by_header.get(authorization)
        if key is None:
            key = _look_up(table, authorization)
        if key.expires_at is not None and self._clock() >= key.expires_at:
            raise Unauthorized(_NOT_VALID)
        return key

    async def follow(self) -> None:
        """Refresh for ever, off the event loop: a shared directory may take its time."""
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        """Read the file again if it is another one than before."""
        try:
            seen = _identity(self._path)  # before reading: a change in between is seen the next time
            if seen == self._seen:
                return self._report(None)
            records = parse_keys(self._path.read_bytes(), str(self._path))
        except (IntegrityError, OSError) as error:
            return self._report(f"{type(error).__name__}: {error}")
        by_sha256 = self._keys_of(records)
        self._table = _Table(by_sha256, ids=frozenset(key.id for key in by_sha256.values()))
        self._seen = seen
        self._report(None)
        logger.info("event=keys_in_force num_keys=%d", len(self._table.by_sha256))

    def _keys_of(self, records: Keys) -> dict[bytes, ApiKey]:
        usages = {key.id: key.usage for key in self._table.by_sha256.values()} if self._table is not None else {}
        now = self._clock()
        in_force = [record for record in records if record.why_refused(now) is None]
        return {bytes.fromhex(record.sha256): _api_key(record, usages.get(record.id), now) for record in in_force}

    def _report(self, error: str | None) -> None:
        if error is not None and error != self.error:
            logger.error("event=keys_unreadable error=%r consequence='the last good keys stay in force'", error)
        elif error is None and self.error is not None:
            logger.info("event=keys_readable_again")
        self.error = error


def require(key: ApiKey, scope: str, *alternatives: str) -> None:
    """Raise `Forbidden` unless a key has the scope or one of the alternatives."""
    if scope not in key.scopes and key.scopes.isdisjoint(alternatives):
        needed = " or ".join((scope, *alternatives))
        raise Forbidden(
            f"key {key.name!r} has the scope {', '.join(sorted(key.scopes))}, this needs {needed}; "
            "a key's scopes never change: `trimtab apikey create` makes another"
        )


def _look_up(table: _Table, authorization: bytes | None) -> ApiKey:
    """Return the key by its hash, and remember a valid one by its header; raises `Unauthorized`."""
    if not authorization:
        raise Unauthorized(_MISSING)
    scheme, presented = authorization[: len(_SCHEME)], authorization[len(_SCHEME) :]
    key = table.by_sha256.get(hashlib.sha256(presented).digest())
    if key is None or scheme.lower() != _SCHEME.lower():
        raise Unauthorized(_NOT_VALID)
    if scheme == _SCHEME:
        table.by_header[authorization] = key
    return key


def _api_key(record: KeyRecord, usage: Usage | None, now: float) -> ApiKey:
    """Return what a record says, with what its key has used up already: reading the file again must not fill its bucket."""
    limits = {"requests_per_s": record.requests_per_s, "max_concurrent": record.max_concurrent}
    usage = usage or Usage(record.name, **limits, now=now)
    return ApiKey(record.id, record.name, frozenset(record.scopes), record.expires_at, usage)


def _identity(path: Path) -> tuple[int, int, int]:
    stat = os.stat(path)
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
