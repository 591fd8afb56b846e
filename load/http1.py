"""A small HTTP/1.1 client on asyncio's transports: pooled connections, and bodies handed over as they arrive.

Why not a library: `python -m load.ceiling` measures httpx, aiohttp and this on one core; a generator that is slower
than its server measures itself.
It does what talking to one server needs: content-length and chunked bodies, keep-alive, TLS. No redirects, cookies,
compression or proxies; HTTP semantics of RFC 9112.

    pool = Pool(origin)
    exchange = pool.send(head_and_body, receiver)     # receiver is told what happens, with the time of each reading
    exchange.cancel()
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast
from urllib.parse import urlsplit

from load.units import BadOption, LoadError

clock = time.monotonic
_MOST_HEAD = 65_536


class Unreachable(LoadError):
    """No connection could be made."""


@dataclass(frozen=True, slots=True)
class Origin:
    """scheme, host and port of a server; `path` is what stands before /v1, without a slash at its end."""

    scheme: str
    host: str
    port: int
    path: str = ""

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == {"http": 80, "https": 443}[self.scheme] else f"{host}:{self.port}"


def parse_url(url: str) -> Origin:
    """`http://host:port`, with or without /v1. Raises BadOption; a key does not belong in a URL."""
    if "://" not in url:
        url = f"http://{url}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BadOption(f"not a URL: {error}") from None
    if "@" in parts.netloc or parts.query:
        raise BadOption("a URL is no place for a key: it would show in process lists and logs; use --api-key-env")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadOption(f"{url!r} is not an http:// or https:// URL")
    path = parts.path.rstrip("/")
    return Origin(
        parts.scheme, parts.hostname, port or {"http": 80, "https": 443}[parts.scheme], path.removesuffix("/v1")
    )


def resolve(origin: Origin) -> str:
    """An address of the host, looked up once: the first at which somebody listens. Raises Unreachable.

    "localhost" is ::1 first on many machines, and many servers listen on 127.0.0.1 only.
    """
    try:
        found = socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unreachable(f"{origin.host} is not known: {error.strerror or error}") from None
    addresses = list(dict.fromkeys(str(one[4][0]) for one in found))
    for address in addresses if len(addresses) > 1 else ():
        try:
            socket.create_connection((address, origin.port), timeout=3).close()
            return address
        except OSError:
            continue
    return addresses[0]


def request_head(origin: Origin, method: str, path: str, headers: Mapping[str, str]) -> bytes:
    """The head without content-length and the empty line: see `with_body`."""
    lines = [f"{method} {origin.path}{path} HTTP/1.1", f"host: {origin.host_header}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if any("\r" in line or "\n" in line for line in lines):
        raise BadOption("a header must not hold a line break")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n"


def with_body(head: bytes, body: bytes) -> bytes:
    return b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body)


class Receiver(Protocol):
    """What one exchange is reported to; times are `clock()`. Exactly one of on_end and on_error comes last."""

    def on_sent(self, now: float) -> None: ...
    def on_head(self, status: int, headers: dict[bytes, bytes], now: float) -> None: ...
    def on_body(self, data: bytes, now: float) -> None: ...
    def on_end(self, now: float) -> None: ...
    def on_error(self, kind: str, detail: str, now: float) -> None:
        """kind: "unreachable", "cut" (the connection broke) or "garbage" (not HTTP)."""
        ...


class Pool:
    """Connections to one origin, as many as there are exchanges at once; idle ones are used again, newest first."""

    def __init__(self, origin: Origin, address: str, *, verify: bool = True) -> None:
        self.origin = origin
        self.address = address
        self.opened = 0
        self.repeated = 0
        self.idle: list[_Connection] = []
        self._open: set[_Connection] = set()
        self._pending: set[asyncio.Task[None]] = set()
        self._ssl = ssl.create_default_context() if origin.scheme == "https" else None
        if self._ssl is not None and not verify:
            self._ssl.check_hostname, self._ssl.verify_mode = False, ssl.CERT_NONE

    def send(self, request: bytes, receiver: Receiver) -> Exchange:
        exchange = Exchange(self, request, receiver)
        exchange.start()
        return exchange

    def connect(self, exchange: Exchange) -> None:
        task = asyncio.get_running_loop().create_task(self._connect(exchange))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)
        exchange.connecting = task

    async def _connect(self, exchange: Exchange) -> None:
        try:
            _, made = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self),
                self.address,
                self.origin.port,
                ssl=self._ssl,
                server_hostname=self.origin.host if self._ssl else None,
            )
        except OSError as error:
            exchange.fail("unreachable", _reason(error))
            return
        self.opened += 1
        self._open.add(made)
        made.carry(exchange, used=False)

    def lost(self, connection: _Connection) -> None:
        self._open.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)

    async def close(self) -> None:
        for task in list(self._pending):
            task.cancel()
        for connection in list(self._open):
            connection.close()
        await asyncio.sleep(0)  # let transports close their sockets


def _reason(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return error.strerror or str(error) or type(error).__name__


class Exchange:
    """One request and its answer."""

    def __init__(self, pool: Pool, request: bytes, receiver: Receiver) -> None:
        self._pool, self._request, self._receiver = pool, request, receiver
        self.connecting: asyncio.Task[None] | None = None
        self._connection: _Connection | None = None
        self.over = False
        self.answered = False  # a byte of the answer has been seen

    def start(self) -> None:
        while self._pool.idle:
            connection = self._pool.idle.pop()
            if connection.usable:
                connection.carry(self, used=True)
                return
        self._pool.connect(self)

    def carried(self, connection: _Connection) -> bytes:
        self._connection, self.connecting = connection, None
        self._receiver.on_sent(clock())
        return self._request

    def head(self, status: int, headers: dict[bytes, bytes], now: float) -> None:
        self._receiver.on_head(status, headers, now)

    def body(self, data: bytes, now: float) -> None:
        self._receiver.on_body(data, now)

    def end(self, now: float) -> None:
        self.over = True
        self._receiver.on_end(now)

    def broken(self, used: bool) -> None:
        """The connection is gone. A kept-alive one that its server closed meanwhile is the usual race: once more."""
        if used and not self.answered and not self.over:
            self._pool.repeated += 1
            self._pool.connect(self)
        else:
            self.fail("cut", "the connection broke in the middle of the answer")

    def fail(self, kind: str, detail: str) -> None:
        if not self.over:
            self.over = True
            self._receiver.on_error(kind, detail, clock())

    def cancel(self) -> None:
        """Hang up; the receiver hears nothing more."""
        if not self.over:
            self.over = True
            if self.connecting is not None:
                self.connecting.cancel()
            if self._connection is not None:
                self._connection.close()


class _Connection(asyncio.Protocol):
    """One TCP connection and the parser of its answers. States: head, length, chunked, until close."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._used = False
        self.closing = False
        self._reset()

    def _reset(self) -> None:
        self._buffer = b""
        self._state = "head"
        self._left = 0  # bytes of the body or chunk still to come
        self._keep = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    @property
    def usable(self) -> bool:
        return not (self.closing or self._transport is None or self._transport.is_closing())

    def carry(self, exchange: Exchange, *, used: bool) -> None:
        assert self._transport is not None, "carry() comes after connection_made()"
        if exchange.over:
            self._pool.idle.append(self)
            return
        self._exchange, self._used = exchange, used
        self._transport.write(exchange.carried(self))

    def close(self) -> None:
        self.closing = True
        self._exchange = None
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closing = True
        self._pool.lost(self)
        exchange, self._exchange = self._exchange, None
        if exchange is None or exchange.over:
            return
        if self._state == "until close" and exc is None:
            exchange.end(clock())
        else:
            exchange.broken(self._used)

    def data_received(self, data: bytes) -> None:
        now = clock()
        exchange = self._exchange
        if exchange is None or exchange.over:
            self.close()  # bytes nobody asked for
            return
        exchange.answered = True
        try:
            if self._state == "head":
                data = self._read_head(exchange, self._buffer + data, now)
                if self._state == "head":
                    return
            if self._state == "chunked":
                self._read_chunks(exchange, data, now)
            elif self._state == "until close":
                exchange.body(data, now)
            else:
                self._read_length(exchange, data, now)
        except ValueError as error:
            self.close()
            exchange.fail("garbage", f"not HTTP: {error}")

    def _read_head(self, exchange: Exchange, data: bytes, now: float) -> bytes:
        """Consume the head if it is whole; what follows it."""
        while True:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > _MOST_HEAD or (data and not data.startswith(b"HTTP/1."[: len(data)])):
                    raise ValueError(f"the answer begins with {data[:40]!r}")
                self._buffer = data
                return b""
            status, headers = _parse_head(data[:end])
            data = data[end + 4 :]
            if status >= 200:
                break
        self._buffer = b""
        self._keep = headers.get(b"connection", b"").lower() != b"close"
        if b"chunked" in headers.get(b"transfer-encoding", b"").lower():
            self._state = "chunked"
        elif b"content-length" in headers:
            self._state, self._left = "length", int(headers[b"content-length"])
        else:
            self._state = "length" if status in (204, 304) else "until close"
        exchange.head(status, headers, now)
        return data

    def _read_length(self, exchange: Exchange, data: bytes, now: float) -> None:
        if data:
            self._left -= len(data)
            exchange.body(data, now)
        if self._left < 0:
            raise ValueError("more bytes than content-length says")
        if self._left == 0 and not exchange.over:
            self._finish(exchange, now)

    def _read_chunks(self, exchange: Exchange, data: bytes, now: float) -> None:
        data = self._buffer + data
        at, parts = 0, []
        ended = False
        while True:
            line_end = data.find(b"\r\n", at)
            if line_end < 0:
                if len(data) - at > 1000:
                    raise ValueError("no chunk size")
                break
            size = _chunk_size(data[at:line_end])
            if size == 0:
                ended = data.startswith(b"\r\n", line_end + 2) or data.find(b"\r\n\r\n", line_end) >= 0
                break
            begin = line_end + 2
            if len(data) < begin + size + 2:
                break  # a chunk that is not whole yet waits: servers send an event a chunk
            parts.append(data[begin : begin + size])
            at = begin + size + 2
        self._buffer = data[at:]
        if parts:
            exchange.body(parts[0] if len(parts) == 1 else b"".join(parts), now)
        if ended and not exchange.over:
            self._finish(exchange, now)

    def _finish(self, exchange: Exchange, now: float) -> None:
        keep = self._keep and not self.closing
        self._exchange = None
        self._reset()
        if keep:
            self._pool.idle.append(self)
        else:
            self.close()
        exchange.end(now)


def _parse_head(head: bytes) -> tuple[int, dict[bytes, bytes]]:
    first, *lines = head.split(b"\r\n")
    parts = first.split(b" ", 2)
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
        raise ValueError(f"the answer begins with {first[:40]!r}")
    headers = {}
    for line in lines:
        name, _, value = line.partition(b":")
        headers[name.lower()] = value.strip()
    return int(parts[1]), headers


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    if not digits or digits.strip(b"0123456789abcdefABCDEF"):
        raise ValueError(f"chunk size {line[:20]!r}")
    return int(digits, 16)
