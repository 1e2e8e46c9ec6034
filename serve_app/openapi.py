"""What the endpoint says of itself: an OpenAPI 3.1 document, from the types that read the bodies and the policy's spaces."""

from typing import Any

import msgspec
import numpy as np

from policies.observations import LARGEST_FLOAT32, Bits, Box, Categories, Observation
from policies.spaces import Spaces
from serve_app.tensors_http import InferRequest
from serve_app.wire import (
    MAX_FEEDBACKS,
    DecideAnswer,
    DecideFailure,
    DecideManyAnswer,
    DecideRequest,
    FeedbackRequest,
    OverrideRequest,
)

_TYPES = (DecideRequest, DecideAnswer, DecideFailure, DecideManyAnswer, FeedbackRequest, OverrideRequest, InferRequest)
_REFUSALS = {
    400: "the body is not JSON, not what the protocol says, or has a state that is none of this policy's",
    401: "the API key is missing or wrong",
    403: "the API key is not for this",
    404: "there is no such decision, model or version",
    408: "the request did not arrive in time",
    409: "this request_id was used before, for another request",
    413: "the body is larger than serving.max_body_bytes",
    415: "the body is compressed",
    422: "the body is JSON, but not what is expected; the message says what is",
    429: "too many requests wait, or come with this key; see Retry-After",
    503: "nobody can answer now, or the log cannot be written; see Retry-After",
    504: "the request's own deadline_ms was over before its turn came",
}
_KEY_REFUSALS = (401, 403, 429)
_ANYTHING: dict[str, Any] = {"type": "object"}
_ACCEPTED = {"type": "object", "properties": {"accepted": {"type": "integer"}}, "required": ["accepted"]}


def openapi_document(policy: str, spaces: Spaces | None, *, version: str) -> dict[str, Any]:
    """Return the document; `spaces` are the champion's, None while there is none: then an observation may be anything."""
    components = _schemas(spaces)
    return {
        "openapi": "3.1.0",
        "info": {"title": f"Trimtab: {policy}", "version": version},
        "paths": _paths(policy),
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def observation_schema(observation: Observation) -> dict[str, Any]:
    """Return the JSON schema of one observation."""
    if isinstance(observation, Box):
        return _box_schema(observation.low, observation.high)
    if isinstance(observation, Categories):
        ranges = [{"type": "integer", "minimum": s, "maximum": s + n - 1} for n, s in zip(observation.nvec, observation.starts)]
        return ranges[0] if not observation.shape else _nested(ranges, observation.shape)
    if isinstance(observation, Bits):
        size = int(np.prod(observation.shape))
        return _nested([{"type": "integer", "minimum": 0, "maximum": 1}] * size, observation.shape)
    parts = [observation_schema(part) for part in observation.parts]
    if observation.names is None:
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
    return _object(dict(zip(observation.names, parts)), is_open=False)


def _schemas(spaces: Spaces | None) -> dict[str, Any]:
    """Return the schema of every body by name, with what the types alone do not say."""
    _, components = msgspec.json.schema_components(_TYPES, ref_template="#/components/schemas/{name}")
    for name in ("request_id", "request_ids"):  # JSON Schema's expressions have no `\\Z`
        _end_patterns_with_dollar(components["DecideRequest"]["properties"][name])
    observation = {} if spaces is None else observation_schema(spaces.observation)
    _say_what_an_observation_is(components["DecideRequest"], observation, spaces)
    one_of_many = {"oneOf": [_ref("DecideAnswer"), _ref("DecideFailure")]}
    components["DecideManyAnswer"]["properties"]["decisions"] = {"type": "array", "items": one_of_many}
    components["DecideAnswer"]["required"].remove("policy")  # said once where there are many
    scalar = {"type": ["number", "string", "boolean"]}
    components["InputTensor"]["properties"]["data"] = {"type": "array", "items": scalar}
    components["InputTensor"]["properties"]["parameters"] = {
        "type": "object",
        "properties": {"binary_data_size": {"type": "integer"}},
    }
    parameters = {"unit_id": {"type": "string"}, "mode": {"enum": ["greedy", "sample"]}, "deadline_ms": {"type": "number"}}
    components["InferRequest"]["properties"]["parameters"] = {"type": "object", "properties": parameters}
    components["RequestedOutput"]["properties"]["parameters"] = {
        "type": "object",
        "properties": {"binary_data": {"type": "boolean"}},
    }
    components["Error"] = _object({"error": _object({"status": {"type": "integer"}, "message": {"type": "string"}})})
    components["ProtocolError"] = _object({"error": {"type": "string"}})
    return components


def _paths(policy: str) -> dict[str, Any]:
    """Return what each path takes and answers."""
    return _deciding() | _watching() | _local_clients() | _health() | _open_inference(policy)


def _deciding() -> dict[str, Any]:
    one_or_many = {"oneOf": [_ref("DecideAnswer"), _ref("DecideManyAnswer")]}
    reward = _ref("FeedbackRequest")
    rewards = {"oneOf": [reward, {"type": "array", "items": reward, "minItems": 1, "maxItems": MAX_FEEDBACKS}]}
    refusals = (400, 401, 403, 408, 409, 413, 415, 422, 429, 503, 504)
    report_refusals = (400, 401, 403, 404, 408, 413, 415, 422, 429, 503)
    override = _operation("Record that something else was done", "operate", _ACCEPTED, report_refusals, _ref("OverrideRequest"))
    return {
        "/v1/decide": {"post": _operation("Decide", "decide", one_or_many, refusals, _ref("DecideRequest"))},
        "/v1/feedback": {"post": _operation("Report rewards", "feedback", _ACCEPTED, report_refusals, rewards)},
        "/v1/decisions/{decision_id}/override": {"post": override, "parameters": [_path_parameter("decision_id")]},
    }


def _watching() -> dict[str, Any]:
    return {
        "/v1/status": {"get": _operation("Status of the whole loop", "read", _ANYTHING, _KEY_REFUSALS)},
        "/v1/endpoints": {"get": _operation("The replicas' own ports", "decide or read", _ANYTHING, _KEY_REFUSALS)},
        "/metrics": {"get": _operation("Metrics in Prometheus' text format", "read", None, _KEY_REFUSALS)},
    }


def _local_clients() -> dict[str, Any]:
    plan = _operation("The traffic plan, for local clients", "decide", _ANYTHING, (401, 403, 429, 503))
    file = _operation("One file of a bundle of the plan, for local clients", "decide", _ANYTHING, (401, 403, 404, 429, 503))
    log = _operation(
        "Log decisions that a local client made",
        "decide",
        _ACCEPTED,
        (400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 503),
        _object({"decisions": {"type": "array", "items": {"type": "object"}}}),
    )
    return {
        "/v1/plan": {"get": plan},
        "/v1/bundles/{digest}/{file}": {"get": file, "parameters": [_path_parameter("digest"), _path_parameter("file")]},
        "/v1/decisions": {"post": log},
    }


def _health() -> dict[str, Any]:
    return {
        "/healthz": {"get": _operation("Is this replica alive?", None, _ANYTHING, ())},
        "/readyz": {"get": _operation("Can it decide?", None, _ANYTHING, (503,))},
    }


def _open_inference(policy: str) -> dict[str, Any]:
    reads, error = "decide or read", "ProtocolError"
    server = _operation("Open Inference Protocol: the server", reads, _ANYTHING, _KEY_REFUSALS, error=error)
    model = _operation("The policy as a model", reads, _ANYTHING, (401, 403, 404, 429, 503), error=error)
    refusals = (400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 503, 504)
    infer = _operation("Decide, as inference", "decide", _ANYTHING, refusals, _ref("InferRequest"), error=error)
    return {
        "/v2": {"get": server},
        f"/v2/models/{policy}": {"get": model},
        f"/v2/models/{policy}/infer": {"post": infer},
    }


def _box_schema(low: np.ndarray, high: np.ndarray) -> dict[str, Any]:
    bounds = [
        {"type": "number", "minimum": max(lo, -LARGEST_FLOAT32), "maximum": min(hi, LARGEST_FLOAT32)}
        for lo, hi in zip(low.reshape(-1).tolist(), high.reshape(-1).tolist())
    ]
    if low.shape and all(bound == bounds[0] for bound in bounds):  # an image has one schema for all of its pixels
        schema: dict[str, Any] = bounds[0] if bounds else {}
        for size in reversed(low.shape):
            schema = {"type": "array", "items": schema, "minItems": size, "maxItems": size}
        return schema
    return _nested(bounds, low.shape)


def _nested(items: list[dict[str, Any]], shape: tuple[int, ...]) -> dict[str, Any]:
    if not shape:
        return items[0]
    size = len(items) // max(shape[0], 1)
    parts = [_nested(items[index * size : (index + 1) * size], shape[1:]) for index in range(shape[0])]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}


def _say_what_an_observation_is(request: dict[str, Any], observation: dict[str, Any], spaces: Spaces | None) -> None:
    properties = request["properties"]
    if spaces is not None and spaces.history > 1:
        frame = observation_schema(spaces.frame)
        request |= _if_there_is_a_state(frame, observation)
        observation = {"anyOf": [frame, observation]}
    elif spaces is not None:
        properties["state"] = properties["states"] = {"type": "null"}
    properties["observation"] = observation
    properties["observations"] = {"type": "array", "items": observation, "minItems": 1, "maxItems": 4096}
    request["additionalProperties"] = False
    single = ("observation", "action_mask", "episode_id", "state")
    many = ("observations", "action_masks", "unit_ids", "episode_ids", "request_ids", "states")
    request["oneOf"] = [
        {"required": ["observation"], "properties": dict.fromkeys(many, False)},
        {"required": ["observations"], "properties": dict.fromkeys(single, False)},
    ]
    if spaces is not None and not spaces.has_mask:
        properties["action_mask"] = properties["action_masks"] = {"type": "null"}
    elif spaces is not None:
        mask = {"type": "array", "items": {"enum": [0, 1]}, "minItems": spaces.mask_size, "maxItems": spaces.mask_size}
        properties["action_mask"], properties["action_masks"] = mask, {"type": "array", "items": mask}


def _if_there_is_a_state(frame: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """Return what a state says of the observation beside it: it is the newest frame. Without one it is a whole observation."""
    return {
        "if": {"properties": {"state": {"type": "string"}}, "required": ["state"]},
        "then": {"properties": {"observation": frame}},
        "else": {"properties": {"observation": whole}},
    }


def _end_patterns_with_dollar(schema: Any) -> None:
    if isinstance(schema, dict) and "pattern" in schema:
        schema["pattern"] = schema["pattern"].replace("\\Z", "$")
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _end_patterns_with_dollar(part)


def _operation(
    summary: str,
    scope: str | None,
    answer: dict[str, Any] | None,
    refusals: tuple[int, ...],
    body: dict[str, Any] | None = None,
    *,
    error: str = "Error",
) -> dict[str, Any]:
    """Return how one path is described; without an `answer` it is text."""
    content = _json(answer) if answer is not None else {"text/plain": {"schema": {"type": "string"}}}
    responses = {"200": {"description": "done", "content": content}}
    for status in refusals:
        responses[str(status)] = {
            "description": _REFUSALS[status],
            "content": _json(_ref(error) if scope else {"type": "object"}),
        }
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if scope is not None:
        operation |= {"security": [{"key": []}], "description": f"Needs a key with the scope {scope}."}
    if body is not None:
        operation["requestBody"] = {"required": True, "content": _json(body)}
    return operation


def _object(properties: dict[str, Any], *, is_open: bool = True) -> dict[str, Any]:
    closed = {} if is_open else {"additionalProperties": False}
    return {"type": "object", "properties": properties, "required": list(properties), **closed}


def _path_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1, "pattern": "^[^/]+$"}}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}
