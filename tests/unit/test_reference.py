"""Are the steps of a reference those of the judged episodes, and nothing else?"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from policies.bundle import read_bundle, write_bundle
from policies.errors import IntegrityError, NotFound
from policies.reference import (
    MAX_STEPS,
    Reference,
    choose_steps,
    decode_reference,
    encode_reference,
    no_steps,
    read_reference,
)
from policies.spaces import Numbers, Spaces
from tests.bundles import golden_as_trained, make_policy, make_report, vector_spaces

SPACES = vector_spaces(3, 2)
REAL = Spaces(SPACES.observation, Numbers(np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32)))


def _steps(num_steps: int, *, num_episodes: int = 4) -> dict[str, np.ndarray]:
    """Return steps of episodes that run side by side; every number of a step says which one it is."""
    step_N = np.arange(num_steps)
    return {
        "obs_ND": np.stack([step_N, step_N + 0.25, -step_N], axis=1).astype(np.float32),
        "actions_N": step_N % 2,
        "rewards_N": step_N.astype(np.float32) / 2,
        "episode_N": step_N % num_episodes,
    }


def _equal(a: Reference, b: Reference) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values()))


def test_steps_are_kept_episode_by_episode_in_their_order() -> None:
    reference = choose_steps(**_steps(10), seed=0)
    # ten steps of four episodes that take turns: 0, 4, 8 are of the first, and so on
    assert reference.observations_ND[:, 0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 3, 7]
    assert reference.episodes_N.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert reference.rewards_N.tolist() == [0, 2, 4, 0.5, 2.5, 4.5, 1, 3, 1.5, 3.5]


def test_of_many_steps_some_of_every_episode_are_drawn() -> None:
    num_steps = 2 * MAX_STEPS
    reference = choose_steps(**_steps(num_steps), seed=0)
    assert len(reference.rewards_N) == MAX_STEPS and len(np.unique(reference.rewards_N)) == MAX_STEPS
    # half of 10,000 per episode, hypergeometric: the deviation is about sqrt(10000 * 0.5 * 0.5 * 0.75) = 43
    assert np.abs(np.bincount(reference.episodes_N) - MAX_STEPS / 4).max() < 4 * 43
    every_second = {key: array[::2] for key, array in _steps(num_steps).items()}
    assert len(np.unique(every_second["episode_N"])) == 2  # what equal distances would have kept


def test_of_large_observations_fewer_steps_are_kept() -> None:
    obs_ND = np.zeros((100, 1 << 18), np.float16)
    steps = {**_steps(100), "obs_ND": obs_ND}
    assert len(choose_steps(**steps, seed=0).rewards_N) == 15  # 4 Mi numbers, by 2^18 + 1 of each


@pytest.mark.parametrize("spaces", [SPACES, REAL])
def test_a_reference_is_read_back_as_it_was_written(spaces: Spaces) -> None:
    steps = _steps(50)
    if spaces is REAL:
        steps["actions_N"] = np.random.default_rng(0).random((50, 2, 2), np.float32)
    reference = choose_steps(**steps, seed=0)
    assert reference.actions_NK.shape == (50, spaces.action.num_components)
    assert _equal(decode_reference(encode_reference(reference, spaces), spaces, "r"), reference)
    assert _equal(decode_reference(encode_reference(no_steps(spaces), spaces), spaces, "r"), no_steps(spaces))


def test_any_reader_of_parquet_reads_it(tmp_path: Path) -> None:
    (tmp_path / "reference.parquet").write_bytes(encode_reference(choose_steps(**_steps(3), seed=0), SPACES))
    table = pyarrow.parquet.read_table(tmp_path / "reference.parquet")
    assert table.to_pylist()[2] == {"observation": [2.0, 2.25, -2.0], "action": [0], "reward": 1.0, "episode": 2}
    assert table.schema.metadata == {b"schema_version": b"1"}


def test_steps_of_other_spaces_or_without_a_number_are_not_written() -> None:
    reference = choose_steps(**_steps(5), seed=0)
    with pytest.raises(IntegrityError, match=r"expected .*observations_ND"):
        encode_reference(reference, vector_spaces(4, 2))
    with pytest.raises(IntegrityError, match=r"expected .*actions_NK"):
        encode_reference(reference, REAL)
    with pytest.raises(IntegrityError, match="rewards_N holds NaN"):
        encode_reference(replace(reference, rewards_N=np.full(5, np.nan, np.float32)), SPACES)


def _written(table: pyarrow.Table) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def test_a_file_that_is_anything_else_is_refused() -> None:
    data = encode_reference(choose_steps(**_steps(5), seed=0), SPACES)
    table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    decode_reference(_written(table), SPACES, "r")  # the control
    nothing = pyarrow.array([None] * 5, table.schema.field("observation").type)
    infinite = pyarrow.array([np.inf] * 5, pyarrow.float32())
    hostile = {
        "r cannot be read": data[:-1],
        "r has the columns": _written(table.drop_columns(["reward"])),
        "r has the columns .*": _written(table.replace_schema_metadata({"schema_version": "2"})),
        "r has 25000 steps": _written(pyarrow.concat_tables([table] * 5000)),
        "without an observation": _written(table.set_column(0, table.schema.field(0), nothing)),
        "rewards_N holds NaN or infinity": _written(table.set_column(2, table.schema.field(2), infinite)),
    }
    for words, damaged in hostile.items():
        with pytest.raises(IntegrityError, match=words):
            decode_reference(damaged, SPACES, "r")


def test_a_bundle_carries_its_reference_and_one_of_the_first_format_has_none(tmp_path: Path) -> None:
    policy = make_policy(num_features=3)
    reference = choose_steps(**_steps(20), seed=0)
    options = {"policy": policy, "golden": golden_as_trained(policy), "gate_report": make_report(policy), "mode": "greedy"}
    bundle = write_bundle(tmp_path, **options, origin={}, created_at=1.0, reference=reference)
    assert _equal(read_reference(bundle), reference)
    path = bundle.path / "reference.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"reference\.parquet: sha256 is"):
        read_reference(bundle)
    (old,) = (path for path in (Path(__file__).parents[1] / "golden" / "bundle-v1").iterdir() if path.is_dir())
    with pytest.raises(NotFound, match=r"has no reference\.parquet"):
        read_reference(read_bundle(old))
