"""Checkpoints and runs: damage is detected and told, the previous generation is used, and nothing of a run is mixed up."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from policies.errors import ConfigError, IntegrityError, NotFound, UsageError
from policies.policy import Architecture
from policies.storage import Storage, open_storage
from training.checkpoint import CURRENT, MANIFEST, STATE, TENSORS, load_checkpoint, load_policy, save_checkpoint
from training.config import EnvironmentConfig, TrainingConfig
from training.environment import read_spaces
from training.learner_state import LearnerState
from training.network import Layout
from training.runs import MetricsLog, RunConfig, change_config, create_run, lock_run, new_run_id, open_run, read_config

CONFIG = RunConfig(EnvironmentConfig(id="CartPole-v1"), TrainingConfig(seed=5))
LAYOUT = Layout(read_spaces(CONFIG.environment), Architecture((8,)))


def save(run_dir: Path, update: int, *, keep: int = 3) -> Path:
    state = LearnerState.initial(LAYOUT, update)
    state.update = update
    metadata = {**state.counters(), "spaces": LAYOUT.spaces.to_json(), "network": LAYOUT.architecture.to_json()}
    return save_checkpoint(run_dir, update=update, tensors=state.to_tensors(LAYOUT), state=metadata, keep=keep)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for update in (10, 20):
        save(tmp_path, update)
    return tmp_path


def test_what_was_saved_is_loaded(run_dir: Path):
    checkpoint = load_checkpoint(run_dir)
    assert checkpoint.path.name == "gen-000020" and checkpoint.state["update"] == 20 and checkpoint.skipped == ()
    state = LearnerState.from_tensors(LAYOUT, checkpoint.tensors, checkpoint.state)
    assert np.array_equal(state.parameters_P, LearnerState.initial(LAYOUT, 20).parameters_P)
    policy, metadata = load_policy(run_dir)
    assert policy.sha256() == state.weights().policy(LAYOUT).sha256() and metadata == checkpoint.state


@pytest.mark.parametrize("name", [TENSORS, STATE, MANIFEST])
def test_every_flipped_byte_is_detected_and_the_previous_generation_used(run_dir: Path, name: str):
    path = run_dir / "checkpoints" / "gen-000020" / name
    original = path.read_bytes()
    for position in range(0, len(original), max(1, len(original) // 50)):
        damaged = bytearray(original)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        checkpoint = load_checkpoint(run_dir)
        assert checkpoint.path.name == "gen-000010", f"byte {position} of {name}"
        assert len(checkpoint.skipped) == 1 and str(path) in checkpoint.skipped[0]
    path.write_bytes(original)
    assert load_checkpoint(run_dir).path.name == "gen-000020"  # negative control: undamaged, it is used


@pytest.mark.parametrize("name", [TENSORS, STATE, MANIFEST])
def test_a_truncated_or_missing_file_is_detected(run_dir: Path, name: str):
    path = run_dir / "checkpoints" / "gen-000020" / name
    path.write_bytes(path.read_bytes()[:-1])
    assert load_checkpoint(run_dir).path.name == "gen-000010"
    path.unlink()
    assert load_checkpoint(run_dir).path.name == "gen-000010"


def test_the_message_has_both_hashes(run_dir: Path):
    path = run_dir / "checkpoints" / "gen-000020" / TENSORS
    expected = json.loads((path.parent / MANIFEST).read_bytes())["files"][TENSORS]["sha256"]
    path.write_bytes(b"something else")
    message = load_checkpoint(run_dir).skipped[0]
    found = "f41f3fa625ff120ddca7ef456bf66371ecea23c129f4e4c32367101edb516cf8"  # printf 'something else' | sha256sum
    assert f"SHA-256 {found}, its manifest says {expected}" in message


def test_a_damaged_pointer_falls_back_to_the_newest_generation(run_dir: Path):
    (run_dir / "checkpoints" / CURRENT).write_bytes(b"{")
    checkpoint = load_checkpoint(run_dir)
    assert checkpoint.path.name == "gen-000020" and CURRENT in checkpoint.skipped[0]


def test_when_all_are_damaged_each_is_named(run_dir: Path):
    for generation in ("gen-000010", "gen-000020"):
        (run_dir / "checkpoints" / generation / STATE).write_bytes(b"{}")
    with pytest.raises(IntegrityError, match=r"(?s)gen-000020.*gen-000010"):
        load_checkpoint(run_dir)


def test_a_run_without_checkpoints_says_so(tmp_path: Path):
    with pytest.raises(NotFound, match="no checkpoint"):
        load_checkpoint(tmp_path)


def test_only_the_newest_generations_are_kept(tmp_path: Path):
    for update in (0, 5, 10, 15):
        save(tmp_path, update, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [CURRENT, "gen-000010", "gen-000015"]


def test_a_generation_can_be_made_again_after_a_fallback(run_dir: Path):
    (run_dir / "checkpoints" / "gen-000020" / TENSORS).write_bytes(b"")
    assert load_checkpoint(run_dir).path.name == "gen-000010"
    save(run_dir, 20)
    assert load_checkpoint(run_dir).path.name == "gen-000020"


def test_leftovers_of_a_killed_writer_are_ignored_and_removed(run_dir: Path):
    leftover = run_dir / "checkpoints" / ".tmp-abc"
    shutil.copytree(run_dir / "checkpoints" / "gen-000010", leftover)
    assert load_checkpoint(run_dir).path.name == "gen-000020"
    save(run_dir, 30)
    assert not leftover.exists()


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
    change_config(run_dir, RunConfig(CONFIG.environment, longer))
    assert read_config(run_dir).training == longer
    other = longer.model_copy(update={"lr": 0.5, "seed": 6})
    with pytest.raises(ConfigError, match=r"lr 0\.\d+ -> 0\.5, .*seed 5 -> 6"):
        change_config(run_dir, RunConfig(CONFIG.environment, other))
    assert read_config(run_dir).training == longer


def test_metrics_of_updates_that_are_made_again_are_removed(tmp_path: Path):
    log = MetricsLog(tmp_path, after_update=0)
    for update in (1, 2, 3):
        log.append({"update": update, "session": 1})
    log.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"update": 4, "ses')  # killed in the middle of a line
    log = MetricsLog(tmp_path, after_update=2)
    log.append({"update": 3, "session": 2})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["update"], row["session"]) for row in rows] == [(1, 1), (2, 1), (3, 2)]


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
    save(create_run(storage, "good", CONFIG), 20)
    repository = Path(__file__).parents[2]
    command = [sys.executable, "examples/flip_policy.py", "--storage", str(storage.root), "--run"]
    flipped = subprocess.run([*command, "good"], cwd=repository, capture_output=True, text=True, timeout=60, check=True)
    run_id = flipped.stdout.strip()
    good, _ = load_policy(open_run(storage, "good"))
    bad, flipped_metadata = load_policy(open_run(storage, run_id))
    obs_BD = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    assert np.array_equal(bad.logits(obs_BD), -good.logits(obs_BD))
    assert flipped_metadata["run_id"] == run_id and flipped_metadata["flipped_from"] == "good"
    assert read_config(open_run(storage, run_id)) == CONFIG
    unknown = subprocess.run([*command, "unknown"], cwd=repository, capture_output=True, text=True, timeout=60)
    assert unknown.returncode == 2 and "newest runs" in unknown.stderr


def test_config_errors_name_sizes_that_fit():
    with pytest.raises(ValueError, match=r"minibatch_size <= 64 or rollout_fragment_length >= 63"):
        TrainingConfig(num_shards=1, num_env_runners=1, num_envs_per_shard=8, rollout_fragment_length=8, minibatch_size=500)
    with pytest.raises(ValueError, match=r"num_env_runners <= 2 or num_shards >= 4"):
        TrainingConfig(num_shards=2, num_env_runners=4)
