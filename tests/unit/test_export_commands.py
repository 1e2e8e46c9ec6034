"""The commands around exports and signatures, from a new key to its revocation, as somebody types them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from policies.errors import ConfigError, SignatureRefused
from policies.exports import load_export
from policies.registry import Registry
from policies.storage import open_storage
from tests.bundles import make_registry
from tests.command_line import run_trimtab
from trimtab.cli import app

LOOP_FILE = "examples/cartpole.yaml"


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """Return a storage root with a champion, version 1, and a version 2."""
    root = tmp_path / "data"
    make_registry(open_storage(root).registry("cartpole"), num_versions=2)
    return root


@pytest.fixture
def trimtab(storage: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs a command in this process, where torch is imported once, and returns its document."""

    def run(*arguments: str | Path) -> dict[str, Any]:
        capsys.readouterr()
        assert app([*map(str, arguments), "--storage", str(storage), "--json"], standalone_mode=False) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_from_a_new_key_to_its_revocation(trimtab: Any, storage: Path, tmp_path: Path) -> None:
    made = trimtab("keys", "new", "release")
    unsigned = run_trimtab("verify", LOOP_FILE, "--version", "2", storage=storage)
    assert unsigned.returncode == 1 and "has no signature" in unsigned.stderr
    with pytest.raises(SignatureRefused, match="trimtab keys trust"):
        trimtab("sign", LOOP_FILE, "--version", "2", "--key", "release")

    trusted = trimtab("keys", "trust", made["public_key"], "--expires", "2999-12-31")
    assert (trusted["name"], trusted["expires_at"]) == ("release", 32503593600.0)  # `date -u -d 2999-12-31 +%s`
    trimtab("sign", LOOP_FILE, "--version", "2", "--key", "release")
    verified = trimtab("verify", LOOP_FILE, "--version", "2")
    assert (verified["version"], verified["key"]["name"]) == (2, "release")

    export = tmp_path / "export"
    arguments = ("export", LOOP_FILE, "--format", "torchscript", "--output", export, "--key", "release")
    written = trimtab(*arguments)
    assert trimtab("verify", LOOP_FILE, "--export", export)["sha256"] == written["sha256"]
    with pytest.raises(ConfigError, match="exists already"):
        trimtab(*arguments)

    trimtab("keys", "revoke", "release", "--reason", "drill")
    for what in (("--version", 2), ("--export", export)):
        with pytest.raises(SignatureRefused, match="was revoked: drill"):
            trimtab("verify", LOOP_FILE, *what)
    assert [key["revoked_because"] for key in trimtab("keys", "list")["keys"]] == ["drill"]


def test_an_exported_champion_answers_in_onnxruntime_without_us(trimtab: Any, storage: Path, tmp_path: Path) -> None:
    written = trimtab("export", LOOP_FILE, "--format", "onnx", "--output", tmp_path / "export")
    champion = Registry(open_storage(storage).registry("cartpole")).bundle(1)
    assert written["bundle_digest"] == champion.digest
    session = onnxruntime.InferenceSession(tmp_path / "export" / "policy.onnx", providers=["CPUExecutionProvider"])
    obs_ND = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    (distributions_NP,) = session.run(["distributions"], {"observations": obs_ND})
    assert distributions_NP == pytest.approx(champion.policy.distributions(obs_ND), abs=1e-5)


def test_all_formats_are_written_by_one_command(trimtab: Any, storage: Path, tmp_path: Path) -> None:
    arguments = ("export", LOOP_FILE, "--format", "all", "--output", tmp_path / "exports")
    written = trimtab(*arguments)["exports"]
    assert [export["format"] for export in written] == ["onnx", "pt2", "torchscript"]
    for export in written:
        assert load_export(tmp_path / "exports" / export["format"], expected_sha256=export["sha256"]).format == export["format"]
    with pytest.raises(ConfigError, match="exists already"):
        trimtab(*arguments)


def test_a_bundle_is_exported_from_where_it_lies(trimtab: Any, storage: Path, tmp_path: Path) -> None:
    bundle = Registry(open_storage(storage).registry("cartpole")).bundle(2)
    arguments = ("export", LOOP_FILE, "--format", "pt2", "--bundle", bundle.path)
    assert trimtab(*arguments, "--output", tmp_path / "export")["bundle_digest"] == bundle.digest
    with pytest.raises(ConfigError, match="give one of them"):
        trimtab(*arguments, "--version", 1, "--output", tmp_path / "other")
