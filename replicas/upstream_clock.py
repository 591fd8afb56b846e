"""How long to wait for an upstream: by progress, not by bytes, and never past the caller's deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from replicas.protocol import DeadlineExceeded
from replicas.upstream_config import UpstreamTimeouts
from replicas.upstream_errors import UpstreamTimeout

T = TypeVar("T")


class Patience:
    """One request's. Only time spent waiting counts: a slow reader on our side is no fault of the upstream."""

    def __init__(self, loop: asyncio.AbstractEventLoop, timeouts: UpstreamTimeouts, deadline: float | None) -> None:
        self._loop = loop
        self._timeouts = timeouts
        self._deadline = deadline
        self._phase = "first_token"
        self._left = timeouts.first_token_s

    def progress(self, at_most_s: float | None = None) -> None:
        """Something came that shows; from here on only gaps count."""
        self._phase = "gap"
        gap = self._timeouts.gap_s
        self._left = gap if at_most_s is None else min(gap, at_most_s)

    def at_least(self, seconds: float) -> None:
        """Wait that long for what comes next, if it would have been shorter."""
        self._left = max(self._left, seconds)

    async def wait(self, step: Callable[[], Awaitable[T]]) -> T:
        """`step`'s result. UpstreamTimeout or DeadlineExceeded when it takes longer than is left; it is cancelled."""
        begin = self._loop.time()
        until = begin + self._left
        if self._deadline is not None:
            until = min(until, self._deadline)
        if begin >= until:
            raise self._late()
        try:
            # also when nothing has to be waited for: data that is always there must not outrun the clock
            async with asyncio.timeout_at(until):
                return await step()
        except TimeoutError:
            raise self._late() from None
        finally:
            self._left -= self._loop.time() - begin

    def _late(self) -> DeadlineExceeded | UpstreamTimeout:
        if self._deadline is not None and self._loop.time() >= self._deadline:
            return DeadlineExceeded("the request's deadline has passed")
        first = self._phase == "first_token"
        what = "did not begin to answer in time" if first else "stopped in the middle of its answer"
        return UpstreamTimeout(f"the upstream {what}", phase=self._phase)
