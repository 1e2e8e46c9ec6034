"""Is every damaged or forged bundle refused, with an error that says where, whatever was done to it?"""

import re
from pathlib import Path

import numpy as np
import pytest

from policies.bundle import read_bundle
from policies.bundle_reader import FILES, MANIFEST
from policies.errors import TrimtabError
from tests.bundles import make_bundle, make_policy
from tests.mutations import FAMILIES, Mutation, mutate, read_contents

SAYS_WHERE = re.compile("|".join(map(re.escape, [*FILES, MANIFEST])))


def _refusals(path: Path, *, num_mutations: int, seed: int) -> tuple[list[TrimtabError], list[Mutation]]:
    """Apply mutations one after the other; return the errors, and what was not refused."""
    contents = read_contents(path)
    errors, accepted = [], []
    for number in range(num_mutations):
        family = list(FAMILIES)[number % len(FAMILIES)]
        mutation = mutate(family, contents, np.random.default_rng((seed, number)))
        _write(path, mutation.changes)
        try:
            read_bundle(path, expected_digest=mutation.digest)
            accepted.append(mutation)
        except TrimtabError as error:
            errors.append(error)
        finally:
            _write(path, {name: contents.get(name) for name in mutation.changes})
    return errors, accepted


def _write(path: Path, changes: dict[str, bytes | None]) -> None:
    for name, data in changes.items():
        (path / name).unlink(missing_ok=True) if data is None else (path / name).write_bytes(data)


def test_every_one_of_10000_mutated_bundles_is_refused_and_the_error_names_the_file(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, make_policy(hidden=(4,)))
    errors, accepted = _refusals(bundle.path, num_mutations=10_000, seed=1)
    assert not accepted
    assert len(errors) == 10_000
    unclear = [str(error) for error in errors if not SAYS_WHERE.search(str(error))]
    assert not unclear
    assert read_bundle(bundle.path).digest == bundle.digest  # the control: without a mutation it is read


def test_a_reader_that_checks_only_hashes_would_take_forged_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the forgers have put the hashes right, so it is the checks behind them that refuse."""
    bundle = make_bundle(tmp_path, make_policy(hidden=(4,)))
    monkeypatch.setattr("policies.bundle_reader.require_passing", lambda *arguments, **options: None)
    monkeypatch.setattr("policies.bundle_reader.check_golden", lambda *arguments: None)
    monkeypatch.setattr("policies.bundle_reader.require_description", lambda *arguments: None)
    _, accepted = _refusals(bundle.path, num_mutations=500, seed=1)
    assert {mutation.family for mutation in accepted} >= {"gate record", "numbers", "manifest value"}
