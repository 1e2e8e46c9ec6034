"""Write a policy for runtimes that are not ours, ONNX, `torch.export` or TorchScript, and read such an export back.

An export is a directory: the artifact, the bundle's golden vectors, and `export.json`, which describes both. Each artifact takes
plain observations (and masks) and gives what `Policy.distributions` gives: preprocessing and normaliser are inside. It has to
reproduce the golden vectors, in the format's own runtime, when it is written and whenever it is read.

Golden vectors find a wrong runtime, not a forger, who would forge them too. A `.pt2` or `.ts` file is a program (torch evaluates
expressions of the one and interprets the other), so either is only loaded when the caller knows the sha256 of `export.json`,
which names every other byte: from whoever made the export, or from a signature (`policies.trust`).

N rows, D features, A choices, P numbers of a distribution.
"""

import importlib.metadata
import io
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from policies.bundle_reader import MAX_FILE_BYTES, Bundle
from policies.errors import ConfigError, IntegrityError, NotFound
from policies.golden import MIN_GOLDEN, Golden, decode_golden, require_golden
from policies.integrity import canonical_json, commit_directory, parse_json, sha256_hex, temporary_directory
from policies.policy import MAX_PARAMETERS, Policy

SCHEMA_VERSION = 1
DESCRIPTION = "export.json"
GOLDEN = "golden.npz"
Format = Literal["onnx", "pt2", "torchscript"]
ARTIFACTS: dict[str, str] = {"onnx": "policy.onnx", "pt2": "policy.pt2", "torchscript": "policy.ts"}
ARE_PROGRAMS = ("pt2", "torchscript")
MAX_ARTIFACT_BYTES = 4 * MAX_PARAMETERS + (64 << 20)  # the largest policy's numbers, and a generous graph around them
INPUTS, OUTPUT = ("observations", "masks"), "distributions"
PICKLED_CONSTANTS = (b"data/constants/opaque_obj_", b"data/constants/custom_obj_")
EXPORT_EXTRA = "pip install 'trimtab[export]'"

Runtime = Callable[[np.ndarray, np.ndarray | None], np.ndarray]


@dataclass(frozen=True)
class Export:
    """An export that was read and verified.

    `distributions` takes observations float32 [N, D] and masks bool [N, A] (None without masks), and returns float32 [N, P].
    `sha256` is that of `export.json`.
    """

    path: Path
    format: Format
    sha256: str
    description: dict[str, Any]
    distributions: Runtime


def write_export(bundle: Bundle, format: Format, path: Path) -> Export:
    """Write the directory `path`, and read it back before it gets that name.

    Raises `ConfigError` when the directory exists, a package is missing, or the format cannot say what the network does;
    `IntegrityError` when the artifact does not reproduce the golden vectors.
    """
    if path.exists():
        raise ConfigError(f"{path} exists already; an export is never written over, name a new directory")
    temporary = temporary_directory(path.absolute().parent)
    try:
        artifact, golden = _encode(bundle.policy, bundle.golden, format), (bundle.path / GOLDEN).read_bytes()
        (temporary / ARTIFACTS[format]).write_bytes(artifact)
        (temporary / GOLDEN).write_bytes(golden)
        files = {name: _described(data) for name, data in ((ARTIFACTS[format], artifact), (GOLDEN, golden))}
        description = canonical_json(_describe(bundle, format, files))
        (temporary / DESCRIPTION).write_bytes(description)
        # Verified before it has the name that others look for.
        export = replace(load_export(temporary, expected_sha256=sha256_hex(description)), path=path)
        commit_directory(temporary, path)
        return export
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_export(path: Path, *, expected_sha256: str | None = None) -> Export:
    """Read an export, verify every byte against `export.json` and its answers against the golden vectors.

    `expected_sha256` is what `export.json` must hash to; TorchScript and `torch.export` are not loaded without it. Raises
    `IntegrityError` for bytes or answers that are not what they should be, `ConfigError` when a package is missing.
    """
    if not path.is_dir():
        raise NotFound(f"{path} is not a directory with an export; make one with `trimtab export`")
    data = _read_bounded(path / DESCRIPTION, MAX_FILE_BYTES["manifest.json"])
    sha256 = sha256_hex(data)
    if expected_sha256 is not None and sha256 != expected_sha256:
        raise IntegrityError(f"{path / DESCRIPTION}: sha256 is {sha256}, expected {expected_sha256}")
    description = parse_json(data, str(path / DESCRIPTION))
    try:
        if description["schema_version"] != SCHEMA_VERSION or description["format"] not in ARTIFACTS:
            raise IntegrityError(
                f"{path}: export schema {description['schema_version']}, format {description['format']!r}; this Trimtab reads "
                f"schema {SCHEMA_VERSION}, formats {', '.join(ARTIFACTS)}"
            )
        format, files = description["format"], description["files"]
        if format in ARE_PROGRAMS and expected_sha256 is None:
            raise IntegrityError(
                f"{path}: a file of the format {format} is a program, and nothing says that this one is to be trusted: give the "
                f"sha256 of its {DESCRIPTION}, which `trimtab export` prints, or have it signed (`trimtab export --key NAME`)"
            )
        limits = {ARTIFACTS[format]: MAX_ARTIFACT_BYTES, GOLDEN: MAX_FILE_BYTES[GOLDEN]}
        artifact, golden_bytes = (_read_described(path / name, files[name], limit) for name, limit in limits.items())
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"{path / DESCRIPTION} is malformed: {error!r}") from error
    golden = decode_golden(golden_bytes, str(path / GOLDEN))
    runtime = _RUNTIMES[format](artifact)
    _require_golden(runtime, golden, f"{path / ARTIFACTS[format]}")
    return Export(path, format, sha256, description, runtime)


def _require_golden(runtime: Runtime, golden: Golden, what: str) -> None:
    """Ask for all rows at once and for the first alone: an artifact that was made for one batch size is found here."""
    if golden.observations_ND.ndim != 2 or len(golden.observations_ND) < MIN_GOLDEN:
        raise IntegrityError(
            f"golden observations of {what} are {golden.observations_ND.shape}, expected at least {MIN_GOLDEN} rows"
        )
    for rows in (slice(None), slice(1)):
        masks_NA = None if golden.masks_NA is None else golden.masks_NA[rows]
        try:
            found_NP = runtime(golden.observations_ND[rows], masks_NA)
        except Exception as error:  # each runtime has its own errors for a graph that does not fit its inputs
            raise IntegrityError(f"{what} cannot answer its golden vectors: {type(error).__name__}: {error}") from error
        expected_NP = golden.distributions_NP[rows]
        if found_NP.shape != expected_NP.shape:
            raise IntegrityError(f"{what} gives distributions {found_NP.shape} for golden vectors {expected_NP.shape}")
        require_golden(found_NP, expected_NP, what)


def _describe(bundle: Bundle, format: Format, files: dict[str, Any]) -> dict[str, Any]:
    policy, packages = bundle.policy, ("trimtab", "torch", "numpy", *(("onnx", "onnxscript") if format == "onnx" else ()))
    inputs = [{"name": INPUTS[0], "dtype": "float32", "shape": ["batch", policy.spaces.num_features]}]
    if policy.spaces.has_mask:
        inputs.append({"name": INPUTS[1], "dtype": "bool", "shape": ["batch", policy.spaces.mask_size]})
    gaussian = policy.architecture.gaussian
    return {
        "schema_version": SCHEMA_VERSION,
        "format": format,
        "bundle_digest": bundle.digest,
        "policy_sha256": policy.sha256(),
        "inputs": inputs,
        "outputs": [{"name": OUTPUT, "dtype": "float32", "shape": ["batch", policy.distribution.num_parameters]}],
        # What the numbers going in and coming out mean, in the bundle manifest's words.
        "spaces": policy.spaces.to_json(),
        "gaussian": gaussian.to_json() if gaussian else None,
        "serving_mode": bundle.manifest["serving_mode"],
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "files": files,
    }


# --- encode ---


def _encode(policy: Policy, golden: Golden, format: Format) -> bytes:
    """Return the artifact, traced with golden observations."""
    import torch

    from policies.torch_policy import TorchPolicy

    rows = 2  # torch.export takes sizes 0 and 1 for constants
    arrays = [golden.observations_ND[:rows], *([] if golden.masks_NA is None else [golden.masks_NA[:rows]])]
    module, inputs = TorchPolicy(policy), tuple(torch.from_numpy(np.array(array)) for array in arrays)
    encode = {"onnx": _encode_onnx, "pt2": _encode_pt2, "torchscript": _encode_torchscript}[format]
    try:
        with _without_notices():
            return encode(module, inputs)
    except ConfigError:
        raise
    except Exception as error:  # a network of the user's own may do anything, and each exporter refuses in its own way
        summary = next(iter(str(error).splitlines()), "")  # torch goes on for pages
        raise ConfigError(
            f"the network cannot be exported as {format}: {type(error).__name__}: {summary}; change it, or try another format of "
            f"{', '.join(ARTIFACTS)}"
        ) from error


def _encode_onnx(module: Any, inputs: tuple[Any, ...]) -> bytes:
    try:
        import onnx  # noqa: F401, only torch uses these two, the reader the third: here a missing one is said in time
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"ONNX exports need the package {error.name}: {EXPORT_EXTRA}") from error
    import torch

    program = torch.onnx.export(
        module,
        inputs,
        dynamo=True,
        dynamic_shapes=_dynamic_batch(inputs),
        input_names=list(INPUTS[: len(inputs)]),
        output_names=[OUTPUT],
        external_data=False,  # one file: what is beside it would be read by its name, whatever is there by then
        verbose=False,
    )
    return program.model_proto.SerializeToString()


def _encode_pt2(module: Any, inputs: tuple[Any, ...]) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.export.save(torch.export.export(module, inputs, dynamic_shapes=_dynamic_batch(inputs)), buffer)
    return buffer.getvalue()


def _encode_torchscript(module: Any, inputs: tuple[Any, ...]) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, inputs), buffer)
    return buffer.getvalue()


def _dynamic_batch(inputs: tuple[Any, ...]) -> tuple[dict[int, Any], ...]:
    import torch

    batch = torch.export.Dim("batch", min=1)
    return tuple({0: batch} for _ in inputs)


@contextmanager
def _without_notices() -> Iterator[None]:
    """Keep torch from telling the user what he cannot mend: its own deprecations, and that torchvision is not installed."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "# The axis name: batch")  # masks and observations share it, as they should
            yield
    finally:
        registration.setLevel(level)


# --- decode: each returns how the artifact answers, or raises `IntegrityError` ---


def _decode_onnx(data: bytes) -> Runtime:
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(f"ONNX exports need the package onnxruntime: {EXPORT_EXTRA}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # threads cost more than these networks
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes have no common base of their own
        raise IntegrityError(f"ONNX model cannot be read: {error}") from error

    def distributions(obs_ND: np.ndarray, masks_NA: np.ndarray | None) -> np.ndarray:
        arrays = (obs_ND,) if masks_NA is None else (obs_ND, masks_NA)
        return session.run([OUTPUT], dict(zip(INPUTS, arrays)))[0]

    return distributions


def _decode_pt2(data: bytes) -> Runtime:
    import torch

    for name in PICKLED_CONSTANTS:
        if name in data:  # an archive has the names of its members in plain bytes
            raise IntegrityError(f"torch.export program holds a pickled object, {name.decode()}…; policies have none")
    with _weights_only(), _without_notices():
        try:
            module = torch.export.load(io.BytesIO(data)).module()
        except Exception as error:  # zip, json, assertion and pickle errors: whatever the bytes provoke
            raise IntegrityError(f"torch.export program cannot be read: {type(error).__name__}: {error}") from error
    return _torch_runtime(module)


def _decode_torchscript(data: bytes) -> Runtime:
    import torch

    with _without_notices():
        try:
            module = torch.jit.load(io.BytesIO(data), map_location="cpu")
        except RuntimeError as error:
            raise IntegrityError(f"TorchScript program cannot be read: {error}") from error
    return _torch_runtime(module)


def _torch_runtime(module: Any) -> Runtime:
    import torch

    def distributions(obs_ND: np.ndarray, masks_NA: np.ndarray | None) -> np.ndarray:
        arrays = (obs_ND,) if masks_NA is None else (obs_ND, masks_NA)
        with torch.no_grad():
            return module(*(torch.from_numpy(np.array(array)) for array in arrays)).numpy()

    return distributions


@contextmanager
def _weights_only() -> Iterator[None]:
    """Keep `torch.export.load` from unpickling: it falls back to that for what its safe reader refuses, and has no parameter."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


_RUNTIMES: dict[str, Callable[[bytes], Runtime]] = {
    "onnx": _decode_onnx,
    "pt2": _decode_pt2,
    "torchscript": _decode_torchscript,
}
assert set(get_args(Format)) == set(ARTIFACTS) == set(_RUNTIMES)


# --- bytes ---


def _described(data: bytes) -> dict[str, Any]:
    return {"sha256": sha256_hex(data), "size_bytes": len(data)}


def _read_described(path: Path, described: dict[str, Any], limit: int) -> bytes:
    data = _read_bounded(path, limit)
    if sha256_hex(data) != described["sha256"]:
        raise IntegrityError(f"{path}: sha256 is {sha256_hex(data)}, {DESCRIPTION} says {described['sha256']}")
    return data


def _read_bounded(path: Path, limit: int) -> bytes:
    if path.is_symlink() or not path.is_file():
        raise IntegrityError(f"{path} is missing or not a plain file")
    if path.stat().st_size > limit:
        raise IntegrityError(f"{path} has {path.stat().st_size} bytes, the limit is {limit}")
    return path.read_bytes()
