"""Pack a policy into an immutable directory named by its digest, and read one back without trusting a byte of it."""

import io
import math
import shutil
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from policies.distributions import Mode
from policies.errors import IntegrityError, SpaceUnsupported
from policies.integrity import (
    canonical_json,
    commit_directory,
    parse_json,
    sha256_file,
    sha256_hex,
    temporary_directory,
)
from policies.network import Architecture, tensor_shapes
from policies.policy import MAX_PARAMETERS, Policy
from policies.spaces import Spaces
from policies.verdicts import GateReport, require_passing

SCHEMA_VERSION = 1
FILES = ("gates.json", "golden.npz", "policy.safetensors")
MANIFEST = "manifest.json"
MAX_FILE_BYTES = {
    MANIFEST: 1 << 20,
    "gates.json": 1 << 20,
    "golden.npz": 64 << 20,
    "policy.safetensors": 4 * MAX_PARAMETERS + (1 << 20),
}
MIN_GOLDEN = 16
# float32 sums in another order: two correct runtimes differ by a few 1e-7 per layer, a missing normaliser by far more.
GOLDEN_TOLERANCE = 2e-5


@dataclass(frozen=True)
class Golden:
    """Observations [N, D] with the action distributions [N, P] that the *training* code gave for them.

    `masks_NA` holds an action mask per row where the policy takes them, else it is None.
    """

    observations_ND: np.ndarray
    distributions_NP: np.ndarray
    masks_NA: np.ndarray | None = None


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and verified."""

    digest: str
    path: Path
    policy: Policy
    golden: Golden
    gate_report: GateReport
    manifest: dict[str, Any]


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
) -> Bundle:
    """Write a bundle below `parent` and read it back from there; writing the same content twice is one bundle.

    Raises `GateRefused` without this policy's passing gate report (or a break-glass reason), `IntegrityError` when the policy
    does not reproduce the golden vectors or samples actions whose propensity is no finite number. `origin` says where the
    policy came from: run, checkpoint, config, seed, code.
    """
    require_passing(gate_report, policy.sha256(), override=override_gates, what="bundle refused")
    check_golden(policy, golden)
    if mode == "sample":
        _check_propensities(policy, golden)
    temporary = temporary_directory(parent)
    try:
        (temporary / "policy.safetensors").write_bytes(_encode_safetensors(policy.tensors))
        (temporary / "golden.npz").write_bytes(_encode_golden(golden))
        (temporary / "gates.json").write_bytes(canonical_json(gate_report.to_json()))
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "created_at": created_at,
            "policy_sha256": policy.sha256(),
            "spaces": policy.spaces.to_json(),
            "network": policy.architecture.to_json(),
            "serving_mode": mode,
            "override_gates": override_gates,
            "origin": origin,
            "files": {name: _describe(temporary / name) for name in FILES},
        }
        data = canonical_json(manifest)
        (temporary / MANIFEST).write_bytes(data)
        final = parent / sha256_hex(data)
        if not final.exists():
            commit_directory(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return read_bundle(final)


def read_bundle(path: Path, *, expected_digest: str | None = None) -> Bundle:
    """Read a bundle, verify every byte against its manifest and its policy against the golden vectors.

    Raises `IntegrityError` with both hashes when they differ. Nothing in a bundle is executed or unpickled.
    """
    digest = expected_digest or path.name
    manifest_bytes = _read_bounded(path / MANIFEST)
    if sha256_hex(manifest_bytes) != digest:
        raise IntegrityError(f"{path / MANIFEST}: sha256 is {sha256_hex(manifest_bytes)}, expected {digest}")
    manifest = parse_json(manifest_bytes, str(path / MANIFEST))
    _check_files(path, manifest)
    try:
        if manifest["schema_version"] != SCHEMA_VERSION:
            raise IntegrityError(f"{path}: bundle schema {manifest['schema_version']}, this Trimtab reads {SCHEMA_VERSION}")
        spaces, architecture = Spaces.from_json(manifest["spaces"]), Architecture.from_json(manifest["network"])
        tensors = _decode_safetensors(_read_bounded(path / "policy.safetensors"), tensor_shapes(architecture, spaces))
        policy = Policy(spaces, architecture, tensors)
        gate_report = GateReport.from_json(parse_json(_read_bounded(path / "gates.json"), str(path / "gates.json")))
        if policy.sha256() != manifest["policy_sha256"]:
            raise IntegrityError(f"{path}: policy digest is {policy.sha256()}, manifest says {manifest['policy_sha256']}")
        require_passing(gate_report, policy.sha256(), override=manifest["override_gates"], what=f"bundle {digest[:12]}… refused")
        if manifest["serving_mode"] not in ("greedy", "sample"):
            raise IntegrityError(f"{path}: serving mode {manifest['serving_mode']!r} is not greedy or sample")
    except KeyError as error:
        raise IntegrityError(f"{path / MANIFEST}: key {error} is missing") from error
    except SpaceUnsupported as error:
        raise IntegrityError(f"{path / MANIFEST}: the network does not fit the spaces: {error}") from error
    golden = decode_golden(_read_bounded(path / "golden.npz"), str(path / "golden.npz"))
    check_golden(policy, golden)
    return Bundle(digest, path, policy, golden, gate_report, manifest)


def check_golden(policy: Policy, golden: Golden) -> None:
    """Raise `IntegrityError` unless the policy gives the distributions that training gave."""
    num_rows, spaces = golden.observations_ND.size // policy.spaces.num_features, policy.spaces
    expected: list[tuple[int, ...] | None] = [(num_rows, spaces.num_features), (num_rows, policy.distribution.num_parameters)]
    expected.append((num_rows, spaces.mask_size) if spaces.has_mask else None)
    found = [None if array is None else array.shape for array in vars(golden).values()]
    if found != expected or num_rows < MIN_GOLDEN:
        raise IntegrityError(f"golden vectors have shapes {found}, expected {expected} with at least {MIN_GOLDEN} rows")
    require_golden(policy.distributions(golden.observations_ND, golden.masks_NA), golden.distributions_NP, "policy")


def require_golden(distributions_NP: np.ndarray, golden_NP: np.ndarray, what: str) -> None:
    """Raise `IntegrityError` unless a runtime's distributions are the golden ones; `what` names the runtime."""
    # Of probabilities this is the plain difference; a mean or a deviation may be any size.
    error = (np.abs(distributions_NP - golden_NP) / np.maximum(1, np.abs(golden_NP))).max()
    if not error <= GOLDEN_TOLERANCE:  # NaN fails too
        raise IntegrityError(
            f"{what} differs from its golden vectors by {error:.3g} (limit {GOLDEN_TOLERANCE:g}): it acts otherwise than trained"
        )


def _check_propensities(policy: Policy, golden: Golden) -> None:
    """A density is a product over all components: of hundreds of narrow ones it is more than any float, of wide ones 0."""
    for row, parameters_P in enumerate(golden.distributions_NP):
        _, propensity = policy.distribution.choose(parameters_P, "sample", row)
        if not 0 < propensity < math.inf:
            raise IntegrityError(
                f"an action sampled for golden observation {row} has the propensity {propensity:g}: nothing could be learned "
                "from its log; set serving.mode to greedy"
            )


def _describe(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_file(path), "size_bytes": path.stat().st_size}


def _check_files(path: Path, manifest: dict[str, Any]) -> None:
    if path.is_symlink() or not path.is_dir():
        raise IntegrityError(f"{path} is not a directory of its own")
    present = sorted(entry.name for entry in path.iterdir())
    if present != sorted((MANIFEST, *FILES)):
        raise IntegrityError(f"{path} holds {present}, expected exactly {sorted((MANIFEST, *FILES))}")
    described = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(described, dict) or sorted(described) != sorted(FILES):
        raise IntegrityError(f"{path / MANIFEST}: files are not exactly {sorted(FILES)}")
    for name in FILES:
        found = sha256_hex(_read_bounded(path / name))
        if not isinstance(described[name], dict) or found != described[name].get("sha256"):
            raise IntegrityError(f"{path / name}: sha256 is {found}, manifest says {described[name]}")


def _read_bounded(path: Path) -> bytes:
    limit = MAX_FILE_BYTES[path.name]
    if path.is_symlink() or not path.is_file():
        raise IntegrityError(f"{path} is missing or not a plain file")
    size = path.stat().st_size
    if size > limit:
        raise IntegrityError(f"{path} has {size} bytes, the limit is {limit}")
    return path.read_bytes()


def _encode_safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    from safetensors.numpy import save  # here, not above: reading needs no library at all

    return save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})


def _decode_safetensors(data: bytes, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Decode exactly the tensors we expect, float32 only, each within the file, before anything is allocated."""
    if len(data) < 8:
        raise IntegrityError(f"safetensors file has {len(data)} bytes")
    (header_size,) = struct.unpack("<Q", data[:8])
    if header_size > len(data) - 8:
        raise IntegrityError(f"safetensors header says {header_size} bytes, the file has {len(data) - 8}")
    header = parse_json(data[8 : 8 + header_size], "safetensors header")
    body = data[8 + header_size :]
    if not isinstance(header, dict) or set(header) != set(shapes):
        raise IntegrityError(f"safetensors header does not hold exactly {sorted(shapes)}")
    tensors = {}
    for name, shape in shapes.items():
        try:
            start, end = header[name]["data_offsets"]
            described = (header[name]["dtype"], tuple(header[name]["shape"]), end - start)
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"safetensors entry {name} is malformed: {error}") from error
        is_within = type(start) is int and 0 <= start <= end <= len(body)
        if described != ("F32", shape, 4 * math.prod(shape)) or not is_within:
            raise IntegrityError(f"safetensors entry {name} is {described} at {start}, expected float32 {shape}")
        tensors[name] = np.frombuffer(body, np.float32, math.prod(shape), start).reshape(shape)
    return tensors


def _encode_golden(golden: Golden) -> bytes:
    buffer = io.BytesIO()
    arrays = {
        "observations": golden.observations_ND.astype(np.float32),
        "distributions": golden.distributions_NP.astype(np.float64),
    }
    if golden.masks_NA is not None:
        arrays["masks"] = golden.masks_NA.astype(bool)
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def decode_golden(data: bytes, source: str) -> Golden:
    """Read golden vectors from the bytes of `golden.npz`; raises `IntegrityError` for any other bytes."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_FILE_BYTES["golden.npz"]:
                raise IntegrityError(f"{source} unpacks to more than {MAX_FILE_BYTES['golden.npz']} bytes")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            masks_NA = arrays["masks"].astype(bool) if "masks" in arrays else None
            return Golden(arrays["observations"].astype(np.float32), arrays["distributions"].astype(np.float64), masks_NA)
    except IntegrityError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds for bytes that nobody wrote
        raise IntegrityError(f"{source} cannot be read: {type(error).__name__} {error}") from error
