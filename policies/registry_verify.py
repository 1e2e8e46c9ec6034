"""Is every byte of a registry what it was when it was written: the journal's chain and files, and all bundles?"""

import re
import time
from dataclasses import dataclass
from pathlib import Path

from policies.bundle import read_bundle
from policies.errors import IntegrityError, NotFound, SignatureRefused, TrimtabError
from policies.journal import FOLDER, Entry, Tail, read_all
from policies.registry import Registry
from policies.registry_state import RegistryState, Version, fold
from policies.registry_store import BUNDLES
from policies.trust import TrustStore, signature_path

DIGEST_PATTERN = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Verification:
    """What was found: `problems` are wrong; `remarks` are worth knowing."""

    num_entries: int
    num_bundles: int
    problems: tuple[str, ...]
    remarks: tuple[str, ...]


def verify(registry: Registry, trust: TrustStore) -> Verification:
    """Read every entry and every bundle of a registry where they are kept, and say what is wrong.

    A signature that does not count, by the keys in `trust`, is a problem where the registry requires signatures, else a remark.
    """
    problems: list[str] = []
    remarks: list[str] = []
    state = RegistryState()
    entries: list[Entry] = []
    files = registry.store.names(FOLDER)  # before the entries: one that is appended meanwhile is no stray file
    try:
        entries, tail = read_all(registry.store)
        state = fold(entry.body for entry in entries)
    except IntegrityError as error:
        problems.append(f"{error}; nothing behind this entry can be trusted, so bundles are not compared with entries")
    else:
        _check_files(files, entries, tail, problems, remarks)
    names = registry.store.names(BUNDLES)
    digests = [name for name in names if DIGEST_PATTERN.fullmatch(name)]
    signatures = [signature_path(Path(digest)).name for digest in digests]
    for name in sorted(set(names) - set(digests) - set(signatures)):
        remarks.append(f"{BUNDLES}/{name} is no bundle: a writer was killed; `registry gc` removes it")
    by_digest: dict[str, list[Version]] = {}
    for version in state.versions.values():
        by_digest.setdefault(version.digest, []).append(version)
    for digest in digests:
        _check_bundle(registry, trust, digest, by_digest.get(digest, []), problems, remarks)
        if entries and digest not in by_digest:
            remarks.append(f"bundle {digest} was never registered")
    for version in state.versions.values():
        if version.digest not in digests and version.collected_at is None:
            problems.append(f"version {version.number}: its bundle {version.digest} is missing")
    return Verification(len(entries), len(digests), tuple(problems), tuple(remarks))


def _check_files(files: list[str], entries: list[Entry], tail: Tail, problems: list[str], remarks: list[str]) -> None:
    for torn in tail.torn:
        problems.append(
            f"{torn} is torn: a crash cut it off, and what it was going to say is lost; the next entry stands in for it"
        )
    for entry in entries:
        for name in entry.files[:-1]:
            remarks.append(f"{name} is torn; {entry.files[-1]} stands in for it")
    known = {name for entry in entries for name in entry.files} | set(tail.torn)
    for name in files:
        path = f"{FOLDER}/{name}"
        if name.startswith(".tmp-"):
            remarks.append(f"{path} is what a killed writer left")
        elif path not in known:
            problems.append(f"{path} is no entry of the chain")
    if entries and entries[-1].body["schema_version"] == 1:
        remarks.append(
            "the last entry is of schema 1, which has no digest of its own: a change of it is found once another follows"
        )


def _check_bundle(
    registry: Registry, trust: TrustStore, digest: str, versions: list[Version], problems: list[str], remarks: list[str]
) -> None:
    is_live = any(version.collected_at is None for version in versions)
    try:
        with registry.kept_bundle(digest) as path:
            bundle = read_bundle(path, expected_digest=digest)
            if signature_path(path).exists() or (registry.requires_signatures and is_live):
                _check_signature(path, trust, problems if registry.requires_signatures else remarks)
    except NotFound:
        if is_live:
            problems.append(f"bundle {digest} has no manifest")
        else:
            remarks.append(f"bundle {digest} is not whole: it is being written or removed, or who did it was killed")
        return
    except TrimtabError as error:
        problems.append(f"bundle {digest}: {error}")
        return
    for version in versions:
        said = (version.policy_sha256, version.gate_verdict, version.override_gates)
        found = (bundle.policy.sha256(), bundle.gate_report.verdict, bundle.manifest["override_gates"])
        if said != found:
            problems.append(f"version {version.number}: its entry says {said}, its bundle {found}")


def _check_signature(path: Path, trust: TrustStore, findings: list[str]) -> None:
    try:
        trust.verify(path, now=time.time())
    except SignatureRefused as error:
        findings.append(f"bundle {path.name}: {error}")
