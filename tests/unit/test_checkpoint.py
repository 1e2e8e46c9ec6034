"""Checkpoints and runs: what was saved is loaded, and nothing of a run is mixed up. Damage: `tests/chaos/`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from actors.controller import _resume_run
from policies.errors import ConfigError, NotFound, UsageError
from policies.integrity import canonical_json
from policies.network import Architecture
from policies.storage import Storage, open_storage
from tests.checkpoints import CONFIG, LAYOUT, save_generation
from training.checkpoint import CURRENT, MANIFEST, SCHEMA_VERSION, TENSORS, load_checkpoint, load_policy
from training.config import TrainingConfig
from training.learner_state import LearnerState
from training.network import Layout
from training.runs import RunConfig, change_config, create_run, lock_run, new_run_id, open_run, read_config, require_resumable


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for update in (10, 20):
        save_generation(tmp_path, update)
    return tmp_path


def test_what_was_saved_is_loaded(run_dir: Path):
    checkpoint = load_checkpoint(run_dir)
    assert checkpoint.path.name == "gen-000020" and checkpoint.state["update"] == 20 and checkpoint.skipped == ()
    state = LearnerState.from_tensors(LAYOUT, checkpoint.tensors, checkpoint.state)
    assert np.array_equal(state.parameters_P, LearnerState.initial(LAYOUT, 20).parameters_P)
    policy, metadata = load_policy(run_dir)
    assert policy.sha256() == state.weights().policy(LAYOUT).sha256() and metadata == checkpoint.state


def test_the_message_has_both_hashes(run_dir: Path):
    path = run_dir / "checkpoints" / "gen-000020" / TENSORS
    expected = json.loads((path.parent / MANIFEST).read_bytes())["files"][TENSORS]["sha256"]
    path.write_bytes(b"something else")
    message = load_checkpoint(run_dir).skipped[0]
    found = "f41f3fa625ff120ddca7ef456bf66371ecea23c129f4e4c32367101edb516cf8"  # printf 'something else' | sha256sum
    assert f"SHA-256 {found}, its manifest says {expected}" in message


def test_a_run_without_checkpoints_says_so(tmp_path: Path):
    with pytest.raises(NotFound, match="no checkpoint"):
        load_checkpoint(tmp_path)


def test_only_the_newest_generations_are_kept(tmp_path: Path):
    for update in (0, 5, 10, 15):
        save_generation(tmp_path, update, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [CURRENT, "gen-000010", "gen-000015"]


def test_a_newer_versions_checkpoint_with_files_of_its_own_is_no_damage(run_dir: Path):
    directory = run_dir / "checkpoints"
    manifest = json.loads((directory / "gen-000020" / MANIFEST).read_bytes())
    newer = canonical_json({**manifest, "schema_version": SCHEMA_VERSION + 1, "files": {"replay_buffer.bin": {}}})
    (directory / "gen-000020" / MANIFEST).write_bytes(newer)
    (directory / CURRENT).unlink()  # it would name the manifest's digest
    with pytest.raises(UsageError, match=r"gen-000020.*, this Trimtab reads \d+; upgrade Trimtab"):
        load_checkpoint(run_dir)


def test_leftovers_of_a_killed_writer_are_ignored_and_removed(run_dir: Path):
    leftovers = [run_dir / "checkpoints" / ".tmp-abc", run_dir / "checkpoints" / ".tmp-def"]
    shutil.copytree(run_dir / "checkpoints" / "gen-000010", leftovers[0])
    leftovers[1].write_bytes(b"{")  # a pointer that was not finished
    assert load_checkpoint(run_dir).path.name == "gen-000020"
    save_generation(run_dir, 30)
    assert not any(leftover.exists() for leftover in leftovers)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "storage")


def test_run_config_round_trips(storage: Storage):
    run_dir = create_run(storage, "first", CONFIG)
    assert open_run(storage, "first") == run_dir and read_config(run_dir) == CONFIG


def test_run_ids_are_refused_when_taken_unknown_or_no_names(storage: Storage):
    create_run(storage, "first", CONFIG)
    with pytest.raises(UsageError, match="trimtab resume --run first"):
        create_run(storage, "first", CONFIG)
    with pytest.raises(NotFound, match="newest runs: first"):
        open_run(storage, "second")
    with pytest.raises(UsageError, match="must match"):
        create_run(storage, "../elsewhere", CONFIG)
    assert new_run_id(0.0).startswith("19700101-000000-") and new_run_id(0.0) != new_run_id(0.0)


def test_resume_accepts_settings_that_do_not_change_the_bits_and_lists_the_others(storage: Storage):
    run_dir = create_run(storage, "first", CONFIG)
    longer = CONFIG.training.model_copy(update={"max_env_steps": 7, "num_env_runners": 1})
    require_resumable(run_dir, RunConfig(CONFIG.environment, longer))
    change_config(run_dir, RunConfig(CONFIG.environment, longer))
    assert read_config(run_dir).training == longer
    other = longer.model_copy(update={"lr": 0.5, "seed": 6})
    with pytest.raises(ConfigError, match=r"lr 0\.\d+ -> 0\.5, .*seed 5 -> 6"):
        require_resumable(run_dir, RunConfig(CONFIG.environment, other))


def test_a_run_whose_networks_code_was_changed_is_not_resumed(storage: Storage):
    save_generation(create_run(storage, "first", CONFIG), 10)
    other = Layout(LAYOUT.spaces, Architecture((9,)))
    with pytest.raises(ConfigError, match=r"parameters .*\(4, 8\).* now has .*\(4, 9\).*restore the code"):
        _resume_run(storage, "first", CONFIG, other, force=True, on_message=print)


def test_a_run_has_one_writer_at_a_time(tmp_path: Path):
    held = lock_run(tmp_path, timeout_s=1)
    program = f"from pathlib import Path; from training.runs import lock_run; lock_run(Path({str(tmp_path)!r}), timeout_s=0.1)"
    repository = Path(__file__).parents[2]
    run = [sys.executable, "-c", program]
    refused = subprocess.run(run, cwd=repository, env=os.environ, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1 and "is being written by another process" in refused.stderr
    held.close()
    assert subprocess.run(run, cwd=repository, env=os.environ, timeout=60).returncode == 0


def test_flip_policy_example_makes_a_run_that_prefers_the_opposite(storage: Storage):
    save_generation(create_run(storage, "good", CONFIG), 20)
    repository = Path(__file__).parents[2]
    command = [sys.executable, "examples/flip_policy.py", "--storage", str(storage.root), "--run"]
    flipped = subprocess.run([*command, "good"], cwd=repository, capture_output=True, text=True, timeout=60, check=True)
    run_id = flipped.stdout.strip()
    good, _ = load_policy(open_run(storage, "good"))
    bad, flipped_metadata = load_policy(open_run(storage, run_id))
    obs_BD = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    assert np.array_equal(bad.outputs(obs_BD), -good.outputs(obs_BD))
    assert flipped_metadata["run_id"] == run_id and flipped_metadata["flipped_from"] == "good"
    assert read_config(open_run(storage, run_id)) == CONFIG
    unknown = subprocess.run([*command, "unknown"], cwd=repository, capture_output=True, text=True, timeout=60)
    assert unknown.returncode == 2 and "newest runs" in unknown.stderr


def test_config_errors_name_sizes_that_fit():
    with pytest.raises(ValueError, match=r"minibatch_size <= 64 or rollout_fragment_length >= 63"):
        TrainingConfig(num_shards=1, num_env_runners=1, num_envs_per_shard=8, rollout_fragment_length=8, minibatch_size=500)
    with pytest.raises(ValueError, match=r"num_env_runners <= 2 or num_shards >= 4"):
        TrainingConfig(num_shards=2, num_env_runners=4)
