"""What a person sees of the registry: each command's answer and exit code, on a registry whose times are known."""

import json
import time
from pathlib import Path

import pytest

from policies.errors import NotFound, RegistryConflict, UsageError
from policies.journal import entry_name
from policies.registry import Registry, change_release, register_version, set_champion, start_release
from policies.storage import open_storage
from tests.bundles import make_bundle, make_policy
from tests.command_line import run_trimtab
from trimtab.command import DONE, NEGATIVE, open_context
from trimtab.commands import registry as commands

LOOP_FILE = Path(__file__).parents[2] / "examples/cartpole.yaml"
T = 1_795_784_400.0  # 2026-11-27 13:00:00 UTC


@pytest.fixture
def storage(tmp_path: Path) -> str:
    """Version 1 is champion from 13:01 UTC; the release of 2 starts at 13:02 and is promoted at 13:04."""
    root = tmp_path / "storage"
    registry = Registry(open_storage(root).registry("cartpole"))
    for seed in range(2):
        bundle = make_bundle(registry.bundles, make_policy(seed))
        registry.append(lambda state, bundle=bundle: register_version(state, bundle), now=T + seed)
    registry.append(lambda state: set_champion(state, 1, "first version"), now=T + 60)
    registry.append(
        lambda state: start_release(state, 2, weights=(0.25,), override_gates=None, reason="started by hand"), now=T + 120
    )
    numbers = {"candidate_mean": 481.25}
    registry.append(lambda state: change_release(state, "promote", reason="better in both", numbers=numbers), now=T + 240)
    return str(root)


def _registry(storage: str) -> Registry:
    return Registry(open_storage(storage).registry("cartpole"))


def _json(capsys: pytest.CaptureFixture[str], command, *arguments, storage: str, **options):
    capsys.readouterr()
    assert command(*arguments, loop_file=LOOP_FILE, storage=storage, as_json=True, **options) == DONE
    return json.loads(capsys.readouterr().out)


def _text(capsys: pytest.CaptureFixture[str], command, *arguments, storage: str, **options) -> str:
    capsys.readouterr()
    assert command(*arguments, loop_file=LOOP_FILE, storage=storage, **options) == DONE
    return capsys.readouterr().out


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch):
    """A machine whose clock shows UTC + 1 in November."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_what_was_champion_at_14_03_and_why_is_one_command(storage: str, capsys, berlin) -> None:
    """14:03 in Berlin is 13:03 UTC: version 1 was champion, and version 2 had a quarter of the traffic."""
    found = _json(capsys, commands.history, storage=storage, at="2026-11-27 14:03")
    assert found["at"] == T + 180
    assert (found["champion"]["version"], found["why"]["number"], found["why"]["reason"]) == (1, 3, "first version")
    assert [(arm["version"], arm["weight"]) for arm in found["plan"]["arms"]] == [(2, 0.25), (1, 0.75)]
    later = _text(capsys, commands.history, storage=storage, at="2026-11-27 14:05")
    assert "champion was version 2" in later and "because: better in both" in later
    assert "since 2026-11-27 13:04:00 UTC, by entry 5 of" in later and "candidate_mean 481.25" in later


@pytest.mark.parametrize(
    ("at", "champion"),
    [
        ("2026-11-27T13:00:59Z", None),
        ("2026-11-27T13:01:00Z", 1),
        ("2026-11-27T13:04:00+00:00", 2),
        ("2026-11-27T15:03+02:00", 1),
    ],
)
def test_a_zone_in_the_time_is_heeded(storage: str, capsys, at: str, champion: int | None) -> None:
    found = _json(capsys, commands.history, storage=storage, at=at)
    assert (found["champion"] and found["champion"]["version"]) == champion


def test_before_the_first_champion_there_was_none(storage: str, capsys) -> None:
    assert "there was no champion yet" in _text(capsys, commands.history, storage=storage, at="2020-01-01")


@pytest.mark.parametrize("at", ["yesterday", "14:03", "2026-13-01", ""])
def test_times_that_are_none_are_refused(storage: str, at: str) -> None:
    with pytest.raises(UsageError, match="is no time: expected '2026-11-27 14:03'"):
        commands.history(LOOP_FILE, storage, at=at)


def test_history_lists_each_entry_with_its_author_and_reason(storage: str, capsys) -> None:
    lines = _text(capsys, commands.history, storage=storage).splitlines()
    assert len(lines) == 5
    assert "version 1 registered, gates said pass" in lines[0]
    assert lines[2].startswith("   3  2026-11-27 13:01:00 UTC") and lines[2].endswith("version 1 became champion: first version")
    assert lines[3].endswith("release 1 of version 2 started: started by hand")


def test_names_tags_and_approvals_are_listed(storage: str, capsys) -> None:
    _json(capsys, commands.alias, "eu", storage=storage, version=1)
    _json(capsys, commands.tag, "eu", "ticket", storage=storage, value="RL-7")
    found = _json(capsys, commands.approve, "champion", storage=storage, reason="read the card", approver="ann")
    assert (found["version"], [approval["approver"] for approval in found["approvals"]]) == (2, ["ann"])
    rows = _json(capsys, commands.list_versions, storage=storage)["versions"]
    assert [(row["version"], row["aliases"], row["tags"]) for row in rows] == [
        (1, ["previous", "eu"], {"ticket": "RL-7"}),
        (2, ["champion"], {}),
    ]
    table = _text(capsys, commands.list_versions, storage=storage)
    assert all(
        part in table for part in ("previous, eu", "ticket=RL-7", "ann", rows[0]["digest"][:12], "2026-11-27 13:00:01 UTC")
    )
    then = _json(capsys, commands.list_versions, storage=storage, at="2026-11-27T13:03Z")["versions"]
    assert [row["aliases"] for row in then] == [["champion"], ["challenger"]]
    assert "approved by ann" in _text(capsys, commands.show, "2", storage=storage)
    _json(capsys, commands.tag, "1", "ticket", storage=storage, remove=True)
    assert _json(capsys, commands.show, "eu", storage=storage)["tags"] == {}
    assert _json(capsys, commands.alias, "eu", storage=storage, remove=True)["aliases"] == {"champion": 2, "previous": 1}


def test_unclear_wishes_are_refused(storage: str) -> None:
    for options in ({}, {"version": 1, "remove": True}):
        with pytest.raises(UsageError, match="either --version N or --remove"):
            commands.alias("eu", LOOP_FILE, storage, **options)
    for options in ({}, {"value": "x", "remove": True}):
        with pytest.raises(UsageError, match="either --value TEXT or --remove"):
            commands.tag("1", "key", LOOP_FILE, storage, **options)
    with pytest.raises(NotFound, match="names no version"):
        commands.show("stable", LOOP_FILE, storage)
    commands.approve("1", LOOP_FILE, storage, reason="read it", approver="ann")
    with pytest.raises(RegistryConflict, match="ann approved version 1 already"):
        commands.approve("1", LOOP_FILE, storage, reason="again", approver="ann")


def test_show_lists_what_concerns_the_version(storage: str, capsys) -> None:
    about_1 = _json(capsys, commands.show, "1", storage=storage)["entries"]
    assert [entry["number"] for entry in about_1] == [1, 3, 4, 5]  # as incumbent of the release as well
    then = _json(capsys, commands.show, "1", storage=storage, at="2026-11-27T13:01Z")
    assert (then["aliases"], [entry["number"] for entry in then["entries"]]) == (["champion"], [1, 3])


def test_diff_and_lineage_find_bundles_by_any_name(storage: str, capsys) -> None:
    registry = _registry(storage)
    loose = make_bundle(registry.bundles, make_policy(9))
    found = _json(capsys, commands.diff, "1", "champion", storage=storage)
    assert list(found["differences"]) == ["policy_sha256"]
    assert _text(capsys, commands.diff, "2", "champion", storage=storage) == "nothing differs but when they were made\n"
    assert _json(capsys, commands.show_lineage, loose.digest[:8], storage=storage)["versions"] == []
    assert _json(capsys, commands.show_lineage, "2", storage=storage)["versions"] == [2]
    with pytest.raises(NotFound, match="names no version"):
        commands.show_lineage("ffffff00", LOOP_FILE, storage)


def test_verify_says_yes_and_after_a_changed_byte_no(storage: str, capsys) -> None:
    assert "5 entries, 2 bundles: 0 problems" in _text(capsys, commands.verify, storage=storage)
    registry = _registry(storage)
    path = registry.bundles / registry.state().version(1).digest / "golden.npz"
    data = path.read_bytes()
    path.write_bytes(data[:200] + bytes([data[200] ^ 4]) + data[201:])
    assert commands.verify(LOOP_FILE, storage, as_json=True) == NEGATIVE
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert "golden.npz: sha256 is" in problem


def test_gc_lists_first_and_removes_when_told(storage: str, capsys) -> None:
    registry = _registry(storage)
    for seed in (5, 6):
        registry.register(make_bundle(registry.bundles, make_policy(seed)), now=T)
    registry.append(lambda state: commands.set_alias(state, "eu", 4, "test"), now=T)
    listed = _json(capsys, commands.gc, storage=storage, keep_days=1.0)
    assert ([item["versions"] for item in listed["bundles"]], listed["applied"]) == ([[3]], False)
    assert registry.bundle(3)
    assert _json(capsys, commands.gc, storage=storage, keep_days=1.0, apply=True)["bundles"] == listed["bundles"]
    assert "(given up)" in _text(capsys, commands.list_versions, storage=storage)
    assert "0 bundle(s) removed" in _text(capsys, commands.gc, storage=storage, keep_days=1.0, apply=True)
    assert "0 problems" in _text(capsys, commands.verify, storage=storage)


def test_a_torn_entry_is_warned_of(storage: str, capsys) -> None:
    _registry(storage)
    (open_storage(storage).registry("cartpole") / entry_name(6)).write_bytes(b"")
    capsys.readouterr()
    assert commands.history(LOOP_FILE, storage) == DONE
    assert "00000006.json is torn" in capsys.readouterr().err
    assert _json(capsys, commands.list_versions, storage=storage)["torn"] == entry_name(6)
    assert commands.verify(LOOP_FILE, storage) == NEGATIVE


def test_two_storage_roots_with_one_registry_in_their_loop_files_see_the_same_versions(tmp_path: Path) -> None:
    loop_file = tmp_path / "loop.yaml"
    loop_file.write_text(f"{LOOP_FILE.read_text()}\nregistry: {tmp_path / 'shared'}\n")
    here, there = (open_context(loop_file, None, str(tmp_path / name)) for name in ("here", "there"))
    here.registry().register(make_bundle(here.registry().bundles, make_policy()), now=1.0)
    assert there.registry().bundle(1).path.parent == tmp_path / "shared" / "cartpole" / "bundles"
    replica = Registry(there.storage.registry("cartpole"))  # as a process of the cluster opens it, without the loop file
    assert replica.state() == here.registry().state()
    alone = open_context(LOOP_FILE, None, str(tmp_path / "alone"))
    assert alone.registry().state().versions == {}  # the control


def test_the_exit_codes_are_those_of_the_command_line(storage: str) -> None:
    registry = _registry(storage)
    assert run_trimtab("registry", "verify", storage=Path(storage)).returncode == 0
    unknown = run_trimtab("registry", "show", "stable", storage=Path(storage))
    assert unknown.returncode == 2 and "names no version" in unknown.stderr
    (registry.bundles / registry.state().version(2).digest / "gates.json").unlink()
    broken = run_trimtab("registry", "verify", "--json", storage=Path(storage))
    assert broken.returncode == 1 and len(json.loads(broken.stdout)["problems"]) == 1
