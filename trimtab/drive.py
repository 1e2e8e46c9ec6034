"""A real client population over HTTP: many episodes at once, each action asked for, each reward reported."""

import asyncio
import contextlib
import itertools
import signal
import time
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import gymnasium
import numpy as np

from policies.errors import ClusterError
from policies.history import BEGINNING
from policies.spaces import ACTION_MASK
from training.config import EnvironmentConfig
from training.environment import read_spaces
from training.gates.intervals import mean_interval
from training.vectorization import make_single

REQUEST_TIMEOUT_S = 10.0
FEEDBACK_EVERY_S = 0.1  # rewards travel in batches of this age: half the requests, and a client's event queue does the same
MAX_FEEDBACK_BATCH = 1000
MAX_ERRORS_IN_A_ROW = 20  # a client that is refused this often in a row gives up, else a dead endpoint would be hammered
CONFIDENCE = 0.95


@dataclass
class Tally:
    """What the population saw, per arm and version."""

    returns: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    latencies_s: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    mixed_returns: list[float] = field(default_factory=list)
    decisions: int = 0
    feedback: int = 0
    fallbacks: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    last_decision_id: str | None = None

    def to_json(self, wall_s: float) -> dict[str, Any]:
        """Summarise: returns with a t interval, requests per second, latency percentiles in milliseconds."""
        every = self.mixed_returns + [value for values in self.returns.values() for value in values]
        return {
            "wall_s": wall_s,
            "episodes": len(every),
            **_returns(every),
            "decisions": self.decisions,
            "decisions_per_s": self.decisions / wall_s,
            "feedback": self.feedback,
            "fallbacks": self.fallbacks,
            "failed_requests": sum(self.failures.values()),
            "failures": dict(self.failures),
            "mixed_episodes": len(self.mixed_returns),
            "last_decision_id": self.last_decision_id,
            "arms": [
                {
                    "arm": arm,
                    "version": version,
                    "decisions": len(latencies_s),
                    "episodes": len(self.returns.get((arm, version), [])),
                    **_returns(self.returns.get((arm, version), [])),
                    "latency_ms": _percentiles_ms(latencies_s),
                }
                for (arm, version), latencies_s in sorted(self.latencies_s.items())
            ],
        }


def drive(
    environment: EnvironmentConfig, url: str, key: str, *, episodes: int | None, seconds: float, concurrency: int, seed: int
) -> dict[str, Any]:
    """Run episodes against the endpoint until `episodes` are done, `seconds` are over or Ctrl-C, and return the summary.

    Each episode is a unit of its own. A failed request is counted and the step asked for again, so that one refusal does
    not throw an episode away. Raises `ClusterError` when nothing answers at all.
    """
    read_spaces(environment)  # a wrong id is said before the first request
    population = _Population(environment, url, key, episodes=episodes, seconds=seconds, seed=seed)
    return asyncio.run(population.run(concurrency))


class _Population:
    def __init__(
        self, environment: EnvironmentConfig, url: str, key: str, *, episodes: int | None, seconds: float, seed: int
    ) -> None:
        self._environment = environment
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"}
        self._episodes = iter(range(episodes)) if episodes is not None else itertools.count()
        self._seconds = seconds
        self._seed = seed
        self._name = uuid.uuid4().hex[:8]
        self._stop = asyncio.Event()  # end the episodes
        self._over = asyncio.Event()  # no episode runs any more
        self._feedback: list[dict[str, Any]] = []
        self._tally = Tally()

    async def run(self, concurrency: int) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop.set)
        loop.call_later(self._seconds, self._stop.set)
        start_s = time.monotonic()
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(headers=self._headers, timeout=timeout, connector=connector) as session:
            reporter = asyncio.create_task(self._report(session))
            try:
                async with asyncio.TaskGroup() as clients:
                    for _ in range(concurrency):
                        clients.create_task(self._play(session))
            except* ClusterError as errors:
                raise errors.exceptions[0] from None
            finally:
                self._over.set()
                await reporter  # not cancelled: a batch on its way would be lost
        return self._tally.to_json(time.monotonic() - start_s)

    async def _play(self, session: aiohttp.ClientSession) -> None:
        env = make_single(self._environment)
        try:
            for index in self._episodes:
                await self._play_episode(session, env, index)
                if self._stop.is_set():
                    return
        finally:
            env.close()

    async def _play_episode(self, session: aiohttp.ClientSession, env: gymnasium.Env, index: int) -> None:
        unit = f"{self._name}-{index}"
        observation, info = env.reset(seed=self._seed + index)
        answered_by: set[tuple[str, int]] = set()
        total, over = 0.0, False
        state = None if self._environment.history == 1 else BEGINNING
        while not over:
            if self._stop.is_set():
                return  # an episode that was cut off has no return
            decision, latency_s = await self._decide(session, request_of(observation, info, state), unit)
            state = decision.get("state")
            arm = decision["arm"], decision["version"]
            answered_by.add(arm)
            self._tally.latencies_s[arm].append(latency_s)
            observation, reward, terminated, truncated, info = env.step(_to_action(env, decision["action"]))
            over, total = terminated or truncated, total + float(reward)
            self._feedback.append({"decision_id": decision["decision_id"], "reward": float(reward), "final": bool(over)})
        if len(answered_by) == 1:
            self._tally.returns[answered_by.pop()].append(total)
        else:
            self._tally.mixed_returns.append(total)

    async def _decide(self, session: aiohttp.ClientSession, request: dict[str, Any], unit: str) -> tuple[dict[str, Any], float]:
        body = {**request, "unit_id": unit, "episode_id": unit, "request_id": uuid.uuid4().hex}
        for _ in range(MAX_ERRORS_IN_A_ROW):
            start_s = time.perf_counter()
            decision = await self._post(session, "/v1/decide", body)
            if decision is not None:
                self._tally.decisions += 1
                self._tally.fallbacks += decision["fallback"] is not None
                self._tally.last_decision_id = decision["decision_id"]
                return decision, time.perf_counter() - start_s
            await asyncio.sleep(FEEDBACK_EVERY_S)
        raise ClusterError(f"{self._url} refused {MAX_ERRORS_IN_A_ROW} requests in a row: {dict(self._tally.failures)}")

    async def _report(self, session: aiohttp.ClientSession) -> None:
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), FEEDBACK_EVERY_S)
            await self._send_feedback(session)

    async def _send_feedback(self, session: aiohttp.ClientSession) -> None:
        while self._feedback:
            batch, self._feedback = self._feedback[:MAX_FEEDBACK_BATCH], self._feedback[MAX_FEEDBACK_BATCH:]
            answer = await self._post(session, "/v1/feedback", batch)
            if answer is None:
                self._feedback = batch + self._feedback  # tried again at the next tick; sent twice it counts once
                return
            self._tally.feedback += answer["accepted"]

    async def _post(self, session: aiohttp.ClientSession, path: str, body: Any) -> dict[str, Any] | None:
        try:
            async with session.post(self._url + path, json=body) as response:
                if response.status == 200:
                    return await response.json()
                text = await response.text()
                self._tally.failures[f"{path}: HTTP {response.status} {text[:200]}"] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            self._tally.failures[f"{path}: {type(error).__name__}"] += 1
        return None


def request_of(observation: Any, info: dict[str, Any], state: str | None = None) -> dict[str, Any]:
    """Return an environment's observation (and its action mask, if it gives one) as the body of a request.

    With a state the newest of its frames is sent: the state stands for the others.
    """
    body = {"observation": _to_json(observation)} if state is None else {"observation": _to_json(observation[-1]), "state": state}
    return {**body, "action_mask": np.reshape(info[ACTION_MASK], -1).tolist()} if ACTION_MASK in info else body


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_json(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return [_to_json(part) for part in value]
    return np.asarray(value).tolist()


def _to_action(env: gymnasium.Env, action: Any) -> Any:
    """Return an answered action as the environment's space holds it."""
    return action if isinstance(action, int) else np.array(action, env.action_space.dtype)


def _returns(values: list[float]) -> dict[str, float | None]:
    if len(values) < 2:
        return {"return_mean": values[0] if values else None, "return_low": None, "return_high": None}
    interval = mean_interval(np.array(values), CONFIDENCE)
    return {"return_mean": interval.mean, "return_low": interval.low, "return_high": interval.high}


def _percentiles_ms(latencies_s: list[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(latencies_s, (50, 95, 99)) * 1000
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99)}
