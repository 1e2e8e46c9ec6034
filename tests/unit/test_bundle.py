"""Is a bundle refused when any byte of it is not what was packed?"""

import io
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies.bundle import FILES, MANIFEST, Golden, _decode_safetensors, check_golden, decode_golden, read_bundle
from policies.errors import GateRefused, IntegrityError
from policies.integrity import canonical_json, parse_json, sha256_hex
from policies.policy import Policy
from policies.verdicts import Verdict
from tests.bundles import make_bundle, make_policy


def test_a_bundle_reads_back_as_it_was_written(tmp_path: Path) -> None:
    policy = make_policy()
    bundle = make_bundle(tmp_path, policy)
    again = read_bundle(bundle.path)
    assert again.digest == bundle.digest == bundle.path.name
    assert again.policy.sha256() == policy.sha256()
    assert all(np.array_equal(again.policy.tensors[name], tensor) for name, tensor in policy.tensors.items())


def test_the_same_content_is_the_same_bundle(tmp_path: Path) -> None:
    assert make_bundle(tmp_path, make_policy()).digest == make_bundle(tmp_path, make_policy()).digest
    assert [path.name for path in tmp_path.iterdir()] == [make_bundle(tmp_path, make_policy()).digest]


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
def test_one_flipped_byte_is_refused_with_both_hashes(tmp_path: Path, name: str) -> None:
    bundle = make_bundle(tmp_path, make_policy())
    path = bundle.path / name
    original = path.read_bytes()
    for position in np.linspace(0, len(original) - 1, 25).astype(int):
        changed = bytearray(original)
        changed[position] ^= 0x10
        path.write_bytes(bytes(changed))
        with pytest.raises(IntegrityError, match=rf"{sha256_hex(bytes(changed))}.*[0-9a-f]{{64}}"):
            read_bundle(bundle.path)
    path.write_bytes(original)
    read_bundle(bundle.path)  # the control: it was the changed byte


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "extra.txt").write_text("hello"),
        lambda path: (path / "golden.npz").unlink(),
        lambda path: (path / "policy.safetensors").write_bytes((path / "policy.safetensors").read_bytes()[:-4]),
        lambda path: (path / "golden.npz").rename(path / "golden.npy"),
    ],
)
def test_a_missing_added_renamed_or_cut_file_is_refused(tmp_path: Path, damage) -> None:
    bundle = make_bundle(tmp_path, make_policy())
    damage(bundle.path)
    with pytest.raises(IntegrityError):
        read_bundle(bundle.path)


def test_a_link_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundles", make_policy())
    outside = tmp_path / "outside.npz"
    shutil.move(bundle.path / "golden.npz", outside)
    (bundle.path / "golden.npz").symlink_to(outside)
    with pytest.raises(IntegrityError, match="not a plain file"):
        read_bundle(bundle.path)


def test_a_gate_report_of_another_policy_is_refused(tmp_path: Path) -> None:
    """Swapped with all hashes put right: only the policy digest inside the report tells."""
    good, other = make_bundle(tmp_path, make_policy(0)), make_bundle(tmp_path, make_policy(1))
    forged = tmp_path / "forged"
    shutil.copytree(good.path, forged)
    shutil.copy(other.path / "gates.json", forged / "gates.json")
    with pytest.raises(GateRefused, match="gate report is of policy"):
        read_bundle(_rehash(forged))


def test_a_failing_report_needs_the_break_glass_reason(tmp_path: Path) -> None:
    for verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE):
        with pytest.raises(GateRefused, match=f"gates say {verdict}"):
            make_bundle(tmp_path, make_policy(), verdict=verdict)
        bundle = make_bundle(tmp_path, make_policy(), verdict=verdict, override_gates="drill")
        assert read_bundle(bundle.path).manifest["override_gates"] == "drill"


def test_a_manifest_that_takes_back_the_override_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, make_policy(), verdict=Verdict.FAIL, override_gates="drill")
    manifest = parse_json((bundle.path / MANIFEST).read_bytes(), "manifest")
    (bundle.path / MANIFEST).write_bytes(canonical_json({**manifest, "override_gates": None}))
    with pytest.raises(GateRefused):
        read_bundle(_rehash(bundle.path))


def _header_with(**changes: Any) -> bytes:
    """Return a safetensors file of two numbers, its entry changed."""
    header = canonical_json({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}})
    return len(header).to_bytes(8, "little") + header + bytes(8)


def test_a_tensor_that_is_not_at_a_whole_number_of_bytes_is_refused() -> None:
    assert _decode_safetensors(_header_with(), {"x": (2,)})["x"].tolist() == [0, 0]  # the control
    for offsets in ([0.0, 8.0], [False, 8], [-8, 0], [8, 16], ["0", "8"], [0], None):
        with pytest.raises(IntegrityError):
            _decode_safetensors(_header_with(data_offsets=offsets), {"x": (2,)})


def _packed(compression: int, **members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def _declaring(shape: tuple[int, ...]) -> bytes:
    """Return the header of an array of this shape, and none of its numbers."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK",
        _packed(zipfile.ZIP_STORED, observations=b"no array"),
        _packed(zipfile.ZIP_STORED, observations=_declaring((1 << 50,))),
        _packed(zipfile.ZIP_DEFLATED, observations=_declaring((2,)))[:-30] + bytes(30),
    ],
)
def test_golden_vectors_that_nobody_wrote_are_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"golden\.npz cannot be read"):
        decode_golden(data, "golden.npz")


def test_a_single_number_is_no_golden_vector() -> None:
    with pytest.raises(IntegrityError, match="golden vectors have shapes"):
        check_golden(make_policy(), Golden(np.array(1, np.float32), np.array(1.0)))


NUMBERS = {"kind": "box", "shape": [1], "low": None, "high": None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spaces": {"action": NUMBERS}}, "Gaussian head"),
        ({"network": {"gaussian": {"squash": "clip", "std": "parameter"}}}, "Gaussian head"),
        ({"network": {"kind": "cnn", "convolutions": [[1, 1, 1]]}}, "network does not fit"),
        ({"network": {"hidden": [1e999]}}, "network description"),
        ({"network": {"kind": "module", "factory": "a:b", "kwargs": {}, "tensors": {"w": [-1, -4]}}}, "negative size"),
    ],
)
def test_a_manifest_whose_parts_do_not_fit_each_other_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    bundle = make_bundle(tmp_path, make_policy())
    manifest = parse_json((bundle.path / MANIFEST).read_bytes(), "manifest")
    for section, values in changes.items():
        manifest[section] |= values
    data = json.dumps(manifest).replace("Infinity", "1e999").encode()
    (bundle.path / MANIFEST).write_bytes(data)
    with pytest.raises(IntegrityError, match=words):
        read_bundle(bundle.path, expected_digest=sha256_hex(data))


def test_a_manifest_that_is_no_object_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, make_policy())
    (bundle.path / MANIFEST).write_bytes(b"[]")
    with pytest.raises(IntegrityError, match="files are not exactly"):
        read_bundle(bundle.path, expected_digest=sha256_hex(b"[]"))


def test_golden_vectors_find_a_policy_without_its_normaliser() -> None:
    policy = make_policy()
    obs_ND = np.random.default_rng(3).standard_normal((32, 4)).astype(np.float32)
    golden = Golden(obs_ND, policy.distributions(obs_ND))
    check_golden(policy, golden)
    identity = {"normaliser.mean": np.zeros(4, np.float32), "normaliser.scale": np.ones(4, np.float32)}
    forgetful = Policy(policy.spaces, policy.architecture, {**policy.tensors, **identity})
    with pytest.raises(IntegrityError, match="differs from its golden vectors"):
        check_golden(forgetful, golden)


def test_golden_vectors_with_nan_or_too_few_rows_are_refused() -> None:
    policy = make_policy()
    obs_ND = np.zeros((32, 4), np.float32)
    golden = Golden(obs_ND, policy.distributions(obs_ND))
    with pytest.raises(IntegrityError, match="differs"):
        check_golden(policy, replace(golden, distributions_NP=np.full((32, 2), np.nan)))
    with pytest.raises(IntegrityError, match="at least 16 rows"):
        check_golden(policy, Golden(obs_ND[:4], policy.distributions(obs_ND[:4])))


def _rehash(path: Path) -> Path:
    """Put every hash of a tampered bundle right and give it the name that its manifest hashes to."""
    manifest = parse_json((path / MANIFEST).read_bytes(), "manifest")
    for name in FILES:
        data = (path / name).read_bytes()
        manifest["files"][name] = {"sha256": sha256_hex(data), "size_bytes": len(data)}
    data = canonical_json(manifest)
    (path / MANIFEST).write_bytes(data)
    return path.rename(path.parent / sha256_hex(data))
