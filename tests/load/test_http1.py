"""The HTTP client, against a server that writes what it is told, byte by byte if need be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from load.http1 import Pool, parse_url, request_head, resolve, with_body


class Heard:
    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.sent = 0
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def on_sent(self, now: float) -> None:
        self.sent += 1

    def on_head(self, status: int, headers: dict[bytes, bytes], now: float) -> None:
        self.status, self.headers = status, headers

    def on_body(self, data: bytes, now: float) -> None:
        self.body += data

    def on_end(self, now: float) -> None:
        self.ended.set_result("end")

    def on_error(self, kind: str, detail: str, now: float) -> None:
        self.ended.set_result(kind)


@asynccontextmanager
async def pool_to(*answers: bytes, piece: int = 100_000, close: bool = False) -> AsyncIterator[Pool]:
    """A pool to a server that gives these answers in turn, in pieces; it closes after each, or when it has no more."""
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while left:
                await reader.readuntil(b"\r\n\r\n")
                answer = left.pop(0)
                for at in range(0, len(answer), piece):
                    writer.write(answer[at : at + piece])
                    await writer.drain()
                    await asyncio.sleep(0)
                if close:
                    break
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    origin = parse_url(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    pool = Pool(origin, resolve(origin))
    try:
        yield pool
    finally:
        await pool.close()
        server.close()
        await server.wait_closed()


async def ask(pool: Pool) -> Heard:
    heard = Heard()
    pool.send(with_body(request_head(pool.origin, "POST", "/v1/x", {}), b""), heard)
    await asyncio.wait_for(heard.ended, 10)
    return heard


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-A: b\r\n\r\n5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\n"
SIZED = b"HTTP/1.1 503 Busy\r\nContent-Length: 3\r\n\r\nno!"


@pytest.mark.parametrize("piece", [1, 2, 7, 100_000])
async def test_bodies_arrive_whole_however_they_are_torn(piece: int) -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\n"
    async with pool_to(interim + CHUNKED, SIZED, CHUNKED, piece=piece) as pool:
        first, second, third = [await ask(pool) for _ in range(3)]
        assert (first.status, first.body, first.headers[b"x-a"]) == (200, b"hello world", b"b")
        assert (second.status, second.body, second.ended.result()) == (503, b"no!", "end")
        assert third.body == b"hello world"
        assert pool.opened == 1


async def test_a_body_without_length_ends_with_the_connection() -> None:
    async with pool_to(b"HTTP/1.1 200 OK\r\n\r\nall of it", close=True) as pool:
        heard = await ask(pool)
        assert (heard.body, heard.ended.result()) == (b"all of it", "end")


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhal", "cut"),
        (CHUNKED[:-5], "cut"),
        (b"HTTP/1.1 200", "cut"),
        (b"SSH-2.0-x\r\n", "garbage"),
        (b"HTTP/1.1 abc OK\r\n\r\n", "garbage"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "garbage"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: ten\r\n\r\n", "garbage"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nmore", "garbage"),
    ],
)
async def test_answers_that_end_too_soon_or_are_none_are_told_apart(answer: bytes, kind: str) -> None:
    async with pool_to(answer, close=True) as pool:
        assert (await ask(pool)).ended.result() == kind


async def test_a_kept_connection_that_its_server_closed_is_replaced_once() -> None:
    async with pool_to(SIZED, CHUNKED, close=True) as pool:
        assert (await ask(pool)).status == 503
        heard = await ask(pool)
        assert (heard.status, heard.body) == (200, b"hello world")
        assert pool.opened == 2


async def test_nobody_listening_is_unreachable() -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    origin = parse_url(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    server.close()
    await server.wait_closed()
    pool = Pool(origin, resolve(origin))
    heard = await ask(pool)
    assert heard.ended.result() == "unreachable"
    await pool.close()


async def test_a_cancelled_exchange_says_nothing_more_and_hangs_up() -> None:
    async with pool_to(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhal", SIZED) as pool:
        heard = Heard()
        exchange = pool.send(with_body(request_head(pool.origin, "POST", "/", {}), b""), heard)
        while not heard.body:
            await asyncio.sleep(0.001)
        exchange.cancel()
        await asyncio.sleep(0.02)
        assert not heard.ended.done()
        assert not pool.idle
