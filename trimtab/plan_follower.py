"""How a process keeps the plan that is in force at the endpoint, with its bundles verified and in memory."""

import logging
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from policies.bundle_reader import MANIFEST, MAX_FILE_BYTES, Bundle, read_bundle
from policies.errors import ClusterError, IntegrityError, Overloaded, TrimtabError
from policies.integrity import commit_directory, make_directory, parse_json, remove, sha256_hex, temporary_directory
from policies.traffic import TrafficPlan
from serve_app.decision_ids import Lease
from trimtab.local_plan import LocalPlan, LocalVersion
from trimtab.retrying import Call

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 1.0
MAX_PAUSE_S = 60.0  # between looks that end in an error nobody expected: each writes a traceback
POLL_TIMEOUT_S, FILE_TIMEOUT_S = 5.0, 60.0  # a bundle has up to 200 MB
_DIGEST = re.compile(r"[0-9a-f]{64}")


class _VersionSaid(msgspec.Struct, frozen=True):
    digest: str


class _LeaseSaid(msgspec.Struct, frozen=True):
    id: str
    key: str
    expires_at: float


class _PlanSaid(msgspec.Struct, frozen=True):
    """Answer of GET /v1/plan."""

    policy: str
    plan: dict[str, Any]
    versions: dict[int, _VersionSaid]
    lease: _LeaseSaid


@dataclass(frozen=True)
class InForce:
    """What decisions are made with: replaced as a whole, so whoever reads it once has one plan."""

    policy: str
    local: LocalPlan
    lease: Lease


class PlanFollower:
    """Polls the endpoint. `in_force` is there from the beginning; later it is the newest plan whose bundles all loaded.

    `error` says why the last look brought nothing new: the endpoint is away, a bundle does not verify, or the replica that was
    asked still has an older plan. Then the last plan stays in force. `refusal` is the endpoint's explicit no to this key or to
    local decisions: then nothing is decided any more.
    `send` makes a request within a time limit.
    """

    def __init__(
        self, send: Callable[[Call, float], Any], cache_dir: Path | None, *, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._send = send
        self._wall_clock = wall_clock
        self._temporary = None if cache_dir else tempfile.TemporaryDirectory(prefix="trimtab-bundles-")
        self._directory = cache_dir or Path(self._temporary.name)
        self._loaded: dict[int, LocalVersion] = {}
        self.error: str | None = None
        self.refusal: TrimtabError | None = None
        self.heard_at_s = time.monotonic()
        self._stopping = threading.Event()
        try:
            make_directory(self._directory)
            self.in_force = self._take(self._ask(), None)
        except BaseException:
            self._clean_up()
            raise
        self._thread = threading.Thread(target=self._run, name="trimtab-plan", daemon=True)
        self._thread.start()

    def refresh(self) -> None:
        """Look at the endpoint once; never raises for what the endpoint says or does."""
        try:
            answer = self._ask()
        except (ClusterError, Overloaded) as error:  # away, or busy
            return self._note(error)
        except TrimtabError as error:
            self.refusal = error
            return self._note(error)
        self.refusal = None
        try:
            self.in_force = self._take(answer, self.in_force)
        except (TrimtabError, OSError) as error:  # a bundle that is damaged, or no longer in force since we asked
            return self._note(error)
        self.error = None

    def close(self) -> None:
        self._stopping.set()
        self._thread.join(POLL_TIMEOUT_S)
        self._clean_up()

    def _run(self) -> None:
        pause_s = POLL_INTERVAL_S
        while not self._stopping.wait(pause_s):
            try:
                self.refresh()
                pause_s = POLL_INTERVAL_S
            except Exception as error:  # a mistake of ours: without this thread the lease would end and nobody know why
                logger.exception("event=plan_follower_failed")
                self.error = f"{type(error).__name__}: {error}"
                pause_s = min(2 * pause_s, MAX_PAUSE_S)

    def _note(self, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        if text != self.error:
            logger.warning("event=plan_not_followed error=%r consequence='the last plan stays in force'", text)
        self.error = text

    def _ask(self) -> Any:
        answer = self._send(Call("GET", "/v1/plan"), POLL_TIMEOUT_S)
        self.heard_at_s = time.monotonic()
        return answer

    def _take(self, answer: Any, before: InForce | None) -> InForce:
        """Return what is in force after an answer: the same object as before when there is nothing new."""
        said = _read(answer)
        plan, lease = TrafficPlan.from_json(said.plan), self._lease(before, said.lease)
        if before is not None and plan.number < before.local.plan.number:  # a rollback too is a plan with a higher number
            raise IntegrityError(
                f"the endpoint told of plan {plan.number}, {before.local.plan.number} is in force: the replica that answered "
                "lags behind; if the registry was put back to an earlier state, make a new client"
            )
        if before is not None and plan == before.local.plan:
            return before if lease is before.lease else InForce(said.policy, before.local, lease)
        return InForce(said.policy, self._load(plan, said.versions), lease)

    def _lease(self, before: InForce | None, said: _LeaseSaid) -> Lease:
        """Return the lease we have, or the new one when half of ours is over."""
        new = Lease(said.id, said.key, said.expires_at)
        now = self._wall_clock()
        if before is None or before.lease.expires_at - now < (new.expires_at - now) / 2:
            return new
        return before.lease

    def _load(self, plan: TrafficPlan, said: dict[int, _VersionSaid]) -> LocalPlan:
        wanted = {arm.version for arm in plan.arms}
        if not wanted <= said.keys():
            raise IntegrityError(f"plan {plan.number} needs versions {sorted(wanted)}, the endpoint told of {sorted(said)}")
        loaded = {version: self._version(version, said[version]) for version in wanted}
        self._loaded = loaded
        champion = plan.arm("champion")
        assert champion is not None, "`from_json` takes no plan without one"
        logger.info("event=plan_in_force plan=%d versions=%s", plan.number, sorted(wanted))
        return LocalPlan(plan, loaded, loaded[champion.version])

    def _version(self, version: int, said: _VersionSaid) -> LocalVersion:
        known = self._loaded.get(version)
        if known is not None and known.digest == said.digest:
            return known
        if not _DIGEST.fullmatch(said.digest):
            raise IntegrityError(f"version {version} is said to have the digest {said.digest!r:.100}, expected 64 hex digits")
        bundle = self._bundle(said.digest)
        return LocalVersion.of(version, bundle.digest, bundle.manifest["serving_mode"], bundle.policy)

    def _bundle(self, digest: str) -> Bundle:
        """Return a bundle from the cache, after fetching it if it is not there or has been damaged there."""
        path = self._directory / digest
        if path.exists():
            try:
                return read_bundle(path, expected_digest=digest)
            except IntegrityError as error:
                logger.warning("event=cached_bundle_damaged digest=%s error=%r", digest, str(error))
                remove(path)
        copy = temporary_directory(self._directory)
        try:
            self._fetch(digest, copy)
            bundle = read_bundle(copy, expected_digest=digest)  # nothing unverified gets the name that says what it is
            try:
                commit_directory(copy, path)
            except OSError:
                if not path.exists():  # else another process fetched it meanwhile, the same bytes
                    raise
        finally:
            shutil.rmtree(copy, ignore_errors=True)
        return bundle

    def _fetch(self, digest: str, into: Path) -> None:
        manifest = self._file(digest, MANIFEST)
        if (found := sha256_hex(manifest)) != digest:
            raise IntegrityError(f"the endpoint's manifest of bundle {digest} has sha256 {found}")
        (into / MANIFEST).write_bytes(manifest)
        described = parse_json(manifest, f"manifest of bundle {digest}")
        files = described.get("files") if isinstance(described, dict) else None
        for name in MAX_FILE_BYTES:  # names that we know: what somebody else calls a file is never made a path
            if isinstance(files, dict) and name in files and name != MANIFEST:
                (into / name).write_bytes(self._file(digest, name))

    def _file(self, digest: str, name: str) -> bytes:
        return self._send(Call("GET", f"/v1/bundles/{digest}/{name}", is_file=True), FILE_TIMEOUT_S)

    def _clean_up(self) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()


def _read(answer: Any) -> _PlanSaid:
    try:
        return msgspec.convert(answer, _PlanSaid, strict=False)  # JSON's keys are texts, ours are numbers
    except msgspec.ValidationError as error:
        raise IntegrityError(f"the endpoint's plan cannot be read: {error}; is it an older Trimtab?") from error
