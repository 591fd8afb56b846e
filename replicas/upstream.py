"""Another server that speaks the OpenAI API, as a replica: requests over pooled HTTP, chunks back, or a clear error.

    conn = await UpstreamConnection.connect(upstream)
    async with aclosing(conn.generate(request)) as chunks:
        async for ready in chunks: ...          # what arrived together, in one list; the last chunk has the usage

The server is always asked to stream, also for callers who want one whole answer: only a stream shows that it is alive,
can be left half-way and tells what had been used by then. Leaving early (`aclose`, a time-out, the deadline) closes the
socket, which is how HTTP/1.1 says cancel.

It is httpx's transport that is used, not its client: a client follows environment variables (proxies, .netrc), keeps
cookies from one caller's answer for the next caller's request, and logs URLs.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial

import httpx

from replicas.protocol import EngineFault, ReplicaAddress, RequestError, SignalboxError, Unavailable
from replicas.upstream_answer import Answer
from replicas.upstream_ask import Mode, body, headers, plainer, trace_headers
from replicas.upstream_clock import Patience
from replicas.upstream_config import Upstream, read_key
from replicas.upstream_errors import Complaint, Refusals, UpstreamBusy, UpstreamLost, UpstreamTimeout, complaint, short
from replicas.upstream_http import Fresh, drain, following, read, utf8
from replicas.upstream_messages import UpstreamChunk, UpstreamRequest, UpstreamUsage
from replicas.upstream_sse import EventReader, EventTooLarge
from replicas.upstream_tokens import Count, counter

log = logging.getLogger(__name__)

Chunks = AsyncGenerator[list[UpstreamChunk], None]
Settle = Callable[[UpstreamUsage], None]

_MAX_ERROR_BYTES = 64 * 1024
# What may follow once every choice has ended, usage and [DONE], is not worth more waiting.
_TAIL_S = 2.0
# For an answer in one piece, which shows no life before it is there; the time that OpenAI's own client allows.
_WHOLE_S = 600.0
# A server may close an idle connection at the moment at which it is used again; then nothing was answered, and the
# request goes out once more. So often at most, before it is given to whatever connection there is.
_STALE_TRIES = 3
_incarnations = itertools.count(1)


class _Wordless(UpstreamLost):
    """A stream that ended as HTTP says it should, and in which nothing was said, not even why."""


@dataclass(frozen=True, slots=True)
class UpstreamCard:
    """What a gateway must know of the model. max_model_len 0: only the upstream knows its limit."""

    model: str
    max_model_len: int
    default_max_tokens: int


class UpstreamConnection:
    """Made by `connect`. Belongs to one event loop. Needs no link to be alive: every request shows anew."""

    status = None

    def __init__(self, upstream: Upstream, key: str | None, count: Count) -> None:
        self.upstream = upstream
        self.count = count
        number = next(_incarnations)
        self.address = ReplicaAddress(
            replica_id=f"upstream-{upstream.name}",
            incarnation=f"{os.getpid()}-{number}",
            model=upstream.name,
            endpoint=upstream.origin,
            events_endpoint="",
        )
        self.card = UpstreamCard(upstream.name, upstream.max_model_len, upstream.default_max_tokens)
        self._refusals = Refusals(upstream, key)
        self._headers = httpx.Headers(headers(key))  # whose repr hides the key
        self._mode = Mode.USAGE
        self._closed = asyncio.Event()
        self._in_flight: dict[int, int] = {}
        self._numbers = itertools.count()
        self._tls = httpx.create_ssl_context() if upstream.origin.startswith("https:") else False
        self._transport = self._new_transport()
        self._loop = asyncio.get_running_loop()
        self._idle: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<UpstreamConnection {self.address.replica_id!r} in_flight={self.in_flight}>"

    @classmethod
    async def connect(
        cls, upstream: Upstream, *, environ: Mapping[str, str] = os.environ, count: Count | None = None
    ) -> UpstreamConnection:
        """Ready to send; nothing is sent yet. ConfigError when the key's variable is not set."""
        key = read_key(upstream, environ)
        return cls(upstream, key, count or await counter(upstream.tokenizer))

    # ---------------------------------------------------------------------------------------------- what it knows

    @property
    def alive(self) -> bool:
        return not self._closed.is_set()

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def full(self) -> bool:
        """As many requests in flight as are allowed at a time: `generate` would refuse, which is no fault of theirs."""
        return len(self._in_flight) >= self.upstream.max_connections

    @property
    def open_connections(self) -> int:
        """Sockets to the upstream, idle ones included; idle ones go after `timeouts.keep_alive_s`."""
        return len(self._transport._pool.connections)

    def unadmitted(self) -> tuple[int, int]:
        """(requests, their estimated prompt tokens) in flight: an upstream reports no load, so all of them."""
        return len(self._in_flight), sum(self._in_flight.values())

    async def wait_closed(self) -> None:
        await self._closed.wait()

    # ----------------------------------------------------------------------------------------------- what it does

    async def generate(self, request: UpstreamRequest, *, settle: Settle | None = None) -> Chunks:
        """Yield chunks until the one with the usage. Raises the protocol's errors, after what came before was yielded.

        An error that arrives together with the first chunks replaces them, so that the gateway may still go elsewhere.
        `settle` is called exactly once, however this ends (if it was read from at all), with what the upstream is known
        to have used: nothing if it did not accept the request or failed before it began to answer, else the tokens up
        to that point.
        """
        answer = Answer(request, self._refusals)
        accepted = False
        try:
            with self._entered(request):
                patience = Patience(self._loop, self.upstream.timeouts, request.deadline)
                for again in (False, True):
                    accepted = False
                    response = await self._open(request, patience, again=again)
                    accepted = True
                    try:
                        async with aclosing(self._chunks(response, answer, patience, again=again)) as chunks:
                            async for ready in chunks:
                                yield ready
                        return
                    except _Wordless:
                        if again:
                            raise
                    finally:
                        await response.aclose()
        except Unavailable:
            accepted = accepted and answer.begun
            raise
        finally:
            if settle is not None:
                nothing = UpstreamUsage(prompt_tokens=0, completion_tokens=0)
                settle(answer.usage(self.count) if accepted else nothing)

    async def aclose(self) -> None:
        """Close every socket; streams still read raise UpstreamLost."""
        self._closed.set()
        if self._idle is not None:
            self._idle.cancel()
        await self._transport.aclose()
        await asyncio.gather(*self._closing, return_exceptions=True)

    # -------------------------------------------------------------------------------------------------- admission

    @contextmanager
    def _entered(self, request: UpstreamRequest) -> Iterator[None]:
        """In flight for as long; refused when that is not possible."""
        if not self.alive:
            raise UpstreamLost("the connection to the upstream was closed")
        if self.full:
            raise UpstreamBusy(f"the upstream of {self.upstream.name!r} has all the requests it is allowed at a time")
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        number = next(self._numbers)
        self._in_flight[number] = request.prompt_tokens
        try:
            yield
        finally:
            del self._in_flight[number]
            if not self._in_flight and self.alive:
                self._idle = self._loop.call_later(self.upstream.timeouts.keep_alive_s, self._let_go)

    def _let_go(self) -> None:
        """Nobody has asked for a while: close what is idle. httpx's pool by itself would wait for the next request."""
        self._idle = None
        if self.open_connections:
            task = self._loop.create_task(self._transport.aclose(), name="upstream-idle")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
            self._transport = self._new_transport()

    def _new_transport(self) -> httpx.AsyncHTTPTransport:
        most = self.upstream.max_connections
        limits = httpx.Limits(
            max_connections=most,
            max_keepalive_connections=most,
            keepalive_expiry=self.upstream.timeouts.keep_alive_s,
        )
        return httpx.AsyncHTTPTransport(verify=self._tls, trust_env=False, http2=False, limits=limits)

    # ---------------------------------------------------------------------------------------------------- sending

    async def _open(self, request: UpstreamRequest, patience: Patience, *, again: bool) -> httpx.Response:
        """The response, once its status is 200. Asks again, in a plainer way, where the server says that it must.

        again: an empty stream came before, so the answer is asked for in one piece: now the status tells what is wrong.
        """
        while True:
            mode = Mode.WHOLE if again else self._mode
            if mode is Mode.WHOLE and not again:
                patience.at_least(_WHOLE_S)
            response = await patience.wait(partial(self._send, request, mode))
            if response.status_code == 200:
                return response
            try:
                refusal = await patience.wait(partial(read, response, _MAX_ERROR_BYTES, cut=True))
            finally:
                await response.aclose()
            said = complaint(refusal) if response.status_code in (400, 422, 501) else Complaint()
            if (next_mode := plainer(mode, said, request.unary)) is None:
                raise self._refused(response, refusal)
            log.info("upstream %s takes no %s; asked without from now on", self.upstream.name, mode.name.lower())
            self._mode = next_mode

    def _refused(self, response: httpx.Response, body: bytes) -> SignalboxError:
        error = self._refusals.of_status(response.status_code, response.headers, body, time.time())
        if not isinstance(error, RequestError):
            code = short(complaint(body).code)
            log.warning("upstream %s answered %d %s", self.upstream.name, response.status_code, code)
        return error

    async def _send(self, request: UpstreamRequest, mode: Mode) -> httpx.Response:
        timeouts = self.upstream.timeouts
        path = "/chat/completions" if request.chat else "/completions"
        own = self._headers.copy()
        own.update(trace_headers(request))
        message = httpx.Request(
            "POST",
            self.upstream.base_url.rstrip("/") + path,
            headers=own,
            content=body(request, self.upstream.model, mode),
            # read and write are bounded by Patience, which knows what counts as progress
            extensions={"timeout": {"connect": timeouts.connect_s, "pool": timeouts.connect_s}},
        )
        with self._translated():
            for _ in range(_STALE_TRIES):
                fresh = message.extensions["trace"] = Fresh()
                try:
                    return await self._transport.handle_async_request(message)
                except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                    if fresh.connected:
                        raise
            return await self._transport.handle_async_request(message)

    # -------------------------------------------------------------------------------------------------- receiving

    async def _chunks(self, response: httpx.Response, answer: Answer, patience: Patience, *, again: bool) -> Chunks:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise UpstreamLost("the upstream compressed its answer although it was asked not to")
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            with self._translated():
                whole = await patience.wait(partial(read, response, self.upstream.max_answer_bytes))
            ready = answer.take_whole(utf8(whole))
            if not again:
                self._mode = Mode.WHOLE  # a server that was asked to stream and did this cannot
            yield [*ready, answer.terminal(self.count)]
        elif kind == "text/event-stream":
            async with (
                aclosing(self._pieces(response)) as pieces,
                aclosing(self._stream(pieces, answer, patience)) as chunks,
            ):
                async for ready in chunks:
                    yield ready
        else:
            raise UpstreamLost("the upstream answered 200 with something that is no stream of events")

    async def _stream(self, pieces: AsyncIterator[bytes], answer: Answer, patience: Patience) -> Chunks:
        reader = EventReader(self.upstream.max_event_bytes)
        started = False
        try:
            while not answer.done:
                piece, before = await self._next(pieces, answer, patience), answer.events
                ready, error = _take(reader, answer, piece)
                if error is not None and not started:
                    raise error
                if error is None and (answer.done or piece is None):
                    ready.append(self._end(answer))
                started = started or bool(ready)
                if started and answer.events > before:  # an empty delta is life too, once there was a token
                    patience.progress(_TAIL_S if answer.complete else None)
                if ready:
                    yield ready
                if error is not None:
                    raise error
                if piece is None:
                    return
        finally:
            if answer.done:
                await drain(pieces)

    async def _next(self, pieces: AsyncIterator[bytes], answer: Answer, patience: Patience) -> bytes | None:
        """The next bytes, None at the end; whatever breaks once all choices have ended is the end too."""
        try:
            return await patience.wait(lambda: following(pieces))
        except (UpstreamTimeout, UpstreamLost):
            if answer.complete:
                return None
            raise

    def _end(self, answer: Answer) -> UpstreamChunk:
        if not answer.events and not answer.done:
            raise _Wordless("the upstream's answer was empty")
        if not answer.complete:
            raise UpstreamLost("the upstream's answer was cut off")
        return answer.terminal(self.count)

    async def _pieces(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        left = self.upstream.max_answer_bytes
        with self._translated():
            async for piece in response.aiter_raw():
                left -= len(piece)
                if left < 0:
                    raise UpstreamLost("the upstream's answer is larger than allowed")
                yield piece

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """httpx's errors as ours, without its texts: they may hold addresses."""
        who = f"the upstream of {self.upstream.name!r}"
        try:
            yield
        except httpx.ConnectTimeout:
            raise UpstreamTimeout(f"{who} could not be reached in time", phase="connect") from None
        except httpx.PoolTimeout:
            raise UpstreamBusy(f"{who} has all the requests it is allowed at a time") from None
        except httpx.ConnectError as error:
            log.warning("upstream %s cannot be reached: %s", self.upstream.name, error)
            raise UpstreamLost(f"{who} cannot be reached") from None
        except httpx.LocalProtocolError as error:
            raise EngineFault(f"the request to {who} could not be written") from error
        except httpx.TransportError:
            raise UpstreamLost(f"{who} broke the connection") from None


# ------------------------------------------------------------------------------------------------------------- pieces


def _take(
    reader: EventReader, answer: Answer, piece: bytes | None
) -> tuple[list[UpstreamChunk], SignalboxError | None]:
    """Chunks of the events that `piece` completes, and the error that followed them."""
    ready: list[UpstreamChunk] = []
    try:
        for data in reader.end() if piece is None else reader.feed(piece):
            ready += answer.take(data)
            if answer.done:
                break
    except EventTooLarge as error:
        return ready, UpstreamLost(error.message)
    except UnicodeDecodeError:
        return ready, UpstreamLost("the upstream sent something that is not UTF-8")
    except SignalboxError as error:
        return ready, error
    return ready, None
