"""The caller's time limit: `x-request-timeout-ms`, the document's own limits, and what is done when the time is over.

Instants are the event loop's (`loop.time()`). The engine and the upstream are told how much is left and end the request
themselves; the gateway's own clock only stands behind them, for whatever else can take time: a replica that is waited
for, the ledger, a server that has stopped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from policies.admission import time_limit_s
from policies.document_limits import Admission
from replicas.protocol import DeadlineExceeded, InvalidRequest

HEADER = "x-request-timeout-ms"
HEADER_NAME = HEADER.encode()
LONGEST_MS = 7 * 86_400_000
# What the one who answers has after the deadline to say so himself: his error tells what had been done.
_GRACE_S = 0.05

T = TypeVar("T")


def deadline(given: Sequence[bytes], admission: Admission | None, started: float) -> float | None:
    """When a request that came at `started` (perf_counter) must be answered; None: it may take its time.

    given: the values of all headers of that name; an empty one is none. InvalidRequest names the header.
    """
    given = [value for value in given if value]
    if not given and admission is None:
        return None
    if len(given) > 1:
        raise InvalidRequest(f"{HEADER} was sent {len(given)} times", param=HEADER)
    limit_s = time_limit_s(admission, _milliseconds(given[0]) / 1e3 if given else None)
    if limit_s is None:
        return None
    return asyncio.get_running_loop().time() + limit_s - (time.perf_counter() - started)


def _milliseconds(given: bytes) -> int:
    text = given.decode("latin-1").strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= 12 and 0 < int(text) <= LONGEST_MS):
        raise InvalidRequest(
            f"{HEADER} must be a whole number of milliseconds from 1 to {LONGEST_MS}, got {text[:32]!r}", param=HEADER
        )
    return int(text)


def left_s(until: float) -> float:
    """Seconds until then; DeadlineExceeded when there are none."""
    left = until - asyncio.get_running_loop().time()
    if left <= 0:
        raise too_late()
    return left


def too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the request was not answered within its time limit")


@asynccontextmanager
async def _within(until: float) -> AsyncGenerator[None, None]:
    left_s(until)
    try:
        async with asyncio.timeout_at(until + _GRACE_S):
            yield
    except TimeoutError:
        raise too_late() from None


async def on_time(work: Coroutine[Any, Any, T], until: float) -> T:
    """The work's result; DeadlineExceeded, and the work is cancelled, when it takes longer."""
    try:
        async with _within(until):
            return await work
    finally:
        work.close()  # where it was not even begun


class OnTime(AsyncIterator[T]):
    """A stream each of whose items must come before the deadline."""

    def __init__(self, stream: AsyncGenerator[T, None], until: float) -> None:
        self._stream = stream
        self._until = until

    async def __anext__(self) -> T:
        async with _within(self._until):
            return await anext(self._stream)

    async def aclose(self) -> None:
        await self._stream.aclose()
