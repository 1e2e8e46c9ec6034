"""The serving benchmarks count good answers only, refuse a server with another policy, and know a pause when they see one."""

import argparse
import asyncio
import itertools
import json
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import serve_app.replica
from benchmarks import serve_batches, serve_budget, serve_latency, serve_overheads
from benchmarks.serving import open_loop, servers
from benchmarks.serving.answers import Answer, WrongAnswers, ask_each, require_same_answers
from benchmarks.serving.arguments import names
from benchmarks.serving.open_loop import Timetable, row_of, run_open_loop
from benchmarks.serving.policies import as_json, clear_observations, draw_observations, policy_of
from benchmarks.serving.results import equal_work_ms, medians
from benchmarks.serving.servers import APPS, App, AppFailed, Running, running
from benchmarks.serving.settings import SETTINGS, SettingNotInForce
from benchmarks.serving.unlogged_replica import UnloggedReplica
from benchmarks.serving.wrk import LoadFailed, Request, parse_result
from policies.records import Decision, Shadow
from policies.storage import open_storage
from serve_app.config import ServingConfig
from serve_app.decision_log import SegmentWriter
from serve_app.replica import PolicyReplica
from tests.serving_helpers import NAME, call, publish, random_policy
from tests.simulators import START_S, Segment, make_decision

# --- wrk's figures ---


def wrk_output(**changes: int) -> str:
    result = {"requests": 1000, "duration_us": 2_000_000, "p50_us": 1500, "p99_us": 9000, "not_2xx": 0, "socket_errors": 0}
    return "Running 2s test\nRequests/sec: 500.00\n\nRESULT " + json.dumps({**result, **changes}) + "\n"


def test_only_requests_answered_with_2xx_count() -> None:
    assert parse_result(wrk_output())["requests_per_s"] == 500
    row = parse_result(wrk_output(not_2xx=100))
    assert row["requests_per_s"] == 450  # (1000 - 100) / 2 s; wrk's own line says 500
    assert (row["p50_ms"], row["p99_ms"], row["not_2xx"]) == (1.5, 9.0, 100)


@pytest.mark.parametrize("output", ["unable to connect to 127.0.0.1:1", wrk_output(not_2xx=1000), wrk_output(requests=0)])
def test_a_load_that_nobody_answered_is_no_row(output: str) -> None:
    with pytest.raises(LoadFailed):
        parse_result(output)


def test_medians_are_taken_over_repetitions_of_the_same_load() -> None:
    rows = [{"app": "a", "load": "1", "x": 1.0}, {"app": "a", "load": "1", "x": 9.0}, {"app": "a", "load": "1", "x": 2.0}]
    rows += [{"app": "a", "load": "64", "x": 5.0}]
    assert medians(rows, ("app", "load"), ("x",)) == {"a_1": {"x": 2.0}, "a_64": {"x": 5.0}}


def test_equal_work_shows_a_machine_that_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that jumps by 20 ms within each 50th piece, and by 1 ms within the others: 2 % are stalls, so p99 is one."""
    ticks, now_s = itertools.count(), 0.0

    def clock() -> float:
        nonlocal now_s
        now_s += 0.0 if (tick := next(ticks)) % 3 else (0.02 if tick % 150 == 0 else 0.001)
        return now_s

    monkeypatch.setattr("benchmarks.serving.results.time.perf_counter", clock)
    monkeypatch.setattr("benchmarks.serving.results.range", lambda number: (), raising=False)
    assert equal_work_ms(2.0) == {"p50": 1.0, "p99": 20.0, "p999": 20.0, "max": 20.0}


def test_a_load_that_failed_is_a_row_and_no_median() -> None:
    with http_server(lambda body: (503, {})) as url:
        figures = serve_latency.open_loop_figures(Request(f"{url}/decide", b"{}"), rate_per_s=20, seconds=1)
    assert "20 bad ones" in figures["error"]
    rows = [{"app": "a", "x": 1.0}, {"app": "a", **figures}, {"app": "b", **figures}]
    assert medians(rows, ("app",), ("x",)) == {"a": {"x": 1.0}}


def test_an_overhead_is_compared_within_its_repetition() -> None:
    throughputs = {(0, "plain"): 100, (0, "log_off"): 110, (1, "plain"): 50, (1, "log_off"): 60}
    rows = [
        {"repetition": repetition, "policy": "small", "setting": setting, "requests_per_s": value}
        for (repetition, setting), value in throughputs.items()
    ]
    found = serve_overheads.ratios_to_plain(rows)["log_off_small"]
    assert found == {"values": [1.1, 1.2], "median": 1.15}
    assert found["median"] != pytest.approx(85 / 75, abs=0.01)  # medians first would mix a slow hour into the ratio


def test_a_ratio_needs_both_apps() -> None:
    values = {"trimtab_small_1": {"requests_per_s": 300.0}, "fastapi_1_small_1": {"requests_per_s": 200.0}}
    assert serve_latency.ratios(values, ["trimtab", "fastapi_1"]) == {"trimtab_to_fastapi_1_small_1": 1.5}
    assert serve_latency.ratios(values, ["trimtab", "bentoml"]) == {}


def test_an_unknown_app_is_refused_by_name() -> None:
    assert names(APPS)("trimtab,fastapi_1") == ["trimtab", "fastapi_1"]
    with pytest.raises(argparse.ArgumentTypeError, match="fastapi_3"):
        names(APPS)("trimtab,fastapi_3")


# --- the check of the answers ---

POLICY = policy_of("large")
OBS_ND = clear_observations(POLICY, draw_observations("large", 400), 50)
DISTRIBUTIONS_NA = POLICY.distributions(OBS_ND)


def greedy_answers(distributions_NA: np.ndarray) -> list[Answer]:
    return [Answer(int(action)) for action in distributions_NA.argmax(axis=1)]


def sampled_answers(distributions_NA: np.ndarray) -> list[Answer]:
    rng = np.random.default_rng(0)
    actions_N = [int(rng.choice(len(row_A), p=row_A / row_A.sum())) for row_A in distributions_NA.astype(np.float64)]
    return [Answer(action, float(row_A[action])) for action, row_A in zip(actions_N, distributions_NA)]


@pytest.mark.parametrize("answers_of", [greedy_answers, sampled_answers])
def test_the_check_knows_the_policy_from_another_one(answers_of: Callable[[np.ndarray], list[Answer]]) -> None:
    require_same_answers("peer", answers_of(DISTRIBUTIONS_NA), DISTRIBUTIONS_NA)
    other_NA = policy_of("large", seed=2).distributions(OBS_ND)
    with pytest.raises(WrongAnswers, match="peer answers"):
        require_same_answers("peer", answers_of(other_NA), DISTRIBUTIONS_NA)


def test_one_wrong_answer_of_fifty_is_found() -> None:
    answers = greedy_answers(DISTRIBUTIONS_NA)
    answers[17] = Answer((answers[17].action + 1) % 18)
    with pytest.raises(WrongAnswers, match="1 of 50 observations unlike the policy, first number 17"):
        require_same_answers("peer", answers, DISTRIBUTIONS_NA)


@pytest.mark.parametrize("action", ["0", True, 0.0, -1, 18])
def test_what_is_no_action_is_wrong(action: Any) -> None:
    with pytest.raises(WrongAnswers):
        require_same_answers("peer", [Answer(action, 1.0)], np.full((1, 18), 1.0))


def test_a_missing_answer_is_wrong() -> None:
    with pytest.raises(WrongAnswers, match="49 answers to 50"):
        require_same_answers("peer", greedy_answers(DISTRIBUTIONS_NA)[:-1], DISTRIBUTIONS_NA)


def test_an_answer_of_another_form_is_wrong() -> None:
    for answer in ({"act": 0}, [0], None):
        with pytest.raises(WrongAnswers, match="expected form"):
            ask_each(lambda body, answer=answer: answer, [{}], APPS["fastapi_1"].read)
    assert ask_each(lambda body: [3], [{}], APPS["bentoml"].read) == [Answer(3)]


@contextmanager
def http_server(answer: Callable[[dict[str, Any]], tuple[int, Any]]) -> Iterator[str]:
    """A real server that gives back status and JSON for a body, with connections kept open."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            status, value = answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("size", ["small", "large"])
def test_a_peer_that_serves_other_weights_is_refused_over_http(size: str) -> None:
    def serving(seed: int) -> Callable[[dict[str, Any]], tuple[int, Any]]:
        policy = policy_of(size, seed=seed)
        return lambda body: (
            200,
            {"action": int(policy.distributions(np.array([body["observation"]], np.float32)).argmax())},
        )

    with http_server(serving(seed=1)) as url:
        serve_latency.check("fastapi_1", size, Running(url, "none", Path()))
    with http_server(serving(seed=2)) as url, pytest.raises(WrongAnswers, match="its speed says nothing"):
        serve_latency.check("fastapi_1", size, Running(url, "none", Path()))
    with http_server(lambda body: (503, {})) as url, pytest.raises(AppFailed, match="503"):
        serve_latency.check("fastapi_1", size, Running(url, "none", Path()))


def test_an_observation_travels_as_the_float32_it_is() -> None:
    obs_D = draw_observations("large", 1)[0]
    assert np.array_equal(np.array(json.loads(json.dumps(as_json(obs_D))), np.float32), obs_D)


# --- the open loop ---


class PausingServer:
    """Answers after 1 ms, but nothing while it pauses; a simulation that holds the time."""

    def __init__(self, pause: tuple[float, float]) -> None:
        self.pause = pause
        self.now_s = 0.0
        self.sent_s: dict[int, float] = {}

    def answer_s(self, slot: int) -> float:
        done_s = self.sent_s[slot] + 0.001
        return self.pause[1] if self.pause[0] <= done_s < self.pause[1] else done_s

    def send(self, slot: int) -> None:
        self.sent_s[slot] = self.now_s


def simulate(timetable: Timetable[int], server: PausingServer) -> list[float]:
    """Run the timetable to its end and return the latencies that count from sending: what a closed loop would report."""
    from_sending_s = []
    while timetable.next_due_s is not None or timetable.num_open:
        slot = min(server.sent_s, key=server.answer_s, default=None)
        due_s = timetable.next_due_s
        if slot is not None and (due_s is None or server.answer_s(slot) <= due_s):
            server.now_s = server.answer_s(slot)
            from_sending_s.append(server.now_s - server.sent_s.pop(slot))
            timetable.answered(slot, server.now_s, is_good=True)
        else:
            assert due_s is not None
            server.now_s = due_s
            timetable.tick(due_s)
    return from_sending_s


def test_a_pause_is_charged_to_every_request_that_was_due_meanwhile() -> None:
    server = PausingServer(pause=(0.1, 0.6))
    timetable = Timetable([1, 2], rate_per_s=100, num_requests=100, start_s=0.0, send=server.send)
    from_sending_s = simulate(timetable, server)
    # 100 requests, 10 ms apart. Number k of those due from 0.1 s on is answered at 0.6 s + 1 ms * floor(k / 2), in pairs, since
    # there are two connections: k = 42 after 0.621 - 0.52 = 101 ms, k = 43 after 0.621 - 0.53 = 91 ms, so 43 wait 100 ms or more.
    assert len(timetable.latencies_s) == 100
    assert sum(latency_s >= 0.1 for latency_s in timetable.latencies_s) == 43
    assert max(timetable.latencies_s) == pytest.approx(0.5)
    # The two connections that were waiting are all that a closed loop would notice.
    assert sum(latency_s >= 0.1 for latency_s in from_sending_s) == 2


def test_without_a_pause_every_request_takes_what_the_server_takes() -> None:
    server = PausingServer(pause=(9.0, 9.0))
    timetable = Timetable([1, 2], rate_per_s=100, num_requests=100, start_s=0.0, send=server.send)
    simulate(timetable, server)
    assert timetable.latencies_s == pytest.approx([0.001] * 100)
    row = row_of(timetable, rate_per_s=100, seconds=1)
    assert (row["asked_per_s"], row["requests_per_s"], row["p99_ms"], row["unanswered"]) == (100, 100, 1.0, 0)


def test_a_rate_that_was_not_kept_is_no_row() -> None:
    sent: list[int] = []
    timetable = Timetable([1], rate_per_s=10, num_requests=10, start_s=0.0, send=sent.append)
    for index in range(10):
        timetable.tick(index / 10)
        if index < 9:
            timetable.answered(1, index / 10 + 0.01, is_good=True)
    assert sent == [1] * 10 and timetable.num_open == 1
    with pytest.raises(LoadFailed, match="9 good answers per second of 10"):
        row_of(timetable, rate_per_s=10, seconds=1)


def test_a_bad_answer_has_no_latency() -> None:
    timetable = Timetable([1], rate_per_s=1, num_requests=1, start_s=0.0, send=lambda slot: None)
    timetable.tick(0.0)
    timetable.answered(1, 0.1, is_good=False)
    assert (timetable.latencies_s, timetable.num_failed, timetable.num_open) == ([], 1, 0)


@pytest.mark.parametrize(("lag_s", "is_refused"), [(0.01, False), (0.03, True)])
def test_a_generator_that_comes_late_measures_itself_and_is_refused(lag_s: float, is_refused: bool) -> None:
    timetable = Timetable([1], rate_per_s=10, num_requests=10, start_s=0.0, send=lambda slot: None)
    for index in range(10):
        timetable.tick(index / 10 + lag_s)
        timetable.answered(1, index / 10 + lag_s + 0.001, is_good=True)
    assert timetable.lags_s == pytest.approx([lag_s] * 10)
    if is_refused:
        with pytest.raises(LoadFailed, match=r"30\.0 ms too late"):
            row_of(timetable, rate_per_s=10, seconds=1)
    else:
        row = row_of(timetable, rate_per_s=10, seconds=1)
        assert (row["generator_lag_p99_ms"], row["p99_ms"]) == (10, 11)  # the lag is charged: it counts from the due time


def test_the_open_loop_asks_a_real_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_loop, "MAX_LAG_S", 5.0)  # other tests may have the processors meanwhile
    bodies: list[Any] = []

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        bodies.append(body)
        return 200, {}

    with http_server(answer) as url:
        row = run_open_loop(Request(f"{url}/decide", b'{"x": 1}'), rate_per_s=40, connections=4, seconds=1)
    assert bodies == [{"x": 1}] * 40
    assert (row["requests_per_s"], row["unanswered"], row["not_2xx"]) == (40, 0, 0)
    with http_server(lambda body: (503, {})) as url, pytest.raises(LoadFailed, match="40 bad ones"):
        run_open_loop(Request(f"{url}/decide", b"{}"), rate_per_s=40, connections=4, seconds=1)


# --- starting and stopping ---


def test_an_app_answers_while_it_runs_and_is_gone_afterwards() -> None:
    with running("uvicorn", "small") as endpoint:
        request = APPS["uvicorn"].request(endpoint.url, endpoint.key, [0.0] * 4)
        assert servers.post(request) == {"action": 0}
    with pytest.raises(AppFailed, match="did not answer"):
        servers.post(request)


def test_an_app_that_ends_at_once_is_refused_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(APPS, "broken", App(arguments=("no_such_module",)))
    with pytest.raises(AppFailed, match=r"ended with code 1 before it answered.*no_such_module"), running("broken", "small"):
        pass


def test_the_key_goes_to_ours_and_to_nobody_else() -> None:
    assert APPS["trimtab"].request("http://a", "secret", [0.0]).headers["Authorization"] == "Bearer secret"
    assert all("secret" not in str(app.request("u", "secret", [0.0])) for name, app in APPS.items() if "trimtab" not in name)


# --- batches ---


def test_a_binary_batch_is_a_header_of_the_length_it_says_and_the_bytes() -> None:
    obs_BD = draw_observations("small", 256)
    request = serve_batches.binary_request("http://a", "key", obs_BD)
    length = int(request.headers["Inference-Header-Content-Length"])
    [tensor] = json.loads(request.body[:length])["inputs"]
    assert (tensor["shape"], tensor["datatype"], tensor["parameters"]) == ([256, 4], "FP32", {"binary_data_size": 4096})
    assert np.array_equal(np.frombuffer(request.body[length:], "<f4").reshape(256, 4), obs_BD)


def test_binary_answers_are_read_in_the_order_of_the_header() -> None:
    texts = b"".join(struct.pack("<I", len(text)) + text for text in (b"id-1", b""))
    columns = [("decision_id", "BYTES", texts), ("propensity", "FP64", struct.pack("<2d", 0.25, 0.5))]
    columns += [("action", "INT64", struct.pack("<2q", 7, 3))]
    outputs = [{"name": name, "datatype": kind, "parameters": {"binary_data_size": len(data)}} for name, kind, data in columns]
    header = json.dumps({"outputs": outputs}).encode()
    body = header + b"".join(data for _, _, data in columns)
    headers = {"inference-header-content-length": str(len(header))}
    assert serve_batches.read_binary(body, headers) == [Answer(7, 0.25), Answer(3, 0.5)]
    with pytest.raises(WrongAnswers, match="no binary tensors"):
        serve_batches.read_binary(body, {})


def test_both_forms_of_a_batch_hold_the_same_observations() -> None:
    obs_BD = draw_observations("large", 3)
    sent = np.array(json.loads(serve_batches.json_request("http://a", "key", obs_BD).body)["observations"], np.float32)
    assert np.array_equal(sent, obs_BD)


# --- settings ---


def decisions_of(*arms: str) -> list[Decision]:
    return [make_decision(f"d{index}", arm=arm) for index, arm in enumerate(arms)]


CHAMPION_ONLY = decisions_of(*["champion"] * 400)
HALF_CANARY = decisions_of(*["champion", "canary"] * 200)
HALF_HOLDOUT = decisions_of(*["champion", "holdout"] * 200)
SHADOWS = [Shadow(d.decision_id, START_S, 2, "d", "greedy", None, None, None, failure="raised") for d in CHAMPION_ONLY]


@pytest.mark.parametrize(
    ("setting", "decisions", "is_shadowed"),
    [
        ("plain", CHAMPION_ONLY, False),
        ("log_off", [], False),
        ("canary", HALF_CANARY, False),
        ("shadow", CHAMPION_ONLY, True),
        ("holdout", HALF_HOLDOUT, False),
    ],
)
def test_only_its_own_log_shows_a_setting(tmp_path: Path, setting: str, decisions: list, is_shadowed: bool) -> None:
    paths = {"decisions": tmp_path / "decisions", "shadows": tmp_path / "shadows"}
    if decisions:
        Segment(paths["decisions"], "decisions").append(*decisions)
    if is_shadowed:
        Segment(paths["shadows"], "shadows").append(*SHADOWS)
    in_force = set()
    for name, other in SETTINGS.items():
        try:
            other.require_in_force(paths["decisions"], paths["shadows"])
        except SettingNotInForce:
            continue
        in_force.add(name)
    assert in_force == ({"plain", "shadow"} if setting == "shadow" else {setting})  # a shadow's decisions are plain ones


def test_a_few_decisions_do_not_show_a_setting(tmp_path: Path) -> None:
    Segment(tmp_path / "decisions", "decisions").append(*HALF_CANARY[:100])
    with pytest.raises(SettingNotInForce):
        SETTINGS["canary"].require_in_force(tmp_path / "decisions", tmp_path / "shadows")


@pytest.mark.parametrize("replica_class", [UnloggedReplica, PolicyReplica])
def test_only_the_benchmarks_replica_decides_without_a_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, replica_class: type[PolicyReplica]
) -> None:
    monkeypatch.setattr(serve_app.replica, "SegmentWriter", SegmentWriter)  # and put it back afterwards
    storage = open_storage(str(tmp_path / "storage"))
    publish(storage, random_policy(1))
    replica = replica_class(NAME, str(storage.root), ServingConfig(direct_lane=False).model_dump())
    body, key = json.dumps({"observation": [0.0] * 4}).encode(), storage.api_key_file.read_text().strip()
    reply = asyncio.run(call(replica.api, "POST", "/v1/decide", body, key=key))
    assert reply.status == 200, reply.body
    assert storage.decisions(NAME).exists() == (replica_class is PolicyReplica)


# --- the budget of one request ---


def test_the_budget_has_a_time_for_each_step_alone_and_in_a_batch() -> None:
    steps = serve_budget.measured(repetitions=1)
    alone, in_a_batch = steps.pop("log_bytes_per_decision")
    assert steps.pop("answer_bytes") > 100 and 2 * in_a_batch < alone < 1000  # one line for all: what they share is said once
    assert len(steps) == 15 and all(0 < value < 1e6 for values in steps.values() for value in values)
