"""POST /v1/chat/completions and /v1/completions: from an ASGI scope to tokens and back.

    authenticate → read and parse once → find the model → tokenise → dispatch → first chunk → status line → the rest

Raw ASGI, because these two carry the load. Nothing is answered before the first chunk is there, so every failure up to
then has its own status; a later one is an `error` event, after which the connection is cut without [DONE].
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send

from gateway import dispatch, requests
from gateway.config import GatewayConfig
from gateway.dispatch import Job
from gateway.edge import HangUp, header, read_body
from gateway.errors import INTERNAL, error_body
from gateway.fleet import Fleet
from gateway.keys import KeyRing
from gateway.metrics import Histogram, Metrics, ModelMetrics
from gateway.models import Model, item_path
from gateway.requests import ChatRequest, CompletionRequest
from gateway.responses import (
    DONE,
    ChatShape,
    Collected,
    CompletionShape,
    Envelope,
    EventWriter,
    Shape,
    total,
)
from gateway.routes import route_request
from replicas.protocol import Chunk, EngineFault, GenerateRequest, InvalidRequest, SignalboxError, Usage

logger = logging.getLogger(__name__)

Request = ChatRequest | CompletionRequest
Prompts = list[tuple[int, ...]]
# Tokenises: (request, model, tenant) -> one tuple of token ids per prompt.
Encode = Callable[[Any, Model, str], Awaitable[Prompts]]

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True, slots=True)
class Kind:
    """What distinguishes one endpoint from the other. `param` names the field that holds the prompt."""

    request: type[Any]
    shape: Shape
    id_prefix: str
    param: str
    encode: Encode


async def _encode_chat(request: ChatRequest, model: Model, tenant: str) -> Prompts:
    return [await model.encode_chat(request.template_messages(), tenant)]


async def _encode_completion(request: CompletionRequest, model: Model, tenant: str) -> Prompts:
    return await model.encode_prompts(request.prompts())


CHAT = Kind(ChatRequest, ChatShape(), "chatcmpl", "messages", _encode_chat)
COMPLETION = Kind(CompletionRequest, CompletionShape(), "cmpl", "prompt", _encode_completion)


class _Laps:
    """Splits the time since arrival over the stages of a request."""

    def __init__(self, stages: dict[str, Histogram]) -> None:
        self._stages = stages
        self.began = self._last = time.perf_counter()

    def lap(self, stage: str) -> float:
        now = time.perf_counter()
        self._stages[stage].observe(now - self._last)
        self._last = now
        return now


@dataclass(slots=True)
class _Answer:
    """One accepted request on its way: the stream of its chunks and what is needed to write and to count them."""

    request: Request
    envelope: Envelope
    stream: dispatch.Chunks
    prompts: int
    laps: _Laps
    metrics: ModelMetrics

    @property
    def choices(self) -> int:
        return self.prompts * self.request.choices

    async def first(self) -> list[Chunk]:
        chunks = await anext(self.stream, None)
        if not chunks:
            raise EngineFault("the replica ended a request without an answer")
        now = self.laps.lap("first_chunk")
        self.metrics.time_to_first_token.observe(now - self.laps.began)
        return chunks

    def settle(self, usages: Sequence[Usage]) -> Usage:
        if len(usages) != self.prompts:
            raise EngineFault("the replica ended a request without its terminal chunk")
        usage = total(usages)
        self.metrics.settled(usage)
        self.metrics.e2e_request_latency.observe(time.perf_counter() - self.laps.began)
        return usage


class Generate:
    """One of the two endpoints as an ASGI application."""

    def __init__(self, kind: Kind, config: GatewayConfig, keys: KeyRing, fleet: Fleet, metrics: Metrics) -> None:
        self._kind = kind
        self._config = config
        self._keys = keys
        self._fleet = fleet
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        laps = _Laps(self._metrics.stages)
        limits = self._config.limits
        key = await self._keys.authenticate(header(scope, b"authorization"))
        laps.lap("auth")
        body = await read_body(scope, receive, limits.max_body_bytes, limits.body_timeout_s)
        laps.lap("read")
        request: Request = requests.parse(self._kind.request, body)
        served = self._fleet.served(request.model)
        laps.lap("parse")
        async with HangUp(receive, not self._config.server_cancels) as hang_up:
            model = await self._fleet.model(served, self._config.retries.wait_s)
            jobs = await self._plan(request, model, key.tenant)
            laps.lap("tokenise")
            metrics = self._metrics.models[model.name]
            envelope = Envelope(
                id=jobs[0].request.request_id.partition("/")[0],
                created=int(time.time()),
                model=model.name,
                fingerprint=model.fingerprint,
            )
            metrics.in_flight += 1
            try:
                async with aclosing(self._dispatch(jobs)) as stream:
                    answer = _Answer(request, envelope, stream, len(jobs), laps, metrics)
                    await (self._stream if request.stream else self._whole)(answer, hang_up, send)
            finally:
                metrics.in_flight -= 1

    async def _plan(self, request: Request, model: Model, tenant: str) -> list[Job]:
        """One job per prompt; everything the caller may have got wrong is found here at the latest."""
        kind = self._kind
        self._check_limits(request)
        prompts = await kind.encode(request, model, tenant)
        answer_id = f"{kind.id_prefix}-{secrets.token_hex(12)}"
        jobs = []
        for number, ids in enumerate(prompts):
            param = item_path(kind.param, number, len(prompts))
            max_tokens = model.max_tokens(len(ids), request.token_limit, param)
            sampling = request.sampling(max_tokens, request.logprobs_wanted, model.card.vocab_size)
            request_id = answer_id if len(prompts) == 1 else f"{answer_id}/{number}"
            asked = GenerateRequest(request_id=request_id, prompt_token_ids=ids, sampling=sampling, tenant=tenant)
            route = route_request(model.card, tenant, request_id, ids, max_tokens)
            jobs.append(Job(model=model.name, request=asked, route=route))
        return jobs

    def _check_limits(self, request: Request) -> None:
        limits = self._config.limits
        if request.prompt_count * request.choices > limits.max_choices:
            raise InvalidRequest(
                f"{request.prompt_count} prompts x n={request.choices} are more than {limits.max_choices} choices",
                param="n" if request.choices > 1 else self._kind.param,
            )
        if isinstance(request, ChatRequest) and len(request.messages) > limits.max_messages:
            raise InvalidRequest(
                f"messages: {len(request.messages)} are more than {limits.max_messages}", param="messages"
            )

    def _dispatch(self, jobs: list[Job]) -> dispatch.Chunks:
        streams = [dispatch.generate(self._fleet, job, self._config.retries) for job in jobs]
        return streams[0] if len(streams) == 1 else dispatch.merged(streams, jobs[0].request.sampling.n)

    async def _whole(self, answer: _Answer, hang_up: HangUp, send: Send) -> None:
        collected = Collected(answer.choices)
        usages: list[Usage] = []
        chunks = await answer.first()
        while True:
            collected.add(chunks)
            usages += [chunk.usage for chunk in chunks if chunk.usage is not None]
            more = None if len(usages) == answer.prompts else await anext(answer.stream, None)
            if more is None:
                break
            chunks = more
        logprobs = answer.request.logprobs_wanted is not None
        body = collected.body(answer.envelope, self._kind.shape, answer.settle(usages), logprobs=logprobs)
        hang_up.ignore()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, answer: _Answer, hang_up: HangUp, send: Send) -> None:
        first = await answer.first()
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        try:
            await self._events(answer, first, hang_up, send)
        except SignalboxError as error:
            await _send_error(error, send)
        except Exception:
            logger.exception("stream %s failed", answer.envelope.id)
            await _send_error(INTERNAL, send)

    async def _events(self, answer: _Answer, chunks: list[Chunk], hang_up: HangUp, send: Send) -> None:
        """Everything that has arrived goes out in one send, each chunk as its own event, the end with the last one."""
        request, gaps = answer.request, answer.metrics.inter_token_latency
        with_usage = bool(request.stream_options and request.stream_options.include_usage)
        with_logprobs = request.logprobs_wanted is not None
        writer = EventWriter(
            answer.envelope, self._kind.shape, answer.choices, logprobs=with_logprobs, usage=with_usage
        )
        text = writer.opening()
        usages: list[Usage] = []
        last = time.perf_counter()
        while True:
            text += writer.events(chunks)
            if (usage := chunks[-1].usage) is not None:  # the terminal chunk of a prompt is always the last of its list
                usages.append(usage)
                if len(usages) == answer.prompts:
                    break
            if text:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
                text = ""
            more = await anext(answer.stream, None)
            if more is None:
                break
            chunks = more
            last, before = time.perf_counter(), last
            gaps.observe(last - before)
        text += writer.closing(answer.settle(usages))
        hang_up.ignore()
        await send({"type": "http.response.body", "body": text.encode() + DONE})


async def _send_error(error: SignalboxError, send: Send) -> None:
    # More body is announced and never sent: the server cuts the connection, so no client can take this for the end.
    await send({"type": "http.response.body", "body": b"data: " + error_body(error) + b"\n\n", "more_body": True})
