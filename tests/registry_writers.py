"""Processes that publish versions, move aliases and release, as fast as they can, and note what was acknowledged."""

import itertools
import json
import multiprocessing
import time
from pathlib import Path

from policies.errors import ReleaseRefused
from policies.registry import Registry, RegistryState, change_release, start_release
from policies.registry_entries import set_alias
from tests.bundles import make_bundle, make_policy

START_TIMEOUT_S = 120.0


def run_writers(roots: list[Path], notes: Path, *, seconds: float) -> list[str]:
    """Let one process per root write for some seconds and return what was acknowledged to all of them.

    The roots are one registry, or several that are at the same place. The first version must be champion already.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(roots))
    arguments = [(root, notes / f"{index}.json", index, seconds, barrier) for index, root in enumerate(roots)]
    writers = [context.Process(target=_write, args=argument) for argument in arguments]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=START_TIMEOUT_S + 4 * seconds)
    assert [writer.exitcode for writer in writers] == [0] * len(writers)
    return [token for index in range(len(roots)) for token in json.loads((notes / f"{index}.json").read_text())]


def _write(root: Path, note: Path, index: int, seconds: float, barrier) -> None:
    registry, acknowledged = Registry(root), []
    barrier.wait(timeout=START_TIMEOUT_S)
    deadline = time.monotonic() + seconds
    for turn in itertools.count():
        if time.monotonic() > deadline:
            break
        for token, entry in _moves(registry, index, turn):
            try:
                if entry is None:
                    registry.register(_bundle(registry, index, turn), now=time.time())
                else:
                    registry.append(entry, now=time.time())
            except ReleaseRefused:
                continue  # another writer's release is open, or has ended meanwhile
            acknowledged.append(token)
    note.write_text(json.dumps(acknowledged))


def _moves(registry: Registry, index: int, turn: int):
    """Yield what a writer does in one turn: publish, name what it published, release it and end the release."""
    if turn % 5 == 0:
        yield _bundle(registry, index, turn).digest, None
    name = f"{index}-{turn}"

    def alias(state: RegistryState) -> dict:
        return set_alias(state, f"alias-{turn % 3}", 1 + turn % len(state.versions), f"{name} alias")

    def start(state: RegistryState) -> dict:
        candidate = max(state.versions)
        return start_release(state, candidate, weights=(0.5,), override_gates=None, reason=f"{name} start")

    def end(state: RegistryState) -> dict:
        return change_release(state, "promote" if turn % 2 else "abort", reason=f"{name} end")

    yield f"{name} alias", alias
    yield f"{name} start", start
    yield f"{name} end", end


def _bundle(registry: Registry, index: int, turn: int):
    return make_bundle(registry.bundles, make_policy(1_000_000 * (index + 1) + turn, hidden=(4,)))
