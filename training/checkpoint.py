"""How a run survives: complete generations of its state, recognised by their hashes, the previous ones kept.

    checkpoints/gen-000123/   tensors.safetensors · state.json · manifest.json (size and SHA-256 of the other two)
                CURRENT       the generation to continue from, with the SHA-256 of its manifest

A generation holds weights, optimiser, normaliser and counters. Random numbers are named by seed and counters
(`training/seeds.py`), and all environments restart at every checkpoint, also in a run that is never killed: so there is
neither a generator's nor an environment's state to save, and a resumed run makes the same bits as an unkilled one.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from policies.errors import IntegrityError, NotFound
from policies.integrity import (
    canonical_json,
    commit_directory,
    parse_json,
    remove_temporary_directories,
    sha256_hex,
    temporary_directory,
    write_atomic,
)
from policies.policy import Architecture, Policy
from policies.spaces import Spaces
from training.network import policy_of

SCHEMA_VERSION = 1
TENSORS, STATE, MANIFEST, CURRENT = "tensors.safetensors", "state.json", "manifest.json", "CURRENT"


@dataclass(frozen=True)
class Checkpoint:
    """A verified generation. `skipped` says which newer ones were damaged, and how."""

    path: Path
    tensors: dict[str, np.ndarray]
    state: dict[str, Any]
    skipped: tuple[str, ...] = ()


def save_checkpoint(run_dir: Path, *, update: int, tensors: dict[str, np.ndarray], state: dict[str, Any], keep: int) -> Path:
    """Commit a generation, point CURRENT at it, and remove all but the newest `keep`. One writer per run.

    The order matters: the generation is complete on the disk before anything names it, and old ones go only after that.
    """
    directory = checkpoints_directory(run_dir)
    remove_temporary_directories(directory)
    temporary = temporary_directory(directory)
    contents = {TENSORS: safetensors.numpy.save(tensors), STATE: canonical_json({"schema_version": SCHEMA_VERSION, **state})}
    manifest = canonical_json(
        {
            "schema_version": SCHEMA_VERSION,
            "files": {name: {"sha256": sha256_hex(data), "size_bytes": len(data)} for name, data in contents.items()},
        }
    )
    for name, data in {**contents, MANIFEST: manifest}.items():
        (temporary / name).write_bytes(data)
    final = directory / f"gen-{update:06d}"
    if final.exists():
        # Damaged, or committed just before a kill and not yet named by CURRENT; either way its bits are being made again.
        shutil.rmtree(final)
    commit_directory(temporary, final)
    write_atomic(directory / CURRENT, canonical_json({"generation": final.name, "manifest_sha256": sha256_hex(manifest)}))
    for old in _generations(directory)[keep:]:
        shutil.rmtree(old)
    return final


def load_checkpoint(run_dir: Path) -> Checkpoint:
    """Return the generation named by CURRENT or, when it is damaged, the newest one that verifies.

    Raises `NotFound` when the run never saved one, `IntegrityError` when all are damaged, with what is wrong with each.
    """
    directory = checkpoints_directory(run_dir)
    skipped: list[str] = []
    for path, manifest_sha256 in _candidates(directory, skipped):
        try:
            tensors, state = _load_generation(path, manifest_sha256)
            return Checkpoint(path, tensors, state, tuple(skipped))
        except IntegrityError as error:
            skipped.append(str(error))
    if not skipped:
        raise NotFound(f"run {run_dir.name!r} has no checkpoint in {directory}")
    raise IntegrityError(f"run {run_dir.name!r} has no checkpoint that can be used: {'; '.join(skipped)}")


def load_policy(run_dir: Path) -> tuple[Policy, dict[str, Any]]:
    """Return the policy of a run's last good checkpoint, and its state: run id, update, steps, hashes, last evaluation."""
    checkpoint = load_checkpoint(run_dir)
    return policy_of_checkpoint(checkpoint), checkpoint.state


def policy_of_checkpoint(checkpoint: Checkpoint) -> Policy:
    """Return the policy among a checkpoint's tensors."""
    spaces, architecture = read_network(checkpoint.state)
    return policy_of(checkpoint.tensors, spaces, architecture)


def read_network(state: dict[str, Any]) -> tuple[Spaces, Architecture]:
    """Return the spaces and the architecture that a checkpoint's state describes."""
    try:
        return Spaces.from_json(state["spaces"]), Architecture.from_json(state["network"])
    except KeyError as error:
        raise IntegrityError(f"checkpoint state has no {error}") from error


def checkpoints_directory(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def _generations(directory: Path) -> list[Path]:
    """Return committed generations, newest first."""
    return sorted((path for path in directory.glob("gen-*") if path.is_dir()), key=lambda path: int(path.name[4:]), reverse=True)


def _candidates(directory: Path, skipped: list[str]) -> Iterator[tuple[Path, str | None]]:
    """Yield what CURRENT names, then all other generations from the newest; notes a damaged CURRENT in `skipped`."""
    current, manifest_sha256 = None, None
    if (directory / CURRENT).exists():
        try:
            pointer = parse_json((directory / CURRENT).read_bytes(), str(directory / CURRENT))
            current, manifest_sha256 = directory / pointer["generation"], pointer["manifest_sha256"]
        except (IntegrityError, KeyError, TypeError) as error:
            skipped.append(f"{directory / CURRENT} cannot be read: {error}")
    if current is not None:
        yield current, manifest_sha256
    for path in _generations(directory):
        if path != current:
            yield path, None


def _load_generation(path: Path, manifest_sha256: str | None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    manifest_bytes = _read(path / MANIFEST)
    if manifest_sha256 is not None and sha256_hex(manifest_bytes) != manifest_sha256:
        raise IntegrityError(f"{path / MANIFEST} has SHA-256 {sha256_hex(manifest_bytes)}, CURRENT says {manifest_sha256}")
    manifest = parse_json(manifest_bytes, str(path / MANIFEST))
    contents = {name: _verified(path / name, manifest) for name in (TENSORS, STATE)}
    state = parse_json(contents[STATE], str(path / STATE))
    if state.get("schema_version") != SCHEMA_VERSION:
        raise IntegrityError(
            f"{path / STATE} has schema version {state.get('schema_version')}, this Trimtab reads {SCHEMA_VERSION}"
        )
    return safetensors.numpy.load(contents[TENSORS]), state


def _verified(path: Path, manifest: Any) -> bytes:
    try:
        expected = manifest["files"][path.name]["sha256"]
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"{path.parent / MANIFEST} does not name {path.name}") from error
    data = _read(path)
    if sha256_hex(data) != expected:
        raise IntegrityError(f"{path} has SHA-256 {sha256_hex(data)}, its manifest says {expected}")
    return data


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}") from error
