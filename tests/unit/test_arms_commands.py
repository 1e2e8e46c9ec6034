"""What a person can do with arms, and how loudly what is switched off is shown."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from policies.errors import IntegrityError, NotFound, ReleaseRefused, UsageError
from policies.registry import Registry, change_release, start_release
from policies.storage import open_storage
from tests.bundles import make_registry
from tests.command_line import run_trimtab
from trimtab.command import DONE, NEGATIVE, UNUSABLE
from trimtab.commands import arms as commands
from trimtab.commands import registry as registry_commands
from trimtab.live import status_view

LOOP_FILE = Path(__file__).parents[2] / "examples/cartpole.yaml"


@pytest.fixture
def storage(tmp_path: Path) -> str:
    """Version 2 took over from version 1; version 3 is new."""
    root = tmp_path / "storage"
    registry = make_registry(open_storage(root).registry("cartpole"), num_versions=3)
    registry.append(lambda s: start_release(s, 2, weights=(1.0,), override_gates=None, reason="test"), now=200.0)
    registry.append(lambda s: change_release(s, "promote", reason="test"), now=300.0)
    return str(root)


def registry_of(storage: str) -> Registry:
    return Registry(open_storage(storage).registry("cartpole"))


def said(capsys: pytest.CaptureFixture[str], command, *arguments, storage: str, as_json: bool = True, **options):
    capsys.readouterr()
    assert command(*arguments, loop_file=LOOP_FILE, storage=storage, as_json=as_json, **options) == DONE
    text = capsys.readouterr().out
    return json.loads(text) if as_json else text


def test_a_holdout_begins_and_ends_by_an_audited_entry(storage: str, capsys) -> None:
    begun = said(capsys, commands.holdout, "previous", weight=0.05, reason="the yearly comparison", storage=storage)
    assert (begun["holdout"]["version"], begun["holdout"]["weight"]) == (1, 0.05)
    assert [(arm["name"], arm["version"], arm["weight"]) for arm in begun["plan"]["arms"]] == [
        ("holdout", 1, 0.05),
        ("champion", 2, 0.95),
    ]
    entry = registry_of(storage).entries()[-1].body
    assert (entry["kind"], entry["reason"], "@" in entry["author"]) == ("holdout", "the yearly comparison", True)
    assert said(capsys, commands.list_arms, storage=storage) == begun
    assert said(capsys, commands.list_arms, storage=storage, as_json=False) == "holdout v1 5%, champion v2 95%\n"
    assert said(capsys, commands.holdout, end=True, storage=storage)["holdout"] is None


def test_shadows_are_exactly_those_that_were_named(storage: str, capsys) -> None:
    assert said(capsys, commands.shadow, ["1", "3"], storage=storage)["plan"]["shadows"] == [1, 3]
    assert said(capsys, commands.shadow, ["3"], storage=storage)["shadows"] == [3]
    assert said(capsys, commands.list_arms, storage=storage, as_json=False) == "champion v2 100%, shadow v3\n"
    assert said(capsys, commands.shadow, None, end=True, storage=storage)["shadows"] == []


def test_what_is_switched_off_is_loud_in_every_answer_until_it_is_enabled(storage: str, capsys) -> None:
    off = said(capsys, commands.disable, "champion", reason="an incident", storage=storage)
    assert off["switched_off"]["champion"]["reason"] == "an incident"
    assert [(arm["name"], arm["version"]) for arm in off["plan"]["arms"]] == [("champion", 1)]
    text = said(capsys, commands.list_arms, storage=storage, as_json=False)
    assert text.startswith("CHAMPION SWITCHED OFF since ") and "an incident (`trimtab arms enable champion`)" in text
    then = said(capsys, registry_commands.history, at="2999-01-01", storage=storage, as_json=False)
    assert "CHAMPION SWITCHED OFF" in then and "traffic: champion v1 100%" in then
    on = said(capsys, commands.enable, "champion", storage=storage)
    assert on["switched_off"] == {} and on["plan"]["arms"][0]["version"] == 2


def test_history_and_show_name_the_new_entries(storage: str, capsys) -> None:
    said(capsys, commands.holdout, "1", weight=0.05, storage=storage)
    said(capsys, commands.shadow, ["1", "3"], storage=storage)
    said(capsys, commands.disable, "canary", reason="frozen", storage=storage)
    said(capsys, commands.enable, "canary", storage=storage)
    said(capsys, commands.shadow, None, end=True, storage=storage)
    said(capsys, commands.holdout, end=True, storage=storage)
    lines = said(capsys, registry_commands.history, storage=storage, as_json=False).splitlines()[-6:]
    expected = [
        "holdout of 5% of the units, version 1",
        "versions in shadow: 1, 3",
        "canary switched off: frozen",
        "canary switched on",
        "shadows ended",
        "holdout ended, version 1",
    ]
    assert all(part in line for part, line in zip(expected, lines, strict=True))
    about_3 = said(capsys, registry_commands.show, "3", storage=storage)["entries"]
    assert [entry["kind"] for entry in about_3] == ["register", "shadows"]
    about_1 = said(capsys, registry_commands.show, "1", storage=storage)["entries"]
    assert [entry["kind"] for entry in about_1][-3:] == ["holdout", "shadows", "holdout"]


def test_unclear_wishes_are_refused(storage: str) -> None:
    before = registry_of(storage).state()
    for name, options in [(None, {}), ("1", {}), ("1", {"weight": 0.1, "end": True}), (None, {"weight": 0.1, "end": True})]:
        with pytest.raises(UsageError, match=r"either a VERSION with --weight 0\.05, or --end"):
            commands.holdout(name, LOOP_FILE, storage, **options)
    for names, options in [(None, {}), ([], {}), (["1"], {"end": True})]:
        with pytest.raises(UsageError, match="either one or more VERSIONs, or --end"):
            commands.shadow(names, LOOP_FILE, storage, **options)
    with pytest.raises(NotFound, match="'stable' names no version"):
        commands.shadow(["stable"], LOOP_FILE, storage)
    with pytest.raises(UsageError, match="arm 'king' does not exist"):
        commands.disable("king", LOOP_FILE, storage, reason="test")
    assert registry_of(storage).state() == before


def test_a_bundle_with_a_changed_byte_gets_no_arm(storage: str) -> None:
    registry = registry_of(storage)
    path = registry.bundles / registry.state().version(3).digest / "policy.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    for begin in (
        lambda: commands.holdout("3", LOOP_FILE, storage, weight=0.1),
        lambda: commands.shadow(["3"], LOOP_FILE, storage),
    ):
        with pytest.raises(IntegrityError, match="sha256"):
            begin()
    assert commands.holdout("1", LOOP_FILE, storage, weight=0.1) == DONE  # the control


def test_exit_codes_are_those_of_releases(storage: str) -> None:
    """On the real command line, where `shadow` takes several versions and the loop file is an option."""
    root = Path(storage)
    done = run_trimtab("arms", "shadow", "1", "3", "--loop-file", str(LOOP_FILE), "--json", storage=root)
    assert (done.returncode, json.loads(done.stdout)["shadows"]) == (DONE, [1, 3]), done.stderr
    refused = run_trimtab("arms", "enable", "canary", storage=root)
    assert refused.returncode == NEGATIVE and "not switched off" in refused.stderr
    unusable = run_trimtab("arms", "holdout", "1", "--weight", "0.9", storage=root)
    assert unusable.returncode == UNUSABLE and "between 0.0001 and 0.5" in unusable.stderr
    with pytest.raises(ReleaseRefused):
        commands.enable("canary", LOOP_FILE, storage)


def shown(status: dict) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(status_view({"policy": "cartpole", "champion": 2, "monitor": {}, **status}))
    return console.file.getvalue()


def test_the_status_shows_shadows_and_switches() -> None:
    counts = {"decisions": 1200, "failures": 3, "agreement": 0.875, "sent_propensity": 0.75}
    shadows = [{"version": 3, "is_asked": True, **counts}, {"version": 4, "is_asked": False, **counts, "agreement": None}]
    text = shown({"shadows": shadows, "switched_off": [{"arm": "canary", "reason": "an incident", "since_s": 1.0}]})
    assert "CANARY SWITCHED OFF: an incident (`trimtab arms enable canary`)" in text
    assert "shadow v3: 1,200 decisions, 3 failures, agrees in 87.5%, would send the same with probability 0.750" in text
    assert "shadow v4: 1,200 decisions, 3 failures, not asked now, would send" in text
    assert "SWITCHED OFF" not in shown({}) and "shadow" not in shown({})  # the control
