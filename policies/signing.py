"""Sign a directory and verify a signature, in the OpenSSF Model Signing format v1.0 with ECDSA keys on the curve P-256.

https://github.com/sigstore/model-transparency. The signature is a file of its own, a Sigstore bundle (JSON): a DSSE envelope
around an in-toto statement that lists every file with its SHA-256. The format's own tool reads what we write and writes what we
read (`model_signing verify key`, `sign key`, with their default settings). What we say about a bundle beyond its bytes stands
in the predicate as `trimtab`, which other readers are told to ignore.

Whose keys count, and until when, is decided in `policies.trust`. Importing this does not import `cryptography`.
"""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policies.errors import ConfigError, SignatureRefused, TrimtabError
from policies.integrity import canonical_json, parse_json, sha256_file, sha256_hex

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
CURVE = "secp256r1"  # OpenSSL's and NIST's P-256
MAX_SIGNATURE_BYTES = 1 << 20


@dataclass(frozen=True)
class Signed:
    """What a valid signature says: by which key, of which files (name to SHA-256), and what else we claimed of them."""

    fingerprint: str
    files: dict[str, str]
    claims: dict[str, Any]


def new_private_key() -> bytes:
    """Return a new private key as PEM (PKCS #8, not encrypted)."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_key_of(private_pem: bytes) -> bytes:
    """Return the public key that belongs to a private one, as PEM; raises `ConfigError`."""
    return _public_pem(_private_key(private_pem).public_key())


def fingerprint_of(public_pem: bytes) -> str:
    """Return the SHA-256 of a public key's PEM, by which a signature names its key; raises `ConfigError` for no such key."""
    return sha256_hex(_public_pem(_public_key(public_pem)))


def hash_files(directory: Path) -> dict[str, str]:
    """Return name and SHA-256 of every file of a directory; raises `SignatureRefused` for links and for directories in it."""
    files = {}
    for path in sorted(directory.iterdir()):
        if path.is_symlink() or not path.is_file():
            raise SignatureRefused(f"{path} is not a plain file: only directories of plain files are signed")
        files[path.name] = sha256_file(path)
    return files


def sign(files: Mapping[str, str], private_pem: bytes, *, name: str, claims: dict[str, Any]) -> bytes:
    """Return the signature file for a directory with this name, these files and our claims about it."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    key = _private_key(private_pem)
    resources = [{"name": file, "algorithm": "sha256", "digest": digest} for file, digest in sorted(files.items())]
    predicate: dict[str, Any] = {
        "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
        "resources": resources,
    }
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": _root_digest(resources)}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate | ({"trimtab": claims} if claims else {}),
    }
    payload = canonical_json(statement)
    signature = key.sign(_authenticated(payload), ec.ECDSA(hashes.SHA256()))
    bundle = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {
            "publicKey": {"hint": sha256_hex(_public_pem(key.public_key()))},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return canonical_json(bundle)


def verify(data: bytes, public_keys: Mapping[str, bytes], source: str) -> Signed:
    """Return what a signature file says, if one of these public keys (PEM by fingerprint) made it.

    Nothing is read out of the statement before its signature holds. Raises `SignatureRefused`; also for older versions of the
    format, which the other tool still reads: their statements name files without a digest over all of them.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    fingerprint, payload, signature = _open(data, source)
    if fingerprint not in public_keys:
        known = ", ".join(key[:12] for key in sorted(public_keys)) or "none"
        raise SignatureRefused(
            f"{source}: signed with the key {fingerprint[:12]}, which is not trusted here (trusted: {known}); "
            "`trimtab keys trust FILE` trusts a public key"
        )
    try:
        _public_key(public_keys[fingerprint]).verify(signature, _authenticated(payload), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise SignatureRefused(f"{source}: the signature is not one by key {fingerprint[:12]} of this statement") from error
    return _read_statement(payload, fingerprint, source)


def _open(data: bytes, source: str) -> tuple[str, bytes, bytes]:
    """Return the fingerprint, the statement's bytes and the signature of a signature file, none of it to be believed yet."""
    try:
        bundle = parse_json(data, source)
        envelope, material = bundle["dsseEnvelope"], bundle["verificationMaterial"]
        types = (bundle["mediaType"], envelope["payloadType"])
        (signature,) = envelope["signatures"]
        fingerprint = material["publicKey"]["hint"]
        opened = tuple(base64.b64decode(text, validate=True) for text in (envelope["payload"], signature["sig"]))
    except (TrimtabError, KeyError, TypeError, ValueError, binascii.Error) as error:
        raise SignatureRefused(f"{source} is not a Model Signing signature made with a key: {error!r}") from error
    if types != (MEDIA_TYPE, PAYLOAD_TYPE) or not isinstance(fingerprint, str):
        raise SignatureRefused(f"{source}: types {types} with key {fingerprint!r}, expected {(MEDIA_TYPE, PAYLOAD_TYPE)}")
    return fingerprint, *opened


def _read_statement(payload: bytes, fingerprint: str, source: str) -> Signed:
    try:
        statement = parse_json(payload, source)
        predicate, types = statement["predicate"], (statement["_type"], statement["predicateType"])
        if types != (STATEMENT_TYPE, PREDICATE_TYPE):
            raise SignatureRefused(f"{source}: statement of types {types}, expected {(STATEMENT_TYPE, PREDICATE_TYPE)}")
        (subject,), resources, serialization = statement["subject"], predicate["resources"], predicate["serialization"]
        methods = {serialization["method"], serialization["hash_type"], *(resource["algorithm"] for resource in resources)}
        if not methods <= {"files", "sha256"}:
            raise SignatureRefused(f"{source}: files are described by {sorted(methods)}, expected whole files by sha256")
        files, claims = {resource["name"]: resource["digest"] for resource in resources}, predicate.get("trimtab", {})
        is_consistent = len(files) == len(resources) and subject["digest"]["sha256"] == _root_digest(resources)
    except SignatureRefused:
        raise
    except (TrimtabError, KeyError, TypeError, ValueError) as error:
        raise SignatureRefused(f"{source}: the signed statement cannot be read: {error!r}") from error
    if not is_consistent or not isinstance(claims, dict):
        raise SignatureRefused(f"{source}: the signed statement contradicts itself")
    return Signed(fingerprint, files, claims)


def _root_digest(resources: list[dict[str, str]]) -> str:
    return sha256_hex(b"".join(bytes.fromhex(resource["digest"]) for resource in resources))


def _authenticated(payload: bytes) -> bytes:
    """Return the bytes that are signed (DSSE's "pre-authentication encoding"): the payload cannot be taken for another type."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def _private_key(private_pem: bytes) -> Any:
    from cryptography.hazmat.primitives import serialization

    try:
        return _on_the_curve(serialization.load_pem_private_key(private_pem, password=None))
    except (ValueError, TypeError) as error:  # TypeError: it is encrypted
        raise ConfigError(f"not a private key that can be used here: {error}; make one with `trimtab keys new`") from error


def _public_key(public_pem: bytes) -> Any:
    from cryptography.hazmat.primitives import serialization

    try:
        return _on_the_curve(serialization.load_pem_public_key(public_pem))
    except ValueError as error:
        raise ConfigError(f"not a public key that can be used here: {error}; `trimtab keys new` makes such a pair") from error


def _on_the_curve(key: Any) -> Any:
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve != CURVE:
        raise ValueError(f"it is {type(key).__name__.strip('_')} on {curve}, only ECDSA keys on P-256 ({CURVE}) are taken")
    return key


def _public_pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
