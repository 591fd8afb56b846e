"""Reading responses of httpx: bounded bodies, the end of a stream, and whether a connection was made or used again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx

from replicas.protocol import SignalboxError
from replicas.upstream_errors import UpstreamLost

# The end of a body, without which its connection cannot be used again, mostly comes with what was before it.
_DRAIN_S = 0.05


class Fresh:
    """Whether a request went out on a connection of its own making: httpcore's trace says so."""

    connected = False

    async def __call__(self, name: str, _: object) -> None:
        self.connected = self.connected or name == "connection.connect_tcp.started"


def utf8(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError:
        raise UpstreamLost("the upstream sent something that is not UTF-8") from None


async def read(response: httpx.Response, most: int, *, cut: bool = False) -> bytes:
    """The body, at most `most` bytes of it; what is longer is cut or an error."""
    body = bytearray()
    try:
        async for piece in response.aiter_raw():
            body += piece
            if len(body) > most:
                if cut:
                    break
                raise UpstreamLost("the upstream's answer is larger than allowed")
    except httpx.TransportError:
        if not cut:
            raise
    return bytes(body[:most])


async def following(pieces: AsyncIterator[bytes]) -> bytes | None:
    return await anext(pieces, None)


async def drain(pieces: AsyncIterator[bytes]) -> None:
    """Read the end of the body, so that the connection can be used again; given up at once if there is more."""
    try:
        async with asyncio.timeout(_DRAIN_S):
            await anext(pieces, None)
    except (TimeoutError, SignalboxError):
        pass
