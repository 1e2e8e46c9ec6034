"""Does a bundle say what was packed, and is it refused when it is not that?"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies.bundle import read_bundle, write_bundle
from policies.bundle_reader import DOCUMENTS, FILES, MANIFEST, MAX_FILE_BYTES
from policies.errors import ConfigError, GateRefused, IntegrityError
from policies.integrity import canonical_json, parse_json, sha256_hex
from policies.network import Architecture, Gaussian
from policies.spaces import Numbers, Spaces
from policies.verdicts import Verdict
from tests.bundles import golden_as_trained, make_bundle, make_policy, make_report, policy_on


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


GOLDEN_FILES = Path(__file__).parents[1] / "golden"
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
    with pytest.raises(IntegrityError, match="schema_version is None"):
        read_bundle(bundle.path, expected_digest=sha256_hex(b"[]"))


OPTIONS = {"mode": "greedy", "origin": {}, "created_at": 1.0}


def test_every_format_that_was_ever_written_is_read_and_decides_as_then() -> None:
    """Never made anew: each is what the code of its time wrote, and each decision what it answered."""
    folders = sorted(path for path in GOLDEN_FILES.glob("bundle-v*"))
    assert [folder.name for folder in folders] == ["bundle-v1", "bundle-v2"]
    for version, folder in enumerate(folders, 1):
        (path,) = (path for path in folder.iterdir() if path.is_dir())
        bundle = read_bundle(path)
        assert (bundle.manifest["schema_version"], bundle.manifest["serving_mode"]) == (version, "sample")
        assert (bundle.golden.actions is not None) == (version > 1)
        decisions = parse_json((folder / "decisions.json").read_bytes(), "decisions")
        assert len({decision["sampled"] for decision in decisions}) == len({decision["greedy"] for decision in decisions}) == 2
        for decision in decisions:
            parameters_P = bundle.policy.distributions(np.array([decision["observation"]], np.float32))[0]
            sampled, propensity = bundle.policy.distribution.choose(parameters_P, "sample", decision["seed"])
            greedy, _ = bundle.policy.distribution.choose(parameters_P, "greedy", decision["seed"])
            assert (sampled, greedy) == (decision["sampled"], decision["greedy"])
            assert propensity == pytest.approx(decision["propensity"], abs=2e-5)  # on another machine: `GOLDEN_TOLERANCE`


def test_an_unknown_format_is_refused_with_those_that_are_read(tmp_path: Path) -> None:
    for version in (0, 3, True, "2", None):
        bundle = make_bundle(tmp_path, make_policy())
        path = _with_manifest(bundle.path, schema_version=version)
        with pytest.raises(IntegrityError, match=r"schema_version is .*, this Trimtab reads 1 and 2"):
            read_bundle(path)
        shutil.rmtree(path)


def test_documents_are_hashed_bounded_and_optional(tmp_path: Path) -> None:
    policy = make_policy()
    options = {"policy": policy, "golden": golden_as_trained(policy), "gate_report": make_report(policy), **OPTIONS}
    without = write_bundle(tmp_path, **options)
    card = {"card.md": b"# Card\n", "card.html": b"<h1>Card</h1>"}
    bundle = write_bundle(tmp_path, **options, documents=card)
    assert bundle.digest != without.digest and {name: (bundle.path / name).read_bytes() for name in DOCUMENTS} == card
    assert sorted(bundle.manifest["files"]) == sorted((*FILES, *DOCUMENTS))
    (bundle.path / "card.md").write_bytes(b"# Cerd\n")
    with pytest.raises(IntegrityError, match=r"card\.md: sha256 is"):
        read_bundle(bundle.path)
    with pytest.raises(ConfigError, match=r"no document 'notes\.txt'; give it one of card\.html, card\.md"):
        write_bundle(tmp_path, **options, documents={"notes.txt": b""})
    with pytest.raises(ConfigError, match="the limit is 8388608; make it smaller"):
        write_bundle(tmp_path, **options, documents={"card.md": bytes(MAX_FILE_BYTES["card.md"] + 1)})


def test_a_manifest_says_in_words_what_the_network_does(tmp_path: Path) -> None:
    policy = make_policy()
    manifest = make_bundle(tmp_path, policy).manifest
    assert manifest["action_distribution"] == {"kind": "categorical", "nvec": [2]}
    assert manifest["normaliser"] == {"kind": "mean_scale", "formula": "(x - mean) * scale", "clip": None}
    numbers = Spaces(policy.spaces.observation, Numbers(np.float32([-1, 0, 0]), np.float32([1, 2, np.inf])))
    plain = policy_on(numbers, Architecture((4,), gaussian=Gaussian("tanh", "output"), observation_clip=5.0))
    plain.tensors["normaliser.mean"][:], plain.tensors["normaliser.scale"][:] = 0, 1
    bundle = write_bundle(tmp_path, policy=plain, golden=golden_as_trained(plain), gate_report=make_report(plain), **OPTIONS)
    assert bundle.manifest["normaliser"] == {"kind": "none", "clip": 5.0}
    assert bundle.manifest["action_distribution"] == {"kind": "normal", "size": 3, "squash": "tanh", "std": "output"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("action_distribution", {"kind": "categorical", "nvec": [3]}),
        ("normaliser", {"kind": "none", "clip": None}),
        ("serving_mode", "random"),
        ("serving_mode", ["greedy"]),
        ("override_gates", 1),
        ("policy_sha256", "0" * 64),
        ("files", []),
        ("files", {"../../etc/passwd": {}}),
        ("spaces", {"observation": "?"}),
        ("network", None),
    ],
)
def test_a_manifest_that_contradicts_the_policy_is_refused_by_its_key(tmp_path: Path, key: str, value: Any) -> None:
    bundle = make_bundle(tmp_path, make_policy())
    with pytest.raises(IntegrityError, match=key):
        read_bundle(_with_manifest(bundle.path, **{key: value}))


def test_names_of_another_number_of_features_are_refused_when_written_and_when_read(tmp_path: Path) -> None:
    policy = make_policy(num_features=3)
    options = {"policy": policy, "golden": golden_as_trained(policy), "gate_report": make_report(policy), **OPTIONS}
    with pytest.raises(IntegrityError, match=r"spaces\.names is .*expected 3 texts"):
        write_bundle(tmp_path, **options, observation_names=("a", "b"))
    bundle = write_bundle(tmp_path, **options, observation_names=("a", "b", "c"), observation_units=("m", "", "s"))
    assert bundle.manifest["spaces"] == {**policy.spaces.to_json(), "names": ["a", "b", "c"], "units": ["m", "", "s"]}
    for labels in (["a", "b"], "abc", [1, 2, 3]):
        path = _with_manifest(bundle.path, spaces={**policy.spaces.to_json(), "units": labels})
        with pytest.raises(IntegrityError, match=r"spaces\.units is .*expected 3 texts"):
            read_bundle(path)
        path.rename(bundle.path)


def test_a_directory_with_another_name_needs_the_digest(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, make_policy())
    path = bundle.path.rename(tmp_path / "policy")
    with pytest.raises(IntegrityError, match="must be named by the digest, or the expected digest be given"):
        read_bundle(path)
    assert read_bundle(path, expected_digest=bundle.digest).digest == bundle.digest


def test_what_is_no_plain_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, make_policy())
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)):
        (bundle.path / "gates.json").rename(tmp_path / "kept")
        make(bundle.path / "gates.json")
        with pytest.raises(IntegrityError, match=r"gates\.json is missing or not a plain file"):
            read_bundle(bundle.path)
        (bundle.path / "gates.json").rename(tmp_path / "other")
        (tmp_path / "kept").rename(bundle.path / "gates.json")
        shutil.rmtree(tmp_path / "other") if (tmp_path / "other").is_dir() else (tmp_path / "other").unlink()
    assert read_bundle(bundle.path).digest == bundle.digest  # the control
    (tmp_path / bundle.digest[::-1]).symlink_to(bundle.path)
    with pytest.raises(IntegrityError, match="not a directory of its own"):
        read_bundle(tmp_path / bundle.digest[::-1], expected_digest=bundle.digest)


def test_a_file_beyond_its_limit_is_refused_unread(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, make_policy())
    with open(bundle.path / "reference.parquet", "r+b") as file:
        file.truncate(1 << 40)  # sparse: who read it would need a terabyte
    with pytest.raises(IntegrityError, match=r"reference\.parquet has 1099511627776 bytes, the limit is"):
        read_bundle(bundle.path)


def _with_manifest(path: Path, **changes: Any) -> Path:
    """Change keys of a manifest and rename the bundle to the digest that it has then."""
    manifest = parse_json((path / MANIFEST).read_bytes(), "manifest") | changes
    data = canonical_json(manifest)
    (path / MANIFEST).write_bytes(data)
    return path.rename(path.parent / sha256_hex(data))


def _rehash(path: Path) -> Path:
    """Put every hash of a tampered bundle right and give it the name that its manifest hashes to."""
    manifest = parse_json((path / MANIFEST).read_bytes(), "manifest")
    for name in FILES:
        data = (path / name).read_bytes()
        manifest["files"][name] = {"sha256": sha256_hex(data), "size_bytes": len(data)}
    data = canonical_json(manifest)
    (path / MANIFEST).write_bytes(data)
    return path.rename(path.parent / sha256_hex(data))
