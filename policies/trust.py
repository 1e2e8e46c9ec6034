"""Whose signatures count: keys that were trusted by hand, until they expire or are revoked.

    trust/<fingerprint>.json           a public key, its name, and until when it is trusted
    trust/<fingerprint>.revoked.json   since when it no longer is, and why

Both are created once and never changed, so that of two people at work at the same time neither undoes a revocation.
"""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policies.bundle import Bundle
from policies.errors import ConfigError, IntegrityError, NotFound, SignatureRefused
from policies.integrity import canonical_json, create_if_absent, make_directory, parse_json, write_atomic
from policies.signing import MAX_SIGNATURE_BYTES, Signed, fingerprint_of, hash_files, new_private_key, public_key_of, sign, verify
from policies.storage import NAME_PATTERN, Storage

SCHEMA_VERSION = 1
_FILE_NAME = re.compile(r"[0-9a-f]{64}\.json")


@dataclass(frozen=True)
class TrustedKey:
    """A public key (PEM) that was trusted at some time; `expires_at` and `revoked_at` are None if it is not to be, was not."""

    fingerprint: str
    name: str
    public_key: str
    trusted_at: float
    expires_at: float | None
    revoked_at: float | None = None
    revoked_because: str | None = None

    def why_refused(self, now: float) -> str | None:
        """Say why a signature with this key does not count now, or None if it does.

        A signature says nothing reliable about when it was made: whoever has the key could write any date. So those made
        before a key expired or was revoked are refused as well.
        """
        if self.revoked_at is not None:
            return f"key {self.name!r} ({self.fingerprint[:12]}) was revoked: {self.revoked_because}"
        if self.expires_at is not None and now >= self.expires_at:
            return f"key {self.name!r} ({self.fingerprint[:12]}) expired {(now - self.expires_at) / 86_400:.1f} days ago"
        return None


def signature_path(directory: Path) -> Path:
    """Return where the signature of a directory is: beside it, so that the directory stays what it is."""
    return directory.with_name(directory.name + ".sig")


def require_made_for(signed: Signed, bundle: Bundle, *, policy: str, version: int) -> None:
    """Raise `SignatureRefused` for a bundle that was signed for another policy, or as another version of this one.

    Otherwise any bundle that was ever signed could be put in the place of any other. A signature of another tool claims nothing;
    then the manifest, which it covers, says for which policy the bundle was published.
    """
    claims = {"policy": _published_for(bundle), "version": version} | signed.claims
    if (claims["policy"], claims["version"]) != (policy, version):
        raise SignatureRefused(
            f"bundle {bundle.digest[:12]}… was signed as version {claims['version']} of {claims['policy']!r}, not as version "
            f"{version} of {policy!r}"
        )


def _published_for(bundle: Bundle) -> str | None:
    """Return the policy's name in the loop file that the bundle was published from."""
    return bundle.manifest.get("origin", {}).get("loop", {}).get("name")


class TrustStore:
    """The trusted keys in a directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self) -> dict[str, TrustedKey]:
        """Return every key that was ever trusted, by fingerprint, oldest first; raises `IntegrityError` for files not ours."""
        paths = [path for path in self._root.glob("*.json") if _FILE_NAME.fullmatch(path.name)]
        keys = sorted(map(self._read, paths), key=lambda key: (key.trusted_at, key.fingerprint))
        return {key.fingerprint: key for key in keys}

    def trust(self, public_pem: bytes, *, name: str, expires_at: float | None, now: float) -> TrustedKey:
        """Trust a key from now on; raises `ConfigError` for no such key, a name or key that is there, or a time that is over."""
        fingerprint = fingerprint_of(public_pem)
        if expires_at is not None and expires_at <= now:
            raise ConfigError(
                f"key {name!r} would have expired {(now - expires_at) / 86_400:.1f} days ago; name a later --expires"
            )
        require_name(name)
        known = [key for key in self.read().values() if name == key.name or fingerprint == key.fingerprint]
        if known:
            raise ConfigError(f"key {known[0].name!r} ({known[0].fingerprint[:12]}) is in {self._root} already; choose another")
        times = {"trusted_at": float(now), "expires_at": None if expires_at is None else float(expires_at)}
        self._write(self._path(fingerprint), {"name": name, "public_key": public_pem.decode()} | times)
        return self.named(name)

    def revoke(self, name: str, *, reason: str, now: float) -> TrustedKey:
        """Trust a key no longer, for ever; raises `NotFound`. Revoking twice keeps the first reason."""
        path = self._revocation_path(self.named(name).fingerprint)
        with contextlib.suppress(FileExistsError):
            self._write(path, {"revoked_at": float(now), "revoked_because": reason})
        return self.named(name)

    def named(self, name: str) -> TrustedKey:
        """Return a key by its name or its fingerprint; raises `NotFound`, also for a name that two people gave at once."""
        keys = self.read().values()
        found = [key for key in keys if name in (key.name, key.fingerprint)]
        if len(found) != 1:
            known = {key.fingerprint: key.name for key in keys}
            raise NotFound(f"{len(found)} keys are named {name!r} in {self._root}; by fingerprint there are {known}")
        return found[0]

    def verify(self, directory: Path, *, now: float) -> Signed:
        """Return what the signature beside a directory says, when it is by a key that counts now and of exactly these files.

        Raises `SignatureRefused` with the reason.
        """
        path = signature_path(directory)
        if not path.is_file() or path.is_symlink():
            raise SignatureRefused(f"{directory} has no signature: {path} is missing; sign it with `trimtab sign`")
        if path.stat().st_size > MAX_SIGNATURE_BYTES:
            raise SignatureRefused(f"{path} has {path.stat().st_size} bytes, the limit is {MAX_SIGNATURE_BYTES}")
        keys = self.read()
        public_keys = {fingerprint: key.public_key.encode() for fingerprint, key in keys.items()}
        signed = verify(path.read_bytes(), public_keys, str(path))
        why_refused = keys[signed.fingerprint].why_refused(now)
        if why_refused:
            raise SignatureRefused(f"{path}: {why_refused}; sign again with a key that is trusted")
        found = hash_files(directory)
        if found != signed.files:
            differing = sorted(name for name in found.keys() | signed.files.keys() if found.get(name) != signed.files.get(name))
            raise SignatureRefused(f"{directory} is not what was signed: {', '.join(differing)} changed, came or went")
        return signed

    def _read(self, path: Path) -> TrustedKey:
        fingerprint, revocation_path = path.stem, self._revocation_path(path.stem)
        document = self._parse(path, {"name": str, "public_key": str, "trusted_at": float, "expires_at": float | None})
        if fingerprint_of(document["public_key"].encode()) != fingerprint:
            raise IntegrityError(f"{path} holds another key than its name says")
        if revocation_path.exists():
            document |= self._parse(revocation_path, {"revoked_at": float, "revoked_because": str})
        return TrustedKey(fingerprint, **document)

    def _parse(self, path: Path, types: dict[str, Any]) -> dict[str, Any]:
        document = parse_json(path.read_bytes(), str(path))
        version = document.pop("schema_version", None) if isinstance(document, dict) else None
        is_whole = version == SCHEMA_VERSION and document.keys() == types.keys()
        if not is_whole or not all(isinstance(document[name], type_) for name, type_ in types.items()):
            raise IntegrityError(f"{path} is not of schema {SCHEMA_VERSION} with exactly {', '.join(types)}")
        return document

    def _write(self, path: Path, document: dict[str, Any]) -> None:
        make_directory(self._root)
        create_if_absent(path, canonical_json({"schema_version": SCHEMA_VERSION} | document))

    def _path(self, fingerprint: str) -> Path:
        return self._root / f"{fingerprint}.json"

    def _revocation_path(self, fingerprint: str) -> Path:
        return self._root / f"{fingerprint}.revoked.json"


# --- our own keys ---


def create_key(storage: Storage, name: str) -> tuple[Path, Path]:
    """Make a private key (mode 600) and its public key beside it; return both paths. Raises `ConfigError` if there is one."""
    require_name(name)
    private_path = storage.private_key_file(name)
    public_path = private_path.with_suffix(".pub")
    private_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    private_pem = new_private_key()
    try:
        create_if_absent(private_path, private_pem, mode=0o600)
    except FileExistsError as error:
        raise ConfigError(f"{private_path} exists already: a key is never written over; choose another name") from error
    write_atomic(public_path, public_key_of(private_pem))
    return private_path, public_path


def require_name(name: str) -> None:
    """Raise `ConfigError` unless this can be a key's name: it becomes a file's name."""
    if not NAME_PATTERN.fullmatch(name):
        raise ConfigError(f"key name {name!r} must be 1-63 of a-z 0-9 . _ - and start with a letter or digit")


@dataclass(frozen=True)
class SigningKey:
    """A private key of ours whose signatures count here and now."""

    fingerprint: str
    private_pem: bytes

    @classmethod
    def load(cls, storage: Storage, name: str, *, now: float) -> "SigningKey":
        """Read a key of this storage root; raises `NotFound`, or `SignatureRefused` if nobody here would take its signatures."""
        require_name(name)
        path = storage.private_key_file(name)
        if not path.is_file():
            raise NotFound(f"no private key {path}; make one with `trimtab keys new {name}`")
        private_pem = path.read_bytes()
        fingerprint = fingerprint_of(public_key_of(private_pem))
        trusted = TrustStore(storage.trust).read().get(fingerprint)
        if trusted is None:
            raise SignatureRefused(f"key {name!r} is not trusted here: `trimtab keys trust {path.with_suffix('.pub')}`")
        if why_refused := trusted.why_refused(now):
            raise SignatureRefused(f"{why_refused}; make another with `trimtab keys new`")
        return cls(fingerprint, private_pem)

    def sign(self, directory: Path, claims: dict[str, Any]) -> Path:
        """Write the signature of a directory beside it, instead of the one that may be there; return its path."""
        path = signature_path(directory)
        write_atomic(path, sign(hash_files(directory), self.private_pem, name=directory.name, claims=claims))
        return path

    def sign_version(self, bundle: Bundle, *, policy: str, version: int) -> Path:
        """Sign a bundle as what the registry says it is; raises `SignatureRefused` if it was published for another policy."""
        if _published_for(bundle) not in (policy, None):
            raise SignatureRefused(
                f"bundle {bundle.digest[:12]}… was published for policy {_published_for(bundle)!r}, not for {policy!r}"
            )
        return self.sign(bundle.path, {"policy": policy, "version": version})
