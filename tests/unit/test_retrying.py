"""Does a call try again when that can help, where it can help, and never beyond its deadline?"""

import json
import random
from collections.abc import Callable

import pytest

from policies.errors import ClusterError, Forbidden, Overloaded, RequestConflict, RequestInvalid
from trimtab import retrying
from trimtab.calls import decide, single
from trimtab.lanes import ASIDE_S, LOOK_INTERVAL_S, DirectLanes
from trimtab.retrying import (
    FIRST_PAUSE_S,
    LEAST_TIMEOUT_S,
    MAX_PAUSE_S,
    Answered,
    Call,
    Failed,
    Judgement,
    Send,
    Verdict,
    exchange,
    judge,
    retry_after_s,
)

URL = "http://endpoint"
OK = Answered(200, b'{"action": 1}')
ONE = decide(single([0.5], action_mask=None, unit_id=None, episode_id=None, request_id="r1"), mode=None, explain=False)


class World:
    """A clock and a network that do what a test says: `answers` maps a URL's host and the try's number to latency and outcome."""

    def __init__(self, answers: Callable[[str, int], tuple[float, Answered | Failed]]) -> None:
        self.now_s = 100.0
        self.sends: list[tuple[float, Send]] = []
        self.pauses: list[float] = []
        self._answers = answers
        self.told_by: dict[str, dict[str, list[str]]] = {}  # what a host says where replicas are; others do not answer that
        self.look_s = 0.0  # after how long they do not

    def run(self, call: Call = ONE, *, timeout_s: float = 5.0, lanes: DirectLanes | None = None, seed: int = 0) -> object:
        steps = exchange(call, url=URL, lanes=lanes, timeout_s=timeout_s, now_s=lambda: self.now_s, rng=random.Random(seed))
        outcome = None
        try:
            while True:
                step = steps.send(outcome)
                outcome = self._do(step)
        except StopIteration as end:
            return end.value

    def _do(self, step) -> Answered | Failed | None:
        if not isinstance(step, Send):
            self.pauses.append(step.seconds)
            self.now_s += step.seconds
            return None
        host = step.url.removeprefix("http://").partition("/")[0]
        if step.url.endswith("/v1/endpoints"):
            told = self.told_by.get(host)
            self.now_s += 0.0 if told else min(self.look_s, step.timeout_s)
            return Failed(OSError("nobody says where replicas are")) if told is None else Answered(200, json.dumps(told).encode())
        self.sends.append((self.now_s, step))
        latency_s, outcome = self._answers(host, len(self.sends) - 1)
        if latency_s > step.timeout_s:
            latency_s, outcome = step.timeout_s, Failed(TimeoutError("too slow"))
        self.now_s += latency_s
        return outcome


def lanes_of(*urls: str) -> DirectLanes:
    lanes = DirectLanes()
    lanes.replace(list(urls), now_s=100.0)
    return lanes


def troubled(seed: int) -> Callable[[str, int], tuple[float, Answered | Failed]]:
    """Return a network in which nearly everything goes wrong, in every way there is."""
    rng = random.Random(seed)

    def answer(host: str, number: int) -> tuple[float, Answered | Failed]:
        status = rng.choice([429, 500, 502, 503, 504])
        trouble = Answered(status, b"{}", rng.choice([None, None, 0.0, 1.0, 30.0]))
        return rng.choice([0.0, 0.01, 0.5, 9.0]), rng.choice([trouble, Failed(OSError("refused"))])

    return answer


def overrun_s(seed: int) -> float:
    """Return by how much a call in a troubled network goes beyond its deadline of 2 s, at most, with its last try's limit."""
    world = World(troubled(seed))
    with pytest.raises((ClusterError, Overloaded)):
        world.run(timeout_s=2.0, lanes=lanes_of("http://a", "http://b") if seed % 2 else None, seed=seed)
    ends_s = [at_s + send.timeout_s for at_s, send in world.sends]
    return max(*ends_s, world.now_s) - 102.0


def test_whatever_goes_wrong_no_try_and_no_pause_goes_beyond_the_deadline() -> None:
    assert max(overrun_s(seed) for seed in range(300)) <= LEAST_TIMEOUT_S + 1e-9


def test_a_rule_that_forgets_the_deadline_would_go_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: pausing as the answer asks, whatever is left."""

    def forgetful(outcome, *, is_direct, num_pauses, remaining_s, rng) -> Judgement:
        return judge(outcome, is_direct=is_direct, num_pauses=num_pauses, remaining_s=float("inf"), rng=rng)

    monkeypatch.setattr(retrying, "judge", forgetful)
    assert max(overrun_s(seed) for seed in range(50)) > 0.01


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_trouble_that_passes_is_tried_again_with_the_same_request_id_and_what_is_left_of_the_time(status: int) -> None:
    world = World(lambda host, number: (0.25, OK if number == 3 else Answered(status, b"{}")))
    assert world.run() == {"action": 1}
    bodies = [json.loads(send.body) for _, send in world.sends]
    assert [body["request_id"] for body in bodies] == ["r1"] * 4 and [body["observation"] for body in bodies] == [[0.5]] * 4
    left_ms = [body["deadline_ms"] for body in bodies]
    # 5 s less what has passed since the call began, which is four tries of 0.25 s and three pauses
    assert left_ms == pytest.approx([1000 * (105.0 - at_s) for at_s, _ in world.sends], abs=0.001)
    assert len(world.pauses) == 3


@pytest.mark.parametrize(
    ("status", "kind"), [(403, Forbidden), (409, RequestConflict), (413, RequestInvalid), (422, RequestInvalid)]
)
def test_a_callers_mistake_is_told_at_once(status: int, kind: type[Exception]) -> None:
    world = World(lambda host, number: (0.0, Answered(status, b'{"error": {"message": "what is wrong"}}')))
    with pytest.raises(kind, match=f"HTTP {status}: what is wrong"):
        world.run()
    assert len(world.sends) == 1 and not world.pauses


def test_retry_after_is_the_least_pause_and_one_beyond_the_deadline_is_not_waited_for() -> None:
    world = World(lambda host, number: (0.0, OK if number else Answered(503, b"{}", 2.0)))
    assert world.run(timeout_s=5.0) == {"action": 1}
    assert 2.0 <= world.pauses[0] <= 2.0 + FIRST_PAUSE_S
    hopeless = World(lambda host, number: (0.0, Answered(429, b"{}", 2.0)))
    with pytest.raises(Overloaded):
        hopeless.run(timeout_s=1.0)
    assert len(hopeless.sends) == 1 and not hopeless.pauses


def test_pauses_double_and_are_drawn_from_nothing_to_their_whole() -> None:
    for num_pauses, longest_s in ((0, FIRST_PAUSE_S), (3, 8 * FIRST_PAUSE_S), (50, MAX_PAUSE_S)):
        failed, rng = Failed(OSError()), random.Random(1)
        pauses_s = [
            judge(failed, is_direct=False, num_pauses=num_pauses, remaining_s=9.0, rng=rng).pause_s / longest_s
            for _ in range(2000)
        ]
        # Uniform on [0, 1]: of 2,000 the mean is 0.5 with a deviation of 0.0065, so 0.03 is four and a half of them.
        assert 0 <= min(pauses_s) < 0.01 and 0.99 < max(pauses_s) <= 1
        assert sum(pauses_s) / 2000 == pytest.approx(0.5, abs=0.03)


def test_a_lane_that_fails_is_left_at_once_for_the_next_and_the_endpoint_is_the_last() -> None:
    lanes = lanes_of("http://a", "http://b")
    world = World(lambda host, number: (0.0, OK if host == "endpoint" else Failed(OSError("refused"))))
    assert world.run(lanes=lanes) == {"action": 1}
    hosts = [send.url for _, send in world.sends]
    assert sorted(hosts[:2]) == ["http://a/v1/decide", "http://b/v1/decide"] and hosts[2:] == [f"{URL}/v1/decide"]
    assert not world.pauses
    assert lanes.next(100.0 + ASIDE_S - 0.1) is None and lanes.next(100.0 + ASIDE_S) is not None


@pytest.mark.parametrize("asks_replicas", [True, False])
def test_while_the_endpoint_is_away_replicas_say_where_the_new_ones_are(
    monkeypatch: pytest.MonkeyPatch, asks_replicas: bool
) -> None:
    """Replicas a and b are replaced by c, and only they can say so. Not asking them, the control, ends without an answer."""
    if not asks_replicas:
        monkeypatch.setattr(DirectLanes, "add", lambda self, urls: None)
    alive = {"a", "b", "c"}
    world = World(lambda host, number: (0.1, OK if host in alive else Failed(OSError("refused"))))
    world.told_by = {host: {"endpoints": [f"http://{host}", "http://c"]} for host in "ab"}
    lanes = lanes_of("http://a", "http://b")
    world.now_s += LOOK_INTERVAL_S
    assert world.run(lanes=lanes) == {"action": 1}
    alive, world.told_by = {"c"}, {}
    if asks_replicas:
        assert world.run(lanes=lanes) == {"action": 1} and world.sends[-1][1].url.startswith("http://c")
    else:
        with pytest.raises(ClusterError):
            world.run(lanes=lanes)


def test_a_full_lane_is_waited_for_and_not_set_aside() -> None:
    lanes = lanes_of("http://a")
    world = World(lambda host, number: (0.0, OK if number else Answered(429, b"{}")))
    assert world.run(lanes=lanes) == {"action": 1}
    assert [send.url for _, send in world.sends] == ["http://a/v1/decide"] * 2 and len(world.pauses) == 1


@pytest.mark.parametrize("timeout_s", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("look_s", [0.0, 60.0])
def test_a_frozen_replica_that_is_also_asked_for_the_others_leaves_time_for_the_endpoint(timeout_s: float, look_s: float) -> None:
    world = World(lambda host, number: (60.0, OK) if host == "a" else (0.05, OK))
    world.look_s, lanes = look_s, lanes_of("http://a")
    world.now_s += LOOK_INTERVAL_S
    assert world.run(lanes=lanes, timeout_s=timeout_s) == {"action": 1}


def test_a_frozen_lane_leaves_two_thirds_of_the_time() -> None:
    world = World(lambda host, number: (99.0, OK) if host == "a" else (0.0, OK))
    assert world.run(timeout_s=3.0, lanes=lanes_of("http://a")) == {"action": 1}
    assert world.now_s == pytest.approx(101.0)


def test_a_lane_that_says_retry_after_nothing_is_not_asked_in_a_circle() -> None:
    world = World(lambda host, number: (0.0, Answered(503, b"{}", 0.0)))
    with pytest.raises(ClusterError):
        world.run(timeout_s=2.0, lanes=lanes_of("http://a"))
    assert sum("//a/" in send.url for _, send in world.sends) <= 3  # once in each second of `MIN_ASIDE_S`


def test_what_is_no_json_is_not_sent_and_what_answers_none_is_named() -> None:
    world = World(lambda host, number: (0.0, Answered(200, b"<html>")))
    with pytest.raises(RequestInvalid, match="cannot be sent"):
        world.run(Call("POST", "/v1/feedback", {"reward": float("nan")}))
    assert not world.sends
    with pytest.raises(ClusterError, match="not JSON"):
        world.run()


def test_only_seconds_are_read_from_a_retry_after_header() -> None:
    assert [retry_after_s(text) for text in ("3", "0.5", None, "Wed, 21 Oct 2026 07:28:00 GMT", "-1", "nan", "inf")] == [
        3.0, 0.5, None, None, None, None, None,
    ]  # fmt: skip


def test_every_outcome_has_a_verdict() -> None:
    rng = random.Random(0)
    for status in range(100, 600):
        ours = b'{"error":{"status":0,"message":"what happened"}}'
        verdict = judge(Answered(status, ours), is_direct=False, num_pauses=0, remaining_s=1.0, rng=rng).verdict
        assert verdict is (Verdict.AGAIN if status in retrying.RETRY_STATUSES else Verdict.ANSWER)
    assert judge(Failed(OSError()), is_direct=False, num_pauses=0, remaining_s=0.0, rng=rng).verdict is Verdict.GIVE_UP


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        (b'{"error":{"status":404,"message":"decision x was not made by this deployment"}}', Verdict.ANSWER),
        (b"Path '/v1/decide' not found. Ping http://.../-/routes for available routes.", Verdict.AGAIN),
        (b"<html>404</html>", Verdict.AGAIN),
        (b'{"detail":"no"}', Verdict.AGAIN),
    ],
)
def test_a_404_that_is_not_ours_comes_from_a_proxy_that_has_not_heard_of_us_yet(body: bytes, verdict: Verdict) -> None:
    outcome = Answered(404, body)
    judged = judge(outcome, is_direct=False, num_pauses=0, remaining_s=5.0, rng=random.Random(0))
    assert judged.verdict is verdict
    assert retrying._endpoints(outcome) == ([] if verdict is Verdict.ANSWER else None), "the lanes that are known stay"
