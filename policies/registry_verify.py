"""Is every byte of a registry what it was when it was written: the journal's chain and files, and all bundles?"""

import re
from dataclasses import dataclass

from policies.errors import IntegrityError, NotFound, TrimtabError
from policies.journal import FOLDER, Entry, Tail, read_all
from policies.registry import Registry
from policies.registry_state import RegistryState, Version, fold
from policies.registry_store import BUNDLES

DIGEST_PATTERN = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Verification:
    """What was found: `problems` are wrong; `remarks` are worth knowing."""

    num_entries: int
    num_bundles: int
    problems: tuple[str, ...]
    remarks: tuple[str, ...]


def verify(registry: Registry) -> Verification:
    """Read every entry and every bundle of a registry where they are kept, and say what is wrong."""
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
    for name in sorted(set(names) - set(digests)):
        remarks.append(f"{BUNDLES}/{name} is no bundle: a writer was killed; `registry gc` removes it")
    by_digest: dict[str, list[Version]] = {}
    for version in state.versions.values():
        by_digest.setdefault(version.digest, []).append(version)
    for digest in digests:
        _check_bundle(registry, digest, by_digest.get(digest, []), problems, remarks)
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


def _check_bundle(registry: Registry, digest: str, versions: list[Version], problems: list[str], remarks: list[str]) -> None:
    try:
        bundle = registry.stored_bundle(digest)
    except NotFound:
        if all(version.collected_at is not None for version in versions):
            remarks.append(f"bundle {digest} is not whole: it is being written or removed, or who did it was killed")
        else:
            problems.append(f"bundle {digest} has no manifest")
        return
    except TrimtabError as error:
        problems.append(f"bundle {digest}: {error}")
        return
    for version in versions:
        said = (version.policy_sha256, version.gate_verdict, version.override_gates)
        found = (bundle.policy.sha256(), bundle.gate_report.verdict, bundle.manifest["override_gates"])
        if said != found:
            problems.append(f"version {version.number}: its entry says {said}, its bundle {found}")
