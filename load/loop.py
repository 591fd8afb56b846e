"""An event loop whose timers are good to some tens of microseconds, for client and null server.

asyncio's epoll selector rounds waiting times up to whole milliseconds, which would be the largest part of the send lag.
An epoll descriptor can itself be waited for with select(2), which takes microseconds.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import select
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

if hasattr(selectors, "EpollSelector"):

    class FineSelector(selectors.EpollSelector):
        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            if timeout is not None and timeout > 0:
                select.select((self.fileno(),), (), (), timeout)
                timeout = 0
            return super().select(timeout)

else:  # pragma: no cover - kqueue's timers are fine already
    FineSelector = selectors.DefaultSelector  # type: ignore[misc,assignment]


def new_loop() -> asyncio.AbstractEventLoop:
    return asyncio.SelectorEventLoop(FineSelector())


def run(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run on a fine loop, with as many descriptors as the system allows and no pauses for old garbage."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.collect()
    gc.freeze()
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(main)
