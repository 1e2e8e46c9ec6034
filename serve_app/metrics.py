"""What GET /metrics says: what this replica counts anyway, in Prometheus' text format. docs/operations.md explains each."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple

from prometheus_client import Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from policies.telemetry import LATENCY_BUCKETS_S, ReplicaReport
from serve_app.breaker import Breaker
from serve_app.decision_log import SegmentWriter
from serve_app.tally import Totals

TEXT_FORMAT = b"text/plain; version=0.0.4; charset=utf-8"

_process = ProcessCollector(registry=None)  # type: ignore[arg-type]


class Reading(NamedTuple):
    """What the metrics are made from. `logs` are the replica's writers, `accepted` what it took in, each by what it is."""

    policy: str
    build: str
    report: ReplicaReport
    totals: Totals
    num_batches: int
    num_connections: int
    breakers: Mapping[int, Breaker]
    logs: Mapping[str, SegmentWriter]
    num_feedbacks: int
    num_overrides: int
    num_local_decisions: int


class ReplicaMetrics:
    """Reads when it is asked, and keeps nothing. Every sample says of which policy and replica it is."""

    def __init__(self, read: Callable[[], Reading]) -> None:
        self._read = read

    def text(self) -> bytes:
        """Return the page."""
        return generate_latest(self)  # type: ignore[arg-type]

    def collect(self) -> Iterator[Metric]:
        """Return the metrics; `generate_latest` calls this by name."""
        reading = self._read()
        labels = {"policy": reading.policy, "replica": reading.report.replica}
        for metric in (*_families(reading), *_process.collect()):
            metric.samples = [sample._replace(labels=labels | sample.labels) for sample in metric.samples]
            yield metric


def _families(reading: Reading) -> Iterator[Metric]:
    yield from _of_decisions(reading)
    yield from _of_requests(reading)
    yield from _of_versions(reading)
    yield from _of_logs(reading)
    report = reading.report
    yield _gauge("trimtab_build_info", "Which Trimtab this replica runs; always 1.", [((reading.build,), 1)], ["build"])
    yield _gauge("trimtab_start_time_seconds", "When this replica started, in seconds since 1970.", report.started_at_s)


def _of_decisions(reading: Reading) -> Iterator[Metric]:
    totals, shadows = reading.totals, reading.report.shadows
    yield _counter(
        "trimtab_decisions",
        "Decisions that were answered, by arm, version that answered, and rung of the ladder.",
        [((arm, str(version), rung), number) for (arm, version, rung), number in totals.decisions.items()],
        ["arm", "version", "rung"],
    )
    yield _counter("trimtab_shielded_decisions", "Decisions that the shield changed.", totals.num_shielded)
    yield _counter("trimtab_repaired_decisions", "Decisions for an observation that was repaired.", totals.num_repaired)
    yield _counter("trimtab_batches", "Batches that requests were decided in.", reading.num_batches)
    yield _latency(totals)
    yield _counter("trimtab_shadow_decisions", "Decisions that shadows were asked about.", shadows["answered"])
    yield _counter("trimtab_shadow_left_out", "Decisions that shadows were not asked about.", shadows["left_out"])
    yield _counter("trimtab_shadow_unlogged", "Records of shadows that could not be written.", shadows["not_logged"])


def _of_requests(reading: Reading) -> Iterator[Metric]:
    report = reading.report
    responses = [((str(status),), number) for status, number in report.responses.items()]
    yield _counter("trimtab_responses", "HTTP answers below /v1 and /v2, by status.", responses, ["status"])
    yield _gauge("trimtab_queued_decisions", "Decisions that wait for a batch.", report.queue_depth)
    yield _gauge("trimtab_open_connections", "Connections that are open, on both ports.", reading.num_connections)
    yield _gauge("trimtab_keys_unreadable", "1 while the API keys cannot be read.", report.keys_error is not None)
    yield _counter("trimtab_feedback", "Rewards that were accepted.", reading.num_feedbacks)
    yield _counter("trimtab_overrides", "Overrides that were accepted.", reading.num_overrides)
    yield _counter("trimtab_local_decisions", "Decisions of local clients that were accepted.", reading.num_local_decisions)


def _of_versions(reading: Reading) -> Iterator[Metric]:
    report = reading.report
    yield _gauge("trimtab_plan_number", "Number of the plan that is answered by; 0 for none.", report.plan)
    yield _gauge("trimtab_versions_in_memory", "Versions in memory.", len(report.versions))
    yield _gauge("trimtab_versions_not_loaded", "Versions that are wanted and do not load.", len(report.load_failures))
    yield _gauge("trimtab_registry_unreadable", "1 while the registry cannot be read.", report.registry_error is not None)
    breakers = [((str(version),), breaker) for version, breaker in reading.breakers.items()]
    is_open = [(version, breaker.is_open) for version, breaker in breakers]
    num_opened = [(version, breaker.num_opened) for version, breaker in breakers]
    yield _gauge("trimtab_breaker_open", "1 while a version is not asked.", is_open, ["version"])
    yield _counter("trimtab_breaker_openings", "How often a version was not asked any more.", num_opened, ["version"])


def _of_logs(reading: Reading) -> Iterator[Metric]:
    log = reading.report.log
    yield _gauge("trimtab_log_failing", "1 while decisions cannot be written, or only slowly.", log["state"] == "failing")
    yield _counter("trimtab_log_failures", "Writes and flushes of decisions that failed or were slow.", log["num_failures"])
    yield _counter("trimtab_log_unlogged_decisions", "Decisions answered before they were written.", log["num_unlogged"])
    yield _counter("trimtab_log_dropped_decisions", "Decisions answered and never written.", log["num_dropped"])
    yield _gauge("trimtab_log_buffered_decisions", "Decisions answered and to be written yet.", log["num_buffered"])
    segments = [((name,), writer.num_segments) for name, writer in reading.logs.items()]
    num_bytes = [((name,), writer.num_bytes) for name, writer in reading.logs.items()]
    yield _counter("trimtab_log_segments", "Segments that were begun, by log.", segments, ["log"])
    yield _counter("trimtab_log_written_bytes", "Bytes that were written, by log.", num_bytes, ["log"])


def _latency(totals: Totals) -> Metric:
    edges = (*(str(edge) for edge in LATENCY_BUCKETS_S), "+Inf")
    buckets = list(zip(edges, accumulate(totals.num_in_bucket)))
    return HistogramMetricFamily(
        "trimtab_decision_duration_seconds",
        "From a request's receipt until its answer was handed over; requests with a new decision only.",
        buckets=buckets,
        sum_value=totals.sum_s,
    )


Samples = float | Iterable[tuple[tuple[str, ...], float]]


def _counter(name: str, help_text: str, samples: Samples, labels: Iterable[str] = ()) -> Metric:
    return _filled(CounterMetricFamily(name, help_text, labels=labels), samples)


def _gauge(name: str, help_text: str, samples: Samples, labels: Iterable[str] = ()) -> Metric:
    return _filled(GaugeMetricFamily(name, help_text, labels=labels), samples)


def _filled(family: CounterMetricFamily | GaugeMetricFamily, samples: Samples) -> Metric:
    for values, number in [((), samples)] if isinstance(samples, (int, float)) else samples:
        family.add_metric(values, number)
    return family
