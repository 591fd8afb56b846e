"""POST /v1/chat/completions and /v1/completions: from an ASGI scope to tokens and back.

    authenticate → read and parse once → choose a model → tokenise → dispatch → first chunk → status line → the rest

Raw ASGI, because these two carry the load. Nothing is answered before the first chunk is there, so every failure up to
then has its own status; a later one is an `error` event, after which the connection is cut without [DONE].
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.types import Receive, Scope, Send

from gateway import passing, requests
from gateway.answering import Answering, Asked, Kind, Opened, Prompts, Request, check_limits
from gateway.config import GatewayConfig
from gateway.deadline import HEADER_NAME as TIMEOUT_HEADER
from gateway.deadline import deadline, on_time
from gateway.edge import EXCHANGE, ClientGone, Exchange, HangUp, header, headers, read_body, trace_headers
from gateway.errors import INTERNAL, error_body, http_error
from gateway.explain import Record, RecordBook
from gateway.jobs import Job
from gateway.keys import ApiKey, KeyRing
from gateway.logs import redacted
from gateway.metrics import Metrics
from gateway.models import Model
from gateway.passing import PassedAnswer, PassedWriter
from gateway.policy_follower import PolicyFollower
from gateway.requests import ChatRequest, CompletionRequest
from gateway.responses import DONE, ChatShape, Collected, CompletionShape, Envelope, EventWriter
from gateway.rules import Rules, rules_for
from gateway.shadow import Shadows
from gateway.telemetry import Laps
from gateway.traffic import TrafficRecorder
from policies import limits
from policies.priority import check_tier
from policies.selection import ModelGroup
from replicas.protocol import InvalidRequest, NotSupported, RequestError, SignalboxError, Usage

if TYPE_CHECKING:
    from gateway.tracing import Tracing

logger = logging.getLogger(__name__)

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_CLIENT_GONE = 499


async def _encode_chat(request: ChatRequest, model: Model, tenant: str) -> Prompts:
    return [await model.encode_chat(request.template_messages(), tenant)]


async def _encode_completion(request: CompletionRequest, model: Model, tenant: str) -> Prompts:
    return await model.encode_prompts(request.prompts())


CHAT = Kind(ChatRequest, ChatShape(), "chatcmpl", "messages", "chat", _encode_chat)
COMPLETION = Kind(CompletionRequest, CompletionShape(), "cmpl", "prompt", "text_completion", _encode_completion)


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What both endpoints share."""

    config: GatewayConfig
    keys: KeyRing
    policies: PolicyFollower[Rules]
    answering: Answering
    shadows: Shadows
    metrics: Metrics
    book: RecordBook
    traffic: TrafficRecorder | None = None
    tracing: Tracing | None = None


class Generate:
    """One of the two endpoints as an ASGI application."""

    def __init__(self, kind: Kind, services: Services) -> None:
        self._kind = kind
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        services = self._services
        laps = Laps(services.metrics.stages)
        exchange: Exchange = scope[EXCHANGE]
        if services.tracing is not None:
            exchange.trace = services.tracing.begin(scope["headers"], self._kind.operation, exchange.started)
            laps.marks = exchange.trace.marks
        key = await services.keys.authenticate(header(scope, b"authorization"))
        laps.lap("auth")
        rules = await rules_for(services.policies, key.id)
        exchange.record = record = self._record(exchange, key, rules.generation)
        services.book.add(record)
        try:
            until = deadline(headers(scope, TIMEOUT_HEADER), rules.document.admission, exchange.started)
            if until is not None:
                record.time_limit_s = until - asyncio.get_running_loop().time()
            bounds = services.config.limits
            body = await read_body(scope, receive, bounds.max_body_bytes, bounds.body_timeout_s)
            laps.lap("read")
            request, unsupported = self._parse(body, rules)
            record.asked, record.stream = request.model, bool(request.stream)
            check_limits(services.config, self._kind, request)
            asked = Asked(
                kind=self._kind,
                request=request,
                body=body,
                unsupported=unsupported,
                key=key,
                first_try=header(scope, b"x-stainless-retry-count") == b"0",
                rules=rules,
                record=record,
                laps=laps,
                until=until,
                trace=exchange.trace,
                caller_trace=trace_headers(scope) if services.config.upstreams else (None, None),
            )
            async with HangUp(receive) as hang_up:
                await self._answer(asked, exchange, hang_up, send)
            record.status = exchange.status
        except SignalboxError as error:
            record.status, record.error = http_error(error).status, error.message
            record.failure = type(error).__name__
            raise
        except (ClientGone, asyncio.CancelledError):
            record.status = _CLIENT_GONE
            raise
        except Exception:
            record.status = 500
            raise
        finally:
            record.ended_s = time.perf_counter() - laps.began
            services.book.add(record)
            if services.traffic is not None:
                services.traffic.add(record, key.tenant)

    def _parse(self, body: bytes, rules: Rules) -> tuple[Request, RequestError | None]:
        """The request, and why no local engine can do it where it is one that an upstream may be able to do."""
        try:
            request = requests.parse(self._kind.request, body)
            if request.service_tier is not None:
                check_tier(request.service_tier, rules.document.priorities)
            return request, None
        except (InvalidRequest, NotSupported) as error:
            if not self._services.config.upstreams:
                raise
            try:
                passed = passing.read(body, self._kind.param)
            except InvalidRequest:
                raise error from None
            if not self._upstreams_of(passed.model, rules):
                raise
            return passed, error

    def _upstreams_of(self, name: str, rules: Rules) -> bool:
        """Whether an upstream is among the models that the name stands for."""
        target = rules.resolve(name)
        group = isinstance(target, ModelGroup)
        members = [one.name for one in target.models] if isinstance(target, ModelGroup) else [target.name]
        members += [] if group else rules.fallbacks(target.name)
        return any(upstream.name in members for upstream in self._services.config.upstreams)

    def _record(self, exchange: Exchange, key: ApiKey, generation: int) -> Record:
        return Record(
            request_id=exchange.request_id.decode(),
            gateway=self._services.config.gateway_id,
            key_id=key.id,
            key_name=key.name,
            endpoint=exchange.route,
            generation=generation,
        )

    async def _answer(self, asked: Asked, exchange: Exchange, hang_up: HangUp, send: Send) -> None:
        services = self._services
        opening = services.answering.open(asked, services.shadows.safety_scale)
        opened = await (opening if asked.until is None else on_time(opening, asked.until))
        async with aclosing(opened.stream):
            exchange.headers += _limit_headers(_counted(asked, opened))
            if asked.record.downgraded_from is not None:
                exchange.headers.append((b"x-signalbox-downgraded-from", asked.record.downgraded_from.encode()))
            await services.answering.remember(asked, opened)
            opened.metrics.in_flight += 1
            try:
                envelope = Envelope(
                    id=opened.id,
                    created=int(time.time()),
                    model=opened.model.name,
                    fingerprint=opened.model.fingerprint,
                )
                send_it = self._stream if asked.request.stream else self._whole
                exchange.failure = await send_it(asked, opened, envelope, hang_up, send)
            finally:
                opened.metrics.in_flight -= 1
            opened.metrics.e2e_request_latency.observe(time.perf_counter() - asked.laps.began)

    async def _whole(self, asked: Asked, opened: Opened, envelope: Envelope, hang_up: HangUp, send: Send) -> str:
        collected: Any = (
            PassedAnswer(opened.choices, chat=self._kind.shape.opens_with_role)
            if opened.passed
            else Collected(opened.choices, logprobs=asked.request.logprobs_wanted is not None)
        )
        usages: list[Usage] = []
        chunks = opened.first
        while True:
            collected.add(chunks)
            usages += [chunk.usage for chunk in chunks if chunk.usage is not None]
            more = None if len(usages) == opened.prompts else await anext(opened.stream, None)
            if more is None:
                break
            chunks = more
        body: bytes = collected.body(envelope, self._kind.shape, opened.settle(usages))
        hang_up.ignore()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        self._services.shadows.consider(asked, opened, collected.text(0))
        return ""

    async def _stream(self, asked: Asked, opened: Opened, envelope: Envelope, hang_up: HangUp, send: Send) -> str:
        """The name of what cut the answer off, "" where it is complete."""
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        try:
            await self._events(asked, opened, envelope, hang_up, send)
        except SignalboxError as error:
            asked.record.error = opened.step.error = error.message
            await _send_error(error, send)
            return type(error).__name__
        except Exception as error:
            logger.error("stream %s failed", envelope.id, exc_info=redacted(error))
            asked.record.error = INTERNAL.message
            await _send_error(INTERNAL, send)
            return type(error).__name__
        return ""

    def _writer(self, request: Request, opened: Opened, envelope: Envelope) -> Any:
        shape, usage = self._kind.shape, request.include_usage
        if opened.passed:
            return PassedWriter(envelope, shape, opened.choices, usage=usage)
        return EventWriter(envelope, shape, opened.choices, logprobs=request.logprobs_wanted is not None, usage=usage)

    async def _events(self, asked: Asked, opened: Opened, envelope: Envelope, hang_up: HangUp, send: Send) -> None:
        """Everything that has arrived goes out in one send, each chunk as its own event, the end with the last one."""
        chunks, gaps = opened.first, opened.metrics.inter_token_latency
        writer = self._writer(asked.request, opened, envelope)
        kept: list[str] | None = [] if self._services.shadows.watches(opened) else None
        text = writer.opening()
        usages: list[Usage] = []
        last = time.perf_counter()
        while True:
            text += writer.events(chunks)
            if kept is not None:
                kept += [chunk.text for chunk in chunks if chunk.index == 0]
            usages += [chunk.usage for chunk in chunks if chunk.usage is not None]
            if len(usages) == opened.prompts:
                break
            if text:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
                text = ""
            more = await anext(opened.stream, None)
            if more is None:
                break
            chunks = more
            last, before = time.perf_counter(), last
            gaps.observe(last - before)
        text += writer.closing(opened.settle(usages))
        hang_up.ignore()
        await send({"type": "http.response.body", "body": text.encode() + DONE})
        if kept is not None:
            self._services.shadows.consider(asked, opened, "".join(kept))


def _counted(asked: Asked, opened: Opened) -> Sequence[Job]:
    """The jobs that the caller's rate limits count: of a hedge those of the attempt that it was made for."""
    if opened.step.role != "hedge":
        return opened.step.jobs
    return asked.record.steps[asked.record.steps.index(opened.step) - 1].jobs


def _limit_headers(jobs: Sequence[Job]) -> list[tuple[bytes, bytes]]:
    standings = [each for job in jobs if job.bill for one in job.bill.reservations for each in one.standings]
    return limits.headers(standings) if standings else []


async def _send_error(error: SignalboxError, send: Send) -> None:
    # More body is announced and never sent: the server cuts the connection, so no client can take this for the end.
    await send({"type": "http.response.body", "body": b"data: " + error_body(error) + b"\n\n", "more_body": True})
