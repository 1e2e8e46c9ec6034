"""Is a policy that is served one observation and a `state` at a time the one that is served all of its last observations?"""

import asyncio
import base64
import binascii
import itertools
import json
import os
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from policies.errors import RequestConflict, RequestInvalid
from policies.history import as_observation, state_after, with_frame
from policies.log_reader import LogTail
from policies.network import Architecture
from policies.observations import Box
from policies.policy import Policy
from policies.records import Decision
from policies.spaces import Spaces
from policies.storage import Storage, open_storage
from policies.traffic import champion_only
from serve_app.openapi import openapi_document
from serve_app.replica import PolicyReplica
from tests.bundles import golden_as_trained, policy_on
from tests.direct_replica import DirectReplica, direct_replica
from tests.serving_helpers import (
    NAME,
    Reply,
    call,
    decide_all,
    publish,
    random_policy,
    read_new,
    release,
    replica_of,
    snapshot_of,
    variant_of,
)
from training.config import EnvironmentConfig
from training.environment import read_spaces
from training.vectorization import make_single
from trimtab import session as sessions
from trimtab.async_client import AsyncClient
from trimtab.client import Client
from trimtab.commands import online
from trimtab.drive import drive
from trimtab.loop_file import load_loop_file
from trimtab.replay import replay
from trimtab.session import Session

LOOP_FILE = Path(__file__).parents[2] / "examples/cartpole_history.yaml"
ENVIRONMENT = load_loop_file(LOOP_FILE).environment
SPACES = read_spaces(ENVIRONMENT)  # 4 frames of 2 numbers: position up to 4.8 and angle up to 0.419
FRAME, NEXT = [0.5, -0.25], [1.0, 0.125]  # float32 has all of these exactly


def policy_with_history(seed: int, environment: EnvironmentConfig = ENVIRONMENT) -> Policy:
    return policy_on(read_spaces(environment), Architecture((16,)), seed)


def published(root: Path, *policies: Policy) -> Storage:
    storage = open_storage(root)
    for policy in policies:
        publish(storage, policy, golden=golden_as_trained(policy))
    return storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return published(tmp_path / "storage", policy_with_history(1))


def told(storage: Storage, replica: PolicyReplica, body: dict[str, Any]) -> dict[str, Any]:
    [reply] = decide_all(storage, replica, body)
    assert reply.status == 200, reply.body
    return reply.json()


def logged(storage: Storage) -> list[Decision]:
    return read_new(LogTail(storage.decisions(NAME), Decision))


def token(*frames: list[float], version: int = 1) -> str:
    """Return a state as it is described, made by other means than the code's."""
    numbers = [number for frame in frames for number in frame]
    return base64.urlsafe_b64encode(struct.pack(f"<B{len(numbers)}f", version, *numbers)).decode().rstrip("=")


# --- the token ---


def test_a_state_is_the_last_frames_but_the_oldest() -> None:
    begun = with_frame(np.float32(FRAME), "", SPACES)
    assert as_observation(begun, SPACES) == [FRAME] * 4
    state = state_after([FRAME] * 4)
    assert state == token(FRAME, FRAME, FRAME)
    going_on = with_frame(np.float32(NEXT), state, SPACES)
    assert as_observation(going_on, SPACES) == [FRAME, FRAME, FRAME, NEXT]
    assert state_after(as_observation(going_on, SPACES)) == token(FRAME, FRAME, NEXT)
    assert len(state) == 34  # 1 + 3 frames x 2 numbers x 4 bytes = 25 bytes, 4 characters for each 3


def test_an_image_keeps_its_order() -> None:
    spaces = read_spaces(EnvironmentConfig(id="tests.training_environments:Screen", history=2))
    frames = np.arange(384, dtype=np.float32).reshape(2, 8, 8, 3) % 256
    obs_D = with_frame(frames[1].reshape(-1), state_after([None, frames[0].tolist()]), spaces)
    assert as_observation(obs_D, spaces) == frames.tolist() and obs_D.tolist() == frames.reshape(-1).tolist()


# --- the same policy, asked in two ways ---


def played(storage: Storage, ask_for: Callable[[int, np.ndarray], dict[str, Any]], swap: Callable[[], None]) -> list[dict]:
    """Play episodes of the environment, 40 steps together, and return what was told; a new version comes after 20 steps."""
    env, answers, is_over, episode = make_single(ENVIRONMENT), [], True, -1
    for step in range(40):
        if step == 20:
            swap()
        if is_over:
            episode += 1
            observation, _ = env.reset(seed=episode)
        answers.append(ask_for(step, observation) | {"episode": episode})
        observation, _, terminated, truncated, _ = env.step(answers[-1]["action"])
        is_over = terminated or truncated
    assert episode > 0, "an episode began in between"
    return answers


def test_with_states_every_decision_is_the_one_of_the_whole_observation_bit_for_bit(tmp_path: Path) -> None:
    """Two deployments with the same secret and bundles name decisions alike, so what differs is only the way of asking."""
    first = published(tmp_path / "first", policy_with_history(1), policy_with_history(2))
    shutil.copytree(first.root, tmp_path / "second")
    second = open_storage(tmp_path / "second")

    def swap(storage: Storage, *replicas: PolicyReplica) -> None:
        release(storage, 2, weights=(1.0,))
        for replica in replicas:
            replica._variants.refresh(now=1e9)

    whole = replica_of(first)
    replicas = [replica_of(second) for _ in range(3)]
    state = ""

    def with_whole(step: int, observation: np.ndarray) -> dict[str, Any]:
        return told(first, whole, {"observation": observation.tolist(), "request_id": f"r{step}", "unit_id": "u"})

    def with_state(step: int, observation: np.ndarray) -> dict[str, Any]:
        nonlocal state
        if (observation == observation[0]).all():  # a first observation, as only a reset shows it
            state = ""
        body = {"observation": observation[-1].tolist(), "request_id": f"r{step}", "unit_id": "u", "state": state}
        answer = told(second, replicas[step % 3], body)
        again = told(second, replicas[(step + 1) % 3], body)  # an answer that was lost, asked for at another replica
        assert again == answer
        state = answer.pop("state")
        return answer

    expected = played(first, with_whole, lambda: swap(first, whole))
    found = played(second, with_state, lambda: swap(second, *replicas))
    assert found == expected
    assert {answer["version"] for answer in found} == {1, 2} and {answer["action"] for answer in found} == {0, 1}
    ours, theirs = ({d.decision_id: d for d in logged(storage)} for storage in (second, first))
    assert len(ours) == len(theirs) == 40, "what was asked for twice is logged once"
    for name, decision in ours.items():
        assert decision.observation == theirs[name].observation and decision.seed == theirs[name].seed
        assert replay(second, NAME, name)["equal"]


def test_a_forgotten_state_would_have_been_noticed(storage: Storage) -> None:
    """Negative control of the test above: a replica that took each frame for a first one would decide otherwise."""
    replica = replica_of(storage)
    going_on = {"observation": NEXT, "state": token(FRAME, [0, 0], FRAME), "request_id": "a"}
    begun = told(storage, replica, {"observation": NEXT, "state": "", "request_id": "b"})
    answer = told(storage, replica, going_on)
    assert answer["propensity"] not in (begun["propensity"], 1 - begun["propensity"])
    assert [decision.observation for decision in logged(storage)] == [[NEXT] * 4, [FRAME, [0, 0], FRAME, NEXT]]


def test_numbers_that_float32_does_not_have_are_logged_as_the_policy_sees_them(storage: Storage) -> None:
    """Else a frame would be another one in the next observation than in its own."""
    replica = replica_of(storage)
    state = told(storage, replica, {"observation": [0.1, 0.2], "state": ""})["state"]
    told(storage, replica, {"observation": [0, 0], "state": state})
    tenth, fifth = float(np.float32(0.1)), float(np.float32(0.2))
    first, second = logged(storage)
    assert first.observation == [[tenth, fifth]] * 4 and second.observation == [[tenth, fifth]] * 3 + [[0.0, 0.0]]


def test_a_whole_observation_is_answered_as_ever_and_without_a_state(storage: Storage) -> None:
    answer = told(storage, replica_of(storage), {"observation": [FRAME] * 4})
    assert "state" not in answer and logged(storage)[0].observation == [FRAME] * 4


def test_a_mask_goes_with_the_newest_observation(tmp_path: Path) -> None:
    environment = EnvironmentConfig(id="tests.training_environments:Masked-v0", kwargs={"flat": True}, history=2)
    policy = policy_with_history(1, environment)
    masks_NA = np.eye(6, dtype=bool)[np.arange(36) % 6]
    storage = open_storage(tmp_path / "storage")
    publish(storage, policy, golden=golden_as_trained(policy, masks_NA))
    body = {"observation": [1.0], "state": token([0.0]), "action_mask": [0, 0, 1, 0, 0, 0]}
    assert told(storage, replica_of(storage), body)["action"] == 3
    assert logged(storage)[0].observation == [[0.0], [1.0]]


# --- the same request again ---


def test_the_same_id_with_another_state_or_frame_is_a_conflict_that_says_which(storage: Storage) -> None:
    replica, body = replica_of(storage), {"observation": NEXT, "state": token(FRAME, FRAME, NEXT), "request_id": "r"}
    answer = told(storage, replica, body)
    assert told(storage, replica, body) == answer and answer["state"] == token(FRAME, NEXT, NEXT)
    for change, name in (
        ({"state": token(NEXT, FRAME, NEXT)}, "another state;"),
        ({"state": ""}, "another state;"),
        ({"observation": FRAME}, "another observation;"),
        ({"observation": FRAME, "state": token(NEXT, FRAME, NEXT)}, "another observation and state;"),
    ):
        [reply] = decide_all(storage, replica, body | change)
        assert reply.status == 409 and name in reply.error, reply.body
    whole = {"observation": [FRAME, FRAME, NEXT, NEXT], "request_id": "r"}
    assert told(storage, replica, whole) == {key: value for key, value in answer.items() if key != "state"}
    assert len(logged(storage)) == 1
    [reply] = decide_all(storage, replica, body | {"state": "no state"})
    assert reply.status == 400 and "8 characters, this policy's have 34" in reply.error


def test_what_was_decided_within_wider_bounds_is_told_again(storage: Storage) -> None:
    replica, body = replica_of(storage), {"observation": [4.0, 0.0], "state": token(*[[4.0, 0.0]] * 3), "request_id": "r"}
    answer = told(storage, replica, body)
    bound = np.full((4, 2), 0.5, np.float32)
    narrow = policy_on(replace(SPACES, observation=Box(-bound, bound)), Architecture((8,)))
    replica._variants.snapshot = snapshot_of(champion_only(2, 2), variant_of(2, narrow))
    assert told(storage, replica, body) == answer
    [reply] = decide_all(storage, replica, body | {"request_id": "new"})
    assert reply.status == 422, "the control"


# --- many ---


def test_each_of_many_has_a_state_of_its_own(storage: Storage) -> None:
    replica = replica_of(storage)
    states = ["", token(FRAME, FRAME, FRAME), None, "nonsense", token(NEXT, NEXT, NEXT)]
    observations = [FRAME, NEXT, [FRAME] * 4, FRAME, [9.0, 0.0]]
    body = {"observations": observations, "states": states, "request_ids": list("abcde"), "unit_id": "u"}
    many = told(storage, replica, body)["decisions"]
    assert [item.get("state") for item in many] == [token(FRAME, FRAME, FRAME), token(FRAME, FRAME, NEXT), None, None, None]
    assert [item["error"]["status"] for item in many[3:]] == [400, 422]
    assert "observation[0] = 9.0 is outside [-4.8, 4.8]" in many[4]["error"]["message"]
    again = told(storage, replica, body)["decisions"]  # from the log
    assert again == many
    other = told(storage, replica, body | {"states": ["", token(FRAME, FRAME, NEXT), None, "", ""]})["decisions"]
    assert other[0] == many[0] and other[1]["error"]["status"] == 409 and "another state" in other[1]["error"]["message"]
    lone = open_storage(storage.root.with_name("lone"))
    shutil.copytree(storage.registry(NAME), lone.registry(NAME))
    shutil.copy(storage.decision_secret_file, lone.decision_secret_file)
    for name, observation, state, item in zip("abc", observations, states, many):
        one = {"observation": observation, "state": state, "request_id": name, "unit_id": "u"}
        assert told(lone, replica_of(lone), one) == {**item, "policy": NAME}


def test_many_frames_without_states_are_each_refused_with_the_remedy(storage: Storage) -> None:
    many = told(storage, replica_of(storage), {"observations": [FRAME, [FRAME] * 4]})["decisions"]
    assert many[0]["error"]["status"] == 400 and '"" to begin an episode' in many[0]["error"]["message"]
    assert "action" in many[1]


# --- repair ---


def test_a_frame_is_mended_before_it_is_put_behind_the_others(storage: Storage) -> None:
    replica = replica_of(storage, fallback={"repair": ["clip", "missing"], "fill": 0.25})
    begun = told(storage, replica, {"observation": [9, 0.125], "state": "", "request_id": "a"})
    assert begun["repair"] == "observation[0] = 9 was cut to 4.8"
    edge = float(np.float32(4.8))
    assert begun["state"] == token(*[[edge, 0.125]] * 3)
    body = {"observation": [0, None], "state": begun["state"], "request_id": "b"}
    going_on = told(storage, replica, body)
    assert going_on["repair"] == "observation[1] was missing, 0.25 is taken"
    assert logged(storage)[1].observation == [[edge, 0.125]] * 3 + [[0.0, 0.25]]
    assert told(storage, replica, body) == going_on
    [reply] = decide_all(storage, replica, body | {"state": ""})
    assert reply.status == 409 and "another state" in reply.error


def test_what_an_older_versions_wider_bounds_let_into_a_state_is_cut_too_or_refused(storage: Storage) -> None:
    wide = token([9, 0.125], FRAME, FRAME)
    body = {"observation": FRAME, "state": wide, "request_id": "a"}
    [refused] = decide_all(storage, replica_of(storage), body)
    assert refused.status == 400 and "holds 9, outside [-4.8, 4.8]" in refused.error
    clipping = replica_of(storage, fallback={"repair": ["clip"]})
    answer = told(storage, clipping, body)
    assert answer["repair"] == "observation[0][0] = 9.0 was cut to 4.8"
    frame = np.float32(FRAME).tolist()
    assert logged(storage)[0].observation == [[float(np.float32(4.8)), 0.125], frame, frame, frame]
    assert told(storage, clipping, body) == answer
    [other] = decide_all(storage, clipping, body | {"state": token([0.25, 0.125], FRAME, FRAME)})
    assert other.status == 409 and "another state" in other.error


# --- what is refused ---

BAD = float(np.float32(4.9))
WRONG = [
    ({"observation": FRAME}, 400, '"" to begin an episode'),
    ({"observation": FRAME, "state": None}, 400, '"" to begin an episode'),
    ({"observation": FRAME, "state": "x"}, 400, "state has 1 characters, this policy's have 34"),
    ({"observation": FRAME, "state": token(FRAME, FRAME)}, 400, "state has 23 characters"),
    ({"observation": FRAME, "state": token(*[FRAME] * 4)}, 400, "state has 44 characters"),
    ({"observation": FRAME, "state": token(FRAME, FRAME, FRAME) + "=="}, 400, "state has 36 characters"),
    ({"observation": FRAME, "state": token(FRAME, FRAME, FRAME, version=2)}, 400, "is of version 2"),
    ({"observation": FRAME, "state": "!" * 34}, 400, "is not base64url"),
    ({"observation": FRAME, "state": "é" * 34}, 400, "is not base64url"),
    ({"observation": FRAME, "state": "\ud800" * 34}, 400, None),
    ({"observation": FRAME, "state": "\0" * 34}, 400, "is not base64url"),
    ({"observation": FRAME, "state": token(FRAME, FRAME, FRAME)[:-1] + "!"}, 400, "is not base64url"),
    ({"observation": FRAME, "state": token(FRAME, [BAD, 0], FRAME)}, 400, "holds 4.9, outside [-4.8, 4.8]"),
    ({"observation": FRAME, "state": token(FRAME, [0, float("nan")], FRAME)}, 400, "is not finite"),
    ({"observation": FRAME, "state": token([float("-inf"), 0], FRAME, FRAME)}, 400, "is not finite"),
    ({"observation": FRAME, "state": 7}, 422, "`str | null`"),
    ({"observation": [FRAME] * 4, "state": ""}, 422, "beside `state` an observation is one frame"),
    ({"observation": ["x", 0], "state": ""}, 422, "observation[0] is str"),
    ({"observation": FRAME, "states": [""]}, 422, "belong to `observations`"),
    ({"observations": [FRAME], "state": ""}, 422, "belong to one observation"),
    ({"observations": [FRAME], "states": ["", ""]}, 422, "states has 2 items for 1 observations"),
]


@pytest.mark.parametrize(("body", "status", "message"), WRONG)
def test_what_is_wrong_with_a_state_is_said_with_the_remedy(
    storage: Storage, body: dict[str, Any], status: int, message: str | None
) -> None:
    [reply] = decide_all(storage, replica_of(storage), body)
    assert reply.status == status, reply.body
    assert message is None or message in reply.error, reply.error
    if status == 400 and message is not None:
        assert '"" to begin an episode' in reply.error


def test_a_policy_without_a_history_takes_no_state_and_tells_none(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "plain")
    publish(storage, random_policy(1))
    replica = replica_of(storage)
    for body in ({"observation": [0, 0, 0, 0], "state": ""}, {"observations": [[0, 0, 0, 0]], "states": [""]}):
        [reply] = decide_all(storage, replica, body)
        assert reply.status == 400 and "this policy has no history" in reply.error
    assert set(told(storage, replica, {"observation": [0, 0, 0, 0]})) == {
        "decision_id", "action", "policy", "version", "arm", "propensity", "fallback",
    }  # fmt: skip


def is_a_state(text: str) -> bool:
    """Say by other means than the code's whether a text is a state of the policy: 3 frames within the bounds."""
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error:
        return False
    if base64.urlsafe_b64encode(data).decode().rstrip("=") != text or len(data) != 25 or data[0] != 1:
        return False
    numbers = struct.unpack("<6f", data[1:])
    limits = itertools.cycle((SPACES.high_D[0], SPACES.high_D[1]))
    return all(abs(number) <= limit for number, limit in zip(numbers, limits))  # NaN is not


ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def mutated(state: str, rng: np.random.Generator) -> str:
    """Return a state that somebody has changed, cut, lengthened, or taken from elsewhere."""
    place, other = int(rng.integers(len(state))), str(rng.choice(list(ALPHABET + "+/= é")))
    ways = [
        lambda: state[:place] + other + state[place + 1 :],
        lambda: state[:place],
        lambda: state[:place] + other + state[place:],
        lambda: state[place:] + state[:place],
        lambda: "".join(rng.choice(list(ALPHABET), len(state))),
        lambda: base64.urlsafe_b64encode(b"\1" + rng.bytes(24)).decode().rstrip("="),
        lambda: token(*rng.normal(0, 3, (3, 2)).tolist()),
        lambda: token(*rng.normal(0, 0.1, (int(rng.integers(1, 6)), int(rng.integers(1, 4)))).tolist()),
        lambda: token(*(0.1 * rng.normal(size=(3, 2))).tolist(), version=int(rng.integers(256))),
    ]
    return ways[rng.integers(len(ways))]()


def test_no_state_that_somebody_made_up_is_taken_for_anything_else_or_breaks_a_replica(storage: Storage) -> None:
    replica, rng, statuses = replica_of(storage), np.random.default_rng(0), Counter[int]()
    texts = [mutated(token(*rng.normal(0, 0.1, (3, 2)).tolist()), rng) for _ in range(2000)]
    bodies = [{"observation": FRAME, "state": text} for text in texts if text != ""]
    for start in range(0, len(bodies), 100):
        part = bodies[start : start + 100]
        for body, reply in zip(part, decide_all(storage, replica, *part)):
            expected = 200 if is_a_state(body["state"].encode("ascii", "replace").decode()) else 400
            assert reply.status == expected, (body, reply.body)
            statuses[reply.status] += 1
    assert statuses[400] > 1000 and statuses[200] > 100, statuses


def test_a_version_with_another_history_is_another_interface(tmp_path: Path) -> None:
    longer = policy_with_history(2, ENVIRONMENT.model_copy(update={"history": 3}))
    storage = published(tmp_path / "storage", policy_with_history(1), longer)
    replica = replica_of(storage)
    release(storage, 2, weights=(1.0,))
    replica._variants.refresh(now=1e9)
    assert "under another policy name" in replica._variants.load_failures[2]
    assert told(storage, replica, {"observation": FRAME, "state": ""})["version"] == 1


# --- the interface's document ---


def test_the_document_says_what_is_taken_with_and_without_a_state() -> None:
    document = openapi_document("demo", SPACES, version="1")
    schema = {**document["components"]["schemas"]["DecideRequest"], "components": document["components"]}
    Draft202012Validator.check_schema(schema)
    takes = Draft202012Validator(schema).is_valid
    assert takes({"observation": FRAME, "state": ""}) and takes({"observation": [FRAME] * 4})
    assert takes({"observations": [FRAME, [FRAME] * 4], "states": ["", None]})
    assert not takes({"observation": FRAME}) and not takes({"observation": [FRAME] * 4, "state": ""})
    assert not takes({"observation": FRAME, "states": [""]}) and not takes({"observation": [FRAME] * 3})
    assert "state" in document["components"]["schemas"]["DecideAnswer"]["properties"]
    plain = openapi_document("demo", random_policy(1).spaces, version="1")["components"]["schemas"]["DecideRequest"]
    takes = Draft202012Validator(plain).is_valid
    assert takes({"observation": [0, 0, 0, 0]}) and not takes({"observation": [0, 0, 0, 0], "state": ""})


# --- clients ---


@pytest.fixture
def replica(storage: Storage) -> Iterator[DirectReplica]:
    with direct_replica(storage) as replica:
        yield replica


def test_both_clients_go_on_with_the_state_that_they_were_told(storage: Storage, replica: DirectReplica) -> None:
    async def run() -> list[str]:
        async with AsyncClient(replica.url, replica.key, timeout_s=20.0) as client:
            begun = await client.decide(FRAME, state="", request_id="a1")
            going_on = await client.decide(NEXT, state=begun["state"], request_id="a2")
            [many] = await client.decide_many([FRAME], states=[going_on["state"]])
            return [begun["state"], going_on["state"], many["state"]]

    expected = [token(FRAME, FRAME, FRAME), token(FRAME, FRAME, NEXT), token(FRAME, NEXT, FRAME)]
    assert asyncio.run(run()) == expected
    with Client(replica.url, replica.key, timeout_s=20.0) as client:
        begun = client.decide(FRAME, state="", request_id="b1")
        going_on = client.decide(NEXT, state=begun["state"], request_id="b2")
        [many] = client.decide_many([FRAME], states=[going_on["state"]])
        assert [begun["state"], going_on["state"], many["state"]] == expected
        with pytest.raises(RequestInvalid, match='"" to begin an episode'):
            client.decide(FRAME)
        with pytest.raises(RequestConflict, match="another state"):
            client.decide(NEXT, state="", request_id="b2")


def test_calls_that_go_together_keep_their_states(storage: Storage, replica: DirectReplica) -> None:
    async def run() -> list[dict[str, Any]]:
        async with AsyncClient(replica.url, replica.key, timeout_s=20.0, batch_window_ms=20.0) as client:
            begun = [client.decide([n / 64, 0.0], state="") for n in range(8)]
            wholes = [client.decide([[n / 64, 0.0]] * 4) for n in range(8)]
            return await asyncio.gather(*begun, *wholes)

    answers = asyncio.run(run())
    assert [item.get("state") for item in answers] == [*(token(*[[n / 64, 0.0]] * 3) for n in range(8)), *[None] * 8]
    with open(next(storage.decisions(NAME).glob("*.jsonl"))) as file:
        assert sum(line.startswith('{"batch_id"') for line in file) > 0  # or none went together


def test_a_local_client_decides_with_states_as_with_whole_observations(storage: Storage, replica: DirectReplica) -> None:
    with Client.local(replica.url, replica.key) as client:
        state, frames = "", np.random.default_rng(1).uniform(-0.4, 0.4, (10, 2)).astype(np.float32)
        stack = np.tile(frames[0], (4, 1))
        for n, frame in enumerate(frames):
            stack = np.concatenate([stack[1:], frame[None]])
            whole = client.decide(stack, request_id=f"r{n}", unit_id="u")
            answer = client.decide(frame, state=state, request_id=f"r{n}", unit_id="u")
            state = answer.pop("state")
            assert answer == whole and state == token(*stack[1:].tolist())
        with pytest.raises(RequestInvalid, match='"" to begin an episode'):
            client.decide(FRAME)
        with pytest.raises(RequestInvalid, match="state is int"):
            client.decide(FRAME, state=7)
    decisions = logged(storage)
    assert len(decisions) == 20
    for whole_one, one in zip(decisions[::2], decisions[1::2]):
        assert one.observation == whole_one.observation and one.propensity == whole_one.propensity


def test_a_local_client_of_a_policy_without_a_history_takes_no_state(tmp_path: Path) -> None:
    plain = open_storage(tmp_path / "plain")
    publish(plain, random_policy(1))
    refused = pytest.raises(RequestInvalid, match="this policy has no history")
    with direct_replica(plain) as replica, Client.local(replica.url, replica.key) as client, refused:
        client.decide([0.0, 0.0, 0.0, 0.0], state="")


def test_drive_plays_with_states_what_the_environment_shows(storage: Storage, replica: DirectReplica) -> None:
    summary = drive(ENVIRONMENT, replica.url, replica.key, episodes=3, seconds=60, concurrency=1, seed=7)
    assert summary["episodes"] == 3 and summary["failed_requests"] == 0 and summary["fallbacks"] == 0
    decisions = logged(storage)
    by_episode = [list(group) for _, group in itertools.groupby(decisions, lambda decision: decision.episode_id)]
    assert len(by_episode) == 3 and len(decisions) == summary["decisions"]
    for index, episode in enumerate(by_episode):
        env = make_single(ENVIRONMENT)
        observation, _ = env.reset(seed=7 + index)
        for decision in episode:
            assert decision.observation == observation.tolist()
            observation, *_ = env.step(decision.action)


def test_the_commands_decide_and_drive_send_states(
    storage: Storage, replica: DirectReplica, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session(NAME, 1, replica.url, str(storage.api_key_file), os.getpid(), "here", "nowhere")
    where = {"loop_file": LOOP_FILE, "storage": str(storage.root)}
    with sessions._locked(storage):  # as a session that serves holds it
        storage.session_file.write_text(json.dumps(asdict(session)))
        assert online.decide("[0.5, -0.25]", state="", **where) == 0
        assert f"state {token(FRAME, FRAME, FRAME)}\n" in capsys.readouterr().out
        assert online.decide("[1, 0.125]", state=token(FRAME, FRAME, FRAME), as_json=True, **where) == 0
        assert json.loads(capsys.readouterr().out)["state"] == token(FRAME, FRAME, NEXT)
        assert online.drive(episodes=2, seconds=60, concurrency=1, seed=0, as_json=True, **where) == 0
        assert json.loads(capsys.readouterr().out)["episodes"] == 2


def test_the_open_inference_protocol_takes_whole_observations(storage: Storage) -> None:
    replica, key = replica_of(storage), storage.api_key_file.read_text()

    def infer(observation: list[Any], shape: list[int]) -> Reply:
        data = np.array(observation).reshape(-1).tolist()
        body = {"inputs": [{"name": "observation", "datatype": "FP32", "shape": shape, "data": data}]}
        return asyncio.run(call(replica.api, "POST", f"/v2/models/{NAME}/infer", json.dumps(body).encode(), key=key))

    assert infer([[FRAME] * 4], [1, 4, 2]).status == 200
    refused = infer([FRAME], [1, 2])
    assert refused.status == 400 and "expected [1, 4, 2]" in refused.error


def test_an_old_bundle_says_no_history() -> None:
    assert Spaces.from_json(random_policy(1).spaces.to_json()).history == 1
