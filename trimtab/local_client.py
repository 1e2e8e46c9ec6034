"""Decide in the caller's own process, with the endpoint's plan, and have it in the endpoint's log all the same."""

import itertools
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from policies import history
from policies.distributions import seed_of
from policies.errors import RequestInvalid, ServiceUnavailable
from policies.records import Decision
from serve_app.decision_ids import Lease
from trimtab.client import Client
from trimtab.local_log import LocalLog, LogCounts, OnFull, Report
from trimtab.local_plan import Drawn, draw
from trimtab.local_policy import as_json
from trimtab.plan_follower import InForce, PlanFollower
from trimtab.retrying import Call

MAX_NAME_LENGTH = 256
_ID_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")


@dataclass(frozen=True)
class LocalStatus:
    """How a local client is. `silent_s` is how long ago the endpoint last told a plan; `plan_error` says why not since then."""

    plan: int
    versions: dict[int, str]
    lease_expires_at: float
    silent_s: float
    plan_error: str | None
    log: LogCounts


class LocalClient:
    """Evaluates the bundles in this process: a decision costs microseconds, and none needs the network.

        with trimtab.Client.local("http://127.0.0.1:8000", key) as client:
            decision = client.decide([0.1, 0.0, -0.02, 0.0], unit_id="user-17")
            client.feedback(decision["decision_id"], reward=1.0, final=True)

    It follows the plan: the same units get the same arms as at the endpoint, from the same bundles, verified. Decisions and
    rewards are sent in the background, so unlike the endpoint's they are acknowledged before they are in the log: a process that
    is killed loses what it had not sent, a fifth of a second's. While the endpoint is away the last plan stays in force until the
    lease ends, a day; `status` says so. Threads may share one client, forked processes may not.

    `max_buffered` decisions and rewards wait at most; then `on_full` says whether new ones are decided and not logged ("drop",
    counted), or wait for room for `timeout_s` and are refused after that ("block"). `cache_dir` keeps bundles between processes.

    Raises as `Client.decide` does when the endpoint does not tell a plan, `IntegrityError` for a bundle that does not verify.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        cache_dir: str | Path | None = None,
        on_full: OnFull = "drop",
        max_buffered: int = 10_000,
        timeout_s: float = 5.0,
    ) -> None:
        self._http = Client(url, key, timeout_s=timeout_s, direct=False)
        self._evaluating = threading.Lock()  # the evaluators' arrays are used by one thread at a time
        try:
            self._plans = PlanFollower(self._send, Path(cache_dir).expanduser() if cache_dir is not None else None)
        except BaseException:
            self._http.close()
            raise
        self._log = LocalLog(self._send, max_buffered=max_buffered, on_full=on_full, timeout_s=timeout_s)
        self._names = _Names(self._plans.in_force.lease)

    def decide(
        self,
        observation: Any,
        *,
        action_mask: Any = None,
        unit_id: str | None = None,
        episode_id: str | None = None,
        request_id: str | None = None,
        state: str | None = None,
    ) -> dict[str, Any]:
        """Return the decision for one observation, as `Client.decide` does; arrays are taken too.

        Raises `RequestInvalid` for what the spaces do not hold, `ServiceUnavailable` when no version answers or the lease is
        over, `Overloaded` when the log is full, and what the endpoint refuses this client for.
        """
        started_s, now = time.perf_counter(), time.time()
        in_force = self._plans.in_force  # once: a new plan comes into force between decisions
        self._require_leave(in_force, now)
        plan = in_force.local
        spaces = plan.champion.spaces
        observation, mask = spaces.split_mask(as_json(observation), None if action_mask is None else as_json(action_mask))
        mask_A = spaces.check_mask(mask)
        if state is None:
            features = spaces.features_of(observation)
        else:
            history.require_history(spaces)
            obs_D = history.with_frame(spaces.check_frame(observation), state, spaces)
            history.require_bounds(obs_D, spaces)
            features, observation = obs_D.tolist(), history.as_observation(obs_D, spaces)
        request_id, decision_id = self._name(in_force.lease, request_id)
        unit_id = _checked("unit_id", unit_id) or _checked("episode_id", episode_id) or request_id
        seed = seed_of(decision_id)
        with self._evaluating:
            drawn = draw(plan, unit_id, features, mask_A, seed)
        self._log.add(
            Decision(  # by position, in the record's order: names would double the time
                decision_id,
                now,
                unit_id,
                episode_id,
                plan.plan.number,
                plan.plan.release,
                drawn.arm,
                drawn.version.version,
                drawn.version.digest,
                observation,
                drawn.action,
                drawn.version.mode,
                seed,
                drawn.propensity,
                drawn.mixture_propensity,
                drawn.fallback,
                time.perf_counter() - started_s,
                None if mask_A is None else mask_A.tolist(),
                "arm" if drawn.fallback is None else "champion",
            )
        )
        told = _told(decision_id, in_force.policy, drawn)
        return told if state is None else {**told, "state": history.state_after(observation)}

    def feedback(self, decision_id: str, *, reward: float, final: bool = False) -> None:
        """Report the reward of a decision; it is sent after the decision itself."""
        reward = float(reward)
        if not reward - reward == 0.0:
            raise RequestInvalid(f"reward is {reward}, expected a finite number")
        self._log.add(Report(decision_id, reward, final))

    def status(self) -> LocalStatus:
        """Return which plan is in force, how long nothing was heard from the endpoint, and what became of the log."""
        in_force, plans = self._plans.in_force, self._plans
        versions = {version: local.digest for version, local in sorted(in_force.local.versions.items())}
        silent_s = time.monotonic() - plans.heard_at_s
        return LocalStatus(
            in_force.local.plan.number, versions, in_force.lease.expires_at, silent_s, plans.error, self._log.counts()
        )

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what is left of the log, for as long as `timeout_s`, and stop."""
        self._log.close(timeout_s)
        self._plans.close()
        self._http.close()

    def __enter__(self) -> "LocalClient":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _send(self, call: Call, timeout_s: float) -> Any:
        return self._http.call(call, timeout_s)

    def _require_leave(self, in_force: InForce, now: float) -> None:
        if self._plans.refusal is not None:
            raise type(self._plans.refusal)(*self._plans.refusal.args)
        if now >= in_force.lease.expires_at:
            raise ServiceUnavailable(
                f"nothing was heard from the endpoint for {time.monotonic() - self._plans.heard_at_s:.0f} s, and the lease to "
                f"decide without it is over: {self._plans.error}"
            )

    def _name(self, lease: Lease, request_id: str | None) -> tuple[str, str]:
        """Return the request's id and the decision's."""
        if request_id is not None:
            if not (0 < len(request_id) <= 64 and _ID_CHARACTERS.issuperset(request_id)):
                raise RequestInvalid(f"request_id is {request_id!r:.100}, expected 1-64 of A-Z a-z 0-9 _ -")
            return request_id, lease.name(request_id)
        names = self._names
        if names.lease is not lease:
            names = self._names = _Names(lease)
        return names.next()


class _Names:
    """Names decisions that came without a request id, all with one keyed hash."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self._prefix = secrets.token_hex(8)
        self._tail = lease.tail(self._prefix)
        self._numbers = itertools.count()  # `next` of it is one step, so no two threads get the same

    def next(self) -> tuple[str, str]:
        request_id = f"{self._prefix}:{next(self._numbers)}"
        return request_id, f"{request_id}.{self._tail}"


def _checked(what: str, name: str | None) -> str | None:
    if name is not None and not (isinstance(name, str) and 0 < len(name) <= MAX_NAME_LENGTH):
        raise RequestInvalid(f"{what} is {name!r:.100}, expected 1 to {MAX_NAME_LENGTH} characters")
    if name is not None and not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair: neither the log nor the endpoint can say it
            raise RequestInvalid(f"{what} is {name!r:.100}, which is no Unicode text: {error.reason}") from error
    return name


def _told(decision_id: str, policy: str, drawn: Drawn) -> dict[str, Any]:
    return {
        "decision_id": decision_id,
        "action": drawn.action,
        "policy": policy,
        "version": drawn.version.version,
        "arm": drawn.arm,
        "propensity": drawn.propensity,
        "fallback": drawn.fallback,
    }
