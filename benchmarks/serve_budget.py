"""What does one decision cost in the replica, step by step?

    python -m benchmarks.serve_budget [--repetitions 40]

In one process, without sockets: each step of the request path on its own, for a request alone and for a batch of 64, with the
4→64→64→2 policy. The smallest of the repetitions counts: a time that another process disturbed is no property of the code.
Sockets are measured by `benchmarks.serve_latency`.
"""

import argparse
import asyncio
import json
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.train_cartpole import commit, machine
from policies.storage import open_storage
from policies.traffic import with_canary
from serve_app.asks import Ask, together
from serve_app.config import ServingConfig
from serve_app.connection import Connection
from serve_app.deciding import Decider, Rows
from serve_app.drafts import Moment, batch_of, told_of_many
from serve_app.features import encode as encode_features
from serve_app.replica import PolicyReplica
from serve_app.variants import Snapshot
from serve_app.wire import encode
from tests.serving_helpers import NAME, publish, random_policy, snapshot_of, variant_of

RESULT_FILE = Path(__file__).parent / "results" / "serve_budget.json"
BODY = b'{"observation":[0.1,0.2,0.3,0.4]}'
BATCH = 64


class Nowhere:
    """A transport whose bytes go nowhere."""

    def write(self, data: bytes) -> None:
        pass

    def is_closing(self) -> bool:
        return False


def budget(replica: PolicyReplica, key: bytes, *, repetitions: int) -> dict[str, Any]:
    """Return microseconds per decision by step, alone and in a batch."""
    ingress, snapshot = replica._ingress, replica._ingress.snapshot()
    api_key = replica._keys.recognise(key)
    spaces = snapshot.champion.policy.spaces
    named = BODY[:-1] + b',"request_id":"0123456789abcdef"}'

    def features(asks: list[Any]) -> Any:
        return encode_features(spaces, [ask.observation for ask in asks], None, is_numbers=True, repair=None)

    def record(asks: list[Any]) -> Any:
        return batch_of(together(asks), encoded[len(asks)], range(len(asks)), answers[len(asks)], at)

    def told(asks: list[Any]) -> Any:
        return told_of_many(together(asks), encoded[len(asks)], range(len(asks)), answers[len(asks)], NAME)

    asks = [ingress.ask(BODY, api_key, started_s=0.0) for _ in range(BATCH)]
    assert all(isinstance(ask, Ask) for ask in asks)
    canary = snapshot_of(
        with_canary(1, 1, champion=1, candidate=2, weight=0.5), snapshot.champion, variant_of(2, random_policy(2))
    )
    shield = Decider(ServingConfig(shield={"low": 0, "high": 1}, fallback={"action": 0}), now_s=lambda: 0.0)
    at = Moment(snapshot.plan, 1.0, 1.0)
    encoded = {num: features(asks[:num]) for num in (1, BATCH)}
    answers = {num: ingress.decider.decide(_rows(asks[:num], snapshot), snapshot) for num in (1, BATCH)}
    lines = {num: encode(record(asks[:num])) + b"\n" for num in (1, BATCH)}
    place = replica._decisions.writer.append(lines[1])

    def one(step: Callable[[], Any]) -> float:
        return min(timeit.repeat(step, number=500, repeat=repetitions)) / 500 * 1e6

    def many(step: Callable[[list[Any]], Any], num: int) -> float:
        return min(timeit.repeat(lambda: step(asks[:num]), number=50, repeat=repetitions)) / 50 / num * 1e6

    def both(step: Callable[[list[Any]], Any]) -> list[float]:
        return [many(step, 1), many(step, BATCH)]

    def same(step: Callable[[], Any]) -> list[float]:
        return [one(step)] * 2

    return {
        "key": same(lambda: replica._keys.check(key, "decide")),
        "body to ask, decision id and seed (without a request id)": same(lambda: ingress.ask(BODY, api_key, started_s=0.0)),
        "the same for a named request": same(lambda: ingress.ask(named, api_key, started_s=0.0)),
        "recall of a named request, one replica": same(lambda: (replica._recall.catch_up(), replica._recall.find("none"))),
        "features": both(features),
        "network and softmax": both(lambda asks: snapshot.champion.distributions(features(asks).obs_BD, None)),
        "network, draw, propensities": both(lambda asks: ingress.decider.decide(_rows(asks, snapshot), snapshot)),
        "the same with a canary of 50 %": both(lambda asks: ingress.decider.decide(_rows(asks, canary), canary)),
        "the same under a shield, row by row": both(lambda asks: shield.decide(_rows(asks, snapshot), snapshot)),
        "log line, with columns of the requests": both(lambda asks: encode(record(asks))),
        "write of the line": both(lambda asks: replica._decisions.writer.append(lines[len(asks)])),
        "remember a named one": same(lambda: replica._recall.remember(("some-name",), *place)),
        "answers and their JSON, with columns of the requests": both(lambda asks: [encode(answer) for answer in told(asks)]),
        "the whole batch, from asks to answers": both(
            lambda asks: ingress._answer_batch(asks, [lambda result: None] * len(asks))
        ),
        "answer_bytes": len(encode(told(asks)[0])),
        "log_bytes_per_decision": [len(lines[1]), len(lines[BATCH]) / BATCH],
    }


def _rows(asks: list[Any], snapshot: Snapshot) -> Rows:
    obs_BD = encode_features(
        snapshot.champion.policy.spaces, [ask.observation for ask in asks], None, is_numbers=True, repair=None
    ).obs_BD
    return Rows([ask.decision_id for ask in asks], [ask.seed for ask in asks], [ask.unit_id for ask in asks], obs_BD, None)


async def lane(replica: PolicyReplica, key: bytes, *, repetitions: int) -> list[float]:
    """Return microseconds per request of the direct lane, from the bytes of a known head to those of the answer."""
    loop = asyncio.get_running_loop()
    head = b"POST /v1/decide HTTP/1.1\r\nhost: x\r\nauthorization: " + key + b"\r\ncontent-length: %d\r\n\r\n" % len(BODY)
    connections = [Connection(replica._direct, loop) for _ in range(BATCH)]
    for connection in connections:
        connection.connection_made(Nowhere())
    result = []
    for num in (1, BATCH):
        times = []
        for _ in range(repetitions):
            started = timeit.default_timer()
            for _ in range(20):
                for connection in connections[:num]:
                    connection.data_received(head + BODY)
                await asyncio.sleep(0)
            times.append((timeit.default_timer() - started) / 20 / num * 1e6)
        result.append(min(times))
    return result


def measured(repetitions: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="serve-budget-") as directory:
        storage = open_storage(Path(directory) / "storage")
        publish(storage, random_policy(1))
        key = b"Bearer " + storage.api_keys.owner_key().encode()
        replica = PolicyReplica(NAME, str(storage.root), ServingConfig().model_dump())
        steps = budget(replica, key, repetitions=repetitions)
        steps["the whole lane, from bytes to bytes (known head)"] = asyncio.run(lane(replica, key, repetitions=repetitions))
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=40)
    arguments = parser.parse_args()
    steps = measured(arguments.repetitions)
    for name, values in steps.items():
        print(f"{name:60s}", *(f"{value:8.2f}" for value in values) if isinstance(values, list) else [values])
    result = {"machine": machine(), "commit": commit(), "batch": BATCH, "us_per_decision_alone_and_in_a_batch": steps}
    RESULT_FILE.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
