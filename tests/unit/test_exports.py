"""Do exports act as trained in their own runtimes, and are those refused that do not, or that nobody vouches for?"""

import contextlib
import io
import json
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from policies import exports
from policies.blocks import BLOCK_ROWS
from policies.bundle import Bundle, Golden, write_bundle
from policies.errors import ConfigError, IntegrityError, NotFound
from policies.exports import ARTIFACTS, DESCRIPTION, Export, load_export, write_export
from policies.integrity import canonical_json, sha256_hex
from policies.network import Architecture
from policies.policy import Policy
from policies.torch_network import TRUSTED_VARIABLE, describe
from tests.bundles import golden_as_trained, make_report, policy_on, vector_spaces
from tests.unit.test_torch_policy import ALL_CASES, inputs_of

FORMATS = list(ARTIFACTS)
DATA_DEPENDENT = f"{__name__}:data_dependent"


def data_dependent(num_features: int, num_outputs: int) -> torch.nn.Module:
    """Make a network that looks at its numbers before it decides what to compute: no exporter can write that down."""
    return DataDependent(num_features, num_outputs)


class DataDependent(torch.nn.Module):
    def __init__(self, num_features: int, num_outputs: int) -> None:
        super().__init__()
        self.positive, self.negative = (torch.nn.Linear(num_features, num_outputs) for _ in range(2))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self.positive(x) if x[0, 0] > 0 else self.negative(x)
        return outputs, outputs[:, 0]


def bundle_of(parent: Path, policy: Policy) -> Bundle:
    """Return a bundle with golden vectors as the training code gives them."""
    if policy.spaces.has_mask:
        golden = golden_as_trained(policy, inputs_of(policy, 32)[1])
    elif policy.architecture.module:  # the training code is the same module
        obs_ND = inputs_of(policy, 32)[0]
        golden = Golden(obs_ND, policy.distributions(obs_ND))
    else:
        golden = golden_as_trained(policy)
    report = make_report(policy)
    return write_bundle(parent, policy=policy, golden=golden, gate_report=report, mode="greedy", origin={}, created_at=1.0)


def bundle_for(parent: Path, name: str = "tanh") -> Bundle:
    case = ALL_CASES[name]
    return bundle_of(parent, policy_on(case.layout.spaces, case.architecture))


@pytest.fixture(scope="module", params=FORMATS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Return an export that tests only read, or copy."""
    parent = tmp_path_factory.mktemp("exports")
    return write_export(bundle_for(parent / "bundles"), request.param, parent / "export")


def copied(export: Export, path: Path) -> Path:
    shutil.copytree(export.path, path)
    return path


@pytest.mark.parametrize("name", ["several masked choices", "numbers, deviation from the network", "channels last"])
@pytest.mark.parametrize("format", FORMATS)
def test_an_export_gives_the_policys_distributions_for_any_batch(tmp_path: Path, format: Any, name: str) -> None:
    bundle = bundle_for(tmp_path / "bundles", name)
    export = write_export(bundle, format, tmp_path / "export")
    obs_ND, masks_NA = inputs_of(bundle.policy, 40)
    mask_inputs = [tensor for tensor in export.description["inputs"] if tensor["name"] == "masks"]
    assert mask_inputs == ([] if masks_NA is None else [{"name": "masks", "dtype": "bool", "shape": ["batch", 2 + 3 + 4]}])
    for rows in (slice(1), slice(2), slice(5, 40)):
        inputs = (obs_ND[rows], None if masks_NA is None else masks_NA[rows])
        found_NP = export.distributions(*inputs)
        assert found_NP.dtype == np.float32
        assert found_NP == pytest.approx(bundle.policy.distributions(*inputs), rel=1e-5, abs=1e-5)  # half the golden tolerance


def test_a_network_of_the_users_own_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.unit.test_torch_policy import NETWORK

    monkeypatch.setenv(TRUSTED_VARIABLE, NETWORK)
    policy = policy_on(vector_spaces(5, 3), Architecture((), module=describe(NETWORK, {"width": 7}, 5, 3)))
    bundle = bundle_of(tmp_path / "bundles", policy)
    for format in FORMATS:
        write_export(bundle, format, tmp_path / format)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_network_that_no_format_can_say_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUSTED_VARIABLE, DATA_DEPENDENT)
    spaces = vector_spaces(5, 3)
    policy = policy_on(spaces, Architecture((), module=describe(DATA_DEPENDENT, {}, 5, 3)))
    bundle = bundle_of(tmp_path / "bundles", policy)
    # What it answers depends on the first row of each block of eight, and both signs are among those.
    assert len(set(np.sign(bundle.golden.observations_ND[::BLOCK_ROWS, 0]))) == 2
    for format in ("onnx", "pt2"):
        with pytest.raises(ConfigError, match=f"cannot be exported as {format}.*another format"):
            write_export(bundle, format, tmp_path / format)
    with pytest.raises(IntegrityError, match="differs from its golden vectors"):  # tracing keeps one of the two branches
        write_export(bundle, "torchscript", tmp_path / "torchscript")
    assert not [path for path in tmp_path.iterdir() if path.name != "bundles"]


def test_the_description_says_what_goes_in_and_comes_out(written: Export) -> None:
    description = json.loads((written.path / DESCRIPTION).read_bytes())
    assert sha256_hex((written.path / DESCRIPTION).read_bytes()) == written.sha256
    assert description["inputs"] == [{"name": "observations", "dtype": "float32", "shape": ["batch", 5]}]
    assert description["outputs"] == [{"name": "distributions", "dtype": "float32", "shape": ["batch", 4]}]
    assert set(description["files"]) == {ARTIFACTS[written.format], "golden.npz"}
    if written.format != "onnx":  # of the three formats only ONNX has names in the file as well
        return
    session = onnxruntime.InferenceSession(written.path / "policy.onnx", providers=["CPUExecutionProvider"])
    assert [(tensor.name, tensor.shape) for tensor in session.get_inputs()] == [("observations", ["batch", 5])]
    assert [(tensor.name, tensor.shape) for tensor in session.get_outputs()] == [("distributions", ["batch", 4])]


def without_normaliser(policy: Policy) -> Policy:
    mean, scale = np.zeros_like(policy.tensors["normaliser.mean"]), np.ones_like(policy.tensors["normaliser.scale"])
    return replace(policy, tensors=policy.tensors | {"normaliser.mean": mean, "normaliser.scale": scale})


def with_swapped_layers(policy: Policy) -> Policy:
    names = ("policy.0.weight", "policy.1.weight")
    return replace(policy, tensors=policy.tensors | dict(zip(names, (policy.tensors[name] for name in reversed(names)))))


@pytest.mark.parametrize("broken", [without_normaliser, with_swapped_layers])
@pytest.mark.parametrize("format", FORMATS)
def test_an_export_that_acts_otherwise_than_trained_is_refused_when_written(
    tmp_path: Path, format: Any, broken: Callable[[Policy], Policy]
) -> None:
    policy = policy_on(vector_spaces(6, 6), Architecture((6, 6)))  # all layers are 6 x 6: only the numbers tell them apart
    bundle = bundle_of(tmp_path / "bundles", policy)
    with pytest.raises(IntegrityError, match=r"policy\.\w+ differs from its golden vectors"):
        write_export(replace(bundle, policy=broken(policy)), format, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_an_export_that_acts_otherwise_than_trained_is_refused_when_read(written: Export, tmp_path: Path) -> None:
    """The artifact of another policy in its place, every hash made to fit, as by a build that mixed two exports up."""
    case = ALL_CASES["tanh"]
    other = bundle_of(tmp_path / "bundles", policy_on(case.layout.spaces, case.architecture, seed=1))
    mixed = copied(write_export(other, written.format, tmp_path / "other"), tmp_path / "mixed")
    load_export(mixed, expected_sha256=sha256_hex((mixed / DESCRIPTION).read_bytes()))  # the control: whole, it is fine
    name = ARTIFACTS[written.format]
    artifact = (written.path / name).read_bytes()
    (mixed / name).write_bytes(artifact)
    description = json.loads((mixed / DESCRIPTION).read_bytes())
    description["files"][name]["sha256"] = sha256_hex(artifact)
    (mixed / DESCRIPTION).write_bytes(canonical_json(description))
    with pytest.raises(IntegrityError, match="differs from its golden vectors"):
        load_export(mixed, expected_sha256=sha256_hex(canonical_json(description)))


def test_a_changed_byte_is_refused_with_both_hashes(written: Export, tmp_path: Path) -> None:
    export = copied(written, tmp_path / "export")
    for name in (DESCRIPTION, "golden.npz", ARTIFACTS[written.format]):
        original = (export / name).read_bytes()
        changed = original[:-9] + bytes([original[-9] ^ 1]) + original[-8:]
        (export / name).write_bytes(changed)
        with pytest.raises(IntegrityError, match=rf"{sha256_hex(changed)}.*[0-9a-f]{{64}}"):
            load_export(export, expected_sha256=written.sha256)
        (export / name).write_bytes(original)
    load_export(export, expected_sha256=written.sha256)  # the control: it was the changed byte


def test_a_program_is_not_loaded_unless_somebody_vouches_for_it(written: Export) -> None:
    if written.format == "onnx":
        load_export(written.path)  # data for a fixed set of operators
        return
    with pytest.raises(IntegrityError, match="is a program, and nothing says that this one is to be trusted"):
        load_export(written.path)


class Gadget:
    """What an attacker pickles: unpickling it calls a function."""

    def __reduce__(self) -> Any:
        return _run, ("unpickled",)


ran: list[str] = []


def _run(what: str) -> tuple[str]:
    ran.append(what)
    return (what,)


def with_member(archive: bytes, name: str, content: bytes) -> bytes:
    """Return a zip archive, stored as torch wants it, with a member's content replaced or added."""
    source, buffer = zipfile.ZipFile(io.BytesIO(archive)), io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as target:
        for member in source.namelist():
            if member != name:
                target.writestr(member, source.read(member))
        target.writestr(name, content)
    return buffer.getvalue()


def pickled_inputs(archive: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save(Gadget(), buffer)
    return with_member(archive, "archive/data/sample_inputs/model.pt", buffer.getvalue())


def pickled_constant(archive: bytes) -> bytes:
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    config = json.dumps({"config": {"x": entry}}).encode()
    archive = with_member(archive, "archive/data/constants/opaque_obj_0", pickle.dumps(Gadget()))
    return with_member(archive, "archive/data/constants/model_constants_config.json", config)


@pytest.mark.parametrize("forge", [pickled_inputs, pickled_constant])
def test_a_torch_export_program_is_never_unpickled(tmp_path: Path, forge: Callable[[bytes], bytes]) -> None:
    """Also not one that is vouched for: a signer can be deceived too."""
    export = copied(write_export(bundle_for(tmp_path / "bundles"), "pt2", tmp_path / "written"), tmp_path / "forged")
    forged = forge((export / "policy.pt2").read_bytes())
    (export / "policy.pt2").write_bytes(forged)
    description = json.loads((export / DESCRIPTION).read_bytes())
    description["files"]["policy.pt2"]["sha256"] = sha256_hex(forged)
    (export / DESCRIPTION).write_bytes(canonical_json(description))
    ran.clear()
    with pytest.raises(IntegrityError, match=r"cannot be read|pickled object"):
        load_export(export, expected_sha256=sha256_hex(canonical_json(description)))
    assert ran == []
    with contextlib.suppress(Exception):  # it may dislike what came out, too late
        torch.export.load(io.BytesIO(forged))
    assert ran == ["unpickled"]  # the control: torch's own reader runs it


def test_a_missing_package_is_said_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundle_for(tmp_path / "bundles")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)
            with pytest.raises(ConfigError, match=rf"need the package {package}: pip install 'trimtab\[export\]'"):
                write_export(bundle, "onnx", tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_an_export_for_one_batch_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundle_for(tmp_path / "bundles")
    monkeypatch.setattr(exports, "_dynamic_batch", lambda inputs: None)
    with pytest.raises(IntegrityError, match=r"policy\.pt2 cannot answer its golden vectors"):
        write_export(bundle, "pt2", tmp_path / "export")


def test_an_export_is_never_written_over(written: Export, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        write_export(bundle_for(tmp_path), written.format, written.path)
    with pytest.raises(NotFound, match="trimtab export"):
        load_export(tmp_path / "nowhere")
