"""What production is doing: a cache of registry journal, decision log and feedback log that can be asked at any moment.

Everything is read from the storage root, live and after a restart by the same code: a monitor that was killed comes back with
the same numbers. Only the replicas' own reports are news from memory, and those come again within a second.
"""

import logging
import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from actors.arms import ShadowTally, arm_version, holdout_status, release_status, shadows_status, switches_status
from actors.version_traffic import VersionTraffic, series_times
from policies.confidence import ConfidenceSequence
from policies.errors import IntegrityError, StorageError
from policies.joining import Account, Joiner, Outcome, account_of
from policies.log_reader import LogTail
from policies.records import Decision, Feedback, Override, Shadow
from policies.registry import Registry, RegistryState, Release
from policies.release import ArmEvidence, ReleaseConfig, ReleaseEvidence, alpha_per_sequence, judge
from policies.storage import existing_storage
from policies.telemetry import ReplicaReport, replica_row
from policies.traffic import Arm

logger = logging.getLogger(__name__)

REPLICA_SILENT_S = 30.0
MAX_REPLICA_TOTALS = 1000  # lives of replicas that are counted apart; beyond, the oldest are added up
MAX_ERRORS = 20
MAX_RELEASES_SHOWN = 20
MAX_VERSIONS_SHOWN = 6


class _ArmEvidence:
    """Collects what one version does in one release; an interval per metric."""

    def __init__(self, outcome_range: tuple[float, float], alpha: float) -> None:
        self.outcomes = ConfidenceSequence(*outcome_range, alpha=alpha_per_sequence(alpha))
        self.errors = ConfidenceSequence(0.0, 1.0, alpha=alpha_per_sequence(alpha), bins=1)

    def freeze(self) -> ArmEvidence:
        outcome_low, outcome_high = self.outcomes.interval()
        error_low, error_high = self.errors.interval()
        return ArmEvidence(
            decisions=self.errors.num_observations,
            errors=round(self.errors.total),
            episodes=self.outcomes.num_observations,
            outcome_mean=self.outcomes.mean,
            outcome_low=outcome_low,
            outcome_high=outcome_high,
            error_low=error_low,
            error_high=error_high,
        )


class Monitor:
    """Follows one policy. Plain: `refresh(now)` reads what is new, the other methods answer from memory."""

    def __init__(
        self,
        policy: str,
        storage_root: str,
        *,
        outcome_range: tuple[float, float],
        reward_window_s: float,
        config: ReleaseConfig,
        now: float,
    ) -> None:
        storage = existing_storage(storage_root)
        self._policy = policy
        self._outcome_range = outcome_range
        self._config = config
        self._registry = Registry(storage.registry(policy))
        self._state = RegistryState()
        self._decisions = LogTail(storage.decisions(policy), Decision)
        self._feedback = LogTail(storage.feedback(policy), Feedback)
        self._overrides = LogTail(storage.overrides(policy), Override)
        self._shadows = LogTail(storage.shadows(policy), Shadow)
        self._joiner = Joiner(reward_window_s)
        self._traffic: dict[tuple[Account, int], VersionTraffic] = {}
        self._shadow_tallies: dict[int, ShadowTally] = {}
        self._num_requested = 0  # decisions whose arm the request chose
        self._evidence: dict[tuple[int, int], _ArmEvidence] = {}  # (release, version), of the last release only
        self._replicas: dict[str, tuple[float, ReplicaReport]] = {}  # when it came
        self._responses: dict[tuple[str, float], dict[int, int]] = {}  # of each life of each replica
        self._older_responses: dict[int, int] = {}
        self._num_clipped = 0
        self._num_read = 0
        self._rebuilt_decisions: int | None = None
        self._started_at = now
        self._refreshed_at: float | None = None
        self._errors: deque[str] = deque(maxlen=MAX_ERRORS)

    def refresh(self, now: float) -> None:
        """Read everything that was written before this call."""
        for _ in self.refresh_steps(now):
            pass

    def refresh_steps(self, now: float) -> Iterator[None]:
        """Do `refresh` in steps of some ten milliseconds, so that somebody can ask in between.

        Whichever log is behind in time is read next: after a restart neither runs ahead by more than a chunk, and waiting
        feedback and open episodes stay as few as they are live.
        """
        self._fold_registry()
        self._feedback.look()  # first: then the decision of each noted feedback is noted too
        self._overrides.look()
        self._decisions.look()
        yield from self._read_overrides()
        while True:
            if self._decisions.position_s <= self._feedback.position_s:
                records = self._read(self._decisions)
                for decision in records:
                    self._take_decision(decision)
                self._num_read += len(records)
            else:
                for feedback in self._read(self._feedback):
                    self._joiner.feedback(feedback)
            position_s = min(self._decisions.position_s, self._feedback.position_s)
            for outcome in self._joiner.settle(min(now, position_s)):
                self._take_outcome(outcome)
            if position_s == math.inf:
                break
            yield
        if self._rebuilt_decisions is None:
            self._rebuilt_decisions = self._num_read + self._decisions.num_sealed_duplicates
        self._refreshed_at = now
        yield from self._read_shadows()

    def report(self, report: dict[str, Any], now: float) -> None:
        """Take in what a replica says of itself (`ReplicaReport` as builtins). A repeated report changes nothing."""
        replica = msgspec.convert(report, ReplicaReport, strict=False)
        self._replicas[replica.replica] = (now, replica)
        life = replica.replica, replica.started_at_s
        self._responses.pop(life, None)  # put last: the first is then the one that was silent for longest
        self._responses[life] = replica.responses
        if len(self._responses) > MAX_REPLICA_TOTALS:
            oldest = self._responses.pop(next(iter(self._responses)))
            self._older_responses = _sum([self._older_responses, oldest])

    def note_error(self, error: Exception) -> None:
        """Keep an error for the status page."""
        logger.error("event=monitor_error policy=%s error=%r", self._policy, error)
        self._errors.append(f"{type(error).__name__}: {error}")

    def may_seal(self, path: Path) -> bool:
        """Say whether a segment of the decision log was read as far as the last refresh found it."""
        return self._refreshed_at is not None and self._decisions.has_read(path.stem)

    def release_evidence(self) -> dict[str, Any]:
        """Return the evidence of the open release and when it was complete: `release` and `evidence` are None without one."""
        release = self._open_release()
        return {
            "refreshed_at": self._refreshed_at,
            "release": release.number if release else None,
            "evidence": self._release_evidence(release).to_json() if release else None,
        }

    def status(self, now: float) -> dict[str, Any]:
        """Return everything the status page, the command line and the dashboard show."""
        state = self._state
        release = self._open_release()
        replicas = [entry for entry in self._replicas.values() if now - entry[0] <= REPLICA_SILENT_S]
        self._replicas = {report.replica: (came_at, report) for came_at, report in replicas}
        counts = dict(self._joiner.counts)
        counts["duplicate_decisions"] += self._decisions.num_sealed_duplicates
        return {
            "policy": self._policy,
            "time_s": now,
            "champion": state.champion,
            "plan": state.plan.to_json() if state.plan else None,
            "release": self._open_release_status(release, now) if release else None,
            "releases": [release_status(closed) for closed in state.releases[-MAX_RELEASES_SHOWN:] if not closed.is_open],
            "versions": [
                {
                    "version": version.number,
                    "digest": version.digest,
                    "policy_sha256": version.policy_sha256,
                    "gate_verdict": str(version.gate_verdict),
                    "override_gates": version.override_gates,
                    "registered_at": version.registered_at,
                }
                for version in state.versions.values()
            ],
            "arms": self._arms_status(now),
            "holdout": holdout_status(state),
            "shadows": shadows_status(state, self._shadow_tallies),
            "switched_off": switches_status(state),
            "requested_decisions": self._num_requested,
            "series": {
                "time_s": series_times(now),
                "versions": {str(version): self._traffic_of("plan", version).series(now) for version in self._shown_versions()},
            },
            "feedback": {
                **{name: counts[name] for name in ("joined", "duplicate", "unknown", "late")},
                "waiting": self._joiner.num_waiting,
            },
            "overrides": {name: counts[name] for name in ("overridden", "override_late", "override_unknown")},
            "replicas": [replica_row(report, now - came_at) for came_at, report in replicas],
            "responses": _string_keys(_sum([self._older_responses, *self._responses.values()])),
            "monitor": {
                "started_at": self._started_at,
                "rebuilt_decisions": self._rebuilt_decisions,
                "refresh_age_s": now - self._refreshed_at if self._refreshed_at is not None else None,
                "integrity_errors": list(self._errors),
                "counts": {
                    **{name: counts[name] for name in ("duplicate_decisions", "abandoned", "evicted")},
                    "clipped": self._num_clipped,
                },
            },
        }

    def _fold_registry(self) -> None:
        try:
            self._state = self._registry.state()
        except (IntegrityError, StorageError) as error:
            self.note_error(error)
        last = len(self._state.releases)
        self._evidence = {key: arm for key, arm in self._evidence.items() if key[0] >= last}

    def _read(self, tail: LogTail) -> list:
        try:
            return tail.read()
        except IntegrityError as error:
            self.note_error(error)
            return []

    def _read_overrides(self) -> Iterator[None]:
        """Read all overrides before the decisions they are about: there are few, and so it is the same after a restart."""
        while self._overrides.position_s < math.inf:
            for override in self._read(self._overrides):
                self._joiner.override(override)
            yield

    def _read_shadows(self) -> Iterator[None]:
        """Read what the shadows would have done, after all that a release waits for."""
        self._shadows.look()
        while self._shadows.position_s < math.inf:
            for shadow in self._read(self._shadows):
                self._shadow_tallies.setdefault(shadow.version, ShadowTally()).add(shadow)
            yield

    def _take_decision(self, decision: Decision) -> None:
        account, version = account_of(decision), decision.version
        if decision.is_stood_in_for:
            if decision.plan > self._state.num_entries:
                self._fold_registry()
            version = arm_version(decision, self._state)
        if not self._joiner.decision(decision, version):
            return
        if account == "request":
            self._num_requested += 1
            return
        self._traffic_of(account, version).decision(decision)
        evidence = self._evidence_of(account, decision.release, version)
        if evidence is not None:
            evidence.errors.update(1.0 if decision.is_stood_in_for else 0.0)

    def _take_outcome(self, outcome: Outcome) -> None:
        if outcome.account == "request":
            return
        traffic = self._traffic_of(outcome.account, outcome.version)
        if outcome.is_mixed:
            traffic.num_mixed += 1
            return
        low, high = self._outcome_range
        value = min(high, max(low, outcome.value))
        self._num_clipped += value != outcome.value
        traffic.outcome(outcome, value)
        evidence = self._evidence_of(outcome.account, outcome.release, outcome.version)
        if evidence is not None:
            evidence.outcomes.update(value)

    def _traffic_of(self, account: Account, version: int) -> VersionTraffic:
        key = account, version
        if key not in self._traffic:
            self._traffic[key] = VersionTraffic(self._outcome_range, self._config.alpha)
        return self._traffic[key]

    def _evidence_of(self, account: Account, release: int, version: int) -> _ArmEvidence | None:
        """Return where to collect evidence; None for the holdout, outside of releases and for those that are over."""
        if account != "plan" or release == 0 or release < len(self._state.releases):
            return None
        key = (release, version)
        if key not in self._evidence:
            self._evidence[key] = _ArmEvidence(self._outcome_range, self._config.alpha)
        return self._evidence[key]

    def _open_release(self) -> Release | None:
        release = self._state.release
        return release if release is not None and release.is_open else None

    def _release_evidence(self, release: Release) -> ReleaseEvidence:
        arms = [self._evidence_of("plan", release.number, version) for version in (release.candidate, release.incumbent)]
        candidate, incumbent = (arm.freeze() for arm in arms if arm is not None)
        return ReleaseEvidence(self._outcome_range, candidate, incumbent)

    def _open_release_status(self, release: Release, now: float) -> dict[str, Any]:
        evidence = self._release_evidence(release)
        gate_verdict = self._state.versions[release.candidate].gate_verdict
        off = self._state.switched_off
        decision = judge(release, evidence, gate_verdict=gate_verdict, config=self._config, now=now, switched_off=off)
        return {
            **release_status(release),
            "verdict": str(decision.verdict),
            "reason": decision.reason,
            "evidence": {key: value for key, value in evidence.to_json().items() if key != "outcome_range"},
        }

    def _shown_versions(self) -> list[int]:
        """Return the versions of the plan and the newest of those that ever answered: the document stays small for ever."""
        planned = {arm.version for arm in self._planned_arms()}
        answered = [version for account, version in self._traffic if account == "plan"]
        return sorted(planned | set(sorted(answered)[-MAX_VERSIONS_SHOWN:]))

    def _planned_arms(self) -> list[Arm]:
        """Return the plan's arms but the holdout, which has an account of its own."""
        return [arm for arm in self._state.plan.arms if arm.name != "holdout"] if self._state.plan else []

    def _arms_status(self, now: float) -> list[dict[str, Any]]:
        arms = {arm.version: arm for arm in self._planned_arms()}
        rows = [self._arm_row("plan", version, arms.get(version), now) for version in self._shown_versions()]
        plan, holdout = self._state.plan, self._state.holdout
        if plan is not None and holdout is not None:
            rows.append(self._arm_row("holdout", holdout.version, plan.arm("holdout"), now) | {"arm": "holdout"})
        return rows

    def _arm_row(self, account: Account, version: int, arm: Arm | None, now: float) -> dict[str, Any]:
        return {
            "version": version,
            "arm": arm.name if arm else None,
            "weight": arm.weight if arm else 0.0,
            **self._traffic_of(account, version).summary(now),
        }


def _sum(totals: list[dict[int, int]]) -> dict[int, int]:
    result: dict[int, int] = {}
    for counts in totals:
        for key, count in counts.items():
            result[key] = result.get(key, 0) + count
    return dict(sorted(result.items()))


def _string_keys(values: dict[int, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in values.items()}
