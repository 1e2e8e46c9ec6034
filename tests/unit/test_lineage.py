"""Does a lineage say what was recorded, and say so where nothing was; and do two bundles differ in what differs?"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies.bundle import Bundle, Golden, write_bundle
from policies.errors import UsageError
from policies.registry import Registry, change_release, start_release
from policies.registry_entries import approve_version, collect_version, set_alias, tag_version
from policies.verdicts import Verdict
from tests.bundles import make_bundle, make_policy, make_registry, make_report
from trimtab.lineage import comparable, differences, lineage
from trimtab.lineage_picture import boxes, save_lineage
from trimtab.registry_text import lineage_text

ORIGIN = {
    "run_id": "run-7",
    "checkpoint": {"update": 40, "env_steps": 81_920, "evaluations": {"returns": [1.0]}},
    "loop": {"training": {"seed": 3, "lr": 0.001}, "gates": {"seed": 5}, "environment": {"id": "CartPole-v1"}},
    "code_commit": "c0ffee",
    "python": "3.11.7",
    "packages": {"numpy": "2.1.0"},
    "parents": [{"kind": "incumbent", "version": 1, "digest": "d" * 64}, {"kind": "run", "run_id": "run-6"}],
    "data_range": {"env_steps": 81_920, "from": 0.0, "to": 86_400.0},
}


def _bundle(registry: Registry, seed: int, origin: dict[str, Any] = ORIGIN) -> Bundle:
    policy = make_policy(seed)
    obs_ND = np.random.default_rng(7).standard_normal((32, 4)).astype(np.float32)
    return write_bundle(
        registry.bundles,
        policy=policy,
        golden=Golden(obs_ND, policy.distributions(obs_ND)),
        gate_report=make_report(policy),
        mode="greedy",
        origin=origin,
        created_at=1.0,
    )


def _bodies(registry: Registry) -> list[dict[str, Any]]:
    return [entry.body for entry in registry.entries()]


def _lived(root: Path) -> tuple[Registry, Bundle]:
    """Version 2 is registered at 200 s, approved, champion from 350 s to 500 s, and has a tag and a name."""
    registry = make_registry(root)
    bundle = _bundle(registry, 9)
    registry.register(bundle, now=200.0)
    registry.append(lambda state: approve_version(state, 2, approver="ann", reason="read the card"), now=250.0)
    registry.append(lambda state: start_release(state, 2, weights=(0.5,), override_gates=None, reason="by hand"), now=300.0)
    registry.append(lambda state: change_release(state, "promote", reason="better in both"), now=350.0)
    registry.append(lambda state: change_release(state, "rollback", reason="complaints"), now=500.0)
    registry.append(lambda state: tag_version(state, 2, "ticket", "RL-7"), now=600.0)
    registry.append(lambda state: set_alias(state, "eu", 2, "test"), now=700.0)
    return registry, bundle


def test_a_lineage_says_where_a_version_came_from_and_what_became_of_it(tmp_path: Path) -> None:
    registry, bundle = _lived(tmp_path)
    found = lineage(bundle, _bodies(registry))
    assert (found["versions"], found["digest"], found["aliases"]) == ([2], bundle.digest, ["eu"])
    assert (found["run_id"], found["seeds"], found["code_commit"]) == ("run-7", {"training": 3, "gates": 5}, "c0ffee")
    assert (found["config"], found["parents"], found["data_range"]) == (
        ORIGIN["loop"],
        ORIGIN["parents"],
        ORIGIN["data_range"],
    )
    assert [approval["approver"] for approval in found["approvals"]] == ["ann"]
    assert [(r["release"], r["role"], r["state"], r["changed_at"]) for r in found["releases"]] == [
        (1, "candidate", "rolled_back", 500.0)
    ]
    assert [(p["entry"], p["time_s"], p["until_s"], p["reason"]) for p in found["champion"]] == [
        (6, 350.0, 500.0, "better in both")
    ]
    assert [r["entry"] for r in found["registered"]] == [3]
    before = lineage(bundle, _bodies(registry)[:4])  # after the approval
    assert (before["releases"], before["champion"], before["aliases"]) == ([], [], [])


def test_the_first_champion_reigned_twice(tmp_path: Path) -> None:
    registry, _ = _lived(tmp_path)
    found = lineage(registry.bundle(1), _bodies(registry))
    assert [(period["time_s"], period["until_s"]) for period in found["champion"]] == [(100.0, 350.0), (500.0, None)]
    assert [release["role"] for release in found["releases"]] == ["incumbent"]


def test_what_nobody_wrote_down_is_not_recorded(tmp_path: Path) -> None:
    registry = make_registry(tmp_path)
    found = lineage(registry.bundle(1), _bodies(registry))
    empty = ("run_id", "checkpoint", "config", "seeds", "code_commit", "packages", "data_range", "parents")
    assert [found[key] for key in empty] == [None] * len(empty)
    lines = dict(line.split(":", 1) for line in lineage_text(found).splitlines() if line[0] != " ")
    for name in ("run", "checkpoint", "config", "seeds", "code commit", "packages", "data range", "parents"):
        assert lines[name].strip() == "not recorded"
    assert lines["approved"].strip() == "by nobody"


def test_the_text_names_everything_a_reviewer_asks_for(tmp_path: Path) -> None:
    registry, bundle = _lived(tmp_path)
    text = lineage_text(lineage(bundle, _bodies(registry)))
    for part in (
        "run-7",
        "env_steps 81920, update 40",
        "training 3, gates 5",
        "c0ffee",
        "numpy 2.1.0",
        "from 1970-01-01 00:00:00 UTC, to 1970-01-02 00:00:00 UTC",
        "kind incumbent, version 1",
        "run_id run-6",
        "training: lr 0.001, seed 3",
        "pass, compared with no incumbent",
        "safety pass: says pass",
        "1970-01-01 00:04:10 UTC by ann: read the card",
        "1, of version 2 against 1: rolled_back 1970-01-01 00:08:20 UTC: complaints",
        "1970-01-01 00:05:50 UTC to 1970-01-01 00:08:20 UTC: better in both",
    ):
        assert part in text, part


def test_a_bundle_that_was_never_registered_or_was_given_up_says_so(tmp_path: Path) -> None:
    registry, _ = _lived(tmp_path)
    loose = _bundle(registry, 11)
    assert "never registered" in lineage_text(lineage(loose, _bodies(registry)))
    registry.register(loose, now=800.0)
    registry.append(lambda state: collect_version(state, 3, "old"), now=900.0)
    found = lineage(loose, _bodies(registry))
    assert found["collected_at"] == 900.0 and "given up:    1970-01-01 00:15:00 UTC" in lineage_text(found)


def test_seeds_in_the_manifest_come_before_those_in_the_settings(tmp_path: Path) -> None:
    registry = make_registry(tmp_path)
    bundle = _bundle(registry, 9, {**ORIGIN, "seeds": {"training": 30}})
    assert lineage(bundle, [])["seeds"] == {"training": 30}


def test_a_picture_has_a_box_for_each_part_and_an_arrow_to_each(tmp_path: Path) -> None:
    """Boxes in order: run, checkpoint, version, release, the run's parent, the version's incumbent."""
    registry, bundle = _lived(tmp_path)
    found = lineage(bundle, _bodies(registry))
    placed, arrows = boxes(found)
    assert [box.lines[0] for box in placed] == [
        *("run", "checkpoint", "version 2", "release 1, as candidate", "parent: run", "parent: incumbent")
    ]
    assert arrows == [(0, 1), (1, 2), (2, 3), (4, 0), (5, 2)]
    save_lineage(found, tmp_path / "a.svg")
    svg = (tmp_path / "a.svg").read_text()
    assert all(part in svg for part in ("run-7", "81,920 steps", "eu", "rolled_back", "approved: ann", "run-6"))
    save_lineage(found, tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_bytes() == (tmp_path / "a.svg").read_bytes()
    save_lineage(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_of_other_kinds_and_places_are_refused(tmp_path: Path) -> None:
    registry = make_registry(tmp_path)
    found = lineage(registry.bundle(1), _bodies(registry))
    with pytest.raises(UsageError, match=r"must end in \.png or \.svg"):
        save_lineage(found, tmp_path / "a.jpg")
    with pytest.raises(UsageError, match="cannot be written"):
        save_lineage(found, tmp_path / "missing" / "a.svg")


def test_two_bundles_differ_in_settings_seeds_packages_and_gates_and_not_in_when(tmp_path: Path) -> None:
    registry = make_registry(tmp_path)
    other = {**ORIGIN, "loop": {**ORIGIN["loop"], "training": {"seed": 4, "lr": 0.001}}, "packages": {"numpy": "2.2.0"}}
    a, b = _bundle(registry, 9), _bundle(registry, 9, other)
    assert differences(comparable(a), comparable(b)) == {
        "config.training.seed": (3, 4),
        "seeds.training": (3, 4),
        "packages.numpy": ("2.1.0", "2.2.0"),
    }
    assert differences(comparable(a), comparable(a)) == {}
    failing = make_bundle(registry.bundles, make_policy(9), verdict=Verdict.FAIL, override_gates="drill")
    found = differences(comparable(a), comparable(failing))
    assert found["gates.safety.verdict"] == ("pass", "fail") and found["override_gates"] == (None, "drill")
    assert found["config.training.lr"] == (0.001, None)


def test_values_that_only_look_equal_differ() -> None:
    assert differences({"a": 1, "b": [1], "c": {"d": 0}}, {"a": True, "b": [1], "c": {"d": 0.0}}) == {
        "a": (1, True),
        "c.d": (0, 0.0),
    }
    assert differences({"a": {"b": 1}}, {"a": None}) == {"a.b": (1, None)}
