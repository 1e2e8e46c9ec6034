"""Do both clients and a real replica understand each other in everything that a client can ask?"""

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from policies.errors import DecisionUnknown, RequestConflict, RequestInvalid
from policies.log_reader import LogTail
from policies.records import Decision, DecisionBatch, Feedback, Override
from policies.storage import Storage, open_storage
from tests.direct_replica import DirectReplica, direct_replica
from tests.serving_helpers import NAME, observations, publish, random_policy, read_new
from trimtab.async_client import AsyncClient
from trimtab.client import Client


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path / "storage")
    publish(storage, random_policy(1))
    return storage


@pytest.fixture
def replica(storage: Storage) -> Iterator[DirectReplica]:
    with direct_replica(storage, request_modes=("greedy", "sample")) as replica:
        yield replica


Use = Callable[..., Any]


def use_client(replica: DirectReplica, method: str, *args: Any, **options: Any) -> Any:
    with Client(replica.url, replica.key, timeout_s=20.0) as client:
        return getattr(client, method)(*args, **options)


def use_async_client(replica: DirectReplica, method: str, *args: Any, **options: Any) -> Any:
    async def run() -> Any:
        async with AsyncClient(replica.url, replica.key, timeout_s=20.0) as client:
            return await getattr(client, method)(*args, **options)

    return asyncio.run(run())


both = pytest.mark.parametrize("use", [use_client, use_async_client])


def logged(directory: Path, kind: type) -> list[Any]:
    return read_new(LogTail(directory, kind))


@both
def test_one_decision_with_all_that_can_be_said(storage: Storage, replica: DirectReplica, use: Use) -> None:
    names = {"unit_id": "u", "episode_id": "e", "request_id": "r1"}
    told = use(replica, "decide", [0.1, 0.2, 0.3, 0.4], mode="greedy", explain=True, **names)
    assert told["explanation"]["mode"] == "greedy" and told["propensity"] == 1.0
    assert use(replica, "decide", [0.1, 0.2, 0.3, 0.4], mode="greedy", **names)["decision_id"] == told["decision_id"]
    with pytest.raises(RequestConflict, match="409"):
        use(replica, "decide", [9.0, 0.2, 0.3, 0.4][::-1], mode="greedy", **names)
    [decision] = logged(storage.decisions(NAME), Decision)
    assert (decision.decision_id, decision.unit_id, decision.episode_id) == (told["decision_id"], "u", "e")


@both
def test_many_decisions_one_of_them_wrong(storage: Storage, replica: DirectReplica, use: Use) -> None:
    rows = [*observations(5), ["x", 0, 0, 0]]
    units, ids = [f"u{n}" for n in range(6)], [f"r{n}" for n in range(6)]
    told = use(replica, "decide_many", rows, unit_ids=units, request_ids=ids, episode_ids=[None, "e", *[None] * 4])
    assert told[5]["error"]["status"] == 422 and all(item["policy"] == NAME for item in told[:5])
    decisions = logged(storage.decisions(NAME), Decision)
    assert [d.decision_id for d in decisions] == [item["decision_id"] for item in told[:5]]
    assert [d.unit_id for d in decisions] == units[:5] and decisions[1].episode_id == "e"
    with pytest.raises(RequestInvalid, match="unit_ids has 2 items"):
        use(replica, "decide_many", rows, unit_ids=["u", "v"])


@both
def test_rewards_and_overrides_arrive(storage: Storage, replica: DirectReplica, use: Use) -> None:
    first, second = use(replica, "decide_many", observations(2))
    assert use(replica, "feedback", first["decision_id"], reward=1.5, final=True) == {"accepted": 1}
    items = [{"decision_id": d["decision_id"], "reward": 0.5, "final": False} for d in (first, second)]
    assert use(replica, "feedback_many", items) == {"accepted": 2}
    assert use(replica, "override", second["decision_id"], 1, "by hand") == {"accepted": 1}
    with pytest.raises(DecisionUnknown):
        use(replica, "feedback_many", [*items, {"decision_id": "nobody.s", "reward": 0.0}])
    assert [(f.reward, f.final) for f in logged(storage.feedback(NAME), Feedback)] == [(1.5, True), (0.5, False), (0.5, False)]
    [override] = logged(storage.overrides(NAME), Override)
    assert (override.decision_id, override.action, override.reason) == (second["decision_id"], 1, "by hand")
    assert use(replica, "status")["policy"] == NAME


def test_calls_that_go_together_are_the_decisions_that_each_would_be_alone(storage: Storage, replica: DirectReplica) -> None:
    rows, told = observations(60), {}
    with Client(replica.url, replica.key, timeout_s=20.0, batch_window_ms=20.0) as client:

        def run(start: int) -> None:
            for n in range(start, 60, 6):
                told[n] = client.decide(rows[n], unit_id=f"u{n}", request_id=f"r{n}")

        threads = [threading.Thread(target=run, args=(start,)) for start in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with Client(replica.url, replica.key) as alone:
        for n in range(60):  # the same ids are told from the log: any mix-up would be another decision, or a conflict
            assert alone.decide(rows[n], unit_id=f"u{n}", request_id=f"r{n}") == told[n]
    _, *lines = next(storage.decisions(NAME).glob("*.jsonl")).read_bytes().splitlines()
    batches = [msgspec.json.decode(line, type=DecisionBatch) for line in lines]
    # Of one request, not of several that arrived together: then each has a latency of its own.
    assert any(len(batch.decision_ids) > 1 and isinstance(batch.latency_s, float) for batch in batches)


def test_both_clients_have_the_same_methods_with_the_same_arguments() -> None:
    def surface(client: type) -> dict[str, Any]:
        methods = {
            name: getattr(client, name) for name in vars(client) if not name.startswith("_") and name not in ("call", "local")
        }
        return {name: list(inspect.signature(method).parameters.values()) for name, method in methods.items()}

    assert surface(Client) == surface(AsyncClient)
    assert inspect.signature(Client.__init__) == inspect.signature(AsyncClient.__init__)
