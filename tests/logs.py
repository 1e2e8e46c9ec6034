"""Logs for tests: random decisions as they are logged, alone and in batches, and everything that a reader finds."""

import base64
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from policies.log_reader import LogTail
from policies.records import SCHEMA_VERSION, Decision, DecisionBatch, SegmentHeader
from tests.simulators import START_S, make_decision

HEADER = msgspec.json.encode(SegmentHeader(SCHEMA_VERSION, "decisions", "writer")) + b"\n"


def encode_lines(*records: Decision | DecisionBatch) -> bytes:
    return b"".join(msgspec.json.encode(record) + b"\n" for record in records)


def make_batch(name: str, *, num_rows: int = 3, time_s: float = START_S, **changes: Any) -> DecisionBatch:
    """Return a binary request's batch: two float32 features per row, an action each."""
    numbers = np.arange(2 * num_rows, dtype="<f4").reshape(num_rows, 2) / np.float32(7)
    batch = DecisionBatch(
        batch_id=name,
        decision_ids=[f"{name}:{row}" for row in range(num_rows)],
        time_s=time_s,
        unit_ids="unit",
        episode_ids=None,
        plan=1,
        release=0,
        arms="champion",
        versions=1,
        digests={1: "d" * 64},
        observations=base64.b64encode(numbers.tobytes()).decode(),
        shape=[2],
        actions=list(range(num_rows)),
        modes="sample",
        seeds=list(range(num_rows)),
        propensities=[0.5] * num_rows,
        mixture_propensities=None,
        fallbacks=None,
        latency_s=0.001,
    )
    return msgspec.structs.replace(batch, **changes)


def random_records(rng: random.Random, num_records: int) -> list[Decision | DecisionBatch]:
    """Return what a replica might log: values of every kind, a clock that sometimes goes back, and ids that come again."""
    records: list[Decision | DecisionBatch] = []
    time_s = START_S
    for number in range(num_records):
        time_s += rng.choice([0.0, 0.25, 1.0, -0.5])
        name = f"d{rng.randrange(number + 1) if rng.random() < 0.1 else number}"
        kind = rng.random()
        if kind < 0.2:
            records.append(make_batch(name, num_rows=rng.randrange(1, 5), time_s=time_s))
        elif kind < 0.4:
            records.append(_random_turn(rng, name, rng.randrange(1, 5), time_s))
        else:
            records.append(make_decision(name, time_s=time_s, **_random_fields(rng)))
    return records


def _random_turn(rng: random.Random, name: str, num_rows: int, time_s: float) -> DecisionBatch:
    """Return the line of requests for one decision each that were answered together."""
    rows = [_random_fields(rng) for _ in range(num_rows)]
    of_each = {f"{field}s": [row[field] for row in rows] for field in ("observation", "action", "episode_id", "seed", "fallback")}
    of_each |= {"unit_ids": [f"u{row}" for row in range(num_rows)], "latency_s": [rng.random() for _ in rows]}
    of_each |= {"propensities": [row["propensity"] for row in rows], "assigned": [row["assigned"] for row in rows]}
    return make_batch(name, num_rows=num_rows, time_s=time_s, batch_id="", shape=None, **of_each)


def _random_fields(rng: random.Random) -> dict[str, Any]:
    values: list[Any] = [None, 0, -1, 2**60, 0.1 + 0.2, 5e-324, "ä\n\"'", [1, [2.5, None]], {"key": [True]}, []]
    return {
        "observation": rng.choice(values),
        "action": rng.choice(values),
        "episode_id": rng.choice([None, "", "e", "\u2028"]),
        "seed": rng.randrange(2**53),
        "propensity": rng.random(),
        "fallback": rng.choice([None, "version 2 gave NaN"]),
        "action_mask": rng.choice([None, [], [True, False]]),
        "rung": rng.choice(["arm", "champion", "previous", "rule", "fixed"]),
        "shield": rng.choice([None, "", "torque"]),
        "assigned": rng.choice(["plan", "request"]),
    }


def rows_of(*records: Decision | DecisionBatch) -> list[Decision]:
    """Return the decisions in the order in which they were logged."""
    return [row for record in records for row in (record.rows() if isinstance(record, DecisionBatch) else [record])]


def first_of_each(rows: list[Decision]) -> list[Decision]:
    """Return what a sealed segment should hold, found the slow way: by time, of each id the first."""
    kept: dict[str, Decision] = {}
    for row in sorted(rows, key=lambda row: row.time_s):  # stable: of equal times the one that was written first
        kept.setdefault(row.decision_id, row)
    return list(kept.values())


def chunks(tail: LogTail, max_bytes: int = 1 << 20) -> Iterator[list]:
    """Return what is new to a reader, chunk by chunk."""
    tail.look()
    while records := tail.read(max_bytes):
        yield records


def read_log(directory: Path) -> list[Decision]:
    """Return everything that a new reader finds."""
    return [row for chunk in chunks(LogTail(directory, Decision)) for row in chunk]
