"""What leaves the registry, and what vouches for it: export, sign, verify, keys."""

import datetime
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from policies.bundle import Bundle, read_bundle
from policies.errors import ConfigError, NotFound
from policies.exports import ARTIFACTS, DESCRIPTION, Export, Format, load_export, write_export
from policies.registry import Registry
from policies.trust import SigningKey, TrustedKey, TrustStore, create_key, signature_path
from trimtab.command import (
    DEFAULT_LOOP_FILE,
    DONE,
    Context,
    ExpiresOption,
    JsonOption,
    KeyOption,
    LoopFile,
    ReasonOption,
    StorageOption,
    load_key,
    open_context,
    output,
    start_of_day,
)

VersionOption = Annotated[int | None, typer.Option(min=1, help="The registered version; default: the champion.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The key's name.")]


def export(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    format: Annotated[
        Literal["onnx", "pt2", "torchscript", "all"],
        typer.Option(
            "--format", help="For onnxruntime, torch.export or (older) TorchScript; all: each, in a directory below DIR."
        ),
    ] = ...,
    target: Annotated[Path, typer.Option("--output", metavar="DIR", help="The new directory.")] = ...,
    version: VersionOption = None,
    bundle_path: Annotated[Path | None, typer.Option("--bundle", metavar="PATH", help="A bundle's directory instead.")] = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> int:
    """Write a version for another runtime, normaliser and all, verified against its golden vectors."""
    context = open_context(loop_file, None, storage)
    if bundle_path is not None and version is not None:
        raise ConfigError("--version and --bundle name two sources; give one of them")
    signing_key = load_key(context, key)
    if bundle_path is not None:
        bundle = read_bundle(bundle_path.absolute())
    else:
        bundle = context.registry().bundle(_version(context, version))
    if format == "all" and target.exists():
        raise ConfigError(f"{target} exists already; an export is never written over, name a new directory")
    targets = {name: target / name for name in ARTIFACTS} if format == "all" else {format: target}
    documents, lines = [], []
    for name, path in targets.items():
        written = _write_export(bundle, name, path.absolute(), signing_key)
        documents.append(_export_document(written) | {"signed_with": key})
        lines.append(f"exported {name} to {path}, equal on its golden vectors\n{DESCRIPTION} sha256 {written.sha256}")
    output(as_json, {"exports": documents} if format == "all" else documents[0], "\n".join(lines))
    return DONE


def _write_export(bundle: Bundle, format: Format, path: Path, key: SigningKey | None) -> Export:
    if signature_path(path).exists():
        raise ConfigError(f"{signature_path(path)} exists already, without what it signs; name another directory")
    written = write_export(bundle, format, path)
    if key is not None:
        key.sign(written.path, {})
    return written


def sign(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    version: VersionOption = None,
    key: Annotated[str, typer.Option("--key", metavar="NAME", help="A key of the storage root.")] = ...,
    as_json: JsonOption = False,
) -> int:
    """Sign a registered version as what it is: these files, this policy, this number. Replaces the signature it had."""
    context = open_context(loop_file, None, storage)
    number = _version(context, version)
    signing_key = load_key(context, key)
    assert signing_key is not None  # a name was required
    # Not through the context: that may ask for the signature which is made here.
    registry = Registry(context.storage.registry(context.loop.name))
    path, digest = registry.sign(number, signing_key), registry.state().version(number).digest
    document = {"policy": context.loop.name, "version": number, "digest": digest, "key": key, "signature": str(path)}
    output(as_json, document, f"signed version {number} with key {key}: {path}")
    return DONE


def verify(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    version: VersionOption = None,
    export_path: Annotated[Path | None, typer.Option("--export", metavar="DIR", help="An export instead of a version.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Verify signature, bytes and golden vectors of a version or an export. Exit code 1 without a signature that counts."""
    context = open_context(loop_file, None, storage)
    trust = TrustStore(context.storage.trust)
    if export_path is not None:
        if version is not None:
            raise ConfigError("--version and --export name two things; give one of them")
        signed = trust.verify(export_path.absolute(), now=time.time())
        if DESCRIPTION not in signed.files:
            raise ConfigError(f"{export_path} is signed, but is no export: it has no {DESCRIPTION}")
        document = _export_document(load_export(export_path.absolute(), expected_sha256=signed.files[DESCRIPTION]))
        what = f"export {export_path}"
    else:
        number = _version(context, version)
        bundle = Registry(context.storage.registry(context.loop.name), trust=trust).bundle(number)
        signed = trust.verify(bundle.path, now=time.time())
        document = {"policy": context.loop.name, "version": number, "digest": bundle.digest}
        what = f"version {number}"
    key = trust.read()[signed.fingerprint]
    output(as_json, document | {"key": _key_document(key)}, f"{what}: bytes, golden vectors and signature by {key.name} hold")
    return DONE


def keys_new(
    name: NameArgument, loop_file: LoopFile = DEFAULT_LOOP_FILE, storage: StorageOption = None, as_json: JsonOption = False
) -> int:
    """Make a pair of keys (ECDSA P-256) to sign with: the private one is readable by you alone, and not encrypted."""
    private_path, public_path = create_key(open_context(loop_file, None, storage).storage, name)
    document = {"name": name, "private_key": str(private_path), "public_key": str(public_path)}
    output(as_json, document, f"{private_path}\n{public_path}; its signatures count after `trimtab keys trust {public_path}`")
    return DONE


def keys_trust(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The public key (PEM).")],
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    name: Annotated[str | None, typer.Option("--name", help="What to call it; default: the file's name.")] = None,
    expires: ExpiresOption = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> int:
    """Let signatures by a key count, from now on, in this storage root."""
    try:
        public_pem = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"public key {file} cannot be read: {error.strerror}") from error
    store = _trust_store(loop_file, storage)
    key = store.trust(public_pem, name=name or file.stem, expires_at=start_of_day(expires), now=time.time())
    output(as_json, _key_document(key), _key_line(key, time.time()))
    return DONE


def keys_list(loop_file: LoopFile = DEFAULT_LOOP_FILE, storage: StorageOption = None, as_json: JsonOption = False) -> int:
    """Show every key that was ever trusted here."""
    keys = list(_trust_store(loop_file, storage).read().values())
    text = "\n".join(_key_line(key, time.time()) for key in keys) or "no key is trusted; `trimtab keys trust FILE`"
    output(as_json, {"keys": [_key_document(key) for key in keys]}, text)
    return DONE


def keys_revoke(
    name: NameArgument,
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    reason: ReasonOption = ...,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> int:
    """Let no signature by a key count any more, whenever it was made. There is no way back."""
    key = _trust_store(loop_file, storage).revoke(name, reason=reason, now=time.time())
    output(as_json, _key_document(key), _key_line(key, time.time()))
    return DONE


def _version(context: Context, version: int | None) -> int:
    champion = context.registry().state().champion
    if version is None and champion is None:
        raise NotFound(f"{context.loop.name} has no champion in {context.storage.root}; name one of its versions with --version")
    return version or champion


def _trust_store(loop_file: Path, storage: str | None) -> TrustStore:
    return TrustStore(open_context(loop_file, None, storage).storage.trust)


def _export_document(export: Export) -> dict[str, Any]:
    return {"export": str(export.path), "sha256": export.sha256, **export.description}


def _key_document(key: TrustedKey) -> dict[str, Any]:
    return {
        "name": key.name,
        "fingerprint": key.fingerprint,
        "trusted_at": key.trusted_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "revoked_because": key.revoked_because,
    }


def _key_line(key: TrustedKey, now: float) -> str:
    until = "for ever" if key.expires_at is None else f"until {_day(key.expires_at)}"
    return key.why_refused(now) or f"key {key.name!r} ({key.fingerprint[:12]}) is trusted {until}"


def _day(time_s: float) -> str:
    return datetime.datetime.fromtimestamp(time_s, datetime.UTC).date().isoformat()
