"""What a person sees of API keys: the key once, the list without it, and an exit code that tells."""

import datetime
import json
from pathlib import Path

import pytest

from policies.errors import ConfigError, NotFound, UsageError
from policies.integrity import sha256_hex
from policies.storage import Storage, open_storage
from tests.command_line import run_trimtab
from trimtab.command import DONE
from trimtab.commands import apikey

LOOP_FILE = Path(__file__).parents[2] / "examples/cartpole.yaml"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "storage")


@pytest.fixture
def run(storage: Storage, capsys: pytest.CaptureFixture[str]):
    """Return a function that runs a command with --json and returns its document."""

    def run_json(command, *arguments, **options) -> dict:
        capsys.readouterr()
        assert command(*arguments, loop_file=LOOP_FILE, storage=str(storage.root), as_json=True, **options) == DONE
        return json.loads(capsys.readouterr().out)

    return run_json


def test_a_key_is_printed_once_with_what_it_may_do(storage: Storage, run) -> None:
    day = datetime.datetime(2100, 1, 31)
    made = run(apikey.create, "shop", scopes=["feedback", "decide"], expires=day, requests_per_s=100.0, max_concurrent=20)
    assert (made["name"], made["scopes"], made["requests_per_s"], made["max_concurrent"]) == (
        "shop",
        ["decide", "feedback"],
        100,
        20,
    )
    assert made["expires_at"] == 4_105_036_800.0  # date -u -d 2100-01-31 +%s
    assert storage.api_keys.read()[-1].sha256 == sha256_hex(made["key"].encode())
    listed = run(apikey.list_keys)
    assert [(key["name"], key["is_valid"]) for key in listed["keys"]] == [("owner", True), ("shop", True)]
    assert made["key"] not in json.dumps(listed) and "sha256" not in json.dumps(listed)


def test_rotation_and_revocation_are_seen_in_the_list(storage: Storage, run) -> None:
    made = run(apikey.create, "shop", scopes=["decide"])
    follower = run(apikey.rotate, "shop", overlap_s=3600.0)
    assert follower["key"] != made["key"] and follower["scopes"] == ["decide"]
    _, old, new = run(apikey.list_keys)["keys"]
    assert (old["id"], new["id"]) == (made["id"], follower["id"]) and old["is_valid"] and new["expires_at"] is None
    assert old["expires_at"] == pytest.approx(new["created_at"] + 3600)
    assert [key["id"] for key in run(apikey.revoke, new["id"])["keys"]] == [new["id"]]
    assert [key["is_valid"] for key in run(apikey.revoke, "shop")["keys"]] == [False, False]
    assert [key["is_valid"] for key in run(apikey.list_keys)["keys"]] == [True, False, False]


def test_a_text_says_all_of_it_and_the_reason_of_what_is_over(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    where = {"loop_file": LOOP_FILE, "storage": str(storage.root)}
    apikey.create(
        "shop", scopes=["decide"], expires=datetime.datetime(2100, 1, 31), requests_per_s=0.5, max_concurrent=3, **where
    )
    apikey.create("old", scopes=["read"], **where)
    apikey.revoke("old", **where)
    capsys.readouterr()
    apikey.list_keys(**where)
    _, shop, old = capsys.readouterr().out.splitlines()
    assert shop.endswith("may decide, 0.5 requests/s, 3 at once, until 2100-01-31 00:00 UTC")
    assert old.startswith("key 'old' (K") and "was revoked" in old


@pytest.mark.parametrize(
    ("command", "arguments", "options", "error"),
    [
        (apikey.create, ["shop"], {"scopes": ["admin"]}, ConfigError),
        (apikey.create, ["owner"], {"scopes": ["read"]}, ConfigError),
        (apikey.create, ["shop"], {"scopes": ["read"], "expires": datetime.datetime(2020, 1, 1)}, ConfigError),
        (apikey.rotate, ["shop"], {}, NotFound),
        (apikey.revoke, ["shop"], {}, NotFound),
    ],
)
def test_what_cannot_be_done_is_a_usage_error_and_changes_nothing(
    storage: Storage, run, command, arguments: list[str], options: dict, error: type[UsageError]
) -> None:
    before = storage.api_keys.path.read_bytes()
    with pytest.raises(error):
        run(command, *arguments, **options)
    assert storage.api_keys.path.read_bytes() == before


def test_a_script_gets_the_key_alone_and_a_person_the_rest(storage: Storage) -> None:
    made = run_trimtab("apikey", "create", "shop", "--scope", "decide", "--scope", "feedback", storage=storage.root)
    assert made.returncode == 0, made.stderr
    assert sha256_hex(made.stdout.strip().encode()) == storage.api_keys.read()[-1].sha256
    assert "may decide, feedback" in made.stderr and made.stdout.strip() not in made.stderr
    refused = run_trimtab("apikey", "create", "shop", "--scope", "decide", storage=storage.root)
    assert refused.returncode == 2 and refused.stdout == "" and "apikey rotate shop" in refused.stderr


def test_the_two_kinds_of_keys_are_told_apart_in_the_help() -> None:
    words = " ".join(run_trimtab("--help").stdout.replace("│", " ").split())
    assert "Make keys to sign versions with, and say whose signatures count; for clients see `apikey`." in words
    assert "Make API keys for clients of the endpoint, and end them; to sign versions see `keys`." in words
