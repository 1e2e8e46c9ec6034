"""Which API keys a storage root has, what each may do, and until when.

    secrets/api_keys.json   every key's name, scopes, limits and SHA-256; mode 600
    secrets/api_key         the key named `owner` in clear, for the person on this machine; mode 600

A key is 24 random bytes: nobody finds it by trying, so one round of a fast hash is as safe as a slow one, and a replica can
afford it on every request. A slow hash is for passwords, which people choose.
"""

import contextlib
import dataclasses
import math
import re
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec

from policies.errors import ConfigError, IntegrityError, NotFound, StorageError
from policies.integrity import canonical_json, exclusive_lock, parse_json, sha256_hex, write_atomic

SCHEMA_VERSION = 1
OWNER = "owner"
Scope = Literal["decide", "feedback", "read", "operate", "approve"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
DEFAULT_OVERLAP_S = 86_400.0  # a day: time to bring the new key to every client
# The longest that a key which is over stays listed: somebody who rotates each hour must not make the file grow for ever.
KEPT_S = 366 * 86_400.0
LOCK_TIMEOUT_S = 10.0  # a change takes milliseconds; whoever holds the lock for longer is stopped
MIN_KEY_CHARACTERS = 20  # of a key that somebody wrote into secrets/api_key: below, the fast hash would not protect it

_NAME = re.compile(r"[a-z][a-z0-9._-]{0,62}")  # no capitals: ids have nothing else, so a word is one or the other
_Time = Annotated[float, msgspec.Meta(ge=0, le=1e12)]


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is kept of one key. Times are seconds since 1970; the limits are per replica, None is no limit."""

    id: Annotated[str, msgspec.Meta(pattern=r"\AK[0-9A-F]{8}\Z")]
    name: Annotated[str, msgspec.Meta(pattern=rf"\A{_NAME.pattern}\Z")]
    sha256: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    scopes: Annotated[tuple[Scope, ...], msgspec.Meta(min_length=1)]
    created_at: _Time
    expires_at: _Time | None
    revoked_at: _Time | None
    requests_per_s: Annotated[float, msgspec.Meta(gt=0, le=1e6)] | None
    max_concurrent: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None

    def why_refused(self, now: float) -> str | None:
        """Say why this key opens nothing now, or None if it does."""
        if self.revoked_at is not None:
            return f"key {self.name!r} ({self.id}) was revoked {_ago(now - self.revoked_at)}"
        if self.expires_at is not None and now >= self.expires_at:
            return f"key {self.name!r} ({self.id}) expired {_ago(now - self.expires_at)}"
        return None


Keys = tuple[KeyRecord, ...]  # in the order in which they were made


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema_version: Literal[1]
    keys: Keys


# --- the rules ---


def create(
    keys: Keys,
    key: str,
    *,
    id: str,
    name: str,
    scopes: Iterable[str],
    now: float,
    expires_at: float | None = None,
    requests_per_s: float | None = None,
    max_concurrent: int | None = None,
) -> Keys:
    """Return the keys with a new one, the last. Raises `ConfigError` for a name in use, no such scope, a time that is over."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"key name {name!r} must be 1-63 of a-z 0-9 . _ - and start with a letter")
    in_use = [record for record in keys if record.name == name and record.why_refused(now) is None]
    if in_use:
        raise ConfigError(
            f"there is a key {name!r} ({in_use[0].id}) already; take another name, `trimtab apikey rotate {name}` or revoke it"
        )
    if expires_at is not None and expires_at <= now:
        raise ConfigError(f"key {name!r} would have expired {_ago(now - expires_at)}; name a later --expires")
    record = KeyRecord(
        id=id,
        name=name,
        sha256=sha256_hex(key.encode()),
        scopes=_ordered(scopes),
        created_at=float(now),
        expires_at=None if expires_at is None else float(expires_at),
        revoked_at=None,
        requests_per_s=None if requests_per_s is None else float(requests_per_s),
        max_concurrent=max_concurrent,
    )
    try:
        return (*keys, msgspec.convert(msgspec.to_builtins(record), KeyRecord))
    except msgspec.ValidationError as error:
        raise ConfigError(f"key {name!r} cannot be made: {error}") from error


def rotate(keys: Keys, key: str, *, id: str, name: str, now: float, overlap_s: float = DEFAULT_OVERLAP_S) -> Keys:
    """Return the keys with a new one, the last, that does what the named one does; that one expires after the overlap.

    A key that was made to last for some time is followed by one that lasts as long. The overlap never prolongs a life.
    Raises `NotFound` when no key of this name is valid, `ConfigError` for an overlap of less than nothing or more than a year.
    """
    if not 0 <= overlap_s <= KEPT_S:
        raise ConfigError(f"the overlap is {overlap_s:g} s; it must be from 0 to {KEPT_S:.0f} s, a year")
    valid = [record for record in keys if record.name == name and record.why_refused(now) is None]
    if not valid:
        raise NotFound(f"no valid key is named {name!r}{_listed(keys)}; `trimtab apikey create {name}` makes a new one")
    old = valid[-1]
    end = now + overlap_s
    ending = msgspec.structs.replace(old, expires_at=end if old.expires_at is None else min(old.expires_at, end))
    new = msgspec.structs.replace(
        old,
        id=id,
        sha256=sha256_hex(key.encode()),
        created_at=float(now),
        expires_at=None if old.expires_at is None else now + (old.expires_at - old.created_at),
    )
    return (*(ending if record is old else record for record in keys), new)


def revoke(keys: Keys, name_or_id: str, *, now: float) -> Keys:
    """Return the keys with those of a name, or the one with an id, revoked for ever; raises `NotFound`.

    Revoking twice keeps the first time.
    """
    if not any(_is_meant(record, name_or_id) for record in keys):
        raise NotFound(f"no key has the name or id {name_or_id!r}{_listed(keys)}")
    return tuple(
        msgspec.structs.replace(record, revoked_at=float(now))
        if _is_meant(record, name_or_id) and record.revoked_at is None
        else record
        for record in keys
    )


def without_long_over(keys: Keys, *, now: float) -> Keys:
    """Return the keys without those that have been revoked or expired for longer than `KEPT_S`."""
    return tuple(record for record in keys if now - _end(record) <= KEPT_S)


def parse_keys(data: bytes, source: str) -> Keys:
    """Read the file's content; raises `IntegrityError` for anything that this version would not have written."""
    document = parse_json(data, source)
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise IntegrityError(f"{source} has schema version {version!r}, this Trimtab reads {SCHEMA_VERSION}")
    try:
        keys = msgspec.convert(document, _File).keys
    except msgspec.ValidationError as error:
        raise IntegrityError(f"{source} is damaged: {error}") from error
    for what in ("id", "sha256"):
        if len({getattr(record, what) for record in keys}) != len(keys):
            raise IntegrityError(f"{source} is damaged: two keys have the same {what}")
    if any(record.scopes != _ordered(record.scopes) for record in keys):
        raise IntegrityError(f"{source} is damaged: scopes are repeated or out of order")
    return keys


# --- the file ---


@dataclasses.dataclass(frozen=True)
class ApiKeyStore:
    """The keys in the directory `secrets` of a storage root. Changes are made under a lock, readers need none."""

    directory: Path

    @property
    def path(self) -> Path:
        return self.directory / "api_keys.json"

    @property
    def owner_file(self) -> Path:
        return self.directory / "api_key"

    def read(self) -> Keys:
        """Return every key; raises `IntegrityError` for a damaged file and `StorageError` for none."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError as error:
            raise StorageError(f"{self.path} is missing; any `trimtab` command on this storage root makes a new one") from error
        return parse_keys(data, str(self.path))

    def ensure_owner(self, *, now: float) -> None:
        """Register the owner's key in a root that has no keys yet: the one in secrets/api_key, or a new one put there.

        Raises `StorageError` for a key there that is too short to be safe.
        """
        if self.path.exists():
            return
        self.directory.mkdir(mode=0o700, exist_ok=True)
        with self._lock():
            if self.path.exists():  # another process opened the same new root
                return
            # The copy first: whoever is killed in between leaves a key to take over, not one that nobody knows.
            if not self.owner_file.exists():
                write_atomic(self.owner_file, _new_key().encode(), mode=0o600)
            key = self.owner_file.read_text().strip()
            if len(key) < MIN_KEY_CHARACTERS:
                raise StorageError(
                    f"{self.owner_file} holds {len(key)} characters, at least {MIN_KEY_CHARACTERS} are needed; "
                    "delete it and a new key is made"
                )
            self._write(create((), key, id=_new_id(), name=OWNER, scopes=SCOPES, now=now))

    def owner_key(self) -> str:
        """Return the owner's key in clear; raises `NotFound` when it was taken away from this machine."""
        try:
            return self.owner_file.read_text().strip()
        except FileNotFoundError as error:
            raise NotFound(f"{self.owner_file} is missing; `trimtab apikey rotate {OWNER}` makes a new one") from error

    def create(
        self,
        name: str,
        scopes: Iterable[str],
        *,
        now: float,
        expires_at: float | None = None,
        requests_per_s: float | None = None,
        max_concurrent: int | None = None,
    ) -> tuple[KeyRecord, str]:
        """Make a key; return its record and the key itself, which is not kept. Raises as the rule `create` does."""
        limits = {"expires_at": expires_at, "requests_per_s": requests_per_s, "max_concurrent": max_concurrent}
        return self._add(lambda keys, key, id: create(keys, key, id=id, name=name, scopes=scopes, now=now, **limits), now=now)

    def rotate(self, name: str, *, now: float, overlap_s: float = DEFAULT_OVERLAP_S) -> tuple[KeyRecord, str]:
        """Make the key that follows another; return its record and the key itself. Raises as the rule `rotate` does."""
        return self._add(lambda keys, key, id: rotate(keys, key, id=id, name=name, now=now, overlap_s=overlap_s), now=now)

    def revoke(self, name_or_id: str, *, now: float) -> list[KeyRecord]:
        """Revoke the keys of a name, or the one with an id; return them. Raises as the rule `revoke` does."""
        with self._lock():
            keys = revoke(self.read(), name_or_id, now=now)
            self._write(without_long_over(keys, now=now))
        return [record for record in keys if _is_meant(record, name_or_id)]

    def _add(self, rule: Callable[[Keys, str, str], Keys], *, now: float) -> tuple[KeyRecord, str]:
        key = _new_key()
        with self._lock():
            keys = self.read()
            keys = rule(keys, key, _new_id(keys))
            self._write(without_long_over(keys, now=now))
            # The copy last: whoever is killed in between leaves the old key there, which still opens during its overlap.
            if keys[-1].name == OWNER:
                write_atomic(self.owner_file, key.encode(), mode=0o600)
        return keys[-1], key

    def _write(self, keys: Keys) -> None:
        document = {"schema_version": SCHEMA_VERSION, "keys": [msgspec.to_builtins(record) for record in keys]}
        data = canonical_json(document) + b"\n"
        parse_keys(data, "what would be written")  # a file that replicas refuse would lock everybody out at the next restart
        write_atomic(self.path, data, mode=0o600)

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        return exclusive_lock(self.directory / "api_keys.lock", timeout_s=LOCK_TIMEOUT_S)


def _new_key() -> str:
    return "tt-" + secrets.token_urlsafe(24)


def _new_id(keys: Keys = ()) -> str:
    """Return an id that no key has; it says nothing about the key, since it stands in logs."""
    taken = {record.id for record in keys}
    while (id := f"K{secrets.token_hex(4).upper()}") in taken:
        pass
    return id


def _ordered(scopes: Iterable[str]) -> tuple[Scope, ...]:
    named = set(scopes)
    unknown = sorted(named - set(SCOPES))
    if unknown or not named:
        what = f"there is no scope {unknown[0]!r}" if unknown else "a key without a scope opens nothing"
        raise ConfigError(f"{what}; the scopes are {', '.join(SCOPES)}")
    return tuple(scope for scope in SCOPES if scope in named)


def _is_meant(record: KeyRecord, name_or_id: str) -> bool:
    return name_or_id in (record.name, record.id)


def _end(record: KeyRecord) -> float:
    """Return when a key was, or will be, over."""
    return min(time_s for time_s in (record.revoked_at, record.expires_at, math.inf) if time_s is not None)


def _listed(keys: Keys) -> str:
    names = ", ".join(sorted({record.name for record in keys}))
    return f" (there are: {names})" if names else ""


def _ago(seconds: float) -> str:
    return f"{seconds / 86_400:.1f} days ago" if seconds >= 86_400 else f"{seconds:.0f} s ago"
