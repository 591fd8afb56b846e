"""OpenTelemetry traces: one per generation, from the caller's traceparent to the engine's queue, prefill and decode.

    chat auto                    SERVER    the whole exchange; parent: the caller's span, if it sent one
    ├── gateway                  INTERNAL  from arrival to the first replica, an event per stage
    ├── chat small               CLIENT    one per attempt: retries, fallbacks, a cascade's steps, shadows
    │   ├── queue                INTERNAL  handed over → first scheduled
    │   ├── prefill              INTERNAL  first scheduled → first token
    │   └── decode               INTERNAL  first token → last token
    └── …

Names are OpenTelemetry's for generative AI, ours begin with `signalbox.`. Replicas know nothing of all this: they tell
how long each phase took (`protocol.Timing`), and the phases are laid on this machine's clock, backwards from the first
token's arrival, so that clocks need not agree. Never a word of a prompt or an answer.

Imported only where tracing is configured (`wanted`), by the SDK's own environment variables.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from gateway.telemetry import failure_name, shown_model
from replicas.protocol import Chunk, ConfigError, GenerateRequest, SamplingParams, SignalboxError, Timing, Usage
from replicas.upstream_messages import UpstreamChunk

if TYPE_CHECKING:
    from gateway.edge import Exchange
    from gateway.explain import Record, Step
    from gateway.jobs import Job
    from gateway.telemetry import Mark

# Spans that wait when the gateway stops have so long to reach the collector.
_FLUSH_S = 5.0
_PROTOCOL = "http/protobuf"
_CLIENT_GONE = 499
_OUR_PROVIDER, _OPENAI = "signalbox", "openai"
_propagator = TraceContextTextMapPropagator()


def from_environment(environ: Mapping[str, str], gateway_id: str) -> Tracing:
    """Tracing as the OTEL_ variables say; the SDK itself reads those of sampler, batches, limits and exporter.

    ConfigError where they ask for what is not here.
    """
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if (protocol or _PROTOCOL) != _PROTOCOL:
        raise ConfigError(f"OTLP is spoken as {_PROTOCOL} only, and OTEL_EXPORTER_OTLP_PROTOCOL says {protocol!r}")
    if (exporter := environ.get("OTEL_TRACES_EXPORTER", "otlp")) != "otlp":
        raise ConfigError(f"OTEL_TRACES_EXPORTER must be 'otlp' or 'none', not {exporter!r}")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return Tracing(OTLPSpanExporter(), gateway_id, name=environ.get("OTEL_SERVICE_NAME") or "signalbox")


class Tracing:
    """Where this gateway's spans go. `exporter` is called from a thread of its own, a batch at a time."""

    def __init__(self, exporter: SpanExporter, gateway_id: str, *, name: str = "signalbox") -> None:
        known = {"service.name": name, "service.version": version("signalbox"), "service.instance.id": gateway_id}
        self._exporter = exporter
        self._provider = TracerProvider(resource=Resource.create(known), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("signalbox.gateway", version("signalbox"))

    def begin(self, headers: Sequence[tuple[bytes, bytes]], operation: str, started: float) -> Trace:
        """A request came (`started` is perf_counter's). Whether it is recorded is the sampler's to say."""
        carrier: dict[str, str] = {}
        for key, value in headers:
            if key == b"traceparent":
                carrier.setdefault("traceparent", value.decode("latin-1"))
            elif key == b"tracestate":  # may come in several lines, which then belong together
                known = carrier.get("tracestate")
                carrier["tracestate"] = (
                    value.decode("latin-1") if known is None else f"{known},{value.decode('latin-1')}"
                )
        parent = _propagator.extract(carrier, Context()) if "traceparent" in carrier else Context()
        return Trace(self._tracer, parent, operation, started)

    async def aclose(self) -> None:
        """Send what waits, for as long as _FLUSH_S; what a dead collector has not taken by then is lost."""
        loop = asyncio.get_running_loop()
        flushed = asyncio.Event()

        def flush() -> None:
            self._provider.shutdown()
            loop.call_soon_threadsafe(flushed.set)

        threading.Thread(target=flush, name="trace-flush", daemon=True).start()
        try:
            async with asyncio.timeout(_FLUSH_S):
                await flushed.wait()
        except TimeoutError:
            self._exporter.shutdown()  # ends its waiting between tries
            await flushed.wait()


class Trace:
    """One request's spans. Where not `recorded` nobody sees them, but upstreams are told the trace id all the same."""

    __slots__ = ("_first_ns", "_offset_ns", "_started", "_tracer", "context", "marks", "operation", "recorded", "root")

    def __init__(self, tracer: Tracer, parent: Context, operation: str, started: float) -> None:
        self._tracer = tracer
        self._started = started
        self._offset_ns = time.time_ns() - round(time.perf_counter() * 1e9)
        self._first_ns: int | None = None
        self.operation = operation
        self.root = tracer.start_span(operation, parent, SpanKind.SERVER, start_time=self.at(started))
        self.recorded = self.root.is_recording()
        self.context = set_span_in_context(self.root, parent)
        self.marks: list[Mark] | None = [] if self.recorded else None

    @property
    def trace_id(self) -> str:
        return f"{self.root.get_span_context().trace_id:032x}"

    def at(self, seconds: float) -> int:
        """An instant of perf_counter's in Unix nanoseconds."""
        return self._offset_ns + round(seconds * 1e9)

    def carried(self, span: AttemptSpan | None) -> tuple[str | None, str | None]:
        """traceparent and tracestate for whoever answers that attempt."""
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, self.context if span is None else span.context)
        return carrier.get("traceparent"), carrier.get("tracestate")

    def attempt(self, job: Job, address: str) -> AttemptSpan | None:
        """The latest of the job's attempts began, at `address` (host:port, "" unknown)."""
        if not self.recorded:
            return None
        span = AttemptSpan(self._tracer, self, job, address)
        if self._first_ns is None:
            self._first_ns = span.began_ns
        return span

    def end(self, exchange: Exchange, method: str) -> None:
        """The exchange is over."""
        if not self.recorded:
            return
        span, ended, record = self.root, self.at(time.perf_counter()), exchange.record
        span.set_attributes(
            {
                "gen_ai.operation.name": self.operation,
                "gen_ai.provider.name": _OUR_PROVIDER,
                "http.request.method": method,
                "http.route": exchange.route,
                "http.response.status_code": exchange.status,
                "signalbox.request_id": exchange.request_id.decode(),
            }
        )
        known = {} if record is None else _of_record(record)
        span.set_attributes(known)
        if record is not None and record.steps:  # else the name may be anything that a caller made up
            span.update_name(f"{self.operation} {record.asked}")
        if exchange.failure:
            span.set_attribute("error.type", exchange.failure)
            if exchange.status >= _CLIENT_GONE or exchange.status < 400:  # a caller's mistake is no error of a server's
                span.set_status(Status(StatusCode.ERROR))
        self._gateway_span(self._first_ns or ended, known)
        span.end(ended)

    def _gateway_span(self, ended: int, known: Mapping[str, Any]) -> None:
        began = self.at(self._started)
        span = self._tracer.start_span("gateway", self.context, SpanKind.INTERNAL, start_time=began)
        for stage, at in self.marks or ():
            if (instant := self.at(at)) <= ended:
                span.add_event(stage, timestamp=instant)
        names = ("gen_ai.request.model", "signalbox.generation", "signalbox.group", "signalbox.downgraded_from")
        span.set_attributes({"gen_ai.operation.name": self.operation} | {n: known[n] for n in names if n in known})
        span.end(max(ended, began))


class AttemptSpan:
    """One attempt at one prompt, by a replica or an upstream."""

    __slots__ = (
        "_complete",
        "_first_at",
        "_job",
        "_reasons",
        "_span",
        "_timing",
        "_trace",
        "_tracer",
        "began_ns",
        "context",
        "failure",
    )

    def __init__(self, tracer: Tracer, trace: Trace, job: Job, address: str) -> None:
        self._tracer = tracer
        self._trace = trace
        self._job = job
        self._first_at: float | None = None
        self._timing: Timing | None = None
        self._complete = False
        self.failure: SignalboxError | None = None
        self._reasons: dict[int, str] = {}
        self.began_ns = trace.at(time.perf_counter())
        name = f"{trace.operation} {job.model}"
        self._span = tracer.start_span(
            name, trace.context, SpanKind.CLIENT, self._asked(address), start_time=self.began_ns
        )
        self.context = set_span_in_context(self._span, trace.context)

    def saw(self, chunks: Sequence[Chunk] | Sequence[UpstreamChunk]) -> None:
        """Chunks came."""
        if self._first_at is None:
            self._first_at = time.perf_counter()
        for chunk in chunks:
            if chunk.finish_reason is not None:
                self._reasons[chunk.index] = str(chunk.finish_reason)
            if chunk.usage is not None:
                self._complete = True
            if isinstance(chunk, Chunk) and chunk.timing is not None:
                self._timing = chunk.timing

    def end(self) -> None:
        """The attempt is over. Called while whatever ended it propagates, if it was not a `failure` of ours."""
        ended = self._trace.at(time.perf_counter())
        span, usage, error = self._span, self._job.used, self.failure
        self._job.finish_reasons = tuple(reason for _, reason in sorted(self._reasons.items()))
        span.set_attributes(self._answered(usage))
        if not self._complete:
            failure = error or sys.exception()
            span.set_attribute("error.type", failure_name(failure))
            # our own messages are fit for callers, hence hold no prompt; nobody can say that of another exception's
            span.set_status(Status(StatusCode.ERROR, error.message if error else None))
        if self._first_at is not None:
            self._phases(self._trace.at(self._first_at), ended, usage)
        span.end(ended)

    def _phases(self, first: int, ended: int, usage: Usage | None) -> None:
        timing, tokens, output = self._timing, {}, {}
        if usage is not None:
            tokens = {
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
            }
            output = {"gen_ai.usage.output_tokens": usage.completion_tokens}
        if timing is None:  # upstreams tell nothing of what they did before the first token
            return
        scheduled = max(self.began_ns, first - round(timing.prefill_s * 1e9))
        last = min(ended, first + round(timing.decode_s * 1e9)) if self._complete else ended
        self._phase("queue", self.began_ns, scheduled, timing.queued_s, {})
        self._phase("prefill", scheduled, first, timing.prefill_s, tokens)
        self._phase("decode", first, last, timing.decode_s if self._complete else None, output)

    def _phase(self, name: str, began: int, ended: int, measured_s: float | None, more: Mapping[str, Any]) -> None:
        attributes = {
            "gen_ai.operation.name": self._trace.operation,
            "gen_ai.provider.name": _OUR_PROVIDER,
            "gen_ai.request.model": self._job.model,
            "signalbox.replica": self._job.attempts[-1].decision.replica_id,
            **more,
        }
        if measured_s is not None:
            attributes["signalbox.measured_s"] = measured_s  # on the replica's own clock
        self._tracer.start_span(name, self.context, SpanKind.INTERNAL, attributes, start_time=began).end(ended)

    def _asked(self, address: str) -> dict[str, Any]:
        job, decision = self._job, self._job.attempts[-1].decision
        ours = isinstance(job.request, GenerateRequest)
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": self._trace.operation,
            "gen_ai.provider.name": _OUR_PROVIDER if ours else _OPENAI,
            "gen_ai.request.model": job.model,
            "signalbox.role": job.role,
            "signalbox.replica": decision.replica_id,
            "signalbox.policy": decision.policy,
            "signalbox.generation": job.generation,
            "signalbox.attempt": len(job.attempts),
            **_server(address),
        }
        if decision.predicted_ms is not None:
            attributes["signalbox.predicted_ttft_ms"] = decision.predicted_ms
        if isinstance(job.request, GenerateRequest):
            attributes |= _of_sampling(job.request.sampling)
        else:
            attributes |= _of_body(job.request.body)
        return attributes

    def _answered(self, usage: Usage | None) -> dict[str, Any]:
        job = self._job
        attributes: dict[str, Any] = {"gen_ai.response.id": job.request.request_id, "gen_ai.response.model": job.model}
        if job.finish_reasons:
            attributes["gen_ai.response.finish_reasons"] = job.finish_reasons
        if self._first_at is not None:
            first_s = (self._trace.at(self._first_at) - self.began_ns) / 1e9
            attributes["gen_ai.response.time_to_first_chunk"] = first_s
        return attributes | _of_usage(usage)


def _server(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if not host or not port.isdigit():
        return {"server.address": port} if port else {}
    return {"server.address": host.strip("[]"), "server.port": int(port)}


def _of_usage(usage: Usage | None) -> dict[str, Any]:
    if usage is None:
        return {}
    return {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
    }


def _of_sampling(sampling: SamplingParams) -> dict[str, Any]:
    """Of the stop sequences only that they are texts of the caller's, so they are left out."""
    attributes: dict[str, Any] = {
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
    }
    if sampling.top_k:
        attributes["gen_ai.request.top_k"] = sampling.top_k
    if sampling.seed is not None:
        attributes["gen_ai.request.seed"] = sampling.seed
    if sampling.n != 1:
        attributes["gen_ai.request.choice.count"] = sampling.n
    return attributes


_NUMBERS = {
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "seed": "seed",
    "n": "choice.count",
}


def _of_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers only: the rest of a body that nobody has checked may be anything."""
    return {
        f"gen_ai.request.{ours}": body[name]
        for name, ours in _NUMBERS.items()
        if isinstance(body.get(name), int | float)
    }


def _of_record(record: Record) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "gen_ai.request.model": shown_model(record.asked),
        "gen_ai.request.stream": record.stream,
        "signalbox.generation": record.generation,
        "signalbox.key_id": record.key_id,
    }
    if record.group is not None:
        attributes["signalbox.group"] = record.group
    if record.downgraded_from is not None:
        attributes["signalbox.downgraded_from"] = record.downgraded_from
    return attributes | (_of_step(record.answered) if record.answered is not None else {})


def _of_step(step: Step) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "gen_ai.response.model": step.model,
        "gen_ai.response.id": step.jobs[0].request.request_id.partition("/")[0],
    }
    request = step.jobs[0].request
    attributes |= _of_sampling(request.sampling) if isinstance(request, GenerateRequest) else _of_body(request.body)
    if reasons := [reason for job in step.jobs for reason in job.finish_reasons]:
        attributes["gen_ai.response.finish_reasons"] = reasons
    if step.ttft_s is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = step.ttft_s
    used = [job.used for job in step.jobs if job.used is not None]
    if used:
        attributes |= {
            "gen_ai.usage.input_tokens": sum(usage.prompt_tokens for usage in used),
            "gen_ai.usage.output_tokens": sum(usage.completion_tokens for usage in used),
            "gen_ai.usage.cache_read.input_tokens": sum(usage.cached_tokens for usage in used),
        }
    return attributes
