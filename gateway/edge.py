"""The outermost layer: one exchange per request, whatever answers it.

Pure ASGI. Gives every response its request id and processing time, turns every exception into OpenAI's error shape, and
counts what happened. Also what the endpoints use to read a body within bounds and to notice that a client hung up.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import logs
from gateway.errors import INTERNAL, error_body, error_headers, http_error
from gateway.explain import Record
from gateway.metrics import Metrics
from replicas.protocol import InvalidRequest, PayloadTooLarge, SignalboxError

if TYPE_CHECKING:
    from gateway.tracing import Trace

logger = logging.getLogger(__name__)

EXCHANGE = "signalbox.exchange"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_METHODS = frozenset(("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"))
_CLIENT_GONE = 499
_HUNG_UP = "ClientGone"


class ClientGone(Exception):
    """The client hung up; nobody is left to answer."""


@dataclass(slots=True)
class Exchange:
    """One request as the edge sees it. `started` is perf_counter's; status 0 means nothing was sent yet.

    `headers` go with whatever is answered. `route` is the pattern that matched, where the endpoint is not one of
    FastAPI's, which say so in the scope. `record` and `trace` are a generation's. `failure` names what went wrong.
    """

    request_id: bytes
    started: float
    sends_id: bool
    send: Send
    status: int = 0
    route: str = ""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    record: Record | None = None
    trace: Trace | None = None
    failure: str = ""

    async def send_stamped(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            elapsed_ms = (time.perf_counter() - self.started) * 1e3
            headers = [*message.get("headers", ()), *self.headers, (b"openai-processing-ms", b"%d" % round(elapsed_ms))]
            if self.sends_id:
                headers.append((b"x-request-id", self.request_id))
            message = {**message, "headers": headers}
        await self.send(message)


def header(scope: Scope, name: bytes) -> bytes:
    """The first header of that (lower case) name, b"" without one."""
    return next((value for key, value in scope["headers"] if key == name), b"")


def headers(scope: Scope, name: bytes) -> list[bytes]:
    """All headers of that (lower case) name."""
    return [value for key, value in scope["headers"] if key == name]


class Edge:
    """Wraps the whole application, inside nothing but Starlette's own last resort."""

    def __init__(self, app: ASGIApp, metrics: Metrics, server_sends_request_id: bool, logged: bool = False) -> None:
        self._app = app
        self._metrics = metrics
        self._logged = logged
        self._server_sends_request_id = server_sends_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = header(scope, b"x-request-id")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}".encode()
        exchange = Exchange(request_id, time.perf_counter(), not self._server_sends_request_id, send)
        scope[EXCHANGE] = exchange
        token = logs.current.set(exchange) if self._logged else None
        try:
            await self._app(scope, receive, exchange.send_stamped)
        except ClientGone:
            exchange.status, exchange.failure = _CLIENT_GONE, _HUNG_UP
        except asyncio.CancelledError:
            exchange.status, exchange.failure = _CLIENT_GONE, _HUNG_UP
            raise
        except SignalboxError as error:
            exchange.failure = type(error).__name__
            await self._refuse(exchange, error)
        except Exception as error:
            exchange.failure = type(error).__name__
            logger.error("request %s failed", exchange.request_id.decode(), exc_info=logs.redacted(error))
            await self._refuse(exchange, INTERNAL)
        finally:
            self._ended(scope, exchange)
            if exchange.record is not None:
                exchange.record.release()
            if token is not None:
                logs.current.reset(token)

    async def _refuse(self, exchange: Exchange, error: SignalboxError) -> None:
        if exchange.status:  # too late for a status line; not completing the body is how the server learns to cut
            return
        body = error_body(error)
        await exchange.send_stamped(
            {
                "type": "http.response.start",
                "status": http_error(error).status,
                "headers": [*error_headers(error), (b"content-length", b"%d" % len(body))],
            }
        )
        await exchange.send({"type": "http.response.body", "body": body})

    def _ended(self, scope: Scope, exchange: Exchange) -> None:
        # the route's pattern, not the path: a caller must not be able to invent labels
        route = exchange.route or getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        seconds = time.perf_counter() - exchange.started
        self._metrics.answered(route, method, exchange.status, seconds)
        if exchange.trace is not None:
            exchange.trace.end(exchange, method)
        if self._logged:
            logs.answered(exchange, method=method, route=route, seconds=seconds)


async def read_body(scope: Scope, receive: Receive, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body. PayloadTooLarge as soon as it is known to be, without reading the rest; ClientGone."""
    length = header(scope, b"content-length")
    if length.isdigit() and len(length) < 20 and int(length) > max_bytes:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            return await _read_parts(receive, max_bytes)
    except TimeoutError:
        raise InvalidRequest(f"the request body did not arrive within {timeout_s:g} s") from None


async def _read_parts(receive: Receive, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGone
        part = message.get("body", b"")
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body"):
            return b"".join(parts)


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the request body is larger than {max_bytes} bytes")


def trace_headers(scope: Scope) -> tuple[str | None, str | None]:
    """The caller's traceparent and tracestate, as they came."""
    parent = header(scope, b"traceparent").decode("latin-1")
    return parent or None, header(scope, b"tracestate").decode("latin-1") or None


class HangUp:
    """`async with HangUp(receive):` cancels its block when the client disconnects and raises ClientGone instead.

    Enter only after the body was read. A server that cancels the handler itself may do so beside it.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._gone = False
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> HangUp:
        task = asyncio.current_task()
        assert task is not None, "endpoints run in tasks"
        self._watcher = asyncio.create_task(self._watch(task), name="hang-up")
        return self

    async def _watch(self, task: asyncio.Task[Any]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        task.cancel()

    def ignore(self) -> None:
        """Call before the last send: a server may report the end of the exchange as a disconnect."""
        if self._watcher is not None:
            self._watcher.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ignore()
        if self._gone:
            task = asyncio.current_task()
            assert task is not None, "endpoints run in tasks"
            if task.uncancel() == 0 and isinstance(error, asyncio.CancelledError):
                raise ClientGone from None
