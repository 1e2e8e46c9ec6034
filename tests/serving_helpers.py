"""Small published policies for tests and benchmarks of the serving half: random weights, honest golden vectors, no training."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from policies.bundle import write_bundle
from policies.distributions import Mode
from policies.errors import ServiceUnavailable
from policies.golden import Golden
from policies.log_reader import LogTail
from policies.network import Architecture, tensor_shapes
from policies.policy import Policy
from policies.records import Decision, Feedback
from policies.registry import Registry, register_version, set_champion, start_release
from policies.storage import Storage
from policies.traffic import TrafficPlan
from serve_app.answers import Answer, Answers, Decided
from serve_app.config import ServingConfig
from serve_app.http_api import HttpApi
from serve_app.replica import PolicyReplica
from serve_app.variants import Snapshot, Variant
from tests.bundles import make_report, vector_spaces

NAME = "demo"


def random_policy(
    seed: int, *, num_features: int = 4, num_actions: int = 2, start: int = 0, hidden: tuple[int, ...] = (64, 64)
) -> Policy:
    """Return a policy with random weights: two seeds are two policies, and its probabilities are far from 0 and 1."""
    rng = np.random.default_rng(seed)
    bound_D = np.full(num_features, np.inf, np.float32)
    bound_D[0] = 4.8  # one closed bound, as CartPole's position has
    spaces, architecture = vector_spaces(num_features, num_actions, start=start, bound_D=bound_D), Architecture(hidden)
    shapes = tensor_shapes(architecture, spaces)
    tensors = {name: (rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32) for name, shape in shapes.items()}
    tensors["normaliser.mean"] = np.zeros(num_features, np.float32)
    tensors["normaliser.scale"] = np.ones(num_features, np.float32)
    return Policy(spaces, architecture, tensors)


def golden_of(policy: Policy) -> Golden:
    """Return golden vectors computed in float64, apart from the code under test."""
    obs_ND = np.random.default_rng(0).normal(size=(32, policy.spaces.num_features)).astype(np.float32)
    x = obs_ND.astype(np.float64)
    num_layers = len(policy.architecture.hidden) + 1
    for layer in range(num_layers):
        x = x @ policy.tensors[f"policy.{layer}.weight"].astype(np.float64) + policy.tensors[f"policy.{layer}.bias"]
        x = np.tanh(x) if layer < num_layers - 1 else x
    e_NA = np.exp(x - x.max(axis=1, keepdims=True))
    return Golden(obs_ND, e_NA / e_NA.sum(axis=1, keepdims=True))


def publish(
    storage: Storage,
    policy: Policy,
    *,
    golden: Golden | None = None,
    mode: Mode = "sample",
    name: str = NAME,
    now: float = 1000.0,
) -> int:
    """Register a policy with a passing gate report and return its version; the first one becomes champion."""
    registry = Registry(storage.registry(name))
    bundle = write_bundle(
        registry.bundles,
        policy=policy,
        golden=golden or golden_of(policy),
        gate_report=make_report(policy),
        mode=mode,
        origin={},
        created_at=now,
    )
    state = registry.append(lambda state: register_version(state, bundle), now=now)
    number = max(state.versions)
    if state.champion is None:
        registry.append(lambda state: set_champion(state, number, "first"), now=now)
    return number


def release(storage: Storage, candidate: int, *, weights: tuple[float, ...], name: str = NAME, now: float = 1000.0) -> None:
    """Start a release of a registered version."""
    Registry(storage.registry(name)).append(
        lambda state: start_release(state, candidate, weights=weights, override_gates=None, reason="test"), now=now
    )


def spoil(bundle_path: Path) -> None:
    """Change one byte of a bundle's weights."""
    path = bundle_path / "policy.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def read_new(tail: LogTail) -> list:
    """Return all records that are new to this reader."""
    tail.look()
    found: list = []
    while records := tail.read():
        found.extend(records)
    return found


def variant_of(version: int, policy: Policy, *, mode: Mode = "sample") -> Variant:
    """Return a loaded version without a registry."""
    return Variant(version, f"digest-{version}", policy, mode)


def snapshot_of(plan: TrafficPlan, *variants: Variant) -> Snapshot:
    """Return a plan in force with these versions."""
    by_version = {variant.version: variant for variant in variants}
    champion = plan.arm("champion")
    assert champion is not None
    return Snapshot(plan, by_version[champion.version], MappingProxyType(by_version))


@dataclass(frozen=True)
class Reply:
    """What an ASGI application answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        error = self.json()["error"]
        return error if isinstance(error, str) else error["message"]  # a text in the Open Inference Protocol


def each(decided: Decided) -> list[Answer | ServiceUnavailable]:
    """Return an answer per row, or why there is none."""
    return decided.each() if isinstance(decided, Answers) else decided


async def call(
    app: HttpApi,
    method: str,
    path: str,
    body: bytes | list[bytes] = b"",
    *,
    key: str | None = None,
    length: int | None = None,
    extra_headers: Sequence[tuple[bytes, bytes]] = (),
) -> Reply:
    """Send one request to an ASGI application in this process; a list of bytes is a chunked body without a declared length."""
    chunks = body if isinstance(body, list) else [body]
    headers = [(b"authorization", b"Bearer " + key.encode())] if key is not None else []
    headers += extra_headers
    if not isinstance(body, list):
        headers.append((b"content-length", str(len(body) if length is None else length).encode()))
    remaining = list(chunks)
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        assert remaining, "the application read beyond the end of the body"
        chunk = remaining.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(remaining)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app({"type": "http", "method": method, "path": path, "headers": headers}, receive, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    reply_headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Reply(sent[0]["status"], reply_headers, sent[1]["body"])


def replica_of(storage: Storage, **config: Any) -> PolicyReplica:
    """Return a replica in this process, without Ray, that serves what is published under `NAME`.

    numpy computes unless a test says otherwise: on a busy machine the trial at load may find another engine faster, and then
    probabilities have other last bits than a test's own numpy.
    """
    return PolicyReplica(NAME, str(storage.root), ServingConfig(**{"engine": "numpy", **config}).model_dump())


async def decide_one(storage: Storage, replica: PolicyReplica, body: dict[str, Any]) -> Reply:
    """Send one request for a decision, or for many."""
    return await call(replica.api, "POST", "/v1/decide", json.dumps(body).encode(), key=storage.api_key_file.read_text())


def decide_all(storage: Storage, replica: PolicyReplica, *bodies: dict[str, Any]) -> list[Reply]:
    """Send requests so that they arrive in one turn of the loop, and so in one batch."""

    async def run() -> list[Reply]:
        return await asyncio.gather(*(decide_one(storage, replica, body) for body in bodies))

    return asyncio.run(run())


def logged(storage: Storage, kind: type = Decision) -> list[Any]:
    """Return the decisions, or the feedback, that are in the log."""
    directory = {Decision: storage.decisions, Feedback: storage.feedback}[kind]
    return read_new(LogTail(directory(NAME), kind))


def observations(num: int) -> list[list[float]]:
    """Return observations that `random_policy` takes."""
    return np.random.default_rng(3).normal(size=(num, 4)).tolist()
