"""Columns say what their rows say, in memory, in the log and as tensors."""

import asyncio
import json
import struct

import msgspec
import numpy as np
import pytest

from policies.distributions import seed_of
from policies.errors import ServiceUnavailable
from policies.records import DecisionBatch
from policies.storage import Storage, open_storage
from serve_app.answers import Answer, Answers, sorted_out
from serve_app.asks import LINE_BYTES, Ask, that_share_a_line
from serve_app.decision_ids import DecisionIds
from serve_app.tensors_http import _text_items
from tests.serving_helpers import (
    NAME,
    Reply,
    call,
    decide_all,
    each,
    logged,
    observations,
    publish,
    random_policy,
    release,
    replica_of,
)

ROW = Answer("champion", 1, "digest-1", "sample", 7, 0, 0.25, 0.5, "arm", None, None, None)
OTHER = ROW._replace(arm="canary", version=2, digest="digest-2", mode="greedy", seed=8, action=[1, 2], propensity=1.0)
FALLEN = ROW._replace(rung="fixed", fallback="version 1 gave NaN", shield="limits", mixture_propensity=0.125)


@pytest.mark.parametrize("rows", [[ROW], [ROW, ROW], [ROW, OTHER], [OTHER, FALLEN, ROW], [FALLEN, FALLEN]])
def test_rows_come_back_from_their_columns(rows: list[Answer]) -> None:
    assert Answers.of(rows).each() == rows


def test_what_all_rows_share_is_said_once_and_what_one_has_is_said_for_each() -> None:
    alike, mixed = Answers.of([ROW, ROW._replace(seed=9)]), Answers.of([ROW, FALLEN])
    assert (alike.arms, alike.versions, alike.modes, alike.rungs, alike.fallbacks) == ("champion", 1, "sample", "arm", None)
    assert (mixed.arms, mixed.rungs, mixed.fallbacks) == ("champion", ["arm", "fixed"], [None, "version 1 gave NaN"])


def test_a_distribution_stays_with_its_row() -> None:
    [first, second] = Answers.of([ROW, OTHER._replace(parameters_P=np.array([0.25, 0.75]))]).each()
    assert first.parameters_P is None and second.parameters_P is not None and second.parameters_P.tolist() == [0.25, 0.75]


def test_rows_without_an_answer_are_apart_and_keep_their_places() -> None:
    refusal = ServiceUnavailable("nobody answers")
    answers, errors = sorted_out([ROW, refusal, OTHER])
    assert answers is not None and answers.each() == [ROW, OTHER] and errors == {1: refusal}
    assert sorted_out([refusal]) == (None, {0: refusal})
    assert each([ROW, refusal]) == [ROW, refusal] and each(Answers.of([ROW])) == [ROW]


@pytest.mark.parametrize(
    "texts", [["a"], ["", "a"], ["x" * 127, "y" * 128], ["ä", "b"], ["ä" * 100, "z" * 300], ["\0\x7f", "\x80"]]
)
def test_texts_of_a_tensor_stand_behind_their_length_in_bytes(texts: list[str]) -> None:
    expected = b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in texts)
    assert _text_items(texts) == expected


@pytest.mark.parametrize("num", [1, 2, 300])
def test_names_within_a_request_are_numbered(num: int) -> None:
    names, seeds = DecisionIds(b"secret").names_within("page-1", num)
    tag = names[0].rpartition(".")[2]
    assert names == [f"page-1:{index}.{tag}" for index in range(num)] and len(seeds) == num


# --- whose decision it is, where nobody said so ---


@pytest.fixture
def storage(tmp_path) -> Storage:
    storage = open_storage(tmp_path / "storage")
    for seed in (1, 2):
        publish(storage, random_policy(seed))
    release(storage, 2, weights=(0.5,))
    return storage


def logged_lines(storage: Storage) -> list[DecisionBatch]:
    lines = [line for path in storage.decisions(NAME).glob("*.jsonl") for line in path.read_bytes().splitlines()[1:]]
    return [msgspec.json.decode(line, type=DecisionBatch) for line in lines]


def test_without_units_each_of_many_is_a_unit_of_its_own_and_the_log_says_so_once(storage: Storage) -> None:
    replica = replica_of(storage)
    [named, unnamed, own] = decide_all(
        storage,
        replica,
        {"observations": observations(40), "request_id": "page"},
        {"observations": observations(40)},
        {"observations": observations(2), "request_ids": ["one", "two"]},
    )
    decisions = logged(storage)
    units = [decision.unit_id for decision in decisions]
    assert units[:40] == [f"page:{index}" for index in range(40)] and units[80:] == ["one", "two"]
    assert len(set(units)) == 82 and {decision.arm for decision in decisions[:40]} == {"canary", "champion"}
    told = [(row["decision_id"], row["arm"]) for reply in (named, unnamed, own) for row in reply.json()["decisions"]]
    assert told == [(decision.decision_id, decision.arm) for decision in decisions]
    assert [line.unit_ids for line in logged_lines(storage)] == [None] * 3


def test_requests_that_are_answered_together_share_a_line_and_keep_what_is_their_own(storage: Storage) -> None:
    replica = replica_of(storage, request_modes=["greedy"])
    bodies = [
        {"observation": observation, "unit_id": f"unit-{index}", "request_id": f"request-{index}"}
        for index, observation in enumerate(observations(20))
    ]
    bodies[3] |= {"mode": "greedy"}
    bodies[4] |= {"explain": True}
    bodies[5] |= {"observation": [0.0]}  # refused: it has no line, nor a place in that of the others
    del bodies[6]["request_id"]
    bodies[7] |= {"episode_id": "episode"}
    replies = decide_all(storage, replica, *bodies)
    assert [reply.status for reply in replies] == [200] * 5 + [422] + [200] * 14
    told = [reply.json() for index, reply in enumerate(replies) if index != 5]
    asked = [body for index, body in enumerate(bodies) if index != 5]
    decisions = logged(storage)
    assert [line.batch_id for line in logged_lines(storage)] == [""]
    for body, answer, decision in zip(asked, told, decisions, strict=True):
        assert (decision.observation, decision.unit_id) == (body["observation"], body["unit_id"])
        assert decision.episode_id == body.get("episode_id") and decision.mode == body.get("mode", "sample")
        assert decision.seed == seed_of(decision.decision_id) or "request_id" not in body
        assert {name: answer[name] for name in ("decision_id", "action", "version", "arm", "propensity")} == {
            name: getattr(decision, name) for name in ("decision_id", "action", "version", "arm", "propensity")
        }
        assert ("explanation" in answer) == ("explain" in body) and answer["policy"] == NAME
    assert {decision.arm for decision in decisions} == {"canary", "champion"}
    assert len({decision.latency_s for decision in decisions}) > 1 and all(0 < d.latency_s < 60 for d in decisions)
    named = [(body, answer["decision_id"], answer["action"]) for body, answer in zip(asked, told) if "request_id" in body]
    again = [reply.json() for reply in decide_all(storage, replica, *[body for body, *_ in reversed(named)])]
    assert [(answer["decision_id"], answer["action"]) for answer in again] == [
        (name, action) for _, name, action in reversed(named)
    ]
    assert len(named) == 18 and len(logged(storage)) == 19  # all were told from the shared line


def test_what_shares_a_line_is_bounded_in_bytes_and_the_batch_is_decided_nevertheless(storage: Storage) -> None:
    """Without a bound 90 requests of 825 kB were a line that no reader took."""
    replica, num = replica_of(storage), 12
    padding = " " * (LINE_BYTES // 4)  # so three bodies are below the bound, and four are above it
    key = storage.api_key_file.read_text()
    bodies = [(json.dumps({"observation": observation}) + padding).encode() for observation in observations(num)]

    async def ask_all() -> list[Reply]:
        return await asyncio.gather(*(call(replica.api, "POST", "/v1/decide", body, key=key) for body in bodies))

    replies = asyncio.run(ask_all())
    assert [len(line.decision_ids) for line in logged_lines(storage)] == [3] * 4
    assert [decision.decision_id for decision in logged(storage)] == [reply.json()["decision_id"] for reply in replies]


def test_one_request_above_the_bound_has_a_line_of_its_own() -> None:
    ask = Ask("d", 0, "u", None, [], None, True, False, None, False, None, 0.0, 0.0, None, num_bytes=2 * LINE_BYTES)
    small = ask._replace(num_bytes=1)
    assert list(that_share_a_line([(4, small), (5, ask), (7, small), (8, small)])) == [[4], [5], [7, 8]]
    assert list(that_share_a_line([])) == []


def test_a_refused_request_does_not_send_the_others_down_the_ladder(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It alone asked for a mode: the others are decided as columns."""
    replica, by_row = replica_of(storage, request_modes=["greedy"]), []
    decide_row = replica._ingress.decider._decide_row
    monkeypatch.setattr(replica._ingress.decider, "_decide_row", lambda *args: by_row.append(args) or decide_row(*args))
    good = [{"observation": observation} for observation in observations(5)]
    replies = decide_all(storage, replica, *good, {"observation": [0.0], "mode": "greedy"})
    assert [reply.status for reply in replies] == [200] * 5 + [422] and not by_row
    decide_all(storage, replica, *good, {**good[0], "mode": "greedy"})
    assert len(by_row) == 6  # the control: one that is decided does


def test_a_repeated_request_for_many_keeps_its_units_and_arms(storage: Storage) -> None:
    replica, body = replica_of(storage), {"observations": observations(40), "request_id": "page"}
    [first] = decide_all(storage, replica, body)
    [again] = decide_all(storage, replica, body)
    [other] = decide_all(storage, replica, {**body, "unit_id": "somebody"})
    assert first.json() == again.json() and len(logged(storage)) == 40
    assert "error" in other.json()["decisions"][0]  # asked for somebody else: it is no repetition
