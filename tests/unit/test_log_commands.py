"""What a person sees of the decision log: each command's answer and exit code."""

import json
from pathlib import Path

import pytest

from policies.errors import UsageError
from policies.sealing import seal as seal_segment
from policies.storage import open_storage
from serve_app.decision_log import SegmentWriter
from tests.command_line import run_trimtab
from tests.logs import HEADER, encode_lines
from tests.simulators import make_decision
from trimtab.command import DONE, NEGATIVE
from trimtab.commands import log as commands

LOOP_FILE = Path(__file__).parents[2] / "examples/cartpole.yaml"
T = 1_795_784_400.0  # 2026-11-27 13:00:00 UTC


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A sealed segment of four decisions, a minute apart, and a finished one of two, the first of which is a duplicate."""
    directory = open_storage(tmp_path / "storage").decisions("cartpole")
    directory.mkdir(parents=True)
    rows = [make_decision(f"d{minute}", time_s=T + 60 * minute, action=[minute, 0.5]) for minute in range(4)]
    (directory / "a.jsonl").write_bytes(HEADER + encode_lines(*rows))
    seal_segment(directory / "a.jsonl")
    (directory / "b.jsonl").write_bytes(
        HEADER + encode_lines(make_decision("d3", time_s=T + 190), make_decision("d4", time_s=T + 240))
    )
    return directory


def call(capsys: pytest.CaptureFixture[str], directory: Path, command, *, code: int = DONE, **options) -> str:
    capsys.readouterr()
    storage = str(directory.parents[2])
    assert command(loop_file=LOOP_FILE, storage=storage, **options) == code
    return capsys.readouterr().out


def test_list_says_what_is_in_each_segment_and_who_holds_it(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = SegmentWriter(directory, "decisions", "c")
    writer.append(encode_lines(make_decision("x", time_s=T)))
    found = json.loads(call(capsys, directory, commands.list_segments, as_json=True))["segments"]
    assert [(row["segment"], row["state"], row["num_rows"]) for row in found] == [
        *(("a", "sealed", 4), ("b", "finished", 2), ("c-000001", "open", 1))
    ]
    assert found[0]["num_bytes"] == (directory / "a.parquet").stat().st_size
    assert (found[0]["first_time_s"], found[0]["last_time_s"]) == (T, T + 180)
    text = call(capsys, directory, commands.list_segments)
    assert "sealed" in text and "2026-11-27 13:03:00 UTC" in text
    writer.close()


def test_seal_seals_what_rests_and_leaves_what_is_written_to(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = SegmentWriter(directory, "decisions", "c")
    writer.append(encode_lines(make_decision("x", time_s=T)))
    assert json.loads(call(capsys, directory, commands.seal, as_json=True)) == {"sealed": [], "errors": []}  # all too young
    document = json.loads(call(capsys, directory, commands.seal, after=0.0, as_json=True))
    assert [(row["segment"], row["num_rows"]) for row in document["sealed"]] == [("b", 2)]
    assert sorted(path.name for path in directory.iterdir()) == ["a.parquet", "b.parquet", "c-000001.jsonl"]
    assert call(capsys, directory, commands.seal, after=0.0).strip() == "0 segment(s) sealed"
    writer.close()


def test_a_damaged_segment_is_named_and_the_exit_code_says_so(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (directory / "bad.jsonl").write_bytes(HEADER + b"no record\n")
    document = json.loads(call(capsys, directory, commands.seal, code=NEGATIVE, after=0.0, as_json=True))
    assert len(document["sealed"]) == 1 and "bad.jsonl" in document["errors"][0]
    found = json.loads(call(capsys, directory, commands.list_segments, code=NEGATIVE, as_json=True))["segments"]
    assert [row["state"] for row in found] == ["sealed", "sealed", "damaged"]  # a, b, bad
    lines = call(capsys, directory, commands.show, code=NEGATIVE, as_json=True).splitlines()
    assert len(lines) == 5  # the others are shown


def test_show_prints_the_decisions_of_a_time_range_once_each(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(**options) -> list[str]:
        lines = call(capsys, directory, commands.show, as_json=True, **options).splitlines()
        return [json.loads(line)["decision_id"] for line in lines]

    assert shown() == ["d0", "d1", "d2", "d3", "d4"]
    assert shown(since="2026-11-27T13:01+00:00", until="2026-11-27T13:03+00:00") == ["d1", "d2"]
    assert shown(limit=2) == ["d0", "d1"]
    text = call(capsys, directory, commands.show)
    assert "[2,0.5]" in text and "2026-11-27 13:02:00 UTC" in text  # brackets are not markup
    assert "no decision" in call(capsys, directory, commands.show, since="2027-01-01")
    with pytest.raises(UsageError, match="--until 'soon' is no time"):
        call(capsys, directory, commands.show, until="soon")


def test_the_command_line_has_them_all(directory: Path) -> None:
    storage = directory.parents[2]
    result = run_trimtab("log", "show", str(LOOP_FILE), "--json", "--limit", "1", storage=storage)
    assert result.returncode == DONE and json.loads(result.stdout)["decision_id"] == "d0"
    assert "there are more" in result.stderr
    assert run_trimtab("log", "seal", str(LOOP_FILE), "--after", "0", storage=storage).stdout.startswith("b: 2 decisions")
    assert json.loads(run_trimtab("log", "list", str(LOOP_FILE), "--json", storage=storage).stdout)["segments"]
