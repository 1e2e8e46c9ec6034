"""Are signatures exchanged with the format's own tool, and is everything refused that was not signed, or by nobody we trust?"""

import base64
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from policies.bundle import Bundle
from policies.errors import ConfigError, IntegrityError, NotFound, SignatureRefused
from policies.integrity import canonical_json
from policies.registry import Registry, register_version, set_champion
from policies.signing import MEDIA_TYPE, PAYLOAD_TYPE, fingerprint_of, hash_files, new_private_key, public_key_of, sign, verify
from policies.storage import Storage, open_storage
from policies.trust import SigningKey, TrustStore, create_key, require_made_for, signature_path
from serve_app.config import ServingConfig
from serve_app.replica import PolicyReplica
from tests.bundles import make_bundle, make_policy

DAY = 86_400.0
NOW = 1000 * DAY
CLAIMS = {"policy": "cartpole", "version": 1}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "data")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundles", make_policy())


def trusted_key(storage: Storage, name: str = "release", *, expires_at: float | None = None, now: float = NOW) -> SigningKey:
    """Make a key in a storage root and trust it there."""
    _, public_path = create_key(storage, name)
    TrustStore(storage.trust).trust(public_path.read_bytes(), name=name, expires_at=expires_at, now=now)
    return SigningKey.load(storage, name, now=now)


def model_signing(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the Model Signing project's own command."""
    command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def tool_verifies(directory: Path, signature: Path, public_key: Path) -> subprocess.CompletedProcess[str]:
    return model_signing("verify", "key", directory, "--signature", signature, "--public_key", public_key)


# --- the independent tool ---


def test_the_independent_tool_accepts_our_signature_and_refuses_a_changed_byte(storage: Storage, bundle: Bundle) -> None:
    key = trusted_key(storage)
    signature, public_key = key.sign(bundle.path, CLAIMS), storage.private_key_file("release").with_suffix(".pub")
    result = tool_verifies(bundle.path, signature, public_key)
    assert result.returncode == 0, result.stdout + result.stderr
    _, other = create_key(storage, "other")
    assert tool_verifies(bundle.path, signature, other).returncode != 0
    (bundle.path / "policy.safetensors").write_bytes(b"other weights")
    result = tool_verifies(bundle.path, signature, public_key)
    assert result.returncode != 0 and "policy.safetensors" in result.stdout + result.stderr


def test_we_accept_the_independent_tools_signature_and_refuse_a_changed_byte(storage: Storage, bundle: Bundle) -> None:
    key, trust, signature = trusted_key(storage), TrustStore(storage.trust), signature_path(bundle.path)
    private_key = storage.private_key_file("release")
    result = model_signing("sign", "key", bundle.path, "--signature", signature, "--private_key", private_key)
    assert result.returncode == 0, result.stdout + result.stderr
    signed = trust.verify(bundle.path, now=NOW)
    assert (signed.fingerprint, signed.claims) == (key.fingerprint, {})
    assert signed.files == hash_files(bundle.path)
    (bundle.path / "policy.safetensors").write_bytes(b"other weights")
    with pytest.raises(SignatureRefused, match=r"not what was signed: policy\.safetensors"):
        trust.verify(bundle.path, now=NOW)


def test_we_accept_a_key_that_openssl_made(storage: Storage, bundle: Bundle, tmp_path: Path) -> None:
    private_key, public_key = tmp_path / "key.pem", tmp_path / "key.pub"
    openssl = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(private_key)]
    subprocess.run(openssl, check=True, timeout=60)
    subprocess.run(["openssl", "ec", "-in", str(private_key), "-pubout", "-out", str(public_key)], check=True, timeout=60)
    TrustStore(storage.trust).trust(public_key.read_bytes(), name="openssl", expires_at=None, now=NOW)
    signature_path(bundle.path).write_bytes(sign(hash_files(bundle.path), private_key.read_bytes(), name="x", claims={}))
    TrustStore(storage.trust).verify(bundle.path, now=NOW)


# --- what was signed ---


def test_files_that_changed_came_or_went_are_named(storage: Storage, bundle: Bundle) -> None:
    key, trust = trusted_key(storage), TrustStore(storage.trust)
    key.sign(bundle.path, CLAIMS)
    assert trust.verify(bundle.path, now=NOW).claims == CLAIMS  # the control
    (bundle.path / "extra.txt").write_text("hello")
    (bundle.path / "gates.json").unlink()
    with pytest.raises(SignatureRefused, match=r"not what was signed: extra\.txt, gates\.json changed, came or went"):
        trust.verify(bundle.path, now=NOW)
    (bundle.path / "link").symlink_to(bundle.path / "golden.npz")
    with pytest.raises(SignatureRefused, match="not a plain file"):
        trust.verify(bundle.path, now=NOW)


def test_every_byte_of_statement_and_signature_counts(storage: Storage, bundle: Bundle) -> None:
    key, trust = trusted_key(storage), TrustStore(storage.trust)
    path = key.sign(bundle.path, CLAIMS)
    whole = json.loads(path.read_bytes())
    for part in ("payload", "sig"):
        text = whole["dsseEnvelope"]["payload"] if part == "payload" else whole["dsseEnvelope"]["signatures"][0]["sig"]
        original = base64.b64decode(text)
        for position in range(0, len(original), max(1, len(original) // 20)):
            changed = bytearray(original)
            changed[position] ^= 1
            forged = json.loads(path.read_bytes())
            holder = forged["dsseEnvelope"] if part == "payload" else forged["dsseEnvelope"]["signatures"][0]
            holder[part] = base64.b64encode(changed).decode()
            with pytest.raises(SignatureRefused, match="not one by key"):
                verify(canonical_json(forged), {key.fingerprint: public_key_of(key.private_pem)}, "x.sig")
    trust.verify(bundle.path, now=NOW)  # the control: it was the changed byte


def forged_statement(change: Callable[[dict[str, Any]], None], private_pem: bytes, files: dict[str, str]) -> bytes:
    """Return a signature that holds, of a statement we would not write."""
    bundle = json.loads(sign(files, private_pem, name="x", claims=CLAIMS))
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    change(statement)
    payload = canonical_json(statement)
    signed = b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)
    key = serialization.load_pem_private_key(private_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    signature = key.sign(signed, ec.ECDSA(hashes.SHA256()))
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    return canonical_json(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(predicateType="https://model_signing/Digests/v0.1"), "statement of types"),  # the format before v1.0
        (lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"), "statement of types"),
        (lambda s: s["predicate"]["serialization"].update(method="shards"), "expected whole files by sha256"),
        (lambda s: s["predicate"]["resources"][0].update(algorithm="md5"), "expected whole files by sha256"),
        (lambda s: s["predicate"]["resources"].pop(), "contradicts itself"),
        (lambda s: s["predicate"]["resources"].append(s["predicate"]["resources"][0]), "contradicts itself"),
        (lambda s: s["subject"].append(s["subject"][0]), "cannot be read"),
        (lambda s: s["predicate"].pop("resources"), "cannot be read"),
        (lambda s: s["predicate"].update(trimtab=["cartpole"]), "contradicts itself"),
    ],
)
def test_a_signed_statement_that_means_something_else_is_refused(change: Callable[..., None], message: str) -> None:
    """The key is right and the signature holds: it is an older format, weaker hashes, or not of all files."""
    private_pem, files = new_private_key(), {"a": "00" * 32, "b": "11" * 32}
    public_pem = public_key_of(private_pem)
    public_keys = {fingerprint_of(public_pem): public_pem}
    assert verify(forged_statement(lambda s: None, private_pem, files), public_keys, "x.sig").files == files  # the control
    with pytest.raises(SignatureRefused, match=message):
        verify(forged_statement(change, private_pem, files), public_keys, "x.sig")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"mediaType": 1, "mediaType": 2}',
        canonical_json(
            {"mediaType": MEDIA_TYPE, "verificationMaterial": {"certificate": {}}, "dsseEnvelope": {"signatures": []}}
        ),
    ],
)
def test_what_is_no_signature_is_refused(data: bytes) -> None:
    with pytest.raises(SignatureRefused, match=r"x\.sig is not a Model Signing signature"):
        verify(data, {}, "x.sig")


# --- whose signature ---


def test_a_key_that_is_not_trusted_does_not_count(storage: Storage, bundle: Bundle, tmp_path: Path) -> None:
    trust = TrustStore(storage.trust)
    with pytest.raises(SignatureRefused, match="has no signature"):
        trust.verify(bundle.path, now=NOW)
    stranger = trusted_key(open_storage(tmp_path / "elsewhere"))
    stranger.sign(bundle.path, CLAIMS)
    with pytest.raises(SignatureRefused, match=rf"{stranger.fingerprint[:12]}, which is not trusted here \(trusted: none\)"):
        trust.verify(bundle.path, now=NOW)
    trust.trust(public_key_of(stranger.private_pem), name="stranger", expires_at=None, now=NOW)
    trust.verify(bundle.path, now=NOW)  # the control: trust was what it lacked


def test_a_signature_under_a_trusted_keys_name_does_not_count(storage: Storage, bundle: Bundle) -> None:
    """The file says which key made it; saying another's does not help."""
    honest, attacker = trusted_key(storage), new_private_key()
    forged = json.loads(sign(hash_files(bundle.path), attacker, name="x", claims=CLAIMS))
    forged["verificationMaterial"]["publicKey"]["hint"] = honest.fingerprint
    signature_path(bundle.path).write_bytes(canonical_json(forged))
    with pytest.raises(SignatureRefused, match="not one by key"):
        TrustStore(storage.trust).verify(bundle.path, now=NOW)


def test_an_expired_key_does_not_count_from_its_day_on(storage: Storage, bundle: Bundle) -> None:
    key, trust = trusted_key(storage, expires_at=NOW + 10 * DAY), TrustStore(storage.trust)
    key.sign(bundle.path, CLAIMS)
    trust.verify(bundle.path, now=NOW + 10 * DAY - 1)
    with pytest.raises(SignatureRefused, match=r"'release' .* expired 0\.0 days ago"):
        trust.verify(bundle.path, now=NOW + 10 * DAY)
    with pytest.raises(SignatureRefused, match=r"expired 2\.5 days ago.*trimtab keys new"):
        SigningKey.load(storage, "release", now=NOW + 12.5 * DAY)


def test_a_revoked_key_counts_no_more_also_for_what_it_signed_before(storage: Storage, bundle: Bundle) -> None:
    key, trust = trusted_key(storage), TrustStore(storage.trust)
    key.sign(bundle.path, CLAIMS)
    trust.verify(bundle.path, now=NOW)  # the control
    revoked = trust.revoke("release", reason="laptop stolen", now=NOW + DAY)
    assert revoked.revoked_at == NOW + DAY
    with pytest.raises(SignatureRefused, match="was revoked: laptop stolen"):
        trust.verify(bundle.path, now=NOW)
    assert trust.revoke("release", reason="again", now=NOW + 2 * DAY).revoked_because == "laptop stolen"
    with pytest.raises(ConfigError, match="already"):  # there is no way back, under no name
        trust.trust(public_key_of(key.private_pem), name="again", expires_at=None, now=NOW)
    with pytest.raises(NotFound, match="named 'nobody'"):
        trust.revoke("nobody", reason="x", now=NOW)


def test_a_trust_store_that_was_tampered_with_is_refused(storage: Storage) -> None:
    key, trust = trusted_key(storage), TrustStore(storage.trust)
    path = storage.trust / f"{key.fingerprint}.json"
    document = json.loads(path.read_bytes())
    for change in ({"public_key": public_key_of(new_private_key()).decode()}, {"expires_at": "never"}, {"schema_version": 0}):
        path.write_bytes(canonical_json(document | change))
        with pytest.raises(IntegrityError, match=key.fingerprint):
            trust.read()
    path.write_bytes(canonical_json(document))
    assert list(trust.read()) == [key.fingerprint]


def test_only_p256_keys_are_taken(storage: Storage) -> None:
    trust = TrustStore(storage.trust)
    for key in (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)):
        pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        with pytest.raises(ConfigError, match="only ECDSA keys on P-256"):
            trust.trust(pem, name="other", expires_at=None, now=NOW)
    with pytest.raises(ConfigError, match="not a public key"):
        trust.trust(b"hello", name="other", expires_at=None, now=NOW)
    with pytest.raises(ConfigError, match=r"expired 1\.0 days ago"):
        trust.trust(public_key_of(new_private_key()), name="late", expires_at=NOW - DAY, now=NOW)
    assert trust.read() == {}


def test_a_private_key_is_its_owners_alone_and_never_written_over(storage: Storage) -> None:
    private_path, public_path = create_key(storage, "release")
    assert (private_path.stat().st_mode & 0o777, private_path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    before = private_path.read_bytes()
    assert b"PRIVATE" in before and b"PRIVATE" not in public_path.read_bytes()
    with pytest.raises(ConfigError, match="never written over"):
        create_key(storage, "release")
    assert private_path.read_bytes() == before
    with pytest.raises(ConfigError, match="must be 1-63"):
        create_key(storage, "../api_key")
    with pytest.raises(SignatureRefused, match="not trusted here: `trimtab keys trust"):
        SigningKey.load(storage, "release", now=NOW)
    with pytest.raises(NotFound, match="trimtab keys new other"):
        SigningKey.load(storage, "other", now=NOW)


# --- a registry that requires signatures ---


def registry_with(storage: Storage, name: str, *seeds: int) -> Registry:
    """Return a registry that requires signatures, with a version per policy; none is signed."""
    registry = Registry(storage.registry(name), trust=TrustStore(storage.trust))
    for seed in seeds:
        made = make_bundle(registry.bundles, make_policy(seed))
        registry.append(lambda state, made=made: register_version(state, made), now=NOW)
    return registry


def sign_version(key: SigningKey, storage: Storage, name: str, version: int) -> Bundle:
    bundle = Registry(storage.registry(name)).bundle(version)
    key.sign_version(bundle, policy=name, version=version)
    return bundle


def test_a_registry_that_requires_signatures_gives_out_no_other_bundle(storage: Storage) -> None:
    registry, key = registry_with(storage, "cartpole", 0), trusted_key(storage)
    with pytest.raises(SignatureRefused, match="has no signature"):
        registry.bundle(1)
    assert Registry(storage.registry("cartpole")).bundle(1).digest  # one that does not require any
    digest = sign_version(key, storage, "cartpole", 1).digest
    assert registry.bundle(1).digest == digest
    TrustStore(storage.trust).revoke("release", reason="test", now=NOW)
    with pytest.raises(SignatureRefused, match="was revoked"):
        registry.bundle(1)


def test_an_older_version_under_a_newer_number_is_refused(storage: Storage) -> None:
    """Version 1 was signed when it was the best there was. Registered again, it would undo what version 2 mended."""
    registry, key = registry_with(storage, "cartpole", 0, 1), trusted_key(storage)
    old = sign_version(key, storage, "cartpole", 1)
    sign_version(key, storage, "cartpole", 2)
    assert registry.bundle(2).digest != old.digest  # the control
    entry = {"kind": "register", "version": 3, "digest": old.digest, "policy_sha256": old.policy.sha256()}
    registry.append(lambda state: entry | {"gate_verdict": "pass", "override_gates": None}, now=NOW)
    with pytest.raises(SignatureRefused, match="was signed as version 1 of 'cartpole', not as version 3"):
        registry.bundle(3)
    registry.bundle(1)  # under its own number it is what it was


def test_a_bundle_of_another_policy_is_refused(storage: Storage) -> None:
    key = trusted_key(storage)
    registry_with(storage, "cartpole", 0)
    signed = sign_version(key, storage, "cartpole", 1)
    other = registry_with(storage, "pricing", 0)
    shutil.copy(signature_path(signed.path), signature_path(other.bundles / signed.digest))
    with pytest.raises(SignatureRefused, match="was signed as version 1 of 'cartpole', not as version 1 of 'pricing'"):
        other.bundle(1)
    sign_version(key, storage, "pricing", 1)
    other.bundle(1)  # the control


def test_what_another_tool_signed_belongs_to_the_policy_that_its_manifest_names(storage: Storage) -> None:
    key, trust = trusted_key(storage), TrustStore(storage.trust)
    registry = registry_with(storage, "cartpole", 0)
    bundle = Registry(storage.registry("cartpole")).bundle(1)
    key.sign(bundle.path, {})
    with pytest.raises(SignatureRefused, match="of None"):  # this bundle was made by a test, from no loop file
        registry.bundle(1)
    published = replace(bundle, manifest=bundle.manifest | {"origin": {"loop": {"name": "cartpole"}}})
    require_made_for(trust.verify(bundle.path, now=NOW), published, policy="cartpole", version=1)
    with pytest.raises(SignatureRefused, match="of 'cartpole', not as version 1 of 'pricing'"):
        require_made_for(trust.verify(bundle.path, now=NOW), published, policy="pricing", version=1)
    with pytest.raises(SignatureRefused, match="published for policy 'cartpole', not for 'pricing'"):
        key.sign_version(published, policy="pricing", version=1)


def test_a_replica_that_requires_signatures_is_not_ready_without(storage: Storage) -> None:
    registry, key = registry_with(storage, "cartpole", 0), trusted_key(storage)
    registry.append(lambda state: set_champion(state, 1, "first"), now=NOW)
    start = partial(PolicyReplica, "cartpole", str(storage.root))
    assert start(ServingConfig().model_dump())._variants.snapshot is not None  # the control
    replica = start(ServingConfig(require_signature=True).model_dump())
    assert replica._variants.snapshot is None and "has no signature" in replica._variants.why_not_ready()
    sign_version(key, storage, "cartpole", 1)
    replica._variants.refresh(now=time.monotonic() + 60)  # the next try, without a restart
    assert replica._variants.snapshot is not None and replica._variants.snapshot.champion.version == 1
