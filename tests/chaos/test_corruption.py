"""Damage to the files of a run: it is noticed and named, the newest undamaged generation is used, and the run goes on."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from policies.errors import ConfigError, IntegrityError
from policies.integrity import canonical_json, parse_json, sha256_hex
from policies.storage import open_storage
from tests.checkpoints import CONFIG, generation, save_generation
from training.checkpoint import BEST, CURRENT, MANIFEST, SCHEMA_VERSION, STATE, TENSORS, Checkpoint, load_checkpoint
from training.metrics import MetricsLog
from training.runs import METRICS, change_config, create_run, read_config, require_resumable

FILES = (TENSORS, BEST, STATE, MANIFEST)
PREVIOUS, NEWEST = "gen-000020", "gen-000030"
NUM_FLIPS, NUM_LENGTHS = 400, 60  # in one file; JSON files are short: no byte of them is left out


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for update in (10, 20, 30):
        save_generation(tmp_path, update)
    return tmp_path


@pytest.fixture
def checkpoints(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def load(run_dir: Path, expected: str) -> Checkpoint:
    """Load, and assert that it is the expected generation, bit for bit."""
    checkpoint = load_checkpoint(run_dir)
    assert checkpoint.path.name == expected, checkpoint.skipped
    tensors, state = generation(int(expected[4:]))
    assert {**state, "schema_version": SCHEMA_VERSION} == checkpoint.state
    assert tensors.keys() == checkpoint.tensors.keys()
    assert all(np.array_equal(tensor, checkpoint.tensors[name]) for name, tensor in tensors.items())
    return checkpoint


def assert_used(run_dir: Path, expected: str, *, damaged: Path) -> None:
    """Assert that the expected generation is used, and that one message names what is damaged."""
    skipped = load(run_dir, expected).skipped
    assert len(skipped) == 1 and str(damaged) in skipped[0], skipped


def assert_mended_by_the_next_commit(run_dir: Path) -> None:
    """Assert that the run, which makes the newest generation again, leaves nothing of the damage."""
    save_generation(run_dir, 30)
    assert load(run_dir, NEWEST).skipped == ()
    left = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert left <= {CURRENT, "gen-000010", PREVIOUS, NEWEST}


def flipped(data: bytes) -> Iterator[bytes]:
    """Flip every k-th bit; k is odd, so that each of the eight bits of a byte has its turn."""
    for place in range(0, 8 * len(data), 8 * len(data) // NUM_FLIPS | 1):
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        yield bytes(damaged)


def truncated(data: bytes) -> Iterator[bytes]:
    yield from (data[:length] for length in range(0, len(data), len(data) // NUM_LENGTHS))
    yield data[:-1]


def extended(data: bytes) -> Iterator[bytes]:
    yield from (data + tail for tail in (b"\0", b"\n", b"}", data, bytes(4096)))


def blank(data: bytes) -> Iterator[bytes]:
    """Zeros, as after a power cut on a file system that stores sizes before contents; also from the middle on."""
    yield bytes(len(data))
    yield data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


Damage = Callable[[bytes], Iterator[bytes]]


@pytest.mark.parametrize("damage", [flipped, truncated, extended, blank])
@pytest.mark.parametrize("name", FILES)
def test_damaged_bytes_are_noticed_and_the_previous_generation_used(run_dir: Path, checkpoints: Path, name: str, damage: Damage):
    path = checkpoints / NEWEST / name
    original = path.read_bytes()
    for data in damage(original):
        path.write_bytes(data)
        assert_used(run_dir, PREVIOUS, damaged=path)
    path.write_bytes(original)
    assert load(run_dir, NEWEST).skipped == ()  # negative control: undamaged, it is used


@pytest.mark.parametrize("damage", [flipped, truncated, extended, blank])
def test_a_damaged_pointer_is_noticed_and_the_newest_generation_used(run_dir: Path, checkpoints: Path, damage: Damage):
    for data in damage((checkpoints / CURRENT).read_bytes()):
        (checkpoints / CURRENT).write_bytes(data)
        assert_used(run_dir, NEWEST, damaged=checkpoints / CURRENT)
    assert_mended_by_the_next_commit(run_dir)


def delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def put_a_directory(path: Path) -> None:
    delete(path)
    (path / "something").mkdir(parents=True)


def put_a_file(path: Path) -> None:
    delete(path)
    path.write_bytes(b"something")


def put_a_dangling_link(path: Path) -> None:
    delete(path)
    path.symlink_to("nowhere")


def put_a_link_to_itself(path: Path) -> None:
    delete(path)
    path.symlink_to(path.name)


def put_a_link_to_the_previous(path: Path) -> None:
    delete(path)
    path.symlink_to(str(path).replace(NEWEST, PREVIOUS))


REPLACEMENTS = [delete, put_a_directory, put_a_file, put_a_dangling_link, put_a_link_to_itself]
Replacement = Callable[[Path], None]


@pytest.mark.parametrize("replace", [*REPLACEMENTS, put_a_link_to_the_previous])
@pytest.mark.parametrize("name", [*FILES, "."])
def test_a_replaced_file_or_directory_is_noticed_and_the_previous_generation_used(
    run_dir: Path, checkpoints: Path, name: str, replace: Replacement
):
    replace(checkpoints / NEWEST / name)
    assert_used(run_dir, PREVIOUS, damaged=checkpoints / NEWEST / name)
    assert_mended_by_the_next_commit(run_dir)


@pytest.mark.parametrize("replace", REPLACEMENTS)
def test_a_replaced_pointer_is_noticed_and_the_newest_generation_used(run_dir: Path, checkpoints: Path, replace: Replacement):
    replace(checkpoints / CURRENT)
    if replace is delete:  # a run that was killed before its first pointer looks the same, so this is no damage to tell
        assert load(run_dir, NEWEST).skipped == ()
    else:
        assert_used(run_dir, NEWEST, damaged=checkpoints / CURRENT)
    assert_mended_by_the_next_commit(run_dir)


@pytest.mark.parametrize("swapped", [*[(name,) for name in FILES], FILES])
@pytest.mark.parametrize("pointer", [True, False])
def test_swapped_files_are_noticed_in_both_generations(run_dir: Path, checkpoints: Path, swapped: tuple[str, ...], pointer: bool):
    for name in swapped:
        (checkpoints / NEWEST / name).rename(checkpoints / "aside")
        (checkpoints / PREVIOUS / name).rename(checkpoints / NEWEST / name)
        (checkpoints / "aside").rename(checkpoints / PREVIOUS / name)
    if not pointer:
        (checkpoints / CURRENT).unlink()
    skipped = load(run_dir, "gen-000010").skipped
    assert all(name in message for name, message in zip((NEWEST, PREVIOUS), skipped, strict=True))


@pytest.mark.parametrize("name", [STATE, MANIFEST, CURRENT])
def test_a_key_that_appears_twice_is_refused(run_dir: Path, checkpoints: Path, name: str):
    """Two readers could understand the document differently, also when every digest in it is right."""
    path = checkpoints / CURRENT if name == CURRENT else checkpoints / NEWEST / name
    key = canonical_json(next(iter(parse_json(path.read_bytes(), name))))
    path.write_bytes(b"{" + key + b":0," + path.read_bytes()[1:])
    if name == STATE:  # with its digest in the manifest, so that only the key is wrong
        manifest = parse_json((path.parent / MANIFEST).read_bytes(), MANIFEST)
        manifest["files"][STATE]["sha256"] = sha256_hex(path.read_bytes())
        (path.parent / MANIFEST).write_bytes(canonical_json(manifest))
    if name != CURRENT:
        (checkpoints / CURRENT).unlink()
    assert_used(run_dir, NEWEST if name == CURRENT else PREVIOUS, damaged=path)
    assert "appears twice" in load_checkpoint(run_dir).skipped[0]


def test_names_that_are_no_generations_are_left_alone(run_dir: Path, checkpoints: Path):
    for name in ("gen-", "gen-latest", "gen-000030.copy", "gen-000099x"):
        shutil.copytree(checkpoints / "gen-000010", checkpoints / name)
    (checkpoints / CURRENT).unlink()
    assert load(run_dir, NEWEST).skipped == ()
    save_generation(run_dir, 40, keep=1)
    assert (checkpoints / "gen-latest").is_dir() and load(run_dir, "gen-000040").skipped == ()


def test_when_all_are_damaged_each_is_named(run_dir: Path, checkpoints: Path):
    damaged = [checkpoints / CURRENT, *(checkpoints / f"gen-0000{update}" / name for update, name in zip((30, 20, 10), FILES))]
    for path in damaged:
        path.write_bytes(b"[]")
    with pytest.raises(IntegrityError) as raised:
        load_checkpoint(run_dir)
    assert all(str(path) in str(raised.value) for path in damaged)


def test_damaged_generations_do_not_push_out_good_ones(run_dir: Path, checkpoints: Path):
    for path in (checkpoints / NEWEST, checkpoints / PREVIOUS):
        (path / TENSORS).write_bytes(b"")
    load(run_dir, "gen-000010")
    save_generation(run_dir, 15, keep=1)  # the run ends earlier than it did before: its settings were changed
    assert load(run_dir, "gen-000015").skipped == ()
    assert {path.name for path in checkpoints.iterdir()} == {CURRENT, "gen-000015"}


def test_a_damaged_config_is_refused_or_put_right(tmp_path: Path):
    run_dir = create_run(open_storage(tmp_path / "storage"), "first", CONFIG)
    path = run_dir / "config.json"
    original, num_refused = path.read_bytes(), 0
    for damage in (flipped, truncated, blank):
        for data in damage(original):
            path.write_bytes(data)
            try:
                require_resumable(run_dir, CONFIG)
                change_config(run_dir, CONFIG)  # what `trimtab resume` does, with the loop file's settings
            except (IntegrityError, ConfigError):
                num_refused += 1
            else:  # only a setting that may change was damaged
                assert read_config(run_dir) == CONFIG
    assert num_refused > NUM_FLIPS


def test_damaged_metrics_cost_only_their_own_lines(tmp_path: Path):
    log = MetricsLog(tmp_path, after_update=0)
    for update in (1, 2, 3):
        log.append({"update": update, "env_steps": 10 * update, "return_mean": 1.5})
    log.close()
    path = tmp_path / METRICS
    original = path.read_bytes()
    for data in [*flipped(original)][::9]:  # each costs two flushes
        path.write_bytes(data)
        MetricsLog(tmp_path, after_update=3).close()
        # A flipped end of a line joins two.
        assert len(set(original.splitlines()) & set(path.read_bytes().splitlines())) >= 1
