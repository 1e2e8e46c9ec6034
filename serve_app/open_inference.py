"""The Open Inference Protocol, version 2: a policy is a model, a version is its version, and a decision is an inference.

What the protocol has no place for travels in the response's `parameters`: decision id, arm, propensity, why somebody else
answered. Of many decisions they are output tensors. If one of a request's observations cannot be decided, none is.
"""

import time
from typing import Any

import numpy as np

from policies.errors import DecisionUnknown, RequestInvalid
from policies.observations import Bits, Box, Categories, Group, Observation
from policies.spaces import ACTION_MASK, Choices, Spaces
from serve_app.asgi import Request, Response
from serve_app.asks import ManyAsk
from serve_app.drafts import Columns
from serve_app.ingress import Ingress
from serve_app.keys import ApiKey, require
from serve_app.tensors_http import BYTES, InferRequest, read_request, write_response
from serve_app.variants import Snapshot
from serve_app.wire import MAX_DEADLINE_MS, MAX_OBSERVATIONS, DecideManyAnswer, encode

PREFIX = "/v2"
MAX_PARAMETER_LENGTH = 256
_TEXT_INPUTS = ("unit_id", "episode_id")


class OpenInference:
    """Answers everything below /v2 but its health pages, which need no key."""

    def __init__(self, policy: str, ingress: Ingress, *, version: str, max_body_bytes: int) -> None:
        self._policy = policy
        self._ingress = ingress
        self._server_version = version
        self._max_body_bytes = max_body_bytes

    def server_metadata(self) -> Response:
        """Return who answers, and which extensions it knows."""
        return Response(200, encode({"name": "trimtab", "version": self._server_version, "extensions": ["binary_tensor_data"]}))

    def model(self, path: str) -> Response:
        """Answer GET /v2/models/<policy>[/versions/<version>][/ready]; raises `DecisionUnknown` for any other model."""
        name, version, action = _parts(path)
        snapshot = self._known(name, version)
        if action == "ready":
            return Response(200, encode({"name": self._policy, "ready": True}))
        if action != "":
            raise DecisionUnknown(f"there is no {path}")
        spaces = snapshot.champion.policy.spaces
        document = {
            "name": self._policy,
            "versions": [str(number) for number in sorted(snapshot.variants)],
            "platform": "trimtab",
            "inputs": [{"name": name, "datatype": kind, "shape": [-1, *shape]} for name, kind, shape in _inputs(spaces)],
            "outputs": [{"name": name, "datatype": kind, "shape": [-1, *shape]} for name, kind, shape in _outputs(spaces)],
        }
        return Response(200, encode(document))

    async def infer(self, path: str, request: Request, key: ApiKey) -> Response:
        """Answer POST /v2/models/<policy>[/versions/<version>]/infer."""
        started_s = time.perf_counter()
        name, version, action = _parts(path)
        if action != "infer":
            raise DecisionUnknown(f"there is no {path} to post to")
        snapshot = self._known(name, version)
        if version is not None:  # that chooses the arm
            require(key, "operate")
        body = await request.body(self._max_body_bytes)
        asked, tensors = read_request(body, request.header(b"inference-header-content-length"))
        ask = self._ask(asked, tensors, snapshot, version, started_s)
        result: Columns | DecideManyAnswer = await self._ingress.batcher.answer(ask, num_rows=ask.num_rows)
        return self._response(asked, result, snapshot)

    def _known(self, name: str, version: str | None) -> Snapshot:
        snapshot = self._ingress.snapshot()
        if name != self._policy:
            raise DecisionUnknown(f"there is no model {name!r}; this endpoint serves {self._policy!r}")
        if version is not None and version not in {str(number) for number in snapshot.variants}:
            found = ", ".join(str(number) for number in sorted(snapshot.variants))
            raise DecisionUnknown(f"version {version!r} of {name!r} is on no arm; versions are {found}")
        return snapshot

    def _ask(
        self, asked: InferRequest, tensors: dict[str, np.ndarray], snapshot: Snapshot, version: str | None, started_s: float
    ) -> ManyAsk:
        spaces = snapshot.champion.policy.spaces
        expected = {name: shape for name, _, shape in _inputs(spaces)}
        unknown = sorted(set(tensors) - set(expected) - set(_TEXT_INPUTS))
        missing = sorted(set(expected) - set(tensors))
        if unknown or missing:
            problem = f"unknown input {unknown[0]!r}" if unknown else f"input {missing[0]!r} is missing"
            raise RequestInvalid(f"{problem}; inputs are {', '.join(expected)}, and unit_id?, episode_id?", 400)
        sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in tensors.values()}
        if len(sizes) != 1 or not 1 <= (num := sizes.pop()) <= MAX_OBSERVATIONS:
            shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
            raise RequestInvalid(
                f"shapes are {shapes!s:.200}; the first size is how many, 1 to {MAX_OBSERVATIONS}, of all alike", 400
            )
        for name, shape in expected.items():
            if tensors[name].shape[1:] != tuple(shape):
                raise RequestInvalid(f"input {name!r} has shape {list(tensors[name].shape)}, expected {[num, *shape]}", 400)
        if spaces.has_mask and tensors[ACTION_MASK].dtype.kind not in "biu":  # of others a part would be cut off, or no number
            raise RequestInvalid(f"input {ACTION_MASK!r} must be BOOL or integers", 400)
        mode, deadline_ms = _text(asked, "mode"), _deadline_ms(asked)
        if mode is not None:
            self._ingress.check_mode(mode)
        is_binary = isinstance(spaces.observation, Box) and not spaces.has_mask and tensors["observation"].dtype == np.float32
        return self._ingress.reader.many(
            num,
            started_s=started_s,
            observations=() if is_binary else _observations(spaces.observation, tensors, num),
            numbers=tensors["observation"] if is_binary else None,
            masks=tensors[ACTION_MASK].astype(int).tolist() if spaces.has_mask else None,
            unit_ids=_names(tensors, "unit_id", num) or _text(asked, "unit_id"),
            episode_ids=_names(tensors, "episode_id", num),
            request_id=_request_id(asked),
            mode=mode,
            arm=None if version is None else _arm_of(snapshot, version),
            deadline_ms=deadline_ms,
            is_all_or_nothing=True,
        )

    def _response(self, asked: InferRequest, result: Columns | DecideManyAnswer, snapshot: Snapshot) -> Response:
        told = _columns_of(result)
        num, action = len(told["decision_id"]), snapshot.champion.policy.spaces.action
        kind, shape = ("INT64", action.shape) if isinstance(action, Choices) else ("FP32", action.low.shape)
        outputs = {
            "action": (kind, [num, *shape], told["action"]),
            "propensity": ("FP64", [num], told["propensity"]),
            "decision_id": (BYTES, [num], told["decision_id"]),
            "arm": (BYTES, [num], told["arm"]),
            "version": ("INT64", [num], told["version"]),
            "fallback": (BYTES, [num], told["fallback"]),
            "repair": (BYTES, [num], told["repair"]),
        }
        document: dict[str, Any] = {"model_name": self._policy, "model_version": str(told["version"][0])}
        if asked.id is not None:
            document["id"] = asked.id
        if num == 1:
            names = ("decision_id", "arm", "propensity", "fallback", "repair")
            document["parameters"] = {name: told[name][0] for name in names}
        body, header_length = write_response(document, outputs, asked)
        if header_length is None:
            return Response(200, body)
        length = [(b"inference-header-content-length", b"%d" % header_length)]
        return Response(200, body, b"application/octet-stream", length)


def _columns_of(result: Columns | DecideManyAnswer) -> dict[str, list[Any]]:
    """Return the outputs; raises `RequestInvalid` where one of the request's decisions was refused."""
    if isinstance(result, Columns):
        answers = result.answers
        found: dict[str, Any] = {
            "decision_id": result.decision_ids,
            "action": answers.actions,
            "propensity": answers.propensities,
        }
        found |= {"arm": answers.arms, "version": answers.versions, "fallback": answers.fallbacks, "repair": result.repairs}
    else:
        rows: list[Any] = result.decisions
        failed = next((row for row in rows if not hasattr(row, "action")), None)
        if failed is not None:  # the request came before, with something else
            raise RequestInvalid(failed.error.message, failed.error.status)
        names = ("decision_id", "action", "propensity", "arm", "version", "fallback", "repair")
        found = {name: [getattr(row, name) for row in rows] for name in names}
    num = len(found["decision_id"])
    told = {name: column if isinstance(column, list) else [column] * num for name, column in found.items()}
    return told | {name: [text or "" for text in told[name]] for name in ("fallback", "repair")}


def _parts(path: str) -> tuple[str, str | None, str]:
    """Return model, version and the rest of /v2/models/<model>[/versions/<version>][/rest]."""
    model, _, rest = path.removeprefix(f"{PREFIX}/models/").partition("/")
    if not rest.startswith("versions/"):
        return model, None, rest
    version, _, action = rest.removeprefix("versions/").partition("/")
    return model, version, action


def _inputs(spaces: Spaces) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return name, datatype and shape of each input: one, or of Dict and Tuple one per part, joined by dots."""
    found = _leaves(spaces.observation, "observation")
    return [*found, (ACTION_MASK, "BOOL", (spaces.mask_size,))] if spaces.has_mask else found


def _leaves(observation: Observation, name: str) -> list[tuple[str, str, tuple[int, ...]]]:
    if isinstance(observation, Group):
        names = observation.names or [str(index) for index in range(len(observation.parts))]
        prefix = "" if name == "observation" else f"{name}."
        return [leaf for key, part in zip(names, observation.parts) for leaf in _leaves(part, f"{prefix}{key}")]
    if isinstance(observation, Box):
        return [(name, "FP32", observation.low.shape)]
    assert isinstance(observation, Categories | Bits)
    return [(name, "INT64", observation.shape)]


def _outputs(spaces: Spaces) -> list[tuple[str, str, tuple[int, ...]]]:
    action = spaces.action
    first = ("action", "INT64", action.shape) if isinstance(action, Choices) else ("action", "FP32", action.low.shape)
    others = {"propensity": "FP64", "decision_id": BYTES, "arm": BYTES, "version": "INT64", "fallback": BYTES, "repair": BYTES}
    return [first, *((name, kind, ()) for name, kind in others.items())]


def _observations(observation: Observation, tensors: dict[str, np.ndarray], num: int) -> list[Any]:
    """Return each row's observation as JSON says it."""
    columns = {name: tensors[name].tolist() for name, _, _ in _leaves(observation, "observation")}
    return [_assembled(observation, "observation", columns, row) for row in range(num)]


def _assembled(observation: Observation, name: str, columns: dict[str, list[Any]], row: int) -> Any:
    if not isinstance(observation, Group):
        return columns[name][row]
    prefix = "" if name == "observation" else f"{name}."
    if observation.names is None:
        return [_assembled(part, f"{prefix}{index}", columns, row) for index, part in enumerate(observation.parts)]
    return {key: _assembled(part, f"{prefix}{key}", columns, row) for key, part in zip(observation.names, observation.parts)}


def _arm_of(snapshot: Snapshot, version: str) -> str:
    return next(arm.name for arm in snapshot.plan.arms if str(arm.version) == version)


def _names(tensors: dict[str, np.ndarray], name: str, num: int) -> list[Any] | None:
    if name not in tensors:
        return None
    texts = tensors[name].reshape(-1).tolist()
    if len(texts) != num:
        raise RequestInvalid(f"input {name!r} has shape {list(tensors[name].shape)}, expected {[num]} or {[num, 1]}", 400)
    if any(not isinstance(text, str) or not 1 <= len(text) <= MAX_PARAMETER_LENGTH for text in texts):
        raise RequestInvalid(f"input {name!r} must be BYTES, each text of 1 to {MAX_PARAMETER_LENGTH} characters", 400)
    return texts


def _text(asked: InferRequest, name: str) -> Any:
    value = asked.parameters.get(name)
    if value is not None and (not isinstance(value, str) or not 1 <= len(value) <= MAX_PARAMETER_LENGTH):
        raise RequestInvalid(
            f"parameter {name!r} is {value!r:.24}, expected a text of 1 to {MAX_PARAMETER_LENGTH} characters", 400
        )
    return value


def _deadline_ms(asked: InferRequest) -> float | None:
    """Return our own `deadline_ms`, or Triton's `timeout`, which counts microseconds."""
    value = asked.parameters.get("deadline_ms")
    timeout = asked.parameters.get("timeout")
    if value is None and timeout is not None:
        value = min(timeout, 1000 * MAX_DEADLINE_MS + 1) / 1000 if type(timeout) in (int, float) else timeout
    if value is not None and (type(value) not in (int, float) or not 0 < value <= MAX_DEADLINE_MS):
        raise RequestInvalid(f"the deadline is {value!r:.24} ms, expected a number above 0, at most {MAX_DEADLINE_MS}", 400)
    return value


def _request_id(asked: InferRequest) -> str | None:
    if asked.id in (None, ""):
        return None
    assert asked.id is not None
    if not (len(asked.id) <= 64 and asked.id.replace("-", "").replace("_", "").isalnum() and asked.id.isascii()):
        raise RequestInvalid(f"id {asked.id!r:.80} must be 1-64 of A-Z a-z 0-9 _ -", 400)
    return asked.id
