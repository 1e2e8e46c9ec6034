"""Read a bundle, an immutable directory named by its digest, without trusting a byte of it.

    <digest>/manifest.json         says what the others are and how they hash; its own SHA-256 is the digest
             policy.safetensors    weights and normaliser
             golden.npz            golden vectors, see `policies/golden.py`
             gates.json            the gate report of this policy, see `policies/verdicts.py`
             reference.parquet     steps of the judged episodes, see `policies/reference.py`; not in format 1
             card.md, card.html    where given: for people, never parsed

Nothing in a bundle is executed or unpickled, and nothing is allocated by what a header says. Every file is read once, and what
is used are the bytes that were hashed. Formats are never changed in place: `tests/golden` has a bundle of each.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from policies.errors import IntegrityError, NotFound, SpaceUnsupported
from policies.golden import (
    MAX_GOLDEN_BYTES,
    NUM_GOLDEN,
    Golden,
    check_golden,
    decode_golden,
    require_propensities,
)
from policies.integrity import parse_json, sha256_hex
from policies.manifest import require_description
from policies.network import Architecture, tensor_shapes
from policies.policy import MAX_PARAMETERS, Policy
from policies.spaces import Spaces
from policies.tensors import decode_tensors
from policies.verdicts import GateReport, require_passing

MANIFEST, GATES, GOLDEN, REFERENCE, TENSORS = (
    "manifest.json",
    "gates.json",
    "golden.npz",
    "reference.parquet",
    "policy.safetensors",
)
FILES_OF_VERSION = {1: (GATES, GOLDEN, TENSORS), 2: (GATES, GOLDEN, TENSORS, REFERENCE)}
SCHEMA_VERSION = 2  # what we write
FILES = FILES_OF_VERSION[SCHEMA_VERSION]
DOCUMENTS = ("card.html", "card.md")
MAX_FILE_BYTES = {
    MANIFEST: 1 << 20,
    GATES: 1 << 20,
    GOLDEN: MAX_GOLDEN_BYTES,
    TENSORS: 4 * MAX_PARAMETERS + (1 << 20),
    REFERENCE: 64 << 20,
    **dict.fromkeys(DOCUMENTS, 8 << 20),
}


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and verified."""

    digest: str
    path: Path
    policy: Policy
    golden: Golden
    gate_report: GateReport
    manifest: dict[str, Any]


def read_bundle(path: Path, *, expected_digest: str | None = None) -> Bundle:
    """Read a bundle, verify every byte against its manifest and its policy against the golden vectors.

    The digest is the directory's name where none is given. Raises `IntegrityError` that names the file or key and what was
    expected, `GateRefused` for a bundle without this policy's passing gate report (or a break-glass reason).
    """
    digest = expected_digest or path.name
    names = _names_in(path)
    manifest_bytes = _read_file(path / MANIFEST)
    if (found := sha256_hex(manifest_bytes)) != digest:
        hint = "" if expected_digest else "; the directory must be named by the digest, or the expected digest be given"
        raise IntegrityError(f"{path / MANIFEST}: sha256 is {found}, expected {digest}{hint}")
    manifest = parse_json(manifest_bytes, str(path / MANIFEST))
    version = _schema_version(manifest, path / MANIFEST)
    contents = _read_files(path, names, manifest, version)
    with _naming(path / MANIFEST):
        policy = _policy_of(manifest, contents[TENSORS], str(path / TENSORS))
        override, mode = _serving_terms(manifest)
    with _naming(path / GATES):
        report = GateReport.from_json(parse_json(contents[GATES], str(path / GATES)))
        require_passing(report, manifest["policy_sha256"], override=override, what=f"bundle {digest[:12]}… refused, {GATES}")
    golden = decode_golden(contents[GOLDEN], str(path / GOLDEN))
    try:
        _check_golden(policy, golden, version, mode)
    except IntegrityError as error:
        raise IntegrityError(f"{path / GOLDEN}: {error}") from error
    return Bundle(digest, path, policy, golden, report, manifest)


def read_verified(bundle: Bundle, name: str) -> bytes:
    """Return the bytes of one of a bundle's files, when they still are those that the manifest names."""
    return _verified(bundle.path / name, bundle.manifest["files"][name])


def read_file_of(path: Path, name: str, *, digest: str) -> bytes:
    """Return the verified bytes of one of a bundle's files, by a name from anywhere: it is looked up, and never made a path.

    Raises `NotFound` for a name that the manifest does not have, `IntegrityError` for bytes that it does not describe.
    """
    manifest_bytes = _read_file(path / MANIFEST)
    if (found := sha256_hex(manifest_bytes)) != digest:
        raise IntegrityError(f"{path / MANIFEST}: sha256 is {found}, expected {digest}")
    described = parse_json(manifest_bytes, str(path / MANIFEST))["files"]
    known = next((file for file in MAX_FILE_BYTES if file == name and file in (MANIFEST, *described)), None)
    if known is None:
        raise NotFound(f"bundle {digest[:12]}… has no file {name!r:.100}; it has {MANIFEST} and {', '.join(sorted(described))}")
    return manifest_bytes if known == MANIFEST else _verified(path / known, described[known])


def _names_in(path: Path) -> list[str]:
    if path.is_symlink() or not path.is_dir():
        raise IntegrityError(f"{path} is not a directory of its own")
    with os.scandir(path) as entries:  # more than there can be, but not all of very many
        return sorted(entry.name for entry in islice(entries, 2 * len(MAX_FILE_BYTES)))


def _schema_version(manifest: Any, path: Path) -> int:
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if type(version) is not int or version not in FILES_OF_VERSION:
        known = " and ".join(map(str, FILES_OF_VERSION))
        raise IntegrityError(f"{path}: schema_version is {version!s:.100}, this Trimtab reads {known}; upgrade it for later ones")
    return version


def _read_files(path: Path, names: list[str], manifest: dict[str, Any], version: int) -> dict[str, bytes]:
    """Return the files that are parsed. All have hash and size as the manifest says, and there is exactly what it names."""
    required, described = FILES_OF_VERSION[version], manifest.get("files")
    optional = DOCUMENTS if version > 1 else ()
    if not isinstance(described, dict) or not set(required) <= set(described) <= {*required, *optional}:
        found = sorted(described) if isinstance(described, dict) else described
        raise IntegrityError(f"{path / MANIFEST}: files are {found!s:.300}, expected {sorted(required)} and perhaps {optional}")
    if names != sorted((MANIFEST, *described)):
        raise IntegrityError(f"{path} holds {names!s:.500}, expected exactly {sorted((MANIFEST, *described))}")
    contents = {}
    for name in described:  # one after the other, so that those which are only hashed do not stay in memory
        data = _verified(path / name, described[name])
        if name in (GATES, GOLDEN, TENSORS):
            contents[name] = data
    return contents


def _verified(path: Path, described: Any) -> bytes:
    data = _read_file(path)
    found = {"sha256": sha256_hex(data), "size_bytes": len(data)}
    if found != described:
        raise IntegrityError(f"{path}: sha256 is {found['sha256']} of {len(data)} bytes, manifest says {described!s:.300}")
    return data


def _read_file(path: Path) -> bytes:
    """Return the bytes of a plain file; not behind a link, and no more than the limit even if it grows meanwhile."""
    limit = MAX_FILE_BYTES[path.name]
    try:
        file = open(path, "rb", opener=_open_itself)  # noqa: SIM115 - closed below
    except OSError as error:
        raise IntegrityError(f"{path} is missing or not a plain file: {error.strerror}") from error
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise IntegrityError(f"{path} is missing or not a plain file")
        data = file.read(limit + 1) if status.st_size <= limit else b""
    if status.st_size > limit or len(data) > limit:
        raise IntegrityError(f"{path} has {max(status.st_size, len(data))} bytes, the limit is {limit}")
    return data


def _open_itself(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)  # a named pipe would wait for its writer


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what bytes that nobody wrote lead to into an `IntegrityError` that names their file."""
    try:
        yield
    except KeyError as error:
        raise IntegrityError(f"{path}: key {error} is missing") from error
    except SpaceUnsupported as error:
        raise IntegrityError(f"{path}: the network does not fit the spaces: {error}") from error
    except IntegrityError as error:
        if str(path.parent) in str(error):
            raise
        raise IntegrityError(f"{path}: {error}") from error
    except (TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise IntegrityError(f"{path} holds a value of another kind: {type(error).__name__} {error!s:.200}") from error


def _policy_of(manifest: dict[str, Any], tensors: bytes, source: str) -> Policy:
    spaces, architecture = Spaces.from_json(manifest["spaces"]), Architecture.from_json(manifest["network"])
    policy = Policy(spaces, architecture, decode_tensors(tensors, tensor_shapes(architecture, spaces), source))
    if policy.sha256() != manifest["policy_sha256"]:
        raise IntegrityError(f"policy_sha256 is {manifest['policy_sha256']!s:.100}, but the policy's is {policy.sha256()}")
    if manifest["schema_version"] > 1:
        require_description(manifest, policy)
    return policy


def _serving_terms(manifest: dict[str, Any]) -> tuple[str | None, str]:
    """Return the reason for which the gates were overruled, if they were, and the serving mode."""
    override, mode = manifest["override_gates"], manifest["serving_mode"]
    if override is not None and not isinstance(override, str):
        raise IntegrityError(f"override_gates is {override!s:.100}, expected a text or null")
    if mode not in ("greedy", "sample"):
        raise IntegrityError(f"serving_mode {mode!s:.100} is not greedy or sample")
    return override, mode


def _check_golden(policy: Policy, golden: Golden, version: int, mode: str) -> None:
    if version > 1 and (golden.actions is None or len(golden.observations_ND) < NUM_GOLDEN):
        raise IntegrityError(f"golden vectors have no actions, or fewer than {NUM_GOLDEN} rows")
    check_golden(policy, golden)
    if mode == "sample" and golden.actions is not None:
        require_propensities(golden.actions)
