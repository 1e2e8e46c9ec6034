"""What runs in one Serve replica, put together from its parts."""

import asyncio
import secrets
import time
from importlib.metadata import version
from typing import Any, NamedTuple

import ray

from policies.registry import Registry
from policies.storage import Storage, existing_storage
from policies.telemetry import ReplicaReport
from policies.trust import TrustStore
from serve_app import front
from serve_app.config import ServingConfig
from serve_app.decision_ids import DecisionIds
from serve_app.decision_log import SegmentWriter
from serve_app.direct import DirectLane
from serve_app.durable_log import DecisionLog
from serve_app.event_log import log_where_serve_does
from serve_app.feedback import FeedbackIntake
from serve_app.group_commit import GroupCommit
from serve_app.http_api import HttpApi
from serve_app.ingress import Ingress
from serve_app.keys import KeyRing
from serve_app.local_decisions import LocalDecisions
from serve_app.metrics import Reading, ReplicaMetrics
from serve_app.open_inference import OpenInference
from serve_app.overrides import OverrideIntake
from serve_app.recall import Recall
from serve_app.record_log import RecordLog
from serve_app.shadowing import Shadowing
from serve_app.static_files import read_static_files
from serve_app.status import StatusView
from serve_app.telemetry import Counters, MonitorLink, report_for_ever
from serve_app.variants import VariantStore


class PolicyReplica:
    """A plain class; `serve_app.app` makes a Serve deployment of it. Loads the plan before it is ready for requests.

    It consists of logs (decisions, feedback, overrides, shadows); of the ingress, which decides, with the variants it decides
    by; of intakes for what is reported later; and of the front, `api`, with the direct lane beside it.
    """

    def __init__(self, policy: str, storage_root: str, config: dict[str, Any]) -> None:
        log_where_serve_does()  # first: what is loaded below is logged
        settings = ServingConfig(**config)
        storage = existing_storage(storage_root)
        self._policy = policy
        self._started_at_s = time.time()
        self.name = f"replica-{int(self._started_at_s)}-{secrets.token_hex(4)}"  # new at each start, see SegmentWriter
        self._keys, decision_ids = KeyRing.of(storage), DecisionIds.of(storage)
        self._counters, self._monitor = Counters(), MonitorLink(policy)
        self._background: list[asyncio.Task[None]] = []

        self._decisions = _decision_log(SegmentWriter(storage.decisions(policy), "decisions", self.name), settings)
        self._feedback = RecordLog(storage.feedback(policy), "feedback", self.name, settings=settings)
        self._overrides = RecordLog(storage.overrides(policy), "overrides", self.name, settings=settings)
        self._shadows = SegmentWriter(storage.shadows(policy), "shadows", self.name)

        self._recall = Recall(storage.decisions(policy), self.name)
        self._shadowing = Shadowing(self._shadows, wall_clock=time.time)
        self._variants = _variants(storage, policy, settings)
        self._ingress = Ingress(
            policy,
            decision_ids=decision_ids,
            variants=self._variants,
            log=self._decisions,
            recall=self._recall,
            shadowing=self._shadowing,
            config=settings,
        )
        self._variants.check = self._ingress.decider.ladder.check
        self._variants.refresh(now=time.monotonic())

        self._intakes = self._make_intakes(Registry(storage.registry(policy)), decision_ids, settings)
        self.api = self._make_api(settings)
        self._direct = DirectLane(self.api, self._ingress, max_body_bytes=settings.max_body_bytes)
        self._endpoint: str | None = None
        self._host = settings.host if settings.direct_lane else None

    def __serve_build_asgi_app__(self) -> HttpApi:
        """Ray Serve asks for the ASGI application by this name, before it starts the server."""
        front.install(self._direct)
        return self.api

    async def check_health(self) -> None:
        """Ray Serve calls this every few seconds and replaces the replica when it raises.

        That the loop came to it proves that requests are being answered; what could have died unseen are our own tasks.
        """
        for task in self._background:
            if task.done():
                raise RuntimeError(f"background task {task.get_name()} ended: {task}")

    def report(self) -> ReplicaReport:
        """Return this replica's totals as the message the monitor takes."""
        snapshot = self._variants.snapshot
        return ReplicaReport(
            replica=self.name,
            time_s=time.time(),
            started_at_s=self._started_at_s,
            plan=snapshot.plan.number if snapshot else 0,
            versions=self._variants.versions,
            engines=self._variants.engines,
            responses=dict(self._counters.responses),
            queue_depth=len(self._ingress.batcher),
            load_failures=self._variants.load_failures,
            endpoint=self._endpoint,
            breakers=self._ingress.decider.open_breakers(),
            registry_error=self._variants.registry_error,
            keys_error=self._keys.error,
            shadows=self._shadowing.counts(),
            log=self._decisions.status(),
        )

    def _make_intakes(self, registry: Registry, decision_ids: DecisionIds, settings: ServingConfig) -> "_Intakes":
        return _Intakes(
            FeedbackIntake(decision_ids=decision_ids, log=self._feedback, config=settings),
            OverrideIntake(decision_ids=decision_ids, log=self._overrides, max_body_bytes=settings.max_body_bytes),
            LocalDecisions(
                self._policy,
                decision_ids=decision_ids,
                variants=self._variants,
                registry=registry,
                log=self._decisions,
                config=settings,
            ),
        )

    def _make_api(self, settings: ServingConfig) -> HttpApi:
        protocol = OpenInference(self._policy, self._ingress, version=version("trimtab"), max_body_bytes=settings.max_body_bytes)
        return HttpApi(
            self._policy,
            ingress=self._ingress,
            feedback=self._intakes.feedback,
            status=StatusView(self._policy, self._variants, self._monitor.status, self.report),
            variants=self._variants,
            keys=self._keys,
            counters=self._counters,
            files=read_static_files(),
            overrides=self._intakes.overrides,
            local=self._intakes.local,
            metrics=ReplicaMetrics(self._reading),
            open_inference=protocol,
            own_endpoint=lambda: self._endpoint,
            start=self._start,
            stop=self._stop,
        )

    def _reading(self) -> Reading:
        return Reading(
            policy=self._policy,
            build=version("trimtab"),
            report=self.report(),
            totals=self._ingress.tally.totals(),
            num_batches=self._ingress.batcher.num_batches,
            num_connections=len(self._direct.connections),
            breakers=self._ingress.decider.breakers,
            logs={
                "decisions": self._decisions.writer,
                "feedback": self._feedback.writer,
                "overrides": self._overrides.writer,
                "shadows": self._shadows,
            },
            num_feedbacks=self._intakes.feedback.num_accepted,
            num_overrides=self._intakes.overrides.num_accepted,
            num_local_decisions=self._intakes.local.num_accepted,
        )

    async def _start(self) -> None:
        if self._host is not None:
            port = await self._direct.start(self._host)
            everywhere = self._host == "0.0.0.0"
            self._endpoint = f"http://{ray.util.get_node_ip_address() if everywhere else self._host}:{port}"
        self._direct.start_sweeping()
        self._background = [
            asyncio.create_task(self._variants.follow(), name="follow_registry"),
            asyncio.create_task(self._keys.follow(), name="follow_keys"),
            asyncio.create_task(self._recall.follow(), name="follow_others"),
            asyncio.create_task(self._retry_log(), name="retry_log"),
            asyncio.create_task(report_for_ever(self._monitor, self.report), name="report_to_monitor"),
        ]

    async def _retry_log(self) -> None:
        """Write down what a failing disk did not take, as soon as it does, also while nobody asks for anything."""
        while True:
            await asyncio.sleep(1.0)
            self._decisions.retry()

    async def _stop(self) -> None:
        self._ingress.repetitions.stop()
        await self._direct.stop()
        self._endpoint = None
        for task in self._background:
            task.cancel()
        self._background = []
        await self._decisions.close()
        await self._feedback.close()
        await self._overrides.close()
        self._shadows.close()


class _Intakes(NamedTuple):
    """They take what is reported later, or was decided elsewhere."""

    feedback: FeedbackIntake
    overrides: OverrideIntake
    local: LocalDecisions


def _decision_log(writer: SegmentWriter, settings: ServingConfig) -> DecisionLog:
    commit = GroupCommit(writer, timeout_s=settings.log_timeout_s) if settings.durability == "fsync" else None
    return DecisionLog(writer, on_failure=settings.on_log_failure, timeout_s=settings.log_timeout_s, commit=commit)


def _variants(storage: Storage, policy: str, settings: ServingConfig) -> VariantStore:
    trust = TrustStore(storage.trust) if settings.require_signature else None
    return VariantStore(Registry(storage.registry(policy), trust=trust), engine=settings.engine)
