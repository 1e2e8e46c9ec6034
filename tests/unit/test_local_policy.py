"""Does a bundle answer in any process as it does when it is served, with nothing installed but numpy?"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import trimtab
from policies.bundle import write_bundle
from policies.errors import IntegrityError, RequestInvalid, ServiceUnavailable
from policies.network import Architecture, Gaussian
from policies.observations import Box, Categories, Group
from policies.policy import Policy
from policies.spaces import Choices, Numbers, Spaces
from tests.bundles import golden_as_trained, make_report, policy_on

ROOT = Path(__file__).parents[2]
OBSERVATION = Box(np.float32([-1, -np.inf]), np.float32([1, np.inf]))
GROUP = Group((OBSERVATION, Categories((3,), (0,), ())), ("a", "b"))
SPACES = {
    "choice": Spaces(OBSERVATION, Choices("discrete", (3,), (5,), ())),
    "numbers": Spaces(OBSERVATION, Numbers(np.float32([-1, 0]), np.float32([1, 5]))),
    "masked": Spaces(GROUP, Choices("multi_discrete", (2, 2), (0, 0), (2,)), has_mask=True),
}


def _load(tmp_path: Path, kind: str, mode: str = "sample") -> tuple[trimtab.LocalPolicy, Policy]:
    spaces = SPACES[kind]
    policy = policy_on(spaces, Architecture((8,), gaussian=Gaussian() if kind == "numbers" else None))
    golden = golden_as_trained(policy, np.ones((32, 4), bool) if spaces.has_mask else None)
    options = {"gate_report": make_report(policy), "mode": mode, "origin": {}, "created_at": 1.0}
    return trimtab.load(write_bundle(tmp_path, policy=policy, golden=golden, **options).path), policy


@pytest.mark.parametrize("mode", ["greedy", "sample"])
@pytest.mark.parametrize("kind", ["choice", "numbers"])
def test_it_decides_as_the_served_policy_does(tmp_path: Path, kind: str, mode: str) -> None:
    local, policy = _load(tmp_path, kind, mode)
    assert local.serving_mode == mode and local.spaces.to_json() == policy.spaces.to_json()
    for row in range(20):
        obs_D, seed = np.float32([0.1 * (row % 10), row]), trimtab.seed_of(f"decision {row}")
        parameters_P = policy.distributions(obs_D[None])[0]
        assert np.array_equal(local.distribution(obs_D), parameters_P)
        expected = policy.distribution.choose(parameters_P, mode, seed)
        assert local.act(obs_D, seed=seed) == local.act(obs_D.tolist(), seed=seed, mode=mode) == expected


def test_without_a_seed_samples_differ_and_greedy_ones_do_not(tmp_path: Path) -> None:
    local, _ = _load(tmp_path, "choice")
    # The least probable of three actions has a share of at least 0.05 here: 200 draws miss it once in 28,000 runs.
    assert local.distribution([0, 0]).min() > 0.05
    assert {local.act([0, 0]).action for _ in range(200)} == {5, 6, 7}
    assert len({local.act([0, 0], mode="greedy") for _ in range(20)}) == 1


def test_an_environments_own_observations_and_masks_are_taken(tmp_path: Path) -> None:
    local, _ = _load(tmp_path, "masked")
    mask = np.array([[1, 0], [0, 1]], np.int8)
    observation = {"a": np.float32([0.5, 3]), "b": np.int64(2)}
    for _ in range(10):
        assert local.act(observation, action_mask=mask) == ([0, 1], 1.0)
        assert local.act({**observation, "action_mask": mask}) == ([0, 1], 1.0)
    assert {tuple(local.act(observation, action_mask=[1] * 4).action) for _ in range(200)} > {(0, 1)}  # the control


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"observation": [0]}, "observation has 1 items"),
        ({"observation": [2, 0]}, r"observation\[0\] = 2 is outside \[-1, 1\]"),
        ({"observation": np.float32([np.nan, 0])}, "is outside"),
        ({"observation": [0, 0], "action_mask": [1, 1, 1]}, "trained without masks"),
        ({"observation": [0, 0], "mode": "random"}, "mode is 'random', expected greedy or sample"),
        ({"observation": [0, 0], "seed": -1}, "seed is -1, expected an integer from 0"),
        ({"observation": [0, 0], "seed": 1 << 53}, "expected an integer from 0"),
        ({"observation": [0, 0], "seed": 0.5}, "seed is 0.5"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_what_was_expected(tmp_path: Path, arguments: dict, words: str) -> None:
    local, _ = _load(tmp_path, "choice")
    with pytest.raises(RequestInvalid, match=words):
        local.act(**arguments)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_a_network_that_overflows_gives_an_error_and_no_action(tmp_path: Path) -> None:
    spaces = SPACES["choice"]
    policy = policy_on(spaces, Architecture((8,), "relu"))
    policy.tensors["normaliser.scale"][:] = 100
    options = {"gate_report": make_report(policy), "mode": "greedy", "origin": {}, "created_at": 1.0}
    local = trimtab.load(write_bundle(tmp_path, policy=policy, golden=golden_as_trained(policy), **options).path)
    local.act([0, 1e6])  # the control
    with pytest.raises(ServiceUnavailable, match="overflows for this observation"):
        local.act([0, 3e38])


def test_another_digest_than_expected_is_refused(tmp_path: Path) -> None:
    local, _ = _load(tmp_path, "choice")
    path = (tmp_path / local.digest).rename(tmp_path / "renamed")
    assert trimtab.load(str(path), expected_digest=local.digest).digest == local.digest
    with pytest.raises(IntegrityError, match="expected 0000"):
        trimtab.load(path, expected_digest="0" * 64)


# A finder before all others: the installed packages are there, but whoever asks for one of them gets an error.
ONLY_NUMPY = """
import sys

class OnlyNumpy:
    def find_spec(self, name, path=None, target=None):
        first = name.split(".")[0]
        if first not in sys.stdlib_module_names | {"numpy", "policies", "trimtab"}:
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, OnlyNumpy())
"""
ASK = """
import trimtab
policy = trimtab.load(sys.argv[1])
print(policy.digest, *policy.act([0.0, 0.0, 0.0, 0.0], seed=1 << 52))
assert not {"torch", "ray", "requests", "pyarrow", "safetensors"} & set(sys.modules)
"""


def _run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("version", [1, 2])
def test_a_bundle_is_loaded_and_asked_with_nothing_but_numpy(version: int) -> None:
    (path,) = (path for path in (ROOT / "tests" / "golden" / f"bundle-v{version}").iterdir() if path.is_dir())
    answer = _run(ONLY_NUMPY + ASK, str(path))
    assert answer.returncode == 0, answer.stderr
    here = trimtab.load(path).act([0.0, 0.0, 0.0, 0.0], seed=1 << 52)
    assert answer.stdout.split() == [path.name, str(here.action), str(here.propensity)]
    # The controls: the hook does refuse, also what the package itself can import.
    assert "requests is not there" in _run(ONLY_NUMPY + "import trimtab; trimtab.Client").stderr
    assert "pyarrow is not there" in _run(ONLY_NUMPY + "import pyarrow").stderr


def test_the_face_has_the_client_too_and_nothing_that_does_not_exist() -> None:
    from trimtab.client import Client

    assert trimtab.Client is Client
    with pytest.raises(AttributeError, match="has no attribute 'Server'"):
        _ = trimtab.Server
