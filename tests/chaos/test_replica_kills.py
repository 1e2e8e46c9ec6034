"""A replica that is killed again and again under load: what was answered is in the log once, and is answered again the same."""

import http.client
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from policies.errors import IntegrityError
from policies.log_reader import LogTail
from policies.records import Decision, Feedback
from policies.registry import Registry, change_release
from policies.storage import Storage, open_storage
from tests.log_audit import broken_rules
from tests.serving_helpers import NAME, publish, random_policy, read_new, release
from tests.simulators import make_decision

pytestmark = pytest.mark.chaos

FEW, MANY = 40, pytest.param(200, marks=pytest.mark.slow)
FEW_FOR_A_MISTAKE = 10
NUM_CLIENTS = 6
LIFE_S = (0.0, 0.5)  # from the kill before to the next one: from a life that never answered to one of about a thousand answers
STEP_TIMEOUT_S = 30.0
ACKNOWLEDGE_TIMEOUT_S = 60.0


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path / "storage")
    publish(storage, random_policy(1))
    publish(storage, random_policy(2))
    return storage


@dataclass
class Lives:
    """The lives of a replica on one port, in a process of their own."""

    process: "subprocess.Popen[str]"
    port: int
    storage: Storage
    num_kills: int = 0
    num_torn: int = 0

    def kill(self, rng: random.Random) -> None:
        """Kill the life that is there at a random moment, and leave half a line behind it every other time."""
        began = self._next("began")
        time.sleep(rng.uniform(*LIFE_S))
        os.kill(int(began[1]), signal.SIGKILL)
        self._next("ended")
        self.num_kills += 1
        if rng.random() < 0.5:
            self._tear(began[2], rng)

    def _next(self, event: str) -> list[str]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().split()
        assert line and line[0] == event, f"expected {event!r}, the replicas' process wrote {line}"
        return line

    def _tear(self, replica: str, rng: random.Random) -> None:
        """Leave what a power cut or a full disk leaves: `write` itself is whole or nothing when a process is killed."""
        line = msgspec.json.encode(make_decision(f"torn-{self.num_kills}"))
        for path in self.storage.decisions(NAME).glob(f"{replica}-*.jsonl"):
            with open(path, "ab") as file:
                file.write(line[: rng.randrange(1, len(line))])
            self.num_torn += 1


@contextmanager
def lives(storage: Storage, *mistakes: str) -> Iterator[Lives]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.replica_lives", str(storage.root), str(port), *mistakes]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Lives(process, port, storage)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=STEP_TIMEOUT_S)


@dataclass
class Clients:
    """Raw connections that ask each request until it is acknowledged, and old ones again."""

    port: int
    key: str
    told: dict[str, dict[str, Any]] = field(default_factory=dict)  # by decision id
    changed: list[str] = field(default_factory=list)  # what was answered otherwise the second time
    refused: list[str] = field(default_factory=list)
    rewarded: list[str] = field(default_factory=list)  # decision ids whose feedback was acknowledged
    num_broken: int = 0  # tries that a kill took
    num_asked_again: int = 0

    def __enter__(self) -> "Clients":
        self._stop, self._errors = threading.Event(), []
        self._threads = [threading.Thread(target=self._run, args=(index,)) for index in range(NUM_CLIENTS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(ACKNOWLEDGE_TIMEOUT_S)
        if kind is None:
            assert not self._errors and not any(thread.is_alive() for thread in self._threads), self._errors

    def _run(self, index: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=STEP_TIMEOUT_S)
        asked: list[dict[str, Any]] = []
        rng = random.Random(index)
        try:
            for number in itertools.count():
                if self._stop.is_set():
                    return
                if asked and rng.random() < 0.2:
                    self.num_asked_again += 1
                    self._ask(connection, rng.choice(asked))
                else:
                    asked.append(_body(f"c{index}-{number}", rng, is_many=number % 10 == 0))
                    self._ask(connection, asked[-1])
                if number % 5 == 0:
                    self._reward(connection, rng.choice(list(self.told)))
        except BaseException as error:
            self._errors.append(error)
            raise
        finally:
            connection.close()

    def _ask(self, connection: http.client.HTTPConnection, body: dict[str, Any]) -> None:
        answer = self._until_acknowledged(connection, "/v1/decide", body)
        for decision in answer.get("decisions", [answer]):
            if "error" in decision:
                self.refused.append(f"{body['request_id']}: {decision['error']}")
                continue
            before = self.told.setdefault(decision["decision_id"], decision)
            if any(before[key] != decision[key] for key in ("action", "version", "arm", "propensity", "fallback")):
                self.changed.append(f"{before} became {decision}")

    def _reward(self, connection: http.client.HTTPConnection, decision_id: str) -> None:
        self._until_acknowledged(connection, "/v1/feedback", {"decision_id": decision_id, "reward": 1.0, "final": True})
        self.rewarded.append(decision_id)

    def _until_acknowledged(self, connection: http.client.HTTPConnection, path: str, body: dict[str, Any]) -> dict[str, Any]:
        deadline = time.monotonic() + ACKNOWLEDGE_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                connection.request("POST", path, json.dumps(body), {"Authorization": f"Bearer {self.key}"})
                response = connection.getresponse()
                answer = json.loads(response.read())
            except (OSError, http.client.HTTPException):
                self.num_broken += 1
                connection.close()
                time.sleep(0.005)
                continue
            if response.status == 200:
                return answer
            self.refused.append(f"{body}: {answer}")
            time.sleep(0.05)
        raise AssertionError(f"{body} was not acknowledged within {ACKNOWLEDGE_TIMEOUT_S:g} s")


def _body(request_id: str, rng: random.Random, *, is_many: bool) -> dict[str, Any]:
    observations = [[round(rng.uniform(-1, 1), 3) for _ in range(4)] for _ in range(3 if is_many else 1)]
    return {"request_id": request_id} | ({"observations": observations} if is_many else {"observation": observations[0]})


@dataclass(frozen=True)
class Storm:
    """What a storm of kills left behind."""

    lives: Lives
    clients: Clients
    decisions: list[Decision]
    log_errors: list[str]


def storm(storage: Storage, *mistakes: str, num_kills: int) -> Storm:
    """Kill the replica again and again under load, under another plan every few kills, and read the log."""
    rng = random.Random(num_kills)
    key = storage.api_key_file.read_text().strip()
    with lives(storage, *mistakes) as replica, Clients(replica.port, key) as clients:
        for number in range(num_kills):
            replica.kill(rng)
            if number % 4 == 1:
                change_plan(storage, number)
        alive_s = time.monotonic() + 1.0  # the last life answers what is still open, and old requests under its plan
        num_told = len(clients.told)
        while time.monotonic() < alive_s or (not mistakes and len(clients.told) == num_told):
            assert time.monotonic() < alive_s + STEP_TIMEOUT_S, "the last life answers nothing"
            time.sleep(0.05)
    return Storm(replica, clients, *read_log(storage))


def read_log(storage: Storage) -> tuple[list[Decision], list[str]]:
    """Return all decisions that can be read, and what the reader complains of."""
    tail = LogTail(storage.decisions(NAME), Decision)
    tail.look()
    decisions: list[Decision] = []
    errors: list[str] = []
    while True:
        try:
            records = tail.read()
        except IntegrityError as error:
            errors.append(str(error))
            continue
        if not records:
            return decisions, errors
        decisions += records


def change_plan(storage: Storage, number: int) -> None:
    """Begin a release that half of all units get, or take it back."""
    registry = Registry(storage.registry(NAME))
    if (open_release := registry.state().release) is not None and open_release.is_open:
        registry.append(lambda state: change_release(state, "abort", reason="test"), now=1000.0 + number)
    else:
        release(storage, 2, weights=(0.5, 1.0), now=1000.0 + number)


@pytest.mark.parametrize("num_kills", [FEW, MANY])
def test_killed_at_random_moments_under_load_a_replica_loses_nothing_it_acknowledged_and_repeats_itself(
    storage: Storage, num_kills: int
) -> None:
    after = storm(storage, num_kills=num_kills)
    clients = after.clients
    assert broken_rules(after.decisions, clients.told, versions={1, 2}) == []
    assert clients.changed == [] and clients.refused == [] and after.log_errors == []
    rewarded = {feedback.decision_id for feedback in read_new(LogTail(storage.feedback(NAME), Feedback))}
    assert set(clients.rewarded) <= rewarded
    # The storm was one: kills took requests, half lines were left, both versions answered, and old ids were asked again.
    assert after.lives.num_kills == num_kills and after.lives.num_torn > num_kills / 10
    assert clients.num_broken >= num_kills and clients.num_asked_again > num_kills
    assert {decision["version"] for decision in clients.told.values()} == {1, 2}


def test_a_replica_that_answers_before_it_writes_is_caught(storage: Storage) -> None:
    after = storm(storage, "answers_before_writing", num_kills=FEW_FOR_A_MISTAKE)
    assert any("is not in the log" in problem for problem in broken_rules(after.decisions, after.clients.told, versions={1, 2}))


def test_a_replica_that_forgets_its_former_lives_is_caught(storage: Storage) -> None:
    after = storm(storage, "forgets_former_lives", num_kills=FEW_FOR_A_MISTAKE)
    problems = broken_rules(after.decisions, after.clients.told, versions={1, 2})
    assert any("is in the log 2 times" in problem for problem in problems)


def test_a_replica_that_writes_behind_a_torn_line_is_caught(storage: Storage) -> None:
    after = storm(storage, "glues_to_torn_tail", num_kills=FEW_FOR_A_MISTAKE)
    assert after.log_errors, "which decision is lost, and whether it was acknowledged, is chance"
