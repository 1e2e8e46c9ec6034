"""Does a wrong loop file name the key and what is allowed?"""

from pathlib import Path

import pytest

from policies.errors import ConfigError
from trimtab.loop_file import LoopConfig, load_loop_file

ROOT = Path(__file__).parents[2]
MINIMAL = "name: x\nenvironment: {id: CartPole-v1}\nfeedback: {outcome_range: [0, 500]}\ntraining: {target_return: 475}\n"


def _load(tmp_path: Path, text: str, **kwargs) -> LoopConfig:
    path = tmp_path / "loop.yaml"
    path.write_text(text)
    return load_loop_file(path, **kwargs)


def test_the_example_is_valid_and_overrides_win(tmp_path: Path) -> None:
    loop = load_loop_file(
        ROOT / "examples/cartpole.yaml",
        overrides=["training.seed=7", "serving.port=8123", "release.weights=[0.5, 1.0]"],
        storage="d",
    )
    assert (loop.training.seed, loop.serving.port, loop.release.weights, loop.storage) == (7, 8123, (0.5, 1.0), "d")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "trainig: {}\n", r"trainig: unknown key; did you mean 'training'\? allowed: name, environment"),
        (
            MINIMAL.replace("target_return: 475", "learning_rate: 1"),
            r"training\.learning_rate: unknown key; .*allowed: algorithm, rllib, lr, gamma",
        ),
        (MINIMAL + "gates: {safety: {constraint: a}}\n", r"gates\.safety\.constraint: unknown key; did you mean 'constraints'"),
        (MINIMAL + "serving: {max_body_bytes: 9000000}\n", r"serving\.max_body_bytes: .*less than or equal to 8388608.*9000000"),
        (MINIMAL + "serving: {port: many}\n", r"serving\.port: .*integer.*'many'"),
        (MINIMAL.replace("name: x", "name: ../evil"), "name: .*'../evil'"),
        ("name: x\n", "environment: this key is required"),
        (MINIMAL.replace("[0, 500]", "[500, 0]"), r"feedback\.outcome_range.*500.*must be below"),
        (MINIMAL.replace("target_return: 475", "seed: 1"), r"target_return.*gates\.performance\.min_return"),
        ("- a\n- b\n", "must be a mapping"),
        ("name: [x\n", "is not YAML"),
    ],
)
def test_a_wrong_file_names_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _load(tmp_path, text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.seed", "expected section.key=value"),
        ("training.sede=1", r"training\.sede: unknown key; did you mean 'seed'"),
        ("name.x=1", "'name' is not a section"),
        ("training.seed=[", "not YAML"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _load(tmp_path, MINIMAL, overrides=[override])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read: No such file"):
        load_loop_file(tmp_path / "nowhere.yaml")
