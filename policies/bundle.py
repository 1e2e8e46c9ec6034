"""Pack a policy into an immutable directory named by its digest; `policies/bundle_reader.py` says what is in it and reads it."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from policies.bundle_reader import (
    DOCUMENTS,
    FILES,
    GATES,
    GOLDEN,
    MANIFEST,
    MAX_FILE_BYTES,
    REFERENCE,
    SCHEMA_VERSION,
    TENSORS,
    Bundle,
    read_bundle,
)
from policies.distributions import Mode
from policies.errors import ConfigError
from policies.golden import Golden, check_golden, encode_golden, require_propensities, with_actions
from policies.integrity import canonical_json, commit_directory, sha256_hex, temporary_directory
from policies.manifest import describe
from policies.policy import Policy
from policies.reference import Reference, encode_reference, no_steps
from policies.tensors import encode_tensors
from policies.verdicts import GateReport, require_passing

__all__ = ["FILES", "MANIFEST", "Bundle", "Golden", "check_golden", "read_bundle", "write_bundle"]


def write_bundle(
    parent: Path,
    *,
    policy: Policy,
    golden: Golden,
    gate_report: GateReport,
    override_gates: str | None = None,
    mode: Mode,
    origin: dict[str, Any],
    created_at: float,
    reference: Reference | None = None,
    documents: Mapping[str, bytes] | None = None,
    observation_names: Sequence[str] = (),
    observation_units: Sequence[str] = (),
) -> Bundle:
    """Write a bundle below `parent` and read it back from there; writing the same content twice is one bundle.

    `golden` is what training answered: here actions are drawn for it, and few rows are repeated. `origin` says where the policy
    came from: run, checkpoint, config, seeds, parents, code. `reference` has no steps where none are given; `documents` are
    some of `DOCUMENTS`. Raises `GateRefused` without this policy's passing gate report (or a break-glass reason),
    `IntegrityError` when the policy does not reproduce the golden vectors or samples actions whose propensity is no finite
    number, `ConfigError` for other or too large documents.
    """
    require_passing(gate_report, policy.sha256(), override=override_gates, what="bundle refused")
    check_golden(policy, golden)
    golden = with_actions(golden, policy.distribution)
    if mode == "sample":
        require_propensities(golden.actions)
    contents = {
        TENSORS: encode_tensors(policy.tensors),
        GOLDEN: encode_golden(golden),
        GATES: canonical_json(gate_report.to_json()),
        REFERENCE: encode_reference(reference or no_steps(policy.spaces), policy.spaces),
        **_checked_documents(documents or {}),
    }
    contents[MANIFEST] = canonical_json(
        {
            "schema_version": SCHEMA_VERSION,
            "created_at": created_at,
            "policy_sha256": policy.sha256(),
            **describe(policy, names=observation_names, units=observation_units),
            "serving_mode": mode,
            "override_gates": override_gates,
            "origin": origin,
            "files": {name: {"sha256": sha256_hex(data), "size_bytes": len(data)} for name, data in contents.items()},
        }
    )
    for name, data in contents.items():  # before anything is written: nobody could read it
        if len(data) > MAX_FILE_BYTES[name]:
            raise ConfigError(f"{name} of this bundle would have {len(data)} bytes, the limit is {MAX_FILE_BYTES[name]}")
    return read_bundle(_commit(parent, contents))


def _checked_documents(documents: Mapping[str, bytes]) -> Mapping[str, bytes]:
    for name, data in documents.items():
        if name not in DOCUMENTS:
            raise ConfigError(f"a bundle has no document {name!r}; give it one of {', '.join(DOCUMENTS)}")
        if len(data) > MAX_FILE_BYTES[name]:
            raise ConfigError(f"document {name} has {len(data)} bytes, the limit is {MAX_FILE_BYTES[name]}; make it smaller")
    return documents


def _commit(parent: Path, contents: Mapping[str, bytes]) -> Path:
    final = parent / sha256_hex(contents[MANIFEST])
    if final.exists():
        return final
    temporary = temporary_directory(parent)
    try:
        for name, data in contents.items():
            (temporary / name).write_bytes(data)
        commit_directory(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final
