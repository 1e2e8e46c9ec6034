"""The endpoint does what its OpenAPI document says: twenty thousand generated requests, valid and not, and no 5xx."""

import json
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from jsonschema import Draft202012Validator
from schemathesis import GenerationMode

from policies.log_reader import LogTail
from policies.observations import Bits, Box, Categories, Group
from policies.records import Decision
from policies.storage import Storage, open_storage
from serve_app.openapi import observation_schema, openapi_document
from tests.direct_replica import direct_replica
from tests.serving_helpers import NAME, publish, random_policy, read_new

NUM_CASES = 20_000


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = open_storage(tmp_path_factory.mktemp("openapi") / "storage")
    publish(storage, random_policy(1))
    return storage


@pytest.fixture(scope="module")
def endpoint(storage: Storage) -> Iterator[str]:
    with direct_replica(storage, max_body_bytes=65_536) as replica:
        yield replica.url


def headers_of(storage: Storage) -> dict[str, str]:
    return {"Authorization": f"Bearer {storage.api_key_file.read_text()}"}


def test_the_document_needs_a_key_and_is_valid(storage: Storage, endpoint: str) -> None:
    assert requests.get(f"{endpoint}/openapi.json", timeout=10).status_code == 401
    document = requests.get(f"{endpoint}/openapi.json", headers=headers_of(storage), timeout=10).json()
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    assert "/v1/decide" in document["paths"] and document["openapi"] == "3.1.0"


def test_generated_requests_are_answered_as_the_document_says(storage: Storage, endpoint: str) -> None:
    """Status and body of every answer are compared with the document; any other answer, or none, fails."""
    headers = headers_of(storage)
    document = requests.get(f"{endpoint}/openapi.json", headers=headers, timeout=10).json()
    posts = [path for path, item in document["paths"].items() if "post" in item]
    sizes = {path: NUM_CASES // len(posts) if path in posts else 100 for path in document["paths"]}
    context = multiprocessing.get_context("spawn")  # not a fork of a process with threads
    statuses: Counter[tuple[str, int]] = Counter()
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        for found in pool.map(send_generated, sizes, sizes.values(), repeat(endpoint), repeat(headers), repeat(document)):
            statuses += found
    assert sum(statuses.values()) >= NUM_CASES, statuses
    assert statuses[("/v1/decide", 200)] > NUM_CASES / 100 and statuses[("/v1/decide", 422)] > NUM_CASES / 100, statuses
    assert requests.get(f"{endpoint}/readyz", timeout=10).status_code == 200
    assert len(read_new(LogTail(storage.decisions(NAME), Decision))) >= statuses[("/v1/decide", 200)]


def send_generated(
    path: str, num_cases: int, endpoint: str, headers: dict[str, str], document: dict[str, Any]
) -> Counter[tuple[str, int]]:
    """Send requests that Schemathesis makes for one path, valid ones and others; return how often each status came."""
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=endpoint)
    schema.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
    [operation] = [found for found in (result.ok() for result in schema.get_all_operations()) if found.path == path]
    described = operation.definition.raw["responses"]
    validators = {
        status: jsonschema_rs.Draft202012Validator(
            {**response["content"]["application/json"]["schema"], "components": document["components"]}
        )
        for status, response in described.items()
        if "application/json" in response["content"]
    }
    statuses: Counter[tuple[str, int]] = Counter()
    session = requests.Session()
    session.headers.update(headers)

    @given(case=operation.as_strategy())
    @settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def send(case: Any) -> None:
        response = case.call(session=session, timeout=10)
        statuses[(path, response.status_code)] += 1
        status = str(response.status_code)
        assert status in described, (status, response.text[:500], case.body)
        assert response.headers["content-type"][0].partition(";")[0] in described[status]["content"]
        if status in validators:
            validators[status].validate(response.json())

    send()
    return statuses


SPACES = {
    "vector": (
        Box(np.array([-1, -np.inf], np.float32), np.array([1, np.inf], np.float32)),
        [[0.5, 9]],
        [[2, 0], [0], [0, "x"], 3],
    ),
    "image": (
        Box(np.zeros((2, 2), np.float32), np.full((2, 2), 255, np.float32)),
        [[[0, 1], [2, 255]]],
        [[[0, 1], [2, 256]], [0, 1]],
    ),
    "number": (Box(np.float32(0).reshape(()), np.float32(1).reshape(())), [0.5], [2, [0.5]]),
    "category": (Categories((3,), (1,), ()), [1, 3], [0, 4, [1], 1.5]),
    "categories": (Categories((2, 3), (0, 0), (2,)), [[1, 2]], [[2, 0], [0], [0, 0, 0]]),
    "bits": (Bits((3,)), [[0, 1, 1]], [[0, 1], [0, 1, 2]]),
    "dict": (
        Group((Categories((2,), (0,), ()), Bits((1,))), ("a", "b")),
        [{"a": 1, "b": [0]}],
        [{"a": 1}, {"a": 1, "b": [0], "c": 1}, [1, [0]]],
    ),
    "tuple": (Group((Categories((2,), (0,), ()), Bits((1,))), None), [[1, [0]]], [[1], [1, [0], 2], {"0": 1}]),
}


@pytest.mark.parametrize("name", SPACES)
def test_an_observation_is_valid_by_its_schema_just_if_the_policy_takes_it(name: str) -> None:
    observation, good, bad = SPACES[name]
    validator = Draft202012Validator(observation_schema(observation))
    for value in [*good, observation.example()]:
        observation.encode_json(value, "observation")
        assert validator.is_valid(value), value
    for value in bad:
        with pytest.raises(Exception, match="observation"):
            observation.encode_json(value, "observation")
        assert not validator.is_valid(value), value


def test_a_document_without_a_champion_takes_any_observation() -> None:
    document = openapi_document("demo", None, version="1")
    assert document["components"]["schemas"]["DecideRequest"]["properties"]["observation"] == {}
    assert json.loads(json.dumps(document)) == document
