"""Commits checkpoints in a process of its own, to be killed: python -m tests.chaos.writer RUN_DIR LAST_UPDATE [--careless]

It continues from the run's last good checkpoint. Every generation is made from the bits of the one before, so a wrong bit
anywhere changes all that follow.
"""

import argparse
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from policies.errors import NotFound
from policies.integrity import canonical_json
from training.checkpoint import SCHEMA_VERSION, Checkpoint, load_checkpoint, save_checkpoint

KEEP = 2


def write_generations(run_dir: Path, last_update: int, *, careless: bool = False) -> None:
    """Commit all generations up to the last one."""
    commit = _commit_carelessly if careless else _commit
    checkpoint = load_if_any(run_dir)
    while checkpoint is None or checkpoint.state["update"] < last_update:
        commit(run_dir, next_generation(checkpoint))
        checkpoint = load_checkpoint(run_dir)


def load_if_any(run_dir: Path) -> Checkpoint | None:
    try:
        return load_checkpoint(run_dir)
    except NotFound:
        return None


def next_generation(previous: Checkpoint | None) -> Checkpoint:
    """Return what follows on a generation, or the first one; not yet on the disk."""
    update = previous.state["update"] + 1 if previous else 1
    previous_sha256 = fingerprint(previous) if previous else ""
    rng = np.random.default_rng([update, *previous_sha256.encode()])
    tensors = {"parameters": rng.standard_normal(2000).astype(np.float32), "scale": rng.random(3)}
    best = {"parameters": rng.standard_normal(2000).astype(np.float32)}
    return Checkpoint(
        Path(), tensors, {"schema_version": SCHEMA_VERSION, "update": update, "previous_sha256": previous_sha256}, best
    )


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return one digest of all that a generation holds."""
    parts = [checkpoint.tensors, checkpoint.best or {}]
    arrays = b"".join(name.encode() + part[name].tobytes() for part in parts for name in sorted(part))
    return hashlib.sha256(canonical_json(checkpoint.state) + arrays).hexdigest()


def marker(update: int, moment: str) -> str:
    """Return the path whose access the tracer sees at the begin and at the end of a commit."""
    return f"/commit-of-update-{update}-{moment}"


@contextmanager
def _marked(update: int) -> Iterator[None]:
    os.access(marker(update, "begins"), os.F_OK)
    yield
    os.access(marker(update, "ends"), os.F_OK)


def _contents(generation: Checkpoint) -> dict[str, Any]:
    return {"tensors": generation.tensors, "best": generation.best, "state": generation.state}


def _commit(run_dir: Path, generation: Checkpoint) -> None:
    update = generation.state["update"]
    with _marked(update):
        save_checkpoint(run_dir, update=update, **_contents(generation), keep=KEEP)


def _commit_carelessly(run_dir: Path, generation: Checkpoint) -> None:
    """Do without renames: remove the old generations, then write the same bytes where they are to stay."""
    scratch, update = run_dir.with_suffix(".scratch"), generation.state["update"]
    save_checkpoint(scratch, update=update, **_contents(generation), keep=KEEP)
    with _marked(update):
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        shutil.copytree(scratch / "checkpoints", run_dir / "checkpoints", copy_function=_write_in_place)


def _write_in_place(source: str, destination: str) -> None:
    Path(destination).write_bytes(Path(source).read_bytes())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("last_update", type=int)
    parser.add_argument("--careless", action="store_true")
    arguments = parser.parse_args()
    write_generations(arguments.run_dir, arguments.last_update, careless=arguments.careless)
