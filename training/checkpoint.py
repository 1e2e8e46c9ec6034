"""How a run survives: complete generations of its state, recognised by their hashes, the previous ones kept.

    checkpoints/gen-000123/   tensors.safetensors · best.safetensors · state.json · manifest.json (size and SHA-256 of each)
                CURRENT       the generation to continue from, with the SHA-256 of its manifest and one of itself

A generation holds weights, optimiser, normaliser and counters, and the weights that did best in an evaluation so far.
Random numbers are named by seed and counters (`training/seeds.py`), and all environments restart at every checkpoint, also in
a run that is never killed: so there is neither a generator's nor an environment's state to save, and a resumed run makes the
same bits as an unkilled one.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from policies.errors import IntegrityError, NotFound, UsageError
from policies.golden import Golden
from policies.integrity import (
    canonical_json,
    commit_directory,
    parse_json,
    remove,
    remove_temporaries,
    sha256_hex,
    temporary_directory,
    write_atomic,
)
from policies.network import Architecture
from policies.policy import Policy
from policies.spaces import Spaces
from training.golden import from_tensors
from training.network import Layout, policy_of

SCHEMA_VERSION = 2
TENSORS, BEST, STATE = "tensors.safetensors", "best.safetensors", "state.json"
MANIFEST, CURRENT = "manifest.json", "CURRENT"


@dataclass(frozen=True)
class Checkpoint:
    """A verified generation. `best` is None before the first evaluation; `skipped` says which newer ones are damaged, and how."""

    path: Path
    tensors: dict[str, np.ndarray]
    state: dict[str, Any]
    best: dict[str, np.ndarray] | None = None
    skipped: tuple[str, ...] = ()


def save_checkpoint(
    run_dir: Path,
    *,
    update: int,
    tensors: dict[str, np.ndarray],
    best: dict[str, np.ndarray] | None = None,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Commit a generation, point CURRENT at it, and remove all but the newest `keep` up to it. One writer per run.

    The order matters: the generation is complete on the disk before anything names it, and others go only after that. Those
    of later updates go too: they are damaged, or of a history that the run left.
    """
    directory = checkpoints_directory(run_dir)
    remove_temporaries(directory)
    temporary = temporary_directory(directory)
    complete_state = {**state, "schema_version": SCHEMA_VERSION, "update": update}
    contents = {TENSORS: safetensors.numpy.save(tensors), STATE: canonical_json(complete_state)}
    if best is not None:
        contents[BEST] = safetensors.numpy.save(best)
    manifest = canonical_json(
        {
            "schema_version": SCHEMA_VERSION,
            "files": {name: {"sha256": sha256_hex(data), "size_bytes": len(data)} for name, data in contents.items()},
        }
    )
    for name, data in {**contents, MANIFEST: manifest}.items():
        (temporary / name).write_bytes(data)
    final = directory / generation_name(update)
    remove(final)  # damaged, or committed just before a kill and not yet named by CURRENT; its bits are being made again
    commit_directory(temporary, final)
    current = directory / CURRENT
    if current.is_dir():
        remove(current)  # it was damaged so that a rename would not replace it
    write_atomic(current, _pointer(final.name, sha256_hex(manifest)))
    generations = _generations(directory)
    newest = generations.index(final)
    # Newer ones were found damaged, so the run went back behind them and makes them again; they must not push out good ones.
    for path in generations[:newest] + generations[newest + keep :]:
        remove(path)
    return final


def adopt_checkpoint(run_dir: Path, donor_dir: Path, generation: str) -> Checkpoint:
    """Put a verified copy of another run's generation in the place of all of a run's own; the run goes on from there.

    Returns what was copied. When that generation is gone or damaged, it is the donor's newest one. Raises as `load_checkpoint`
    does.
    """
    try:
        donated = _load_generation(checkpoints_directory(donor_dir) / generation, None)
    except IntegrityError:
        donated = load_checkpoint(donor_dir)
    adopted_from = {"run_id": donor_dir.name, "generation": donated.path.name}
    save_checkpoint(
        run_dir,
        update=donated.state["update"],
        tensors=donated.tensors,
        best=donated.best,
        state={**donated.state, "run_id": run_dir.name, "adopted_from": adopted_from},
        keep=1,
    )
    return donated


def load_checkpoint(run_dir: Path) -> Checkpoint:
    """Return the generation named by CURRENT or, when it is damaged, the newest one that verifies.

    Raises `NotFound` when the run never saved one, `IntegrityError` when all are damaged, with what is wrong with each.
    """
    directory = checkpoints_directory(run_dir)
    skipped: list[str] = []
    for path, manifest_sha256 in _candidates(directory, skipped):
        try:
            return replace(_load_generation(path, manifest_sha256), skipped=tuple(skipped))
        except IntegrityError as error:
            skipped.append(str(error))
    if not skipped:
        raise NotFound(f"run {run_dir.name!r} has no checkpoint in {directory}")
    raise IntegrityError(f"run {run_dir.name!r} has no checkpoint that can be used: {'; '.join(skipped)}")


def load_policy(run_dir: Path) -> tuple[Policy, dict[str, Any]]:
    """Return the best policy of a run, and the state of its last good checkpoint: run id, update, steps, hashes, evaluations.

    The best one is that of the evaluation with the highest return; before the first evaluation it is the last one.
    """
    checkpoint = load_checkpoint(run_dir)
    layout = read_layout(checkpoint.state)
    return policy_of(checkpoint.best or checkpoint.tensors, layout.spaces, layout.architecture), checkpoint.state


def load_golden(run_dir: Path) -> Golden | None:
    """Return the golden vectors of a run's best policy that RLlib computed, or None when our own trainer made it.

    Raises `NotFound` when a run of RLlib's has not been evaluated yet.
    """
    checkpoint = load_checkpoint(run_dir)
    if "rllib" not in checkpoint.state:
        return None
    if checkpoint.best is None:
        raise NotFound(f"run {run_dir.name!r} has no evaluated policy yet; `trimtab resume --run {run_dir.name}` goes on with it")
    return from_tensors(checkpoint.best)


def read_layout(state: dict[str, Any]) -> Layout:
    """Return the layout of the parameters that a checkpoint's state describes."""
    try:
        return Layout(Spaces.from_json(state["spaces"]), Architecture.from_json(state["network"]), state["vf_share_layers"])
    except KeyError as error:
        raise IntegrityError(f"checkpoint state has no {error}") from error


def checkpoints_directory(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def generation_name(update: int) -> str:
    return f"gen-{update:06d}"


def _generations(directory: Path) -> list[Path]:
    """Return what has a generation's name, newest first."""
    found = [path for path in directory.glob("gen-*") if re.fullmatch(r"gen-[0-9]{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name[4:]), reverse=True)


def _pointer(generation: str, manifest_sha256: str) -> bytes:
    """Return the content of CURRENT; its own digest tells damage to it from damage to the generation that it names."""
    pointer = {"generation": generation, "manifest_sha256": manifest_sha256}
    return canonical_json({**pointer, "sha256": sha256_hex(canonical_json(pointer))})


def _read_pointer(path: Path) -> tuple[str, str]:
    """Return the name of a generation and the SHA-256 of its manifest."""
    data = _read(path)
    pointer = parse_json(data, str(path))
    try:
        generation, manifest_sha256 = pointer["generation"], pointer["manifest_sha256"]
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"{path} names no generation: {error}") from error
    if data != _pointer(generation, manifest_sha256):
        raise IntegrityError(f"{path} does not have the SHA-256 that it says itself")
    return generation, manifest_sha256


def _candidates(directory: Path, skipped: list[str]) -> Iterator[tuple[Path, str | None]]:
    """Yield what CURRENT names, then all other generations from the newest; notes a damaged CURRENT in `skipped`."""
    current, manifest_sha256 = None, None
    if os.path.lexists(directory / CURRENT):
        try:
            generation, manifest_sha256 = _read_pointer(directory / CURRENT)
            current = directory / generation
        except IntegrityError as error:
            skipped.append(str(error))
    if current is not None:
        yield current, manifest_sha256
    for path in _generations(directory):
        if path != current:
            yield path, None


def _load_generation(path: Path, manifest_sha256: str | None) -> Checkpoint:
    manifest_bytes = _read(path / MANIFEST)
    if manifest_sha256 is not None and sha256_hex(manifest_bytes) != manifest_sha256:
        raise IntegrityError(f"{path / MANIFEST} has SHA-256 {sha256_hex(manifest_bytes)}, CURRENT says {manifest_sha256}")
    manifest = parse_json(manifest_bytes, str(path / MANIFEST))
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if isinstance(files, dict):
        _require_schema(manifest, path / MANIFEST)  # before it is found to be damaged: another version may have other files
    if not isinstance(files, dict) or not {TENSORS, STATE} <= set(files) <= {TENSORS, STATE, BEST}:
        raise IntegrityError(f"{path / MANIFEST} does not name exactly {TENSORS}, {STATE} and perhaps {BEST}")
    contents = {name: _verified(path / name, described) for name, described in files.items()}
    state = parse_json(contents[STATE], str(path / STATE))
    _require_schema(state, path / STATE)
    if state.get("update") != int(path.name[4:]):
        raise IntegrityError(f"{path} holds update {state.get('update')}: generations were renamed or swapped")
    best = safetensors.numpy.load(contents[BEST]) if BEST in contents else None
    return Checkpoint(path, safetensors.numpy.load(contents[TENSORS]), state, best)


def _require_schema(document: dict[str, Any], path: Path) -> None:
    """Raise `UsageError` for another version than ours: that is no damage, an older generation would be of no use either."""
    found = document.get("schema_version")
    if found != SCHEMA_VERSION:
        remedy = "upgrade Trimtab" if isinstance(found, int) and found > SCHEMA_VERSION else "start a new run"
        raise UsageError(f"{path} has schema version {found}, this Trimtab reads {SCHEMA_VERSION}; {remedy}")


def _verified(path: Path, described: Any) -> bytes:
    data = _read(path)
    expected = described.get("sha256") if isinstance(described, dict) else None
    if sha256_hex(data) != expected:
        raise IntegrityError(f"{path} has SHA-256 {sha256_hex(data)}, its manifest says {expected}")
    return data


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}") from error
