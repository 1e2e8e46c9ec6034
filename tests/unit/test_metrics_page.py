"""The numbers of /metrics are those of what happened, they only grow, and a real Prometheus takes them in."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from prometheus_client.parser import text_string_to_metric_families

from policies.storage import Storage, open_storage
from policies.telemetry import LATENCY_BUCKETS_S
from policies.traffic import champion_only
from serve_app import tally as tally_module
from serve_app.answers import Answer, Answers
from serve_app.config import FallbackConfig
from serve_app.replica import PolicyReplica
from serve_app.tally import Tally
from tests.direct_replica import direct_replica
from tests.serving_helpers import NAME, call, decide_all, publish, random_policy, replica_of, variant_of
from tests.unit.test_ingress import EVERYBODY, NanForPositive, Raising, no_space, put_in_force

# In CI the tests with Prometheus fail without it: they must not be lost unnoticed.
needs_prometheus = pytest.mark.skipif(
    (shutil.which("prometheus") is None or shutil.which("promtool") is None) and os.environ.get("CI") != "true",
    reason="no Prometheus here: apt-get install -y --no-install-recommends prometheus",
)

ZEROS = [0.0, 0.0, 0.0, 0.0]
Key = tuple[str, frozenset[tuple[str, str]]]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path / "storage")
    publish(storage, random_policy(1))
    return storage


def scrape(replica: PolicyReplica) -> dict[Key, float]:
    """Return every sample by its name and its labels but policy and replica, which all have."""
    found: dict[Key, float] = {}
    for metric in text_string_to_metric_families(replica.api._metrics.text().decode()):
        for sample in metric.samples:
            labels = dict(sample.labels)
            assert (labels.pop("policy"), labels.pop("replica")) == (NAME, replica.name)
            found[sample.name, frozenset(labels.items())] = sample.value
    return found


def value(samples: dict[Key, float], name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def decisions(samples: dict[Key, float]) -> dict[tuple[str, ...], float]:
    """Return the decisions by arm, version and rung."""
    counted = {labels: number for (name, labels), number in samples.items() if name == "trimtab_decisions_total"}
    return {tuple(dict(labels)[name] for name in ("arm", "version", "rung")): number for labels, number in counted.items()}


def test_after_n_decisions_and_m_refusals_the_numbers_are_n_and_m(storage: Storage) -> None:
    replica, key = replica_of(storage), storage.api_keys.owner_key()
    many = {"observations": [ZEROS] * 5}
    named = {"observation": ZEROS, "request_id": "r"}
    replies = decide_all(storage, replica, *([{"observation": ZEROS}] * 3 + [many] + [{"observation": [0]}] * 4 + [named] * 2))

    async def others() -> None:
        feedback = [{"decision_id": reply.json()["decision_id"], "reward": 1.0} for reply in replies[:2]]
        assert (await call(replica.api, "POST", "/v1/feedback", json.dumps(feedback).encode(), key=key)).status == 200
        override = f"/v1/decisions/{replies[0].json()['decision_id']}/override"
        assert (await call(replica.api, "POST", override, b'{"action":1,"reason":"test"}', key=key)).status == 200
        assert (await call(replica.api, "POST", "/v1/decide", b"{}", key="tt-wrong")).status == 401
        assert (await call(replica.api, "GET", "/metrics", key=key)).status == 200  # is no decision, and below no /v1

    asyncio.run(others())
    samples = scrape(replica)
    # 3 of one request each, 5 of one, and 1 that was asked for twice; 5 requests had a new decision.
    assert decisions(samples) == {("champion", "1", "arm"): 9}
    assert value(samples, "trimtab_decision_duration_seconds_count") == 5
    assert value(samples, "trimtab_decision_duration_seconds_bucket", le="+Inf") == 5
    # 3 + 1 + 2 decided, 1 feedback, 1 override; 4 observations that do not fit; 1 without a key that is valid
    assert {status: value(samples, "trimtab_responses_total", status=status) for status in ("200", "422", "401")} == {
        "200": 8,
        "422": 4,
        "401": 1,
    }
    assert value(samples, "trimtab_batches_total") == 2, "the repeated one came with the next batch"
    assert (value(samples, "trimtab_feedback_total"), value(samples, "trimtab_overrides_total")) == (2, 1)
    [log] = storage.decisions(NAME).glob("*.jsonl")
    assert value(samples, "trimtab_log_written_bytes_total", log="decisions") == log.stat().st_size
    assert [value(samples, "trimtab_log_segments_total", log=log) for log in ("decisions", "feedback", "shadows")] == [1, 1, 0]


def test_who_answered_and_what_was_mended_is_counted(storage: Storage) -> None:
    """Two decisions by a canary; one by the champion for it, of a row that it gives NaN for; and one observation was cut."""
    replica = replica_of(storage, fallback=FallbackConfig(repair=("clip",)))
    put_in_force(replica, EVERYBODY, variant_of(1, random_policy(1)), NanForPositive(2, "d2", random_policy(2), "sample"))
    replies = decide_all(storage, replica, *[{"observation": [0, -1, 0, 0]}, {"observation": [5, -1, 0, 0]}])
    assert [reply.status for reply in replies] == [200] * 2
    assert decisions(scrape(replica)) == {("canary", "2", "arm"): 2}
    assert value(scrape(replica), "trimtab_repaired_decisions_total") == 1
    decide_all(storage, replica, {"observation": [0, 1, 0, 0]})
    assert decisions(scrape(replica)) == {("canary", "2", "arm"): 2, ("canary", "1", "champion"): 1}


def test_what_nobody_answered_counts_for_nobody(storage: Storage) -> None:
    """Of two one gives NaN: alone it is refused alone, in a request where all or none are answered the other one is too."""
    replica = replica_of(storage)
    put_in_force(replica, champion_only(9, 1), NanForPositive(1, "d1", random_policy(1), "sample"))
    replies = decide_all(storage, replica, *[{"observation": [0, -1, 0, 0]}, {"observation": [0, 1, 0, 0]}])
    assert [reply.status for reply in replies] == [200, 503]
    rows = [0.0, -1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    infer = {"inputs": [{"name": "observation", "shape": [2, 4], "datatype": "FP32", "data": rows}]}
    key, path = storage.api_keys.owner_key(), f"/v2/models/{NAME}/infer"
    assert asyncio.run(call(replica.api, "POST", path, json.dumps(infer).encode(), key=key)).status == 503
    assert decisions(scrape(replica)) == {("champion", "1", "arm"): 1}


def test_an_open_breaker_and_a_failing_log_are_told(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = replica_of(storage, on_log_failure="answer")
    put_in_force(replica, EVERYBODY, variant_of(1, random_policy(1)), Raising(2, "d2", random_policy(2), "sample"))
    decide_all(storage, replica, *[{"observation": ZEROS}] * 5)
    before = scrape(replica)
    assert value(before, "trimtab_breaker_open", version="2") == value(before, "trimtab_breaker_openings_total", version="2") == 1
    assert (value(before, "trimtab_log_failing"), value(before, "trimtab_log_failures_total")) == (0, 0)
    monkeypatch.setattr(replica._decisions.writer, "append", no_space)
    decide_all(storage, replica, *[{"observation": ZEROS}] * 3)
    after = scrape(replica)
    assert (value(after, "trimtab_log_failing"), value(after, "trimtab_log_failures_total")) == (1, 1)
    assert (value(after, "trimtab_log_unlogged_decisions_total"), value(after, "trimtab_log_buffered_decisions")) == (3, 3)
    assert decisions(after) == {("canary", "1", "champion"): 8}, "they were answered"


def test_counters_only_grow_and_refused_decisions_are_in_none(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = replica_of(storage)  # `refuse`: what cannot be logged is not answered
    seen = [scrape(replica)]
    append = replica._decisions.writer.append
    for number in range(6):
        monkeypatch.setattr(replica._decisions.writer, "append", no_space if number == 3 else append)
        monkeypatch.setattr("serve_app.durable_log.RETRY_S", 0.0)
        decide_all(storage, replica, *[{"observation": ZEROS}] * number)
        seen.append(scrape(replica))
    for before, after in zip(seen, seen[1:]):
        counted = [key for key in before if key[0].endswith(("_total", "_bucket", "_count", "_sum"))]
        assert all(after[key] >= before[key] for key in counted)
    assert decisions(seen[-1]) == {("champion", "1", "arm"): 1 + 2 + 4 + 5}
    assert value(seen[-1], "trimtab_responses_total", status="503") == 3


@pytest.mark.parametrize("max_noted", [1, 3, 1000])
def test_however_many_are_counted_at_once_the_totals_are_the_same(monkeypatch: pytest.MonkeyPatch, max_noted: int) -> None:
    monkeypatch.setattr(tally_module, "MAX_NOTED", max_noted)
    tally = Tally()
    by_arm = Answer("champion", 1, "d", "sample", 0, 1, 0.5, 0.5, "arm", None, "", None)
    shielded = by_arm._replace(rung="fixed", shield="limits")
    for _ in range(5):
        tally.add_answers(Answers.of([by_arm, shielded]), 1)
        tally.add_answers(Answers.of([by_arm]), 0)
        tally.add_requests([10.0 - LATENCY_BUCKETS_S[0], 10.0 - 1e6], 10.0)
    totals = tally.totals()
    assert totals.decisions == {("champion", 1, "arm"): 10, ("champion", 1, "fixed"): 5}
    assert (totals.num_shielded, totals.num_repaired) == (5, 5)
    assert (sum(totals.num_in_bucket), totals.num_in_bucket[-1]) == (10, 5) and totals == tally.totals()


# --- the real Prometheus ---


@needs_prometheus
def test_promtool_finds_nothing_to_say_about_the_page(storage: Storage) -> None:
    replica = replica_of(storage)
    decide_all(storage, replica, {"observation": ZEROS})
    good = replica.api._metrics.text()
    bad = good.replace(b"trimtab_batches_total", b"trimtab_batches")  # negative control: a counter's name ends in _total
    check = ["promtool", "check", "metrics"]
    said_of_good, said_of_bad = [subprocess.run(check, input=page, capture_output=True, timeout=60) for page in (good, bad)]
    assert (said_of_good.returncode, said_of_good.stdout + said_of_good.stderr) == (0, b"")
    assert said_of_bad.returncode != 0


@contextmanager
def prometheus(directory: Path, jobs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Run a Prometheus that scrapes these jobs each second, and return its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = directory / "prometheus.yml"
    scrape_configs = [{"job_name": name, "scrape_interval": "1s", "scrape_timeout": "1s", **job} for name, job in jobs.items()]
    config.write_text(yaml.safe_dump({"scrape_configs": scrape_configs}))
    arguments = [f"--config.file={config}", f"--storage.tsdb.path={directory / 'tsdb'}", f"--web.listen-address={address}"]
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(["prometheus", *arguments], stdout=log, stderr=log, cwd=directory)
        try:
            yield f"http://{address}"
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)


def query(url: str, expression: str) -> list[dict[str, Any]]:
    """Return what an expression gives now, nothing while Prometheus starts."""
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query?query={urllib.parse.quote(expression)}", timeout=10) as answer:
            return json.loads(answer.read())["data"]["result"]
    except OSError:
        return []


def wait_for(url: str, expression: str, *, expected: str) -> dict[str, Any]:
    """Return the one series of an expression once it has a value."""
    found, deadline_s = [], time.monotonic() + 60
    while time.monotonic() < deadline_s:
        found = query(url, expression)
        if [series["value"][1] for series in found] == [expected]:
            return found[0]["metric"]
        time.sleep(0.2)
    raise AssertionError(f"{expression} is {found}, expected {expected}")


@needs_prometheus
def test_prometheus_scrapes_the_direct_lane_with_a_key_that_may_read(storage: Storage, tmp_path: Path) -> None:
    """Configured as docs/operations.md says. A key that may only decide is the negative control: its target is down."""
    for scope in ("read", "decide"):
        (tmp_path / scope).write_text(storage.api_keys.create(scope, [scope], now=1000.0)[1])
    with direct_replica(storage) as replica:
        headers, url = {"Authorization": f"Bearer {replica.key}"}, f"{replica.url}/v1/decide"
        decided = [requests.post(url, json={"observation": ZEROS}, headers=headers, timeout=10).status_code for _ in range(7)]
        refused = [requests.post(url, json={"observation": [0]}, headers=headers, timeout=10).status_code for _ in range(2)]
        assert (decided, refused) == ([200] * 7, [422] * 2)
        targets = tmp_path / "trimtab.json"
        targets.write_text(json.dumps([{"targets": [replica.url.removeprefix("http://")]}]))
        jobs = {
            scope: {
                "authorization": {"credentials_file": str(tmp_path / scope)},
                "file_sd_configs": [{"files": [str(targets)]}],
            }
            for scope in ("read", "decide")
        }
        with prometheus(tmp_path, jobs) as server:
            labels = wait_for(server, "trimtab_decisions_total", expected="7")
            assert (labels["arm"], labels["version"], labels["rung"]) == ("champion", "1", "arm")
            assert (labels["policy"], labels["replica"], labels["job"]) == (NAME, replica.replica.name, "read")
            wait_for(server, 'trimtab_responses_total{status="422"}', expected="2")
            wait_for(server, "trimtab_decision_duration_seconds_count", expected="7")
            wait_for(server, 'up{job="read"}', expected="1")
            wait_for(server, 'up{job="decide"}', expected="0")
