"""The Open Inference Protocol with its own real client, tritonclient, against a replica's own port."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from policies.golden import Golden
from policies.network import Architecture, tensor_shapes
from policies.observations import Box, Categories, Group
from policies.policy import Policy
from policies.registry import Registry
from policies.spaces import Choices, Spaces
from policies.storage import Storage, open_storage
from tests.direct_replica import direct_replica
from tests.serving_helpers import NAME, golden_of, logged, publish, random_policy, release


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path / "storage")
    publish(storage, random_policy(1))
    return storage


@contextmanager
def client_of(storage: Storage, **config: Any) -> Iterator[tuple[triton.InferenceServerClient, dict[str, str], str]]:
    """Yield Triton's client of a replica, the headers with its key, and its address."""
    with direct_replica(storage, **config) as replica:
        client = triton.InferenceServerClient(replica.url.removeprefix("http://"), connection_timeout=10, network_timeout=10)
        yield client, {"Authorization": f"Bearer {replica.key}"}, replica.url
        client.close()


def observation_input(obs: np.ndarray, *, binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput("observation", list(obs.shape), "FP32")
    tensor.set_data_from_numpy(obs.astype(np.float32), binary_data=binary)
    return tensor


def observations(num: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(num, 4)).astype(np.float32)


def test_health_needs_no_key_and_metadata_does(storage: Storage) -> None:
    with client_of(storage) as (client, headers, _):
        assert client.is_server_live() and client.is_server_ready()
        assert client.get_server_metadata(headers=headers)["extensions"] == ["binary_tensor_data"]
        assert client.is_model_ready(NAME, headers=headers) and client.is_model_ready(NAME, "1", headers=headers)
        metadata = client.get_model_metadata(NAME, headers=headers)
        assert metadata["versions"] == ["1"]
        assert metadata["inputs"] == [{"name": "observation", "datatype": "FP32", "shape": [-1, 4]}]
        assert [output["name"] for output in metadata["outputs"]][:3] == ["action", "propensity", "decision_id"]
        with pytest.raises(InferenceServerException, match="the API key is missing"):
            client.get_server_metadata()
        with pytest.raises(InferenceServerException, match="API key"):
            client.infer(NAME, [observation_input(observations(1))])
    assert logged(storage) == []


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_what_comes_back_is_what_was_logged_and_replays(storage: Storage, binary_in: bool, binary_out: bool) -> None:
    obs = observations(40)
    with client_of(storage) as (client, headers, _):
        outputs = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in ("action", "propensity", "decision_id")]
        answer = client.infer(
            NAME, [observation_input(obs, binary=binary_in)], headers=headers, outputs=outputs, request_id="r-1"
        )
        actions, propensities = answer.as_numpy("action"), answer.as_numpy("propensity")
        ids = [name if isinstance(name, str) else name.decode() for name in answer.as_numpy("decision_id").tolist()]
        assert answer.get_response()["id"] == "r-1" and answer.get_response()["model_version"] == "1"
    decisions = logged(storage)
    assert [d.decision_id for d in decisions] == ids and len(set(ids)) == 40
    assert [d.action for d in decisions] == actions.tolist() and [d.propensity for d in decisions] == propensities.tolist()
    policy = Registry(storage.registry(NAME)).bundle(1).policy
    for row, decision in enumerate(decisions):
        assert np.array_equal(np.array(decision.observation, np.float32), obs[row])
        parameters_P = policy.distributions(np.array([decision.observation], np.float32))[0]
        assert policy.distribution.choose(parameters_P, "sample", decision.seed) == (decision.action, decision.propensity)


def test_one_decision_has_its_name_and_propensity_in_the_parameters(storage: Storage) -> None:
    with client_of(storage) as (client, headers, _):
        answer = client.infer(
            NAME, [observation_input(observations(1))], headers=headers, parameters={"unit_id": "u-7", "deadline_ms": 5000}
        ).get_response()
    [decision] = logged(storage)
    assert answer["parameters"] == {
        "decision_id": decision.decision_id,
        "arm": "champion",
        "propensity": decision.propensity,
        "fallback": "",
        "repair": "",
    }
    assert decision.unit_id == "u-7"


def test_units_and_episodes_are_text_inputs(storage: Storage) -> None:
    with client_of(storage) as (client, headers, _):
        inputs = [observation_input(observations(2))]
        for name in ("unit_id", "episode_id"):
            inputs.append(triton.InferInput(name, [2], "BYTES"))
            inputs[-1].set_data_from_numpy(np.array([f"{name}-a", f"{name}-é"], object))
        client.infer(NAME, inputs, headers=headers)
    assert [(d.unit_id, d.episode_id) for d in logged(storage)] == [
        ("unit_id-a", "episode_id-a"),
        ("unit_id-é", "episode_id-é"),
    ]


def test_the_same_id_is_the_same_answer_and_another_body_is_refused(storage: Storage) -> None:
    with client_of(storage) as (client, headers, _):
        obs = observations(3)
        first, again = (client.infer(NAME, [observation_input(obs)], headers=headers, request_id="r") for _ in range(2))
        assert first.as_numpy("action").tolist() == again.as_numpy("action").tolist()
        with pytest.raises(InferenceServerException, match="was made before, for another observation"):
            client.infer(NAME, [observation_input(obs + 1)], headers=headers, request_id="r")
    assert len(logged(storage)) == 3


def test_a_version_on_an_arm_can_be_asked_for_and_others_are_unknown(storage: Storage) -> None:
    publish(storage, random_policy(2))
    publish(storage, random_policy(3))
    release(storage, 2, weights=(0.5, 1.0))
    with client_of(storage) as (client, headers, _):
        assert client.get_model_metadata(NAME, headers=headers)["versions"] == ["1", "2"]
        for version in ("1", "2"):
            answer = client.infer(NAME, [observation_input(observations(20))], model_version=version, headers=headers)
            assert set(answer.as_numpy("version").tolist()) == {int(version)}
        with pytest.raises(InferenceServerException, match="version '3' of 'demo' is on no arm; versions are 1, 2"):
            client.infer(NAME, [observation_input(observations(1))], model_version="3", headers=headers)
        with pytest.raises(InferenceServerException, match="there is no model 'other'"):
            client.infer("other", [observation_input(observations(1))], headers=headers)
        assert not client.is_model_ready(NAME, "3", headers=headers)
    assert {decision.assigned for decision in logged(storage)} == {"request"}
    assert all(decision.mixture_propensity == decision.propensity for decision in logged(storage))


def test_one_bad_observation_refuses_the_request_and_nothing_is_logged(storage: Storage) -> None:
    obs = observations(5)
    obs[3, 0] = 100  # CartPole's position ends at 4.8
    bad_nan = observations(5)
    bad_nan[2, 1] = np.nan
    with client_of(storage) as (client, headers, _):
        with pytest.raises(InferenceServerException, match=r"observation 3 of the request: observation\[0\] = 100"):
            client.infer(NAME, [observation_input(obs)], headers=headers)
        with pytest.raises(InferenceServerException, match="observation 2 of the request"):
            client.infer(NAME, [observation_input(bad_nan)], headers=headers)
    assert logged(storage) == []


HEADER = b'{"inputs":[{"name":"observation","shape":[1,4],"datatype":"FP32","parameters":{"binary_data_size":16}}]}'
MALFORMED: dict[str, tuple[bytes, str | None, str]] = {
    "a length beyond the body": (HEADER, "9999", "inference-header-content-length is b'9999'"),
    "a negative length": (HEADER, "-1", "inference-header-content-length is b'-1'"),
    "fewer bytes than it says": (HEADER + b"12345678", str(len(HEADER)), "8 bytes are left"),
    "more bytes than it says": (HEADER + b"\0" * 20, str(len(HEADER)), "4 bytes behind the last tensor"),
    "no JSON": (b"nonsense", None, "not JSON"),
    "data that is nested without end": (
        b'{"inputs":[{"name":"observation","shape":[1,4],"datatype":"FP32","data":' + b"[" * 50_000 + b"]" * 50_000 + b"}]}",
        None,
        "not JSON",
    ),
    "data that is nested deeply": (
        b'{"inputs":[{"name":"observation","shape":[1,4],"datatype":"FP32","data":' + b"[" * 500 + b"1" + b"]" * 500 + b"}]}",
        None,
        "holds 1 items; expected 4",
    ),
    "no inputs": (b"{}", None, "missing required field `inputs`"),
    "no input of that name": (
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1]}]}',
        None,
        "unknown input 'x'; inputs are observation",
    ),
    "no tensor at all": (b'{"inputs":[]}', None, "input 'observation' is missing"),
    "another shape": (
        b'{"inputs":[{"name":"observation","shape":[2,2],"datatype":"FP32","data":[1,2,3,4]}]}',
        None,
        "has shape [2, 2], expected [2, 4]",
    ),
    "a shape that is not its data's": (
        b'{"inputs":[{"name":"observation","shape":[1,4],"datatype":"FP32","data":[1,2,3]}]}',
        None,
        "holds 3 items; expected 4 of FP32",
    ),
    "text for numbers": (
        b'{"inputs":[{"name":"observation","shape":[1,4],"datatype":"FP32","data":[1,2,3,"4"]}]}',
        None,
        "holds '4'; expected 4 of FP32",
    ),
    "null among numbers": (
        b'{"inputs":[{"name":"observation","shape":[1,4],"datatype":"FP32","data":[1,null,3,"0.5"]}]}',
        None,
        "holds None; expected 4 of FP32",
    ),
    "null among integers": (
        b'{"inputs":[{"name":"observation","shape":[1,4],"datatype":"INT64","data":[1,null,3,4]}]}',
        None,
        "holds None; expected 4 of INT64",
    ),
    "nothing of an impossible shape": (
        b'{"inputs":[{"name":"observation","shape":[0,2147483648,2147483648,2147483648],"datatype":"FP32","data":[]}]}',
        None,
        "no array has",
    ),
    "bytes of a size that no array has": (
        b'{"inputs":[{"name":"observation","shape":[1180591620717411303424,0],"datatype":"FP32",'
        b'"parameters":{"binary_data_size":0}}]}',
        "124",
        "no array has",
    ),
    "a deadline beyond all numbers": (
        b'{"inputs":[{"name":"observation","shape":[1,4],"datatype":"FP32","data":[0,0,0,0]}],"parameters":{"deadline_ms":1'
        + b"0" * 400
        + b"}}",
        None,
        "the deadline is 1000",
    ),
    "a timeout beyond all numbers": (
        b'{"inputs":[{"name":"observation","shape":[1,4],"datatype":"FP32","data":[0,0,0,0]}],"parameters":{"timeout":1'
        + b"0" * 400
        + b"}}",
        None,
        "the deadline is 600000",
    ),
    "a datatype that is none": (
        b'{"inputs":[{"name":"observation","shape":[1,4],"datatype":"FP31","data":[1,2,3,4]}]}',
        None,
        "datatype 'FP31'",
    ),
    "a shape of millions": (
        b'{"inputs":[{"name":"observation","shape":[1000000000,1000000000],"datatype":"FP32","data":[1]}]}',
        None,
        "holds 1 items; expected 1000000000000000000",
    ),
    "nothing to decide": (
        b'{"inputs":[{"name":"observation","shape":[0,4],"datatype":"FP32","data":[]}]}',
        None,
        "the first size is how many, 1 to 4096",
    ),
    "units that are no texts at all": (
        b'{"inputs":[{"name":"observation","shape":[1,4],"datatype":"FP32","data":[1,2,3,4]},'
        b'{"name":"unit_id","shape":[1,0],"datatype":"BYTES","data":[]}]}',
        None,
        "input 'unit_id' has shape [1, 0], expected [1] or [1, 1]",
    ),
    "two episodes for one row": (
        b'{"inputs":[{"name":"observation","shape":[1,4],"datatype":"FP32","data":[1,2,3,4]},'
        b'{"name":"episode_id","shape":[1,2],"datatype":"BYTES","data":["a","b"]}]}',
        None,
        "input 'episode_id' has shape [1, 2], expected [1] or [1, 1]",
    ),
    "an output that is none": (
        b'{"inputs":[{"name":"observation","shape":[1,4],"datatype":"FP32","data":[1,2,3,4]}],"outputs":[{"name":"y"}]}',
        None,
        "there is no output 'y'",
    ),
    "a mode that nobody allowed": (
        b'{"inputs":[{"name":"observation","shape":[1,4],"datatype":"FP32","data":[1,2,3,4]}],"parameters":{"mode":"greedy"}}',
        None,
        "mode 'greedy' cannot be asked for",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_inference_request_is_refused_in_the_protocols_way(storage: Storage, name: str) -> None:
    body, header_length, message = MALFORMED[name]
    with client_of(storage) as (_, headers, url):
        extra = {} if header_length is None else {"Inference-Header-Content-Length": header_length}
        reply = requests.post(f"{url}/v2/models/{NAME}/infer", body, headers={**headers, **extra}, timeout=10)
    assert 400 <= reply.status_code < 500
    assert isinstance(reply.json()["error"], str) and message in reply.json()["error"]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("kind", ["FP32", "FP64"])
@pytest.mark.parametrize("binary", [True, False])
def test_tensors_are_mended_as_observations_in_json_are(storage: Storage, kind: str, binary: bool) -> None:
    """Both ways in: FP32 as an array, anything else row by row. NaN stands for the null that a tensor does not have."""
    obs = [[9.0, 0, 0, 0], [-9.0, NAN if binary else 1.0, 0, 0], [0.5, 1.0, 0, 0]]
    tensor = triton.InferInput("observation", [3, 4], kind)
    tensor.set_data_from_numpy(np.array(obs, np.float32 if kind == "FP32" else np.float64), binary_data=binary)
    with client_of(storage, fallback={"repair": ["clip", "missing"], "fill": 0.25}) as (client, headers, url):
        answer = client.infer(NAME, [tensor], headers={**headers}, request_id="r")  # it writes into them
        told = [text if isinstance(text, str) else text.decode() for text in answer.as_numpy("repair").tolist()]
        again = client.infer(NAME, [tensor], headers={**headers}, request_id="r")
        json = {"observations": [[None if number != number else number for number in row] for row in obs]}
        decided = requests.post(f"{url}/v1/decide", json=json, headers=headers, timeout=10).json()["decisions"]
    decisions, bound = logged(storage), float(np.float32(4.8))
    assert told == [decision.repair or "" for decision in decisions[:3]] == [row.get("repair") or "" for row in decided]
    assert told[0] == "observation[0] = 9.0 was cut to 4.8" and told[2] == ""
    mended = [[bound, 0, 0, 0], [-bound, 0.25 if binary else 1.0, 0, 0], [0.5, 1, 0, 0]]
    assert [d.observation for d in decisions[:3]] == mended == [d.observation for d in decisions[3:]]
    assert again.as_numpy("decision_id").tolist() == answer.as_numpy("decision_id").tolist() and len(decisions) == 6
    policy = Registry(storage.registry(NAME)).bundle(1).policy
    for decision in decisions:
        parameters_P = policy.distributions(np.array([decision.observation], np.float32))[0]
        assert policy.distribution.choose(parameters_P, "sample", decision.seed) == (decision.action, decision.propensity)


@pytest.mark.parametrize("kind", ["FP32", "FP64"])
def test_without_the_repair_a_tensor_stays_as_it_is_and_nan_is_never_a_bound(storage: Storage, kind: str) -> None:
    tensor = triton.InferInput("observation", [1, 4], kind)
    for config, number in (({}, 9.0), ({}, NAN), ({"repair": ["clip"]}, NAN), ({"repair": ["missing"]}, INF)):
        tensor.set_data_from_numpy(np.array([[number, 0, 0, 0]], np.float32 if kind == "FP32" else np.float64))
        refused = pytest.raises(InferenceServerException, match=r"observation\[0\] = .* is outside")
        with client_of(storage, fallback=config) as (client, headers, _), refused:
            client.infer(NAME, [tensor], headers=headers)
    assert logged(storage) == []


def test_a_dict_of_parts_is_one_input_per_part_with_a_mask(tmp_path: Path) -> None:
    position = Box(np.full(2, -5, np.float32), np.full(2, 5, np.float32))
    spaces = Spaces(
        Group((Categories((3,), (0,), ()), position), ("gear", "position")), Choices("discrete", (4,), (0,), ()), True
    )
    architecture = Architecture((8,))
    rng = np.random.default_rng(0)
    tensors = {n: rng.normal(size=shape).astype(np.float32) for n, shape in tensor_shapes(architecture, spaces).items()}
    tensors |= {"normaliser.mean": np.zeros(5, np.float32), "normaliser.scale": np.ones(5, np.float32)}
    policy = Policy(spaces, architecture, tensors)
    obs_ND, mask_NA = rng.normal(size=(32, 5)).astype(np.float32), np.ones((32, 4), bool)
    storage = open_storage(tmp_path / "storage")
    publish(storage, policy, golden=Golden(obs_ND, policy.distributions(obs_ND, mask_NA), mask_NA))
    with client_of(storage) as (client, headers, _):
        inputs = client.get_model_metadata(NAME, headers=headers)["inputs"]
        assert [(i["name"], i["datatype"], i["shape"]) for i in inputs] == [
            ("gear", "INT64", [-1]),
            ("position", "FP32", [-1, 2]),
            ("action_mask", "BOOL", [-1, 4]),
        ]
        gear = triton.InferInput("gear", [2], "INT64").set_data_from_numpy(np.array([2, 0]))
        place = triton.InferInput("position", [2, 2], "FP32").set_data_from_numpy(np.array([[1, 2], [3, 4]], np.float32))
        mask = triton.InferInput("action_mask", [2, 4], "BOOL").set_data_from_numpy(np.array([[0, 0, 1, 0], [1, 0, 0, 0]], bool))
        halves = triton.InferInput("action_mask", [2, 4], "FP32").set_data_from_numpy(np.full((2, 4), 0.5, np.float32))
        with pytest.raises(InferenceServerException, match="'action_mask' must be BOOL or integers"):
            client.infer(NAME, [gear, place, halves], headers=headers)
        answer = client.infer(NAME, [gear, place, mask], headers=headers)
        assert answer.as_numpy("action").tolist() == [2, 0], "the mask leaves one choice each"
    first, second = logged(storage)
    assert first.observation == {"gear": 2, "position": [1.0, 2.0]} and second.observation["gear"] == 0
    assert first.action_mask == [False, False, True, False]


def test_the_golden_distribution_comes_back_through_the_protocol(storage: Storage) -> None:
    """What training had is what answers here: the share of 4,000 draws lies within four standard deviations of it."""
    golden = golden_of(random_policy(1))
    obs = np.repeat(golden.observations_ND[:1], 4000, axis=0)
    with client_of(storage) as (client, headers, _):
        actions = client.infer(NAME, [observation_input(obs)], headers=headers).as_numpy("action")
    p = float(golden.distributions_NP[0, 1])
    assert abs(actions.mean() - p) < 4 * np.sqrt(p * (1 - p) / 4000)
    assert abs(actions.mean() - (1 - p)) > 4 * np.sqrt(p * (1 - p) / 4000), "the other way round would have been seen"
