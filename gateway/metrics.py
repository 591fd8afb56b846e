"""What /metrics shows: this gateway's own measurements and every replica's last report, as Prometheus text.

Counted on the event loop only, hence without the locks of the client library's own types: an observation is a bisect
and two additions. Labels are models, replicas, routes and statuses, never anything a caller can invent.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from replicas.protocol import EngineStats, Usage

if TYPE_CHECKING:
    from gateway.connection import Connection

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

# How the names of those begin that several gateways know alike: the largest is the newest, and nothing is added up.
NEWEST_ONLY = "signalbox_policy_"

STAGES = ("auth", "read", "parse", "select", "tokenise", "first_chunk")

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_STAGE_SECONDS = (0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1, 1.0)

_GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_requests_running": ("Requests in the engine's batch.", lambda s: s.num_requests_running),
    "num_requests_waiting": ("Requests in the engine's queue.", lambda s: s.num_requests_waiting),
    "num_queued_tokens": ("Prompt tokens accepted and not yet computed.", lambda s: s.queued_tokens),
    "kv_cache_usage_perc": (
        "Share of KV blocks in use, 0 to 1.",
        lambda s: 1 - s.kv_blocks_free / s.kv_blocks_total if s.kv_blocks_total else 0.0,
    ),
    "host_cache_usage_perc": (
        "Share of the host-memory tier in use, 0 to 1.",
        lambda s: s.host_cache_blocks_used / s.host_cache_blocks_total if s.host_cache_blocks_total else 0.0,
    ),
}
_COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "prompt_tokens": ("Prompt tokens processed.", lambda s: s.prompt_tokens),
    "generation_tokens": ("Tokens generated.", lambda s: s.generation_tokens),
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", lambda s: s.prefix_cache_queries),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", lambda s: s.prefix_cache_hits),
    "host_cache_hits": ("Prompt tokens fetched from host memory, of prefix_cache_hits.", lambda s: s.host_cache_hits),
    "host_cache_offloaded_blocks": ("KV blocks copied to host memory.", lambda s: s.host_cache_offloaded_blocks),
    "host_cache_fetched_blocks": ("KV blocks copied back from host memory.", lambda s: s.host_cache_fetched_blocks),
    "host_cache_offloaded_bytes": (
        "Bytes copied to host memory.",
        lambda s: s.host_cache_offloaded_blocks * s.host_cache_block_bytes,
    ),
    "host_cache_fetched_bytes": (
        "Bytes copied back from host memory.",
        lambda s: s.host_cache_fetched_blocks * s.host_cache_block_bytes,
    ),
    "num_preemptions": ("Requests preempted by the engine.", lambda s: s.num_preemptions),
    "engine_steps": ("Engine steps.", lambda s: s.steps),
    "spec_decode_num_drafts": ("Speculative proposals that were verified.", lambda s: s.spec_decode_num_drafts),
    "spec_decode_num_draft_tokens": ("Speculative tokens verified.", lambda s: s.spec_decode_num_draft_tokens),
    "spec_decode_num_accepted_tokens": ("Speculative tokens accepted.", lambda s: s.spec_decode_num_accepted_tokens),
}


class Histogram:
    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by upper bound, and the sum of all values: what the text format wants."""
        running = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            running += count
            buckets.append((bound, running))
        return buckets, self._sum


class ModelMetrics:
    """One model's histograms, in seconds, and what passed through. A gap is observed between chunks of one request."""

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(_SECONDS)
        self.inter_token_latency = Histogram(_SECONDS)
        self.e2e_request_latency = Histogram(_SECONDS)
        self.in_flight = 0
        self.usage = Counter[str]()
        self.hedged = Counter[str]()

    def settled(self, usage: Usage) -> None:
        self.usage["prompt"] += usage.prompt_tokens
        self.usage["cached"] += usage.cached_tokens
        self.usage["completion"] += usage.completion_tokens


class Metrics(Collector):
    def __init__(self, models: Iterable[str]) -> None:
        self.models = {model: ModelMetrics() for model in models}
        self.stages = {stage: Histogram(_STAGE_SECONDS) for stage in STAGES}
        self._requests = Counter[tuple[str, str, str]]()
        self._durations: dict[str, Histogram] = {}
        self._connections: Callable[[], Iterable[Connection]] = tuple
        self._gauges: Callable[[], Iterable[Family]] = tuple
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def follow(self, connections: Callable[[], Iterable[Connection]], gauges: Callable[[], Iterable[Family]]) -> None:
        """Whose reports to show, and what else to ask for at every scrape."""
        self._connections = connections
        self._gauges = gauges

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        self._requests[route, method, str(status)] += 1
        durations = self._durations.get(route)
        if durations is None:
            durations = self._durations[route] = Histogram(_SECONDS)
        durations.observe(seconds)

    def families(self) -> list[Metric]:
        """All of them now, this process's own vital signs included."""
        return list(self._registry.collect())

    def collect(self) -> Iterator[Family]:
        yield from self._gateway()
        yield from self._latencies()
        yield from self._engines()
        yield from self._gauges()

    def _gateway(self) -> Iterator[Family]:
        requests = CounterMetricFamily(
            "signalbox_http_requests", "Answers by route and status.", labels=["route", "method", "status"]
        )
        for labels, count in self._requests.items():
            requests.add_metric(labels, count)
        yield requests
        yield _histograms("http_request_duration_seconds", "Until the answer's last byte.", "route", self._durations)
        yield _histograms("gateway_stage_seconds", "Where a generation's time goes.", "stage", self.stages)
        in_flight = GaugeMetricFamily(
            "signalbox_gateway_requests_in_flight", "Generations in progress here.", labels=["model_name"]
        )
        tokens = CounterMetricFamily(
            "signalbox_gateway_tokens", "Tokens of finished generations by kind.", labels=["model_name", "kind"]
        )
        for name, model in self.models.items():
            in_flight.add_metric([name], model.in_flight)
            for kind in ("prompt", "cached", "completion"):
                tokens.add_metric([name, kind], model.usage[kind])
        yield in_flight
        yield tokens
        yield self._hedged()

    def _hedged(self) -> CounterMetricFamily:
        family = CounterMetricFamily(
            "signalbox_hedged_requests", "Requests asked twice, by who answered.", labels=["model_name", "answered"]
        )
        for name, model in self.models.items():
            for who in ("first", "second"):
                family.add_metric([name, who], model.hedged[who])
        return family

    def _latencies(self) -> Iterator[Family]:
        models = self.models.items()
        first = {name: model.time_to_first_token for name, model in models}
        between = {name: model.inter_token_latency for name, model in models}
        whole = {name: model.e2e_request_latency for name, model in models}
        yield _histograms("time_to_first_token_seconds", "From arrival to the first chunk.", "model_name", first)
        yield _histograms("inter_token_latency_seconds", "Between chunks of a generation.", "model_name", between)
        yield _histograms("e2e_request_latency_seconds", "From arrival to the last chunk.", "model_name", whole)

    def _engines(self) -> Iterator[Family]:
        # keyed, because an old incarnation that still finishes its work shares its name with the new one
        reports = {(c.address.model, c.address.replica_id): c.status.stats for c in self._connections() if c.status}
        for name, (help_text, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"signalbox_{name}", help_text, labels=["model_name", "replica"])
            for labels, stats in reports.items():
                gauge.add_metric(labels, value(stats))
            yield gauge
        for name, (help_text, value) in _COUNTERS.items():
            counter = CounterMetricFamily(f"signalbox_{name}", help_text, labels=["model_name", "replica"])
            for labels, stats in reports.items():
                counter.add_metric(labels, value(stats))
            yield counter
        by_position = CounterMetricFamily(
            "signalbox_spec_decode_num_accepted_tokens_per_pos",
            "Speculative tokens accepted, by their place in the proposal.",
            labels=["model_name", "replica", "position"],
        )
        for labels, stats in reports.items():
            for position, accepted in enumerate(stats.spec_decode_num_accepted_tokens_per_pos):
                by_position.add_metric((*labels, str(position)), accepted)
        yield by_position


def _histograms(name: str, help_text: str, label: str, histograms: dict[str, Histogram]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(f"signalbox_{name}", help_text, labels=[label])
    for value, histogram in histograms.items():
        buckets, total = histogram.buckets()
        family.add_metric([value], buckets=buckets, sum_value=total)
    return family
